"""One table of a cohort: a row for each fit, and what the fits of a setting have in common."""

import csv
import io as text_io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medinr.cohorts.plan import Fit, folder_of
from medinr.cohorts.state import read_state
from medinr.io import write_text

Row = dict[str, Any]
FITS, SUMMARY, PAGE = "cohort.csv", "summary.csv", "cohort.md"
OWN = ("fit", "case", "seed", "state", "seconds", "failures", "error")
SHOWN = ("tre/mean", "tre/snapped_mean", "dsc/mean", "image/psnr", "image/ssim", "folding/percent")
"""Metrics of the table by cases, as far as they are there."""
COLUMNS = ("mean", "sd_seeds", "sd_cases", "p5", "p50", "p95", "n")


def read_metrics(folder: Path) -> dict[str, float]:
    """The numbers in the metrics.json of a fit that is done; no number where it says null."""
    state = read_state(folder)
    if state["state"] != "done":
        return {}
    try:
        found = json.loads((folder / state["run"] / "results" / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: float(v) for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def read_rows(out: Path, fits: Sequence[Fit]) -> list[Row]:
    """A row for each fit: what it is, how it went, and its metrics."""
    rows = []
    for fit in fits:
        folder = folder_of(out, fit)
        state = read_state(folder)
        row: Row = {"fit": fit.name, "case": fit.case or "", "seed": fit.seed, **fit.settings}
        row |= {key: state[key] for key in ("state", "seconds", "failures", "error")}
        rows.append(row | read_metrics(folder))
    return rows


def metric_names(rows: Sequence[Row], fits: Sequence[Fit]) -> list[str]:
    """Names of the metrics, in the order of the first fit that has them."""
    own = {*OWN, *(key for fit in fits for key in fit.settings)}
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name not in own]


def summarise(rows: Sequence[Row], name: str) -> dict[str, float]:
    """One number of several fits: mean, spread and percentiles of a metric; NaN where there are too few.

    ``mean`` and the percentiles are over all fits. ``sd_seeds`` is the standard deviation, over the seeds, of the mean
    over the cases: how far the result of the experiment moves when it is repeated. Cases that lack a seed do not count
    for it. ``sd_cases`` is that of the cases, each as the mean of its seeds. Both divide by n - 1.
    """
    table: dict[tuple[str, int], float] = {(r["case"], r["seed"]): r[name] for r in rows if name in r}
    if not table:
        return {**dict.fromkeys(COLUMNS, math.nan), "n": 0}
    values = list(table.values())
    cases, seeds = {case for case, _ in table}, {seed for _, seed in table}
    whole = [case for case in cases if all((case, seed) in table for seed in seeds)]
    by_seed = [statistics.fmean(table[case, seed] for case in whole) for seed in seeds] if whole else []
    by_case = [statistics.fmean(v for (c, _), v in table.items() if c == case) for case in cases]
    p5, p50, p95 = np.percentile(values, [5, 50, 95]).tolist()
    return {
        "mean": statistics.fmean(values),
        "sd_seeds": statistics.stdev(by_seed) if len(by_seed) > 1 else math.nan,
        "sd_cases": statistics.stdev(by_case) if len(by_case) > 1 else math.nan,
        "p5": p5,
        "p50": p50,
        "p95": p95,
        "n": len(values),
    }


def groups(rows: Sequence[Row], fits: Sequence[Fit]) -> dict[str, list[Row]]:
    """The rows of each setting."""
    found: dict[str, list[Row]] = {}
    for row, fit in zip(rows, fits, strict=True):
        found.setdefault(fit.setting, []).append(row)
    return found


def failure_rate(rows: Sequence[Row], limits: Mapping[str, float]) -> float:
    """Share of fits without a result, or with a metric that is at its limit, above it, or missing."""

    def is_failed(row: Row) -> bool:
        return row["state"] != "done" or any(not row.get(name, math.inf) < limit for name, limit in limits.items())

    return sum(map(is_failed, rows)) / len(rows)


def summary_rows(rows: Sequence[Row], fits: Sequence[Fit], limits: Mapping[str, float]) -> list[Row]:
    """A row for each setting and metric, and one named ``failure_rate``, whose mean is the share of failures."""
    found: list[Row] = []
    for setting, some in groups(rows, fits).items():
        rate = {"mean": failure_rate(some, limits), "n": len(some)}
        found.append({"setting": setting, "metric": "failure_rate", **rate})
        for name in ["seconds", *metric_names(rows, fits)]:
            done = [row for row in some if row["state"] == "done"]
            found.append({"setting": setting, "metric": name, **summarise(done, name)})
    return found


def csv_text(rows: Sequence[Row], columns: Sequence[str]) -> str:
    out = text_io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: "" if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows
    )
    return out.getvalue()


