"""The page about runs, from their folders alone."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medinr import figures
from medinr.callbacks import runs
from medinr.dashboard.records import Record, differing, groups, numbers
from medinr.dashboard.specification import HEADLINES, is_term, others
from medinr.figures import overview

MOST_PICTURES = 40
"""Of all runs together; above that each run shows its newest only."""
Names = Mapping[Path, str]
"""What runs are called, by their folders."""
DISTINCT = 6
"""So many curves of one panel can be told apart by their colours."""
LONG = 25
"""A table of settings with more rows is folded away: experiments, and not settings, differ."""
COST = {"costs/seconds": "seconds", "costs/memory_mb": "MB"}
EVALUATED = "Means over the cases that `medinr test` or `medinr predict` has evaluated on the whole grid."
LOOKED = "Not evaluated: what the fit logged last, on a thinned grid."


def page(records: Sequence[Record], title: str) -> str:
    """Everything about some runs on one page.

    Args:
        records: at least one.
        title: what they have in common.
    """
    names = labels(records)
    found = groups(records)
    curves, colours = names, list(names.values())
    if len(records) > DISTINCT:  # few runs have a colour each, many the one of their group
        curves = {r.folder: f"{group}: {names[r.folder]}" for group, some in found.items() for r in some}
        colours = list(found)
    further = {name: name for name in others(records)}
    body = [
        overview.section("Runs", overview.table(run_table(records, names)), note=_how(records)),
        overview.section("Comparison", _spread(found), overview.table(group_table(found)), note=COMPARED),
        overview.section("Curves", _curves(records, curves, colours, HEADLINES | further)),
        overview.section("Cases", overview.table(case_table(records, names))),
        overview.section("Alpha", *_alpha(records, names), note=SEARCHED),
        overview.section("Images", overview.gallery(_pictures(records, names))),
        overview.section("Loss", _curves(records, curves, colours, _terms(records))),
        overview.section("Settings", *_settings(records, names)),
    ]
    cases = {str(row.get("case")) for r in records for row in r.cases}
    subtitle = f"{_count(len(records), 'run')}, {_count(len(found), 'group')}, {_count(len(cases), 'evaluated case')}"
    return overview.overview_page(title, subtitle, doubts(records), body)


COMPARED = (
    "Runs that differ in case, seed, data folder and trainer only are one group. A point is a case of a run; the box "
    "ends at the quartiles."
)
SEARCHED = "Points of the search for the regularization weight; the line marks the chosen one."


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def labels(records: Sequence[Record]) -> dict[Path, str]:
    """A name for each run that no other has, by its folder: name in a cohort, experiment and time, case and seed."""
    varied = differing(records)
    told = {word: varied[key] for key, word in (("data.case", "case"), ("seed_everything", "seed")) if key in varied}
    found: dict[Path, str] = {}
    for i, record in enumerate(records):
        words = [
            *([record.fit] if record.fit else []),
            record.name,
            *(f"{word} {values[i]}" for word, values in told.items()),
        ]
        name = base = " ".join(words)
        n = 1
        while name in found.values():
            n += 1
            name = f"{base} ({n})"
        found[record.folder] = name
    return found


def doubts(records: Sequence[Record]) -> list[str]:
    """What a careful reader would ask about."""
    found = []
    broken = [r.name for r in records if not r.finished]
    if broken:
        found.append(f"Not finished: {_some(broken)}; `medinr fit ... --ckpt_path last` continues them.")
    unseen = [r.name for r in records if r.finished and not r.cases]
    if unseen:
        found.append(f"Not evaluated: {_some(unseen)}; run `medinr test` with the same --config.")
    worse = [r.name for r in records if r.metrics.get("tre/mean", 0) > r.metrics.get("tre/initial_mean", math.inf)]
    if worse:
        found.append(f"Landmarks are farther apart than before: {_some(worse)}.")
    folded = [r.name for r in records if r.metrics.get("folding/percent", 0) > 0]
    if folded:
        found.append(f"Voxels fold (det J ≤ 0): {_some(folded)}.")
    if not any(word in name for r in records for name in r.metrics for word in ("tre/", "dsc/", "dice", "error_mm")):
        found.append("Nothing here measures the error: no run had landmarks or labels.")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _how(records: Sequence[Record]) -> str:
    looked = " ".join(dict.fromkeys(EVALUATED if r.cases else LOOKED for r in records))
    return looked


def cell(value: Any) -> str:
    """A number as a table shows it; nothing for what is missing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_table(records: Sequence[Record], names: Names) -> overview.Table:
    shown = [m for m in HEADLINES if any(m in r.metrics for r in records)]
    costs = [m for m in COST if any(m in r.history for r in records)]
    head = ["run", "state", "steps", *(HEADLINES[m] for m in shown), *(COST[m] for m in costs)]
    rows = []
    for r in records:
        last = {m: r.history[m][1][-1] for m in costs if m in r.history}
        state = "finished" if r.finished else "broken off"
        numbers_ = [*(r.metrics.get(m) for m in shown), *(last.get(m) for m in costs)]
        rows.append([names[r.folder], state, str(r.steps), *map(cell, numbers_)])
    return head, rows, 2


