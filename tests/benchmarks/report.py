"""Markdown tables of experiments/RESULTS.md from rows.jsonl: python tests/benchmarks/report.py"""

# ruff: noqa: E501  (rows of tables)
import itertools
import json
import statistics as st
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "rows.jsonl"
Row = dict[str, Any]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def pick(rows: Sequence[Row], start: str) -> list[Row]:
    """Rows whose name starts so."""
    return [row for row in rows if row["row"].startswith(start)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``mean (smallest to largest)``."""
    return f"{st.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def popi(rows: Sequence[Row]) -> str:
    lines = []
    for preset in ("accurate", "fast"):
        found = pick(rows, f"popi {preset}")
        if found:
            lines.append([
                preset, str(len(found)), f"{found[0]['rms_lungs_before']:.1f}", spread([r["rms_lungs"] for r in found], 1),
                spread([r["folding/percent"] for r in found], 3), spread([r["displacement/max_mm"] for r in found], 1),
                spread([r["seconds"] for r in found], 1), spread([r["seconds/fit"] for r in found], 1),
            ])  # fmt: skip
    return table(
        ["preset", "seeds", "RMS before", "RMS after", "folding %", "largest motion mm", "seconds", "fit s"], lines
    )


def errors(rows: Sequence[Row]) -> str:
    """One line a row: errors of registrations with landmarks."""
    return table(
        ["row", "initial", "TRE mean", "95%", "max", "snapped", "folding %", "fit s"],
        [
            [r["row"], *(f"{r[k]:.2f}" for k in ("tre/initial_mean", "tre/mean", "tre/p95", "tre/max", "tre/snapped_mean")),
             f"{r['folding/percent']:.3f}", f"{r.get('seconds/fit', r['seconds']):.0f}"]
            for r in rows
        ],
    )  # fmt: skip


def big(rows: Sequence[Row]) -> str:
    """One line a row: time and memory of the large pair."""
    return table(
        ["row", "seconds", "processor s", "fit s", "evaluation s", "peak GiB", "TRE initial", "TRE", "folding %"],
        [
            [r["row"], f"{r['seconds']:.0f}", f"{r['seconds_processor']:.0f}", f"{r['seconds/fit']:.0f}",
             f"{r['seconds/evaluation']:.0f}", f"{r['peak_gib']:.2f}", f"{r['tre/initial_mean']:.2f}",
             f"{r['tre/mean']:.2f}", f"{r['folding/percent']:.3f}"]
            for r in rows
        ],
    )  # fmt: skip


def cidir(rows: Sequence[Row]) -> str:
    """Curves and choices of cIDIR for each seed, and IDIR at single alphas."""
    parts = []
    for row in pick(rows, "cidir case"):
        grid = row["table"]
        single = [r for r in grid if any(abs(r["alpha"] / 10 ** (-4 + 0.4 * k) - 1) < 1e-3 for k in range(11))]
        best = min(grid, key=lambda r: r["tre"])
        worst = max(grid, key=lambda r: r["tre"])
        dice = max(grid, key=lambda r: r["dice"])
        free = min((r for r in grid if r["folding"] <= 0.1), key=lambda r: r["similarity"])
        falls = all(a["bending"] > b["bending"] for a, b in itertools.pairwise(single))
        seed = row["row"].rsplit(" ", 1)[1]
        lines = [
            ["bending falls at all 11 alphas, ratio of first to last", f"{falls}, {single[0]['bending'] / single[-1]['bending']:.1f}"],
            ["oracle: alpha, TRE", f"{best['alpha']:.2g}, {best['tre']:.3f} mm"],
            ["worst: alpha, TRE, oracle better by", f"{worst['alpha']:.2g}, {worst['tre']:.3f} mm, {100 * (1 - best['tre'] / worst['tre']):.0f} %"],
            ["by Dice of parenchyma and vessels: alpha, TRE, above the oracle", f"{dice['alpha']:.2g}, {dice['tre']:.3f} mm, {100 * (dice['tre'] / best['tre'] - 1):.1f} %"],
            ["without masks: alpha, TRE, above the oracle", f"{free['alpha']:.2g}, {free['tre']:.3f} mm, {100 * (free['tre'] / best['tre'] - 1):.1f} %"],
            ["search, seconds", f"{row['search/seconds']:.1f}"],
        ]  # fmt: skip
        for other in pick(rows, "cidir idir"):
            if other["row"].endswith(f"seed {seed}"):
                here = min(grid, key=lambda r: abs(r["alpha"] - other["alpha"]))
                change = 100 * (here["tre"] / other["tre/mean"] - 1)
                name = f"alpha {other['alpha']:.2g}: TRE of IDIR trained for it alone, of cIDIR"
                lines.append([name, f"{other['tre/mean']:.3f}, {here['tre']:.3f} mm ({change:+.1f} %)"])
        parts.append(table([f"cIDIR, seed {seed} (initial TRE {row['tre/initial_mean']:.2f} mm)", "measured"], lines))
    return "\n".join(parts)


def main() -> None:
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    print("### POPI T10 / T60\n\n" + popi(rows))
    print("### Known warps of POPI T10\n\n" + errors(pick(rows, "warp")))
    print("### Phantom\n\n" + errors(pick(rows, "phantom")))
    print("### cIDIR\n\n" + cidir(rows))
    print("### A large pair\n\n" + big(pick(rows, "big")))
    print("### Published profiles\n\n" + errors([*pick(rows, "idir"), *pick(rows, "ccidir")]))


if __name__ == "__main__":
    main()
