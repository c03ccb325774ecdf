"""medinr: implicit neural representations of medical images and of the deformations between them."""

import importlib
from typing import Any

__all__ = ["Result", "adapt", "apply", "atlas", "cohort", "evaluate", "register", "sequence"]

_LAZY = {
    "register": "medinr.commands.register",
    "Result": "medinr.commands.register",
    "apply": "medinr.commands.apply",
    "evaluate": "medinr.commands.evaluate",
    "cohort": "medinr.commands.cohort",
    "sequence": "medinr.commands.sequence",
    "atlas": "medinr.commands.atlas",
    "adapt": "medinr.commands.adapt",
}


def __getattr__(name: str) -> Any:
    """The functions and `Result` on first use: importing medinr does not wait for PyTorch."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'medinr' has no attribute {name!r}")
