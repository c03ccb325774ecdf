"""Normalised mutual information on points: known answers, invariances, gradient."""

import math

import pytest
import torch
from torch import Tensor

from medinr.losses import NCC, NMI
from medinr.losses.information import entropy, joint_histogram, mutual_information, parzen_weights
from tests.medinr.tolerances import assert_close

# Entropy of the window at a bin's centre: 1/6, 4/6, 1/6.
WINDOW = -(2 / 6 * math.log(1 / 6) + 4 / 6 * math.log(4 / 6))


def draw(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def centre(bin: int, bins: int = 32) -> float:
    """The value that lies at the centre of a bin."""
    return (bin - 1) / (bins - 3)


def test_window_is_the_cubic_b_spline() -> None:
    values = torch.cat((torch.tensor([0.0, 1.0, 0.5]).double(), draw(200)))
    weights = parzen_weights(values, 20)
    distance = (torch.arange(20) - (1 + values[:, None] * 17)).abs()
    inner, outer = (4 - 6 * distance**2 + 3 * distance**3) / 6, (2 - distance).clamp(min=0) ** 3 / 6
    assert_close(weights, torch.where(distance < 1, inner, outer))
    assert_close(weights.sum(1), torch.ones(203).double())


def test_two_values_that_tell_each_other() -> None:
    """Two far bins, half of the points each: I = ln 2, each entropy ln 2 + that of the window."""
    low, high = centre(6), centre(24)
    a = torch.tensor([low, low, high, high]).double()
    wanted = 1 - math.log(2) / (math.log(2) + WINDOW)
    assert_close(NMI()(a, a), torch.tensor(wanted, dtype=torch.float64))
    assert_close(NMI()(a, 1 - a), torch.tensor(wanted, dtype=torch.float64))


def test_independent_values_score_one() -> None:
    low, high = centre(6), centre(24)
    a, b = torch.tensor([low, low, high, high]).double(), torch.tensor([low, high, low, high]).double()
    assert_close(NMI()(a, b), torch.tensor(1.0).double())
    assert NMI()(draw(20_000), draw(20_000)) > 0.995


def test_information_of_a_joint_table() -> None:
    table = torch.tensor([[0.4, 0.1], [0.2, 0.3]]).double()
    shared, one, other = mutual_information(table)
    rows, columns = table.sum(1), table.sum(0)
    assert_close(shared, (table * (table / (rows[:, None] * columns)).log()).sum())
    assert_close(one, -(rows * rows.log()).sum())
    assert_close(other, entropy(columns))
    assert entropy(torch.tensor([1.0, 0.0])) == 0


def test_other_customary_form() -> None:
    """(H1 + H2) / H12 = 2 / (1 + loss)."""
    a = draw(500)
    b = (a + 0.2 * draw(500)) / 1.2
    p = joint_histogram(a, b)
    _, one, other = mutual_information(p)
    assert_close((one + other) / entropy(p), 2 / (1 + NMI()(a, b)))


@pytest.mark.parametrize("remap", ["inverted", "square root", "folded"])
def test_contrast_hardly_matters(remap: str) -> None:
    """Inversion mirrors the bins: equal. Other maps, up to the width of the bins. Correlation fails at all of them."""
    a = draw(20_000)
    maps = {"inverted": 1 - a, "square root": a.sqrt(), "folded": (2 * a - 1).abs()}
    aligned, unrelated = NMI()(a, maps[remap]), NMI()(a, draw(20_000))
    if remap == "inverted":
        assert_close(aligned, NMI()(a, a))
    # Inherent: a folded value keeps one bit less than there is (of 32 bins, 5 bits, blurred to some 4).
    assert aligned < (0.6 if remap == "folded" else 0.5) < 0.99 < unrelated
    if remap != "square root":
        assert NCC()(a, maps[remap]) > 0.9


def test_more_noise_scores_worse() -> None:
    a, noise = draw(5000), draw(5000)
    losses = [float(NMI()(a, (1 - s) * (1 - a) + s * noise)) for s in (0.0, 0.05, 0.2, 0.5, 1.0)]
    assert losses == sorted(losses) and losses[-1] - losses[0] > 0.4


@pytest.mark.parametrize("bins", [16, 32, 64])
def test_gradient(bins: int) -> None:
    a, b, mask = draw(40), (0.05 + 0.9 * draw(40)).requires_grad_(), draw(40)
    assert torch.autograd.gradcheck(lambda m: NMI(bins)(a, m, mask), (b,))


def test_masked_points_do_not_count() -> None:
    a, b, mask = draw(300), draw(300), (draw(300) > 0.4).double()
    assert_close(NMI()(a, torch.where(mask > 0, b, 1e3), mask), NMI()(a[mask > 0], b[mask > 0]))
    nothing = b.clone().requires_grad_()
    value = NMI()(a, nothing, torch.zeros_like(a))
    value.backward()
    assert nothing.grad is not None and torch.isfinite(value) and torch.isfinite(nothing.grad).all()


def test_constant_image_is_harmless() -> None:
    flat = torch.full((50,), 0.5, requires_grad=True)
    value = NMI()(torch.rand(50), flat)
    value.backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()
    assert float(value.detach()) == pytest.approx(1, abs=1e-4)


def test_too_few_bins() -> None:
    with pytest.raises(ValueError, match="at least 4, got 3"):
        NMI(3)