def group_table(found: Mapping[str, Sequence[Record]]) -> overview.Table:
    """Mean, spread and percentiles over all cases of all runs of a group."""
    head = ["group", "metric", "n", "mean", "sd", "5 %", "median", "95 %"]
    rows = []
    for group, some in found.items():
        for metric, name in HEADLINES.items():
            if values := case_values(some, metric):
                low, middle, high = np.percentile(values, [5, 50, 95])
                sd = statistics.stdev(values) if len(values) > 1 else math.nan
                numbers_ = [statistics.fmean(values), sd, float(low), float(middle), float(high)]
                rows.append([group, name, str(len(values)), *map(cell, numbers_)])
    return head, rows if any(int(row[2]) > 1 for row in rows) else [], 2


def case_values(records: Sequence[Record], metric: str) -> list[float]:
    """One value a case of each run that was evaluated."""
    return numbers(row.get(metric) for r in records for row in r.cases)


def case_table(records: Sequence[Record], names: Names) -> overview.Table:
    """One row a case of each run: the headline metrics, or what else a method measures."""
    columns = list(dict.fromkeys(k for r in records for row in r.cases for k in row if k != "case"))
    shown = [m for m in ("tre/initial_mean", "dsc/initial_mean", *HEADLINES) if m in columns]
    shown = shown or [c for c in columns if numbers(row.get(c) for r in records for row in r.cases)][:8]
    called = {**HEADLINES, "tre/initial_mean": "TRE before [mm]", "dsc/initial_mean": "Dice before"}
    rows = [
        [str(row.get("case", "")), names[r.folder], *(cell(row.get(m)) for m in shown)]
        for r in records
        for row in r.cases
    ]
    return ["case", "run", *(called.get(m, m) for m in shown)], rows, 2


def _spread(found: Mapping[str, Sequence[Record]]) -> str:
    panels = {
        name: {group: values for group, some in found.items() if (values := case_values(some, metric))}
        for metric, name in HEADLINES.items()
    }
    panels = {name: values for name, values in panels.items() if values}
    if sum(len(v) for groups_ in panels.values() for v in groups_.values()) <= len(panels):
        return ""  # one value each: the table of runs says it
    return overview.drawing(figures.spread_figure(panels), "metrics by group")


def _terms(records: Sequence[Record]) -> dict[str, str]:
    """The loss, its weighted terms and the raw penalties."""
    logged = sorted({name for r in records for name in r.history})
    return {n: n for n in ("loss", *(n for n in logged if is_term(n)))}


def _curves(records: Sequence[Record], curves: Names, colours: Sequence[str], metrics: Mapping[str, str]) -> str:
    panels = {
        title: {curves[r.folder]: r.history[m] for r in records if m in r.history} for m, title in metrics.items()
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    return overview.drawing(figures.overlay_figure(panels, colours), "curves of the fit") if panels else ""


def _alpha(records: Sequence[Record], names: Names) -> list[str]:
    drawn = []
    for r in [r for r in records if r.tables.get("alpha_search")][:6]:
        rows = r.tables["alpha_search"]
        shown = [c for c in ("tre", "dice", "folding", "bending") if c in rows[0]]
        chosen = {"chosen": r.metrics["search/alpha_0"]} if "search/alpha_0" in r.metrics else None
        x = [row["alpha"] for row in rows]
        figure = figures.curve_figure(
            x, {c: [row[c] for row in rows] for c in shown}, chosen, log_x=min(x) > 0 and max(x) > 30 * min(x),
            title=names[r.folder],
        )  # fmt: skip
        drawn.append(overview.drawing(figure, "error, Dice, folding and bending against alpha"))
    return drawn


def _pictures(records: Sequence[Record], names: Names) -> dict[str, list[tuple[str, Path]]]:
    few = sum(len(r.pictures) for r in records) > MOST_PICTURES
    return {
        names[r.folder]: [(p.relative_to(r.folder).as_posix(), p) for p in (r.pictures[-1:] if few else r.pictures)]
        for r in records
    }


def _settings(records: Sequence[Record], names: Names) -> list[str]:
    """What differs between the runs as a table; the whole configuration of the first of each group folded away."""
    varied = differing(records)
    if len(records) <= 8:
        rows = [[key, *map(_setting, values)] for key, values in varied.items()]
        told = overview.table((["setting", *(names[r.folder] for r in records)], rows, 1 + len(records)))
    else:
        rows = [[names[r.folder], *(_setting(v[i]) for v in varied.values())] for i, r in enumerate(records)]
        told = overview.table((["run", *varied], rows if varied else [], 1 + len(varied)))
    whole = []
    for group, some in groups(records).items():
        settings = runs.flat({k: v for k, v in some[0].config.items() if k in ("model", "data", "trainer")})
        given = {k: str(v) for k, v in settings.items() if v is not None}
        if given:
            whole.append(overview.folded(f"Configuration of {group}", overview.values(given)))
    return [overview.folded("What differs", told) if told and len(varied) > LONG else told, *whole]


def _setting(value: Any) -> str:
    return "" if value is None else str(value)
