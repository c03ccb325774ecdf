"""Objects that remember how they were built, so that a checkpoint can rebuild them from plain values.

A field, a similarity or a whole method is written into a checkpoint as ``{"class_path": ..., "init_args": {...}}``, the
same nested form that the YAML files use, and `build` makes it again. Only numbers, strings, lists and dicts are
stored, so the checkpoint loads with ``weights_only=True``.
"""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from medinr.errors import UserError


class Configured:
    """Base class that keeps the arguments of the constructor (no metaclass, no change to ``__init__``)."""

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        instance = super().__new__(cls)
        object.__setattr__(instance, "_arguments", (args, kwargs))
        return instance


def spec(part: Configured) -> dict[str, Any]:
    """``{"class_path", "init_args"}`` of an object, nested objects included; plain values only.

    Raises:
        TypeError: an argument is neither plain nor `Configured`.
    """
    args, kwargs = part._arguments
    # Of the class itself, older Pythons (3.11.2) give the signature of `__new__`.
    bound = inspect.signature(type(part).__init__).bind(part, *args, **kwargs)
    given = list(bound.arguments.items())[1:]
    where = f"{type(part).__module__}.{type(part).__qualname__}"
    return {"class_path": where, "init_args": {k: _plain(v, f"{where}.{k}") for k, v in given}}


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Configured):
        return spec(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(v, where) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    raise TypeError(f"{where}: expected a plain value or an object derived from Configured, got {type(value).__name__}")


def build(value: Any) -> Any:
    """The inverse of `spec`: build the object (and those inside it) again.

    Raises:
        UserError: a class that cannot be imported, or that is not a `Configured` one.
    """
    if isinstance(value, Mapping):
        if set(value) == {"class_path", "init_args"}:
            module, _, name = str(value["class_path"]).rpartition(".")
            try:
                cls = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise UserError(
                    f"checkpoint: its class {value['class_path']} cannot be imported ({error}); "
                    "install the package that defines it"
                ) from None
            if not (isinstance(cls, type) and issubclass(cls, Configured)):
                raise UserError(f"checkpoint: {value['class_path']} is not a class that medinr builds")
            return cls(**{k: build(v) for k, v in value["init_args"].items()})
        return {k: build(v) for k, v in value.items()}
    if isinstance(value, list):
        return [build(v) for v in value]
    return value
