"""One line for a mistake: what was wrong, where, and the likeliest correction.

jsonargparse reports a misspelt key as a tree of every type that it tried. The leaf of that tree says what is wrong; the
nodes on the way to it say where. `explain` puts the two together.
"""

import argparse
import difflib
import errno
import importlib
import inspect
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from medinr.errors import UserError

BASES = {
    "model": ("medinr.methods", "Method"),
    "method": ("medinr.methods", "RegistrationMethod"),
    "data": ("lightning.pytorch", "LightningDataModule"),
    "field": ("medinr.fields", "Field"),
    "similarity": ("medinr.losses", "Similarity"),
    "regularizers": ("medinr.losses", "Regularizer"),
}
"""Keys whose value is a class, and the base that the class must have."""

NOISE = re.compile(r"(- )?(Expected a <class 'NoneType'>|Does not validate against any|Subtypes:|Errors:$)")
PYTHON_ONLY = ("progress", "keep_interrupted")
"""Arguments of `register` that the command sets itself."""
CANNOT_WRITE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
"""What a disk says that is full, or that may only be read."""
POSITIONAL = ("fixed", "moving", "checkpoint", "layout", "root")
"""Arguments that are given without a name."""
AFTER = ("Given value type:", "Given value:")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"``, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(text: str) -> str:
    return " ".join(text.split())


def explain(error: BaseException, command: str = "", args: Sequence[str] = ()) -> str | None:
    """The line for an error that is the user's, or None for one that is the program's."""
    if isinstance(error, UserError):
        return one_line(str(error))
    if isinstance(error, argparse.ArgumentError):
        return one_line(_argument_error(error.message or str(error), command, args))
    if isinstance(error, UnicodeDecodeError) and (files := _configurations(args)):
        return f"--config: expected YAML text, found binary data in {', '.join(files)}; give the path of a YAML file"
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}cannot be written ({error.strerror}); free some space, or choose a folder that is writable"
    return None


def _configurations(args: Sequence[str]) -> list[str]:
    return [b for a, b in itertools.pairwise(args) if a in ("-c", "--config")]


def _argument_error(text: str, command: str, args: Sequence[str]) -> str:
    if found := re.match(r"Subcommand '\w+' does not accept option '([^']+)'", text):
        key = found[1]
        return f"{key}: no such key{did_you_mean(key, _keys(command))}"
    if found := re.match(r"[Uu]nrecognized arguments: (\S+)", text):
        return _unknown(found[1].split("=")[0], command, args)
    if found := re.match(r"the following arguments are required: (.+)", text):
        names = found[1].replace(f"{command}.", "")
        hint = (
            "give --config FILE.yaml" if set(names.split(", ")) <= {"model", "data"} else f"see medinr {command} --help"
        )
        return f"{names}: missing; {hint}"
    if found := re.match(r"Parser key \"config\": File does not exist: '([^']+)'", text):
        return f"--config: no file {found[1]}; give the path of a YAML file"
    if text.startswith("Problems parsing config"):
        where = ", ".join(_configurations(args)) or "--config"
        reason = text.split(":", 1)[1].replace('in "<unicode string>",', "at")
        return f"{where}: not valid YAML: {reason}"
    return _tree(text)


def _unknown(word: str, command: str, args: Sequence[str]) -> str:
    """An option that is not there, or a word without one."""
    see = f"see medinr {command} --help"
    if not word.startswith("-"):
        if word.lower().endswith((".yaml", ".yml")):
            return f"{word}: one argument too many; did you mean --config {word}?"
        if command in ("register", "apply", "phantom") and "--out" not in args:
            return f"{word}: one argument too many; did you mean --out {word}?"
        return f"{word}: one argument too many, no option takes it; {see}"
    keys = _keys(command)
    given = [key for key in keys if key in POSITIONAL]
    if word.lstrip("-") in given:
        return f"{word}: no such option: medinr {command} {' '.join(given).upper()} ..., without {word}; {see}"
    known = [f"--{key}" for key in keys if key not in given]
    if len(word) == 2 and len(starting := [k for k in known if k.startswith(f"-{word}")]) == 1:
        return f"{word}: no such option; did you mean {starting[0]}?"
    return f"{word}: no such option{did_you_mean(word, known)}; {see}"


def _tree(text: str) -> str:
    """The leaf of jsonargparse's tree of attempts, with the key that leads to it."""
    keys: list[str] = []
    owner = ""
    for raw in text.splitlines():
        line = raw.strip()
        if not line or NOISE.match(line):
            continue
        if line.startswith(AFTER):
            break
        line = line.removeprefix("- ")
        if found := re.match(r'Parser key "([^"]+)":\s*(.*)', line):
            keys.append(found[1])
            line = found[2]
        if found := re.match(r"Problem with given class_path '([^']+)':\s*(.*)", line):
            owner = found[1]
            line = found[2]
        if line:
            return _leaf(line, keys, owner, text)
    return text


def _leaf(line: str, keys: list[str], owner: str, text: str) -> str:
    where = ".".join(keys)
    if found := re.match(r"Option '([^']+)' is not accepted", line):
        name = found[1].split(".")[0]
        near = did_you_mean(name, _arguments(owner))
        return f"{where}.{name}: {owner.rpartition('.')[2]} has no such argument{near}"
    if found := re.match(r"Expected a dot import path string: (\S+)", line):
        return f"{where}: no class named {found[1]}{did_you_mean(found[1], _classes(keys))}"
    if keys and keys[-1] in BASES and (found := re.match(r"Expected a path but (\S+) either not accessible", line)):
        return f"{where}: no class named {found[1]}{did_you_mean(found[1], _classes(keys))}"
    if found := re.match(r"the following arguments are required: (.+)", line):
        return f"{where}: {owner.rpartition('.')[2]} needs {found[1]}"
    if found := re.match(r"Expected a (?:<class '([^']+)'>|(\S+))\. Got value: (.*)", line):
        return f"{where}: expected {found[1] or found[2]}, got {found[3]}"
    return f"{where}: {line}" if where else line


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        # Of a class that has a `__new__`, older Pythons (3.11.2) give the signature of that.
        made_by = found.__init__ if isinstance(found, type) else found  # type: ignore[misc]
        return [name for name in inspect.signature(made_by).parameters if name != "self"]
    except (ImportError, AttributeError, ValueError):
        return []


def _subclasses(cls: type) -> list[type]:
    found: list[type] = cls.__subclasses__()
    return found + [c for sub in found for c in _subclasses(sub)]


def _classes(keys: Sequence[str]) -> list[str]:
    """Names of the classes that may stand at a key; of every part where the key is not known."""
    bases = [BASES[keys[-1]]] if keys and keys[-1] in BASES else list(BASES.values())
    found: list[Any] = []
    for module, name in bases:
        found += _subclasses(getattr(importlib.import_module(module), name))
    return [c.__name__ for c in found if not c.__name__.startswith("_")]


def _keys(command: str) -> list[str]:
    if command in ("register", "apply"):  # their options are the arguments of the function of the same name
        function = getattr(importlib.import_module(f"medinr.commands.{command}"), command)
        names = [name for name in inspect.signature(function).parameters if name not in PYTHON_ONLY]
        return [name.replace("_", "-") for name in names]
    if command not in ("fit", "validate", "test", "predict"):
        return []
    from medinr.commands.experiment import OWN_KEYS, keys_of

    return [*OWN_KEYS, *keys_of(command)]
