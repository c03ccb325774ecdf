"""Search over a conditioned method's alpha: a grid, then a refinement around the best, by one of three criteria."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from medinr.errors import UserError

Criterion = Literal["dice", "landmarks", "similarity"]
Row = dict[str, float]
Score = Callable[[Tensor], Row]
"""alpha [p] -> similarity, folding, bending, and dice and tre where masks and landmarks are known."""


@dataclass(frozen=True)
class SearchResult:
    """The chosen alpha, the criterion that chose it, the table of all that was tried (by alpha), and seconds."""

    alpha: list[float]
    criterion: Criterion
    oracle: bool
    table: list[Row] = field(default_factory=list)
    seconds: float = 0.0


def badness(row: Row, criterion: Criterion, folding_bound: float) -> tuple[float, float]:
    """Sort key of a row, lower is better: first whether it folds beyond the bound, then the criterion."""
    key = {"dice": "dice", "landmarks": "tre", "similarity": "similarity"}[criterion]
    if key not in row:
        needs = {"dice": "a mask of both images", "landmarks": "landmarks of both images", "similarity": "images"}
        raise UserError(f"search by {criterion}: needs {needs[criterion]}, and the data has none")
    value = -row[key] if criterion == "dice" else row[key]
    excess = max(0.0, row["folding"] - folding_bound) if criterion != "landmarks" else 0.0
    if math.isnan(value) or math.isnan(row["folding"]):  # no number is smaller than NaN: it would win if it came first
        return math.inf, math.inf
    return excess, value


def best_row(table: Sequence[Row], criterion: Criterion, folding_bound: float = 0.1) -> list[float]:
    """The alpha of the best row of a search's table by any criterion."""
    row = min(table, key=lambda r: badness(r, criterion, folding_bound))
    return [v for k, v in row.items() if k.startswith("alpha")]


def search(
    score: Score,
    criterion: Criterion,
    grid: Sequence[Sequence[float]],
    refinements: int = 2,
    folding_bound: float = 0.1,
) -> SearchResult:
    """Score every alpha of ``grid`` [n][p]; a single alpha is then refined around the best, ``refinements`` times.

    El Hadramy et al. (cIDIR, arXiv 2507.12953) search a grid by the Dice of warped against fixed masks. Landmarks make
    it an oracle, and the result says so. Without any mask: the best similarity among those with at most
    ``folding_bound`` percent of folded points. In between two grid values the geometric mean is tried, because the
    effect of a weight is spread over decades.
    """
    begin = time.perf_counter()
    rows = {tuple(a): score(torch.tensor(a)) for a in grid}

    def best() -> tuple[float, ...]:
        return min(rows, key=lambda a: badness(rows[a], criterion, folding_bound))

    if len(grid[0]) == 1:
        for _ in range(refinements):
            tried = sorted(rows)
            i = tried.index(best())
            for j in (i - 1, i):
                if 0 <= j < len(tried) - 1:
                    low, high = tried[j][0], tried[j + 1][0]
                    middle = ((low * high) ** 0.5 if low > 0 else high / 2,)
                    rows.setdefault(middle, score(torch.tensor(middle)))
    chosen = best()
    table = [{**{f"alpha{k}" if k else "alpha": v for k, v in enumerate(a)}, **rows[a]} for a in sorted(rows)]
    return SearchResult(list(chosen), criterion, criterion == "landmarks", table, time.perf_counter() - begin)
