"""Dice and HD95."""

import math

import numpy as np
import pytest
import torch

from medinr.metrics import Dice, HausdorffDistance95, dice, hd95
from medinr.space import Domain
from tests.medinr.tolerances import assert_close

SPACED = Domain.of((20, 20, 20), np.diag([1.0, 2.0, 3.0, 1.0]))


def block(start: int, label: int = 1, axis: int = 0) -> torch.Tensor:
    """A cube of 6 voxels a side that begins at ``start`` along an axis."""
    volume = torch.zeros(20, 20, 20, dtype=torch.int16)
    low = [5, 5, 5]
    low[axis] = start
    i, j, k = low
    volume[i : i + 6, j : j + 6, k : k + 6] = label
    return volume


def test_known_answer() -> None:
    """Shifted by two of six voxels, two thirds are shared."""
    assert dice(block(5), block(7)) == {1: pytest.approx(2 / 3)}
    assert dice(block(5), block(5)) == {1: 1.0}
    assert dice(block(5), block(12)) == {1: 0.0}
    assert dice(block(5) > 0, block(7) > 0) == {1: pytest.approx(2 / 3)}


@pytest.mark.parametrize("spread", [1, 7, 3_000_000])
def test_labels_by_the_definition(spread: int) -> None:
    """Also for large label numbers, which are handled another way, and for negative ones."""
    a, b = (torch.randint(-1, 5, (6, 7, 8)) * spread for _ in range(2))
    expected = {}
    for k in sorted({int(v) for v in torch.cat((a, b)).unique()} - {0}):
        expected[k] = 2 * ((a == k) & (b == k)).sum().item() / ((a == k).sum() + (b == k).sum()).item()
    assert dice(a, b) == pytest.approx(expected)
    assert dice(a, b, [spread, 99]) == pytest.approx({spread: expected[spread]})


def test_a_label_in_one_volume_only_scores_zero() -> None:
    assert dice(block(5, 3), block(5, 4)) == {3: 0.0, 4: 0.0}
    with pytest.raises(ValueError, match="one grid"):
        dice(block(5), block(5)[1:])


def test_dice_metric_is_the_mean_over_cases() -> None:
    metric = Dice([1, 2, 9])
    metric.update(block(5), block(7))
    metric.update(block(5), block(5))
    metric.update(block(5, 2), block(12, 2))
    found = metric.compute()
    assert set(found) == {"dsc/mean", "dsc/label_1", "dsc/label_2"}
    assert_close(found["dsc/label_1"], torch.tensor(5 / 6).double(), 1e-7)
    assert_close(found["dsc/mean"], torch.tensor(5 / 12).double(), 1e-7)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hd95_is_in_mm(axis: int) -> None:
    """A cube pushed by three voxels: its end faces move by three spacings, and they are more than 5% of the surface."""
    found = hd95(block(5, axis=axis), block(8, axis=axis), SPACED)
    assert found == {1: pytest.approx(3 * SPACED.spacing[axis])}


def test_hd95_without_a_partner() -> None:
    found = hd95(block(5, 3), block(5, 4), SPACED, [3, 4, 5])
    assert set(found) == {3, 4} and all(math.isnan(v) for v in found.values())
    metric = HausdorffDistance95()
    metric.update(block(5), block(8), SPACED)
    metric.update(block(5), block(5), SPACED)
    metric.update(block(5, 3), block(5, 4), SPACED)
    assert metric.compute().item() == pytest.approx(1.5)
