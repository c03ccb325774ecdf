"""Markdown tables of comparison.jsonl: python -m tests.benchmarks.comparison_report [--split test]"""

import argparse
import statistics as st
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import comparison_tools as tools
from tests.benchmarks.comparison import DECIDING, ROWS, Row, chosen, key, modality, read_rows
from tests.benchmarks.report import table

FAMILIES = {
    "bspline": "Known B-spline warps of POPI",
    "sliding": "Known sliding motion of POPI's lungs",
    "rbf": "Known radial-basis warps of POPI",
    "popi": "POPI T10 / T60",
    "mouse": "Mouse brains",
    "adult": "Adult brains, slabs of 18 slices",
    "fetal": "Fetal brains, weeks 23 to 30",
    "phantom": "Phantom",
}
LABELS = ("dice", "hd95_mm")
ERROR = {"mouse": LABELS, "adult": LABELS, "fetal": LABELS, "popi": ("rms",)}
"""Error columns of a family, the first decides; all others: landmarks."""
LANDMARKS = ("tre_mean", "tre_p95")
NAMES = {"tre_mean": "TRE mm", "tre_p95": "TRE 95% mm", "dice": "Dice", "hd95_mm": "HD95 mm", "rms": "RMS HU"}


def latest(rows: Sequence[Row]) -> list[Row]:
    """One row for each tool, setting, pair and seed: the last that was written."""
    return list({key(r): r for r in rows}.values())


def errors(family: str) -> tuple[str, ...]:
    return ERROR.get(family, LANDMARKS)


def start(row: Row) -> float:
    """The error before registration, in the deciding column of the row's family."""
    name = errors(row["family"])[0]
    return float(row["tre_initial" if name == "tre_mean" else f"{name}_initial"])


def used(rows: Sequence[Row], split: str) -> list[Row]:
    """Rows of a split, of rivals only those of the chosen setting."""
    choice = {(t, m): chosen(list(rows), t, m) for t in tools.TOOLS for m in DECIDING}
    found = [r for r in rows if split in ("both", r["split"])]
    return [
        r for r in found if r["tool"].startswith("medinr") or r["setting"] == choice[r["tool"], modality(r["pair"])]
    ]


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by tool and setting, in the order of the tools; the settings of our presets apart from each other."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda r: (list(tools.TOOLS).index(r["tool"]), r["setting"])):
        found.setdefault((row["tool"], row["setting"]), []).append(row)
    return found


def mean_over_pairs(rows: Sequence[Row], column: str) -> float:
    """Mean over pairs of the mean over seeds."""
    pairs: dict[str, list[float]] = {}
    for row in rows:
        if column in row:
            pairs.setdefault(row["pair"], []).append(row[column])
    return st.mean(st.mean(v) for v in pairs.values()) if pairs else float("nan")


def number(value: float, column: str) -> str:
    digits = {"dice": 4, "hd95_mm": 3, "rms": 1}.get(column, 2)
    return f"{value:.{digits}f}"


def costs(rows: Sequence[Row]) -> list[str]:
    """Failures, folding, CPU seconds and memory."""
    folding = [r["folding_percent"] for r in rows if "folding_percent" in r]
    return [
        f"{sum(bool(r['failure']) for r in rows)} of {len(rows)}",
        f"{max(folding):.3f}" if folding else "-",
        f"{mean_over_pairs(rows, 'cpu_seconds'):.0f}",
        f"{max(r['memory_mb'] for r in rows):.0f}",
    ]


