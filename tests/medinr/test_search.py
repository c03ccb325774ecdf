"""The search over alpha: criteria, refinement, and what it says of itself."""

import math

import pytest
import torch
from torch import Tensor

from medinr.errors import UserError
from medinr.search import Row, badness, best_row, search

GRID = [[1e-4], [1e-3], [1e-2], [1e-1], [1.0]]


def valley(alpha: Tensor, at: float = 2e-3) -> Row:
    """Best at ``at``; folding falls with alpha, TRE is best elsewhere, Dice the more the better."""
    a = alpha[0].item()
    distance = (math.log10(max(a, 1e-9)) - math.log10(at)) ** 2
    return {"similarity": distance, "dice": 1 - distance / 100, "tre": 1 + abs(math.log10(a) + 1), "folding": 0.0}


def test_refinement_comes_closer_than_the_grid() -> None:
    coarse = search(valley, "similarity", GRID, refinements=0)
    fine = search(valley, "similarity", GRID, refinements=3)
    assert coarse.alpha == [1e-3]
    assert abs(math.log10(fine.alpha[0] / 2e-3)) < abs(math.log10(coarse.alpha[0] / 2e-3)) / 2
    assert len(fine.table) == len(GRID) + 6
    alphas = [row["alpha"] for row in fine.table]
    assert alphas == sorted(alphas)


def test_between_two_values_the_geometric_mean_and_beside_zero_the_half() -> None:
    found = search(lambda a: valley(a, 1e-2), "similarity", GRID, refinements=1)
    new = [row["alpha"] for row in found.table if [row["alpha"]] not in GRID]
    assert new == pytest.approx([10**-2.5, 10**-1.5])
    found = search(lambda a: {"similarity": a[0].item(), "folding": 0.0}, "similarity", [[0.0], [1.0]], refinements=1)
    assert [row["alpha"] for row in found.table] == [0.0, 0.5, 1.0]


def test_each_alpha_is_scored_once() -> None:
    seen: list[float] = []

    def score(alpha: Tensor) -> Row:
        seen.append(alpha[0].item())
        return valley(alpha)

    search(score, "similarity", GRID, refinements=2)
    assert len(seen) == len(set(seen)) == len(GRID) + 4


def test_criteria() -> None:
    results = {c: search(valley, c, GRID, refinements=0) for c in ("dice", "landmarks", "similarity")}  # type: ignore[arg-type]
    assert results["dice"].alpha == [1e-3] and results["landmarks"].alpha == [1e-1]
    assert [r.oracle for r in results.values()] == [False, True, False]
    assert best_row(results["dice"].table, "landmarks") == [1e-1]


def test_folding_bound_holds_but_for_the_oracle() -> None:
    rows = [
        {"alpha": 0.1, "similarity": 0.0, "dice": 0.9, "tre": 1.0, "folding": 5.0},
        {"alpha": 0.2, "similarity": 0.5, "dice": 0.5, "tre": 2.0, "folding": 0.05},
        {"alpha": 0.3, "similarity": 0.6, "dice": 0.4, "tre": 3.0, "folding": 0.0},
    ]
    assert best_row(rows, "similarity", 0.1) == best_row(rows, "dice", 0.1) == [0.2]
    assert best_row(rows, "similarity", 10.0) == [0.1]
    assert best_row(rows, "landmarks", 0.1) == [0.1]
    everything_folds = [{**row, "folding": 9 - 10 * row["alpha"]} for row in rows]
    assert best_row(everything_folds, "similarity", 0.1) == [0.3], "the least folding where nothing is within the bound"


def test_a_score_that_is_not_a_number_never_wins() -> None:
    rows = [{"alpha": 0.1, "similarity": math.nan, "folding": 0.0}, {"alpha": 0.2, "similarity": 3.0, "folding": 0.0}]
    assert best_row(rows, "similarity") == best_row(rows[::-1], "similarity") == [0.2]
    broken = [{"alpha": 0.1, "similarity": 0.0, "folding": math.nan}, rows[1]]
    assert best_row(broken, "similarity") == best_row(broken[::-1], "similarity") == [0.2]


def test_several_alphas_are_searched_on_the_grid_alone() -> None:
    grid = [[a, b] for a in (0.1, 0.5) for b in (0.2, 0.9)]
    found = search(
        lambda a: {"similarity": (a - torch.tensor([0.5, 0.2])).square().sum().item(), "folding": 0.0},
        "similarity",
        grid,
    )
    assert found.alpha == [0.5, 0.2] and len(found.table) == 4
    assert set(found.table[0]) == {"alpha", "alpha1", "similarity", "folding"}


@pytest.mark.parametrize(("criterion", "needs"), [("dice", "mask"), ("landmarks", "landmarks")])
def test_a_criterion_without_its_data_says_so(criterion: str, needs: str) -> None:
    with pytest.raises(UserError, match=f"search by {criterion}: needs a? ?{needs} of both images"):
        badness({"similarity": 1.0, "folding": 0.0}, criterion, 0.1)  # type: ignore[arg-type]
