"""What a cohort consists of: one fit for each case, seed and setting, with the arguments of its commands."""

import hashlib
import itertools
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medinr.callbacks.runs import load_yaml
from medinr.cohorts import claims
from medinr.cohorts.state import JOB, STATE, is_done, read_json, run_of, write_json
from medinr.errors import UserError

PLAN, CONFIGS, FITS, BATCHES = "cohort.json", "configs", "fits", "batches"
BATCH_COMMAND = ("-m", "medinr.commands.batch")
CASE = "{case}"
"""Stands for the case in an override, for data whose cases are files or folders."""
OWN = {"seed_everything": "--seeds", "runs": "--out", "out": "--out", "ckpt_path": "nothing", "config": "--config"}
"""Keys that differ between fits by themselves, and what stands for them."""


@dataclass(frozen=True)
class Fit:
    """One fit.

    Attributes:
        name: of its folder.
        case: as given, None for an experiment without cases.
        seed: of every random number.
        settings: dotted keys and values of ``--set``.
        arguments: of `medinr fit` and `medinr test`.
    """

    name: str
    case: str | None
    seed: int
    settings: Mapping[str, str]
    arguments: tuple[str, ...]

    @property
    def setting(self) -> str:
        """The settings in one word, "" without any."""
        return ", ".join(f"{short(key)}={value}" for key, value in self.settings.items())


def _numbers(piece: str, option: str, text: str) -> list[str] | None:
    """A range such as 1-10 as its numbers (001-010 keeps its zeros), None for anything else."""
    if not (found := re.fullmatch(r"(\d+)-(\d+)", piece)):
        return None
    first, last = found.groups()
    if int(last) < int(first):
        raise UserError(f"{option}: expected ranges from small to large such as 1-10, got {text}")
    width = len(first) if first.startswith("0") else 0
    return [str(n).zfill(width) for n in range(int(first), int(last) + 1)]


def case_values(text: str) -> list[str]:
    """``"1-3,5"`` -> 1, 2, 3, 5; anything else is a name: ``"sub-01,sub-02"``, ``"data/a,data/b"``.

    Raises:
        UserError: an empty piece, a range that runs backwards, a case given twice.
    """
    found: list[str] = []
    for piece in (p.strip() for p in text.split(",")):
        if not piece or re.fullmatch(r"\d+-|-\d+", piece):
            raise UserError(f"--cases: expected numbers, ranges and names such as 1-10 or 1,3,5-7, got {text!r}")
        found += _numbers(piece, "--cases", text) or [piece]
    if twice := next((c for c in found if found.count(c) > 1), None):
        raise UserError(f"--cases: expected each case once, got {twice} twice in {text}")
    return found


def seed_values(text: str) -> list[int]:
    """``"3"`` is how many: 0, 1, 2; ``"5,7"`` and ``"5-7"`` are the seeds themselves.

    Raises:
        UserError: anything else.
    """
    if text.isdigit():
        if int(text) < 1:
            raise UserError("--seeds: expected 1 or more, got 0")
        return list(range(int(text)))
    pieces = [p.strip() for p in text.split(",")]
    found = [n for piece in pieces for n in (_numbers(piece, "--seeds", text) or [piece])]
    if not all(n.isdigit() for n in found) or len(set(found)) < len(found):
        raise UserError(f"--seeds: expected how many, such as 3, or different ones, such as 0,5 or 0-4, got {text}")
    return [int(n) for n in found]


def split_values(text: str) -> list[str]:
    """The values between commas, except those inside brackets and quotes: ``"[64,64],[128]"`` are two."""
    found, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        depth += (char in "[{(") - (char in "]})") if not quote else 0
        if char == "," and depth == 0 and not quote:
            found.append("")
        else:
            found[-1] += char
    return [value.strip() for value in found]


