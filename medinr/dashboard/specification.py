"""A workspace of Weights & Biases as data: which panels show an experiment; a JSON file to edit and to upload."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medinr import io
from medinr.dashboard.records import Record
from medinr.errors import UserError

VERSION = 1
HEADLINES = {
    "tre/mean": "TRE [mm]",
    "dsc/mean": "Dice",
    "image/psnr": "PSNR [dB]",
    "image/ssim": "SSIM",
    "folding/percent": "folded voxels [%]",
}
"""The metrics that every method is judged by, as far as its data allow, and what they are called."""
STEP = "trainer/global_step"
"""Lightning's logger counts steps under this name; W&B's own count goes up with every call."""
REQUIRED: dict[str, tuple[str, ...]] = {
    "line": ("metrics",),
    "images": ("keys",),
    "table": ("key",),
    "curve": ("table", "x", "y"),
    "bars": ("metric", "by"),
    "scatter": ("x", "metric"),
    "settings": (),
}
"""Kinds of panels, and what each needs beside its optional ``title``."""

Panel = dict[str, Any]
TIMES: Panel = {"kind": "curve", "title": "TRE [mm] over time", "table": "times", "x": "time", "y": "tre_mm"}


def specification(
    records: Sequence[Record], experiments: Sequence[str], project: str, entity: str | None = None, alpha: bool = False
) -> dict[str, Any]:
    """The panels of experiments: those for which runs have logged something, or all usual ones where there is no run.

    Args:
        records: the runs.
        experiments: names; the workspace shows the W&B runs with these names in their configuration.
        project: of W&B.
        entity: user or team of W&B (None: that of the account).
        alpha: whether a conditioned method searches its alpha (runs that have a table of it say so themselves).
    """
    logged = {name for r in records for name in (*r.history, *r.metrics)}
    accuracy = [name for name in HEADLINES if name in logged or not records]
    losses = sorted(name for name in logged if is_term(name))
    tables = {name for r in records for name in r.tables} | ({"alpha_search"} if alpha else set())
    sections = [
        _section("Accuracy", [_line(HEADLINES[name], [name]) for name in accuracy]),
        _section("Further metrics", [_line(name, [name]) for name in others(records)]),
        _section("Images", [{"kind": "images", "keys": _keys(records, "alpha_search" in tables)}]),
        _section("Cases", [{"kind": "table", "key": "cases"}]),
        _section("Alpha", _alpha(records) if "alpha_search" in tables else []),
        _section("Times", [TIMES] if "times" in tables else []),
        _section("Comparison", _comparison(accuracy, records)),
        _section("Loss", [_line("loss", ["loss"]), *([_line("terms", losses)] if losses else [])]),
        _section("Cost", [_line("seconds", ["costs/seconds"]), _line("memory [MB]", ["costs/memory_mb"])]),
    ]
    return {
        "medinr_workspace": VERSION,
        "name": ", ".join(experiments),
        "project": project,
        "entity": entity,
        "url": None,
        "experiments": list(experiments),
        "sections": [section for section in sections if section["panels"]],
    }


def is_term(name: str) -> bool:
    """Whether a metric is a term of a loss, or a raw penalty; a method of two directions puts a word before it."""
    return "loss" in name.split("/")[:-1] or "raw" in name.split("/")[:-1]


def others(records: Sequence[Record]) -> list[str]:
    """What fits logged besides the headlines and their details: the measures of atlases and generators, for one."""
    known = {name.split("/")[0] for name in HEADLINES} | {"loss", "costs", "displacement", "start", "overlap", "step"}
    logged = sorted({name for r in records for name in r.history})
    return [name for name in logged if name.split("/")[0] not in known and not is_term(name)][:12]


def _section(name: str, panels: Iterable[Panel]) -> dict[str, Any]:
    return {"name": name, "panels": list(panels)}


def _line(title: str, metrics: Sequence[str]) -> Panel:
    return {"kind": "line", "title": title, "metrics": list(metrics)}


def _keys(records: Sequence[Record], alpha: bool) -> list[str]:
    """Names under which pictures are logged: those of files of an evaluation; the fit's are all ``registration``."""
    files = [p for r in records for p in r.pictures if "results" in p.parts]
    return list(dict.fromkeys(["registration", *(["alpha"] if alpha else []), *sorted(p.stem for p in files)]))


def _alpha(records: Sequence[Record]) -> list[Panel]:
    columns = {name for r in records for row in r.tables.get("alpha_search", ()) for name in row}
    shown = [c for c in ("tre", "dice", "folding", "bending") if c in columns or not columns]
    return [
        {"kind": "curve", "title": f"{c} against alpha", "table": "alpha_search", "x": "alpha", "y": c} for c in shown
    ]


def _comparison(metrics: Sequence[str], records: Sequence[Record]) -> list[Panel]:
    """Mean and spread by experiment, every case and seed against each other, what differs, and a cohort's tables."""
    bars: list[Panel] = [{"kind": "bars", "title": HEADLINES[m], "metric": m, "by": "experiment"} for m in metrics]
    cases: list[Panel] = [
        {"kind": "scatter", "title": f"{HEADLINES[m]} by case", "x": "data.init_args.case", "metric": m}
        for m in metrics[:1]
    ]
    cohort: list[Panel] = [{"kind": "table", "key": "cohort/fits"}, {"kind": "table", "key": "cohort/summary"}]
    return [*bars, *cases, {"kind": "settings"}, *(cohort if any(r.fit for r in records) else [])]


# -- as a file -----------------------------------------------------------------------------------------------------


def write_specification(path: Path, spec: Mapping[str, Any]) -> None:
    """Write it as JSON, whole or not at all."""
    io.write_text(path, json.dumps(spec, indent=2, ensure_ascii=False) + "\n")


def read_specification(path: str | Path) -> dict[str, Any]:
    """A specification that was written before, checked.

    Raises:
        UserError: no such file; not JSON; not a specification; an unknown kind of panel, or one that lacks something.
    """
    file = io.existing_file(path)
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: expected a workspace in JSON, found: {error}; write it again") from None
    if not isinstance(found, dict) or found.get("medinr_workspace") != VERSION:
        raise UserError(
            f"{file}: expected a workspace that `medinr dashboard` wrote (medinr_workspace: {VERSION}), found another "
            "file; give its workspace.json"
        )
    kinds: dict[str, Any] = {"name": str, "project": str, "experiments": list, "sections": list}
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind) or not found[key]:
            raise UserError(f"{file}: {key}: expected a {kind.__name__}, found {found.get(key)!r}")
    for section in found["sections"]:
        if not isinstance(section, dict) or not isinstance(section.get("panels"), list) or "name" not in section:
            raise UserError(f"{file}: sections: expected name and panels in each, found {section!r}")
        for panel in section["panels"]:
            _check(panel, f"{file}: section {section['name']}")
    return found


def _check(panel: Any, where: str) -> None:
    kind = panel.get("kind") if isinstance(panel, dict) else None
    if kind not in REQUIRED:
        raise UserError(f"{where}: expected a panel of kind {', '.join(REQUIRED)}, found {kind or panel!r}")
    for key in REQUIRED[kind]:
        several = key in ("metrics", "keys")
        value = panel.get(key)
        good = isinstance(value, list) and all(isinstance(v, str) for v in value) if several else isinstance(value, str)
        if not value or not good:
            what = "a list of names" if several else "a name"
            raise UserError(f"{where}: {kind}: {key}: expected {what}, found {value!r}")