def family_table(rows: Sequence[Row], family: str) -> str:
    """One line a tool: mean error over the pairs, failures, largest folding, mean CPU seconds, largest memory."""
    here = [r for r in rows if r["family"] == family]
    if not here:
        return ""
    columns = errors(family)
    pairs = sorted({r["pair"] for r in here})
    before = {r["pair"]: start(r) for r in here if errors(family)[0] in r}
    head = ["tool", "setting", "pairs", *(NAMES[c] for c in columns), *pairs]
    head += ["failed", "folding %", "CPU s", "memory MB"]
    lines = [["start", "", str(len(before)), number(st.mean(before.values()), columns[0])]] if before else []
    if lines:
        lines[0] += [""] * (len(columns) - 1) + [number(before[p], columns[0]) if p in before else "" for p in pairs]
        lines[0] += [""] * 4
    for (tool, setting), own in groups(here).items():
        cells = [number(mean_over_pairs(own, c), c) for c in columns]
        single = [number(mean_over_pairs([r for r in own if r["pair"] == p], columns[0]), columns[0]) for p in pairs]
        lines.append([tool, setting, str(len({r["pair"] for r in own})), *cells, *single, *costs(own)])
    return f"### {FAMILIES[family]}\n\n" + table(head, lines).replace("nan", "-") + "\n"


def overview(rows: Sequence[Row]) -> str:
    """One line a tool: the deciding error of each family where it ran on all pairs, and its CPU seconds there."""
    families = [f for f in FAMILIES if any(r["family"] == f for r in rows)]
    pairs = {f: {r["pair"] for r in rows if r["family"] == f} for f in families}
    lines = []
    by_tool: dict[str, list[Row]] = {}
    for (tool, setting), own in groups(rows).items():
        if setting == "preset" or not tool.startswith("medinr"):
            by_tool.setdefault(tool, []).extend(own)
    for tool, own in by_tool.items():
        here = {f: [r for r in own if r["family"] == f] for f in families}
        cells = []
        for family, found in here.items():
            column = errors(family)[0]
            whole = {r["pair"] for r in found if column in r} == pairs[family]
            cells.append(number(mean_over_pairs(found, column), column) if whole else "")
        if any(cells):
            seconds = [mean_over_pairs(found, "cpu_seconds") for found in here.values() if found]
            lines.append([tool, *cells, f"{min(seconds):.0f} to {max(seconds):.0f}"])
    head = ["tool", *(f"{f}, {NAMES[errors(f)[0]]}" for f in families), "CPU s"]
    return "### In short\n\n" + table(head, lines) + "\n"


def settings_table(rows: Sequence[Row]) -> str:
    """Every setting on the deciding tuning pairs, and which was chosen for MR and for CT."""
    deciding = [p for group in DECIDING.values() for p in group]
    lines = []
    for name, tool in tools.TOOLS.items():
        if len(tool.settings) == 1:
            continue
        choice = {m: chosen(list(rows), name, m) for m in DECIDING}
        for setting, what in tool.settings.items():
            own = [r for r in rows if (r["tool"], r["setting"]) == (name, setting)]
            if not own:
                continue
            cells = []
            for pair in deciding:
                found = [r for r in own if r["pair"] == pair]
                column = errors(pair.split("_")[0])[0]
                cells += [number(mean_over_pairs(found, column), column) if found else "", failures(found)]
            cpu = mean_over_pairs([r for r in own if r["pair"] in deciding], "cpu_seconds")
            marks = ", ".join(m.upper() for m in DECIDING if choice[m] == setting)
            lines.append([name, setting, what.source, *cells, f"{cpu:.0f}", marks])
    head = ["tool", "setting", "from", *(c for p in deciding for c in (p, "")), "CPU s", "chosen for"]
    return "### Settings, on tuning pairs\n\n" + table(head, lines).replace("nan", "-") + "\n"


def failures(rows: Sequence[Row]) -> str:
    return "; ".join(sorted({r["failure"] for r in rows if r["failure"]}))


def versions(rows: Sequence[Row]) -> str:
    found = sorted({f"{r['tool']}: {r['version']}" for r in rows})
    return "Versions: " + "; ".join(found) + ".\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--split", choices=["tuning", "test", "both"], default="test")
    given = parser.parse_args()
    rows = latest(read_rows(given.rows))
    print(overview(used(rows, given.split)))
    print(settings_table(rows))
    for family in FAMILIES:
        print(family_table(used(rows, given.split), family), end="")
    print(versions(rows))


if __name__ == "__main__":
    main()