def setting_axes(given: Sequence[str]) -> dict[str, list[str]]:
    """``["model.points=100,200"]`` -> {"model.points": ["100", "200"]}.

    Raises:
        UserError: no key, no value, a value or a key given twice, a key that the cohort sets itself.
    """
    axes: dict[str, list[str]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        key = key.strip().removeprefix("--")
        found = split_values(values)
        if not equals or not key or not all(found) or len(set(found)) < len(found):
            raise UserError(f"--set: expected KEY=VALUE,VALUE,... with different values, got {text}")
        if key in axes:
            raise UserError(f"--set: expected each key once, got {key} twice; put its values behind one another")
        if key in OWN:
            raise UserError(f"--set {key}: a cohort sets it itself; use {OWN[key]}")
        axes[key] = found
    return axes


def short(key: str) -> str:
    """The last part of a dotted key that says something."""
    return key.replace(".init_args", "").replace(".class_path", "").rpartition(".")[2]


def _word(text: str) -> str:
    """Text as a part of a folder's name; unlike texts stay unlike."""
    word = re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")
    if len(word) <= 40 and word == text:
        return word
    return f"{word[-30:].strip('-.')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _name(case: str | None, seed: int, settings: Mapping[str, str]) -> str:
    words = [] if case is None else [f"case{case}" if case.isdigit() else _word(case)]
    words.append(f"seed{seed}")
    # Two keys with the same last part are told apart by all of their parts.
    lasts = [short(key) for key in settings]
    words += [f"{k if lasts.count(short(k)) > 1 else short(k)}-{_word(v)}" for k, v in settings.items()]
    return "_".join(words)


def plan(
    configs: Sequence[Path],
    overrides: Sequence[str],
    cases: Sequence[str | None],
    seeds: Sequence[int],
    axes: Mapping[str, Sequence[str]],
) -> list[Fit]:
    """One fit for each case, setting and seed, seeds last.

    Args:
        configs: YAML files, as given to ``--config``.
        overrides: ``--key=value`` of all fits. `CASE` in one stands for the case, which is else ``--data.case``.
        cases: ``[None]`` for an experiment without cases.
        seeds, axes: see `seed_values` and `setting_axes`.

    Raises:
        UserError: ``--set data.case``, where there are cases; `CASE` where there are none.
    """
    if "data.case" in axes and cases != [None]:
        raise UserError("--set data.case: a cohort sets it itself; use --cases")
    if any(CASE in text for text in overrides) and cases == [None]:
        raise UserError(f"{CASE}: expected --cases, found none; name the cases")
    fits = []
    for case, values in itertools.product(cases, itertools.product(*axes.values())):
        settings = dict(zip(axes, values, strict=True))
        named = [*overrides, *(f"--{key}={value}" for key, value in settings.items())]
        if case is not None and not any(CASE in text for text in named):
            named.append(f"--data.case={case}")
        named = [text.replace(CASE, str(case)) for text in named]
        files = [word for config in configs for word in ("--config", str(config))]
        for seed in seeds:
            arguments = (*files, *named, f"--seed_everything={seed}", "--trainer.enable_progress_bar=false")
            fits.append(Fit(_name(case, seed, settings), case, seed, settings, arguments))
    names = [fit.name for fit in fits]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--cases: expected names that stay unlike as folders, got two that become {twice}")
    return fits


# -- on the disk -----------------------------------------------------------------------------------------------------


def digest(configs: Sequence[Path], overrides: Sequence[str]) -> str:
    """A name for what all fits of a cohort share: the values in the YAML files (not their comments) and overrides."""
    try:
        values = [load_yaml(Path(c).read_text(encoding="utf-8")) for c in configs]
    except Exception:  # of the YAML library that is there
        raise UserError(f"--config: not valid YAML: {', '.join(map(str, configs))}; correct it") from None
    return hashlib.sha256(json.dumps([values, list(overrides)], default=str).encode()).hexdigest()


def copies(out: Path, configs: Sequence[Path]) -> list[Path]:
    """Where the copies of the YAML files are; each keeps its name, which is the experiment's."""
    return [out.absolute() / CONFIGS / str(i) / config.name for i, config in enumerate(configs)]


def check_same(out: Path, configs: Sequence[Path], overrides: Sequence[str]) -> None:
    """``out`` is new, or holds a cohort of the same configuration.

    Raises:
        UserError: it holds another one; a YAML file is missing.
    """
    for config in configs:
        if not Path(config).is_file():
            raise UserError(f"--config: no file {config}; give the path of a YAML file")
    found = read_json(out / PLAN)
    if found and found.get("digest") != digest(configs, overrides):
        told = " ".join([*(found.get("configs") or []), *(found.get("overrides") or [])])
        raise UserError(
            f"{out}: expected fits of this configuration, found those of another ({told}, or the file has changed "
            "since); choose another --out"
        )


def write_plan(
    out: Path, configs: Sequence[Path], overrides: Sequence[str], fits: Sequence[Fit], command: Sequence[str] = ()
) -> None:
    """Write cohort.json, the copies of the YAML files, and job.json of each fit; what is there stays as it is.

    Args:
        command: what runs instead of ``python -m medinr.cli``.
    """
    for copy, config in zip(copies(out, configs), configs, strict=True):
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(config, copy.with_suffix(".part"))
            copy.with_suffix(".part").replace(copy)
    content = {"digest": digest(configs, overrides), "configs": [str(c) for c in configs], "overrides": list(overrides)}
    if read_json(out / PLAN) != content:
        write_json(out / PLAN, content)
    for fit in fits:
        job: dict[str, Any] = {
            "case": fit.case,
            "seed": fit.seed,
            "settings": dict(fit.settings),
            "command": list(command) or [sys.executable, "-m", "medinr.cli"],
            "arguments": list(fit.arguments),
            "cwd": str(Path.cwd()),
        }
        if read_json(folder_of(out, fit) / JOB) != job:
            write_json(folder_of(out, fit) / JOB, job)


def folder_of(out: Path, fit: Fit) -> Path:
    return out.absolute() / FITS / fit.name


# -- batches ---------------------------------------------------------------------------------------------------------


def make_batches(out: Path, fits: Sequence[Fit], size: int) -> list[list[Fit]]:
    """Groups of at most ``size`` fits of one setting. A fit that is done, that somebody works on, or that has a
    checkpoint is in none of them; neither is one that would be alone."""

    def is_new(fit: Fit) -> bool:
        folder = folder_of(out, fit)
        return not is_done(folder) and run_of(folder) is None and claims.holder(folder) is None

    new: dict[str, list[Fit]] = {}
    for fit in fits:
        if is_new(fit):
            new.setdefault(fit.setting, []).append(fit)
    groups = [some[i : i + size] for some in new.values() for i in range(0, len(some), size)]
    return [group for group in groups if len(group) > 1]


def write_batches(out: Path, groups: Sequence[Sequence[Fit]]) -> dict[str, Path]:
    """Write the job.json of each batch; returns their folders by name."""
    found = {}
    for group in groups:
        names = [fit.name for fit in group]
        name = f"batch-{len(group)}-{hashlib.sha256(' '.join(names).encode()).hexdigest()[:8]}"
        folder = found[name] = out.absolute() / BATCHES / name
        members = [str(folder_of(out, fit)) for fit in group]
        cwd = read_json(Path(members[0]) / JOB).get("cwd", str(Path.cwd()))
        write_json(folder / JOB, {"members": members, "command": [sys.executable, *BATCH_COMMAND], "cwd": cwd})
        (folder / STATE).unlink(missing_ok=True)  # of an earlier call, whose fits were deleted since
    return found
