"""What runs have left in their folders: configuration, curves, figures of each case, tables, pictures."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medinr.callbacks import runs

Curve = tuple[list[float], list[float]]
"""Steps, and the values there."""
TABLES = ("alpha_search", "times")
"""Tables of numbers that methods write beside metrics.json (``Method.report``)."""
COHORT = "cohort.json"
"""What `medinr cohort` leaves in the folder that holds ``fits/NAME/EXPERIMENT/TIME``."""
DEEPEST = 4
"""Run folders are looked for so many folders below the one that is named."""


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        folder: of the run.
        experiment: its name.
        config: the resolved configuration, {} where there is none.
        history: the fit's curves by metric.
        cases: one row a case of the evaluation, ``case`` and its numbers; without one, none.
        tables: rows by the name of the table (`TABLES`).
        pictures: PNG files, those of the fit first.
        finished: whether the fit reached its last step.
        unsent: folders of W&B that wait for ``wandb sync``.
    """

    folder: Path
    experiment: str
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Curve] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    finished: bool = False
    unsent: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As W&B calls it: experiment and time."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def fit(self) -> str:
        """Its name among the fits of `medinr cohort`, "" for a run of another kind."""
        above = self.folder.absolute().parents
        return above[1].name if len(above) > 3 and (above[3] / COHORT).is_file() else ""

    @property
    def steps(self) -> int:
        """Steps that were done, as far as they were logged."""
        return int(max((steps[-1] for steps, _ in self.history.values()), default=-1)) + 1

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the cases of the evaluation; without one, what the fit logged last."""
        if not self.cases:
            return {name: values[-1] for name, (_, values) in self.history.items()}
        names = dict.fromkeys(name for row in self.cases for name in row)
        columns = {name: numbers(row.get(name) for row in self.cases) for name in names}
        return {name: sum(values) / len(values) for name, values in columns.items() if values}


def numbers(values: Iterable[Any]) -> list[float]:
    """Those that are finite numbers."""
    return [
        float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(float(v))
    ]


def read_record(run: Path) -> Record:
    """Everything of one run folder; what is missing, or cannot be read, is left out."""
    config = runs.read_config(run)
    waiting = sorted(f for f in run.glob("wandb/offline-run-*") if not list(f.glob("*.wandb.synced")))
    results = run / "results"
    found = (results / f"{name}.csv" for name in TABLES)
    per_case = (p for p in sorted(results.glob("*/figures/*.png")))
    return Record(
        folder=run,
        experiment=str(config.get("experiment") or run.parent.name),
        config=config,
        history=read_history(run / "metrics.csv"),
        cases=read_cases(results),
        tables={path.stem: rows for path in found if (rows := read_table(path))},
        pictures=[*sorted(run.glob("figures/*.png")), *sorted(results.glob("figures/*.png")), *per_case],
        finished=runs.is_finished(run),
        unsent=waiting,
    )


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_history(path: Path) -> dict[str, Curve]:
    """Curves of a ``metrics.csv``: empty cells, NaN and infinities are left out."""
    found: dict[str, Curve] = {}
    for row in _rows(path):
        step = _number(row.get("step"))
        for name, cell in row.items():
            value = _number(cell)
            if step is not None and value is not None and name not in ("step", "epoch"):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return found


def read_table(path: Path) -> list[dict[str, float]]:
    """A table of numbers; a cell that holds none is NaN."""
    table = []
    for row in _rows(path):
        table.append({k: math.nan if (value := _number(v)) is None else value for k, v in row.items()})
    return table


def read_cases(results: Path) -> list[dict[str, Any]]:
    """One row a case: of ``cases.csv``, of each case's own ``metrics.json``, or of the only one."""
    if rows := _rows(results / "cases.csv"):
        return [{k: v if k == "case" or (n := _number(v)) is None else n for k, v in row.items()} for row in rows]
    files = sorted(results.glob("*/metrics.json")) or [results / "metrics.json"]
    return [row for path in files if (row := _read_metrics(path))]


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# -- which runs ----------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: its configuration, and something that the run has left."""
    left = (runs.FINISHED, "metrics.csv", "checkpoints", "results")
    return (folder / runs.CONFIG).is_file() and any((folder / name).exists() for name in left)


def runs_below(folder: Path) -> list[Path]:
    """Run folders in a folder, at most `DEEPEST` below it, in order of their names; a run's own folder gives itself."""
    if is_run(folder):
        return [folder]
    patterns = ("/".join(["*"] * depth) for depth in range(1, DEEPEST + 1))
    found = [path.parent for pattern in patterns for path in folder.glob(f"{pattern}/{runs.CONFIG}")]
    return sorted(run for run in found if is_run(run) and "wandb" not in run.relative_to(folder).parts)


def differing(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Settings of model, data, trainer and seed in which runs differ: dotted key -> the value of each run."""
    kept = ("model", "data", "trainer", "seed_everything")
    settings = [runs.flat({k: v for k, v in r.config.items() if k in kept}) for r in records]
    keys = dict.fromkeys(key for one in settings for key in one)
    columns: Mapping[str, list[Any]] = {key: [one.get(key) for one in settings] for key in keys}
    return {key: values for key, values in columns.items() if any(v != values[0] for v in values)}


REPLICATES = ("seed_everything", "data.case", "data.cases", "data.root", "data.fixed", "data.moving", "trainer.")
"""Settings that tell one repetition of an experiment from another, not one experiment from another."""


def _repeats(key: str) -> bool:
    """Whether a setting only says which data, which seed and how long."""
    return key.startswith(REPLICATES) and not key.endswith("_phase")


def groups(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs that repeat each other, over cases and seeds, under one name: the experiment and the settings it varies."""
    found: dict[str, list[Record]] = {}
    for experiment in dict.fromkeys(r.experiment for r in records):
        same = [r for r in records if r.experiment == experiment]
        varied = {k: v for k, v in differing(same).items() if not _repeats(k)}
        for i, record in enumerate(same):
            words = [f"{key.removeprefix('model.')}={values[i]}" for key, values in varied.items()]
            found.setdefault(" ".join([experiment, *words[:3]]), []).append(record)
    return found