def markdown(title: str, rows: Sequence[Row], fits: Sequence[Fit], summary: Sequence[Row]) -> str:
    """The summary of each setting, the metrics that one looks at by cases, and the fits that failed."""
    done = sum(row["state"] == "done" for row in rows)
    parts = [f"# {title}", f"{done} of {len(rows)} fits are done."]
    names = metric_names(rows, fits)
    shown = [name for name in SHOWN if name in names] or names[:6]
    for setting, some in groups(rows, fits).items():
        mine = [row for row in summary if row["setting"] == setting]
        head = f"## {setting}" if setting else "## Summary"
        rate = next(row for row in mine if row["metric"] == "failure_rate")
        parts += [
            head,
            f"Failure rate: {100 * rate['mean']:.3g} % of {rate['n']} fits.",
        ]
        lines = [["metric", "mean", "SD seeds", "SD cases", "5 %", "50 %", "95 %", "n"]]
        lines += [[row["metric"], *(_shown(row[c]) for c in COLUMNS)] for row in mine if "p50" in row and row["n"]]
        parts.append(_table(lines))
        cases = list(dict.fromkeys(row["case"] for row in some))
        if len(cases) > 1 and shown:
            lines = [["case", *shown]]
            for case in cases:
                of_case = [row for row in some if row["case"] == case and row["state"] == "done"]
                lines.append([case, *(_spread([row[n] for row in of_case if n in row]) for n in shown)])
            parts += ["Mean ± SD over the seeds:", _table(lines)]
    if failed := [row for row in rows if row["state"] == "failed"]:
        parts += ["## Failed", _table([["fit", "error"], *([r["fit"], r["error"].replace("|", "/")] for r in failed)])]
    return "\n\n".join(parts) + "\n"


def _table(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *(["---:"] * (len(lines[0]) - 1))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _shown(value: float) -> str:
    return "" if not math.isfinite(value) else str(value) if isinstance(value, int) else f"{value:.4g}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = _shown(statistics.fmean(values))
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def write_tables(out: Path, fits: Sequence[Fit], title: str, limits: Mapping[str, float]) -> tuple[list[Row], bool]:
    """Write cohort.csv, summary.csv and cohort.md.

    Args:
        out: folder of the cohort.
        fits: the rows, in this order.
        title: of the page.
        limits: metric -> value from which a fit counts as failed.

    Returns:
        The rows of the summary, and whether cohort.csv is other than before.

    Raises:
        UserError: the folder cannot be written to.
    """
    rows = read_rows(out, fits)
    summary = summary_rows(rows, fits, limits)
    keys = list(dict.fromkeys(key for fit in fits for key in fit.settings))
    columns = ["fit", "case", "seed", *keys, "state", "seconds", "failures", "error", *metric_names(rows, fits)]
    text = csv_text(rows, columns)
    try:
        changed = (out / FITS).read_text(encoding="utf-8") != text
    except OSError:
        changed = True
    write_text(out / FITS, text)
    write_text(out / SUMMARY, csv_text(summary, ["setting", "metric", *COLUMNS]))
    write_text(out / PAGE, markdown(title, rows, fits, summary))
    return summary, changed


def headline(summary: Sequence[Row]) -> list[str]:
    """The few lines that a person wants to see at the end."""
    lines = []
    for row in summary:
        if row["metric"] in SHOWN and row["n"]:
            where = f"{row['setting']}: " if row["setting"] else ""
            spread = f" ± {row['sd_seeds']:.2g} over seeds" if math.isfinite(row["sd_seeds"]) else ""
            lines.append(f"  {where}{row['metric']} {row['mean']:.4g}{spread} (median {row['p50']:.4g})")
    return lines
