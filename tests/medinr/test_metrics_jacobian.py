"""Finite differences against known fields; folding; the spread of log det."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from medinr.metrics import (
    FoldingPercentage,
    StdLogJacobian,
    finite_difference_jacobian,
    folding_percent,
    jacobian,
    sdlogj,
)
from medinr.space import Domain, transform_points
from tests.medinr import grids
from tests.medinr.tolerances import assert_close

LINEAR = torch.tensor([[0.1, -0.2, 0.05], [0.3, 0.0, 0.1], [-0.15, 0.2, -0.4]], dtype=torch.float64)


def world_grid(domain: Domain) -> Tensor:
    return transform_points(domain.voxel_to_world, domain.voxels().double()).reshape(*domain.shape, 3)


@pytest.mark.parametrize("kind", grids.ALL)
def test_an_affine_map_is_exact(kind: str) -> None:
    """Everywhere, border included, on every kind of grid."""
    domain = grids.domain(kind)
    det = finite_difference_jacobian(world_grid(domain) @ LINEAR.T + 3, domain)
    assert_close(det, torch.full(domain.shape, torch.linalg.det(torch.eye(3).double() + LINEAR).item()).double())


def test_slabs_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = grids.domain("oblique")
    u = torch.randn(*domain.shape, 3, dtype=torch.float64)
    whole = finite_difference_jacobian(u, domain)
    for voxels in (1, 5 * 22 * 15):
        monkeypatch.setattr(jacobian, "_SLAB_VOXELS", voxels)
        assert torch.equal(finite_difference_jacobian(u, domain), whole)


@pytest.mark.parametrize("kind", ["identity", "sheared"])
def test_second_order(kind: str) -> None:
    """Half the spacing, a quarter of the error, inside."""

    def error(refine: int) -> float:
        affine = grids.affine(kind) @ np.diag([2 / refine] * 3 + [1])
        domain = Domain.of((8 * refine, 7 * refine, 6 * refine), affine)
        x, y, z = (world_grid(domain) / 9).unbind(-1)
        u = torch.stack((torch.sin(y) + 0.5 * x, torch.sin(x + z), torch.cos(x)), dim=-1)
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        rows = (
            torch.stack((1 + 0.5 * one / 9, torch.cos(y) / 9, zero), -1),
            torch.stack((torch.cos(x + z) / 9, one, torch.cos(x + z) / 9), -1),
            torch.stack((-torch.sin(x) / 9, zero, one), -1),
        )
        truth = torch.linalg.det(torch.stack(rows, -2))
        inside = (slice(refine, -refine),) * 3  # the same part of space for both
        return (finite_difference_jacobian(u, domain) - truth)[inside].abs().max().item()

    assert math.log2(error(2) / error(4)) == pytest.approx(2, abs=0.3)


def test_one_slice_and_wrong_shapes() -> None:
    domain = Domain.of((5, 6, 1), np.eye(4))
    u = torch.zeros(5, 6, 1, 3)
    u[..., 0] = torch.arange(5.0)[:, None, None] * 0.5
    assert_close(finite_difference_jacobian(u, domain), torch.full((5, 6, 1), 1.5))
    with pytest.raises(ValueError, match="displacement"):
        finite_difference_jacobian(u[1:], domain)


def test_folding_counts_zero_and_minds_the_mask() -> None:
    det = torch.tensor([1.0, 0.0, -2.0, 3.0]).reshape(2, 2, 1)
    assert folding_percent(det) == 50
    assert folding_percent(det, torch.tensor([True, True, False, True]).reshape(2, 2, 1)) == pytest.approx(100 / 3)
    metric = FoldingPercentage()
    metric.update(det)
    metric.update(torch.ones(2, 2, 3))
    assert metric.compute().item() == pytest.approx(100 * 2 / 16)


def test_a_field_that_folds() -> None:
    """u = -2 x turns space over; u = -x/2 does not."""
    domain = grids.domain("left-handed")
    grid = world_grid(domain)
    u = torch.zeros_like(grid)
    u[..., 0] = -2 * grid[..., 0]
    assert folding_percent(finite_difference_jacobian(u, domain)) == 100
    assert folding_percent(finite_difference_jacobian(u / 4, domain)) == 0


def test_sdlogj_is_of_the_positive_ones() -> None:
    det = torch.tensor([math.e, math.e, 1.0, 1.0, -5.0, 0.0]).reshape(1, 2, 3)
    assert sdlogj(det) == pytest.approx(0.5, abs=1e-6)
    mask = torch.tensor([True, True, False, False, True, True]).reshape(1, 2, 3)
    assert sdlogj(det, mask) == pytest.approx(0, abs=1e-6)
    assert math.isnan(sdlogj(-torch.ones(1, 1, 1)))


def test_sdlogj_metric_pools_the_cases() -> None:
    first, second = torch.rand(3, 4, 5) + 0.5, torch.rand(3, 4, 5) * 2 - 0.2
    metric = StdLogJacobian()
    metric.update(first)
    metric.update(second)
    both = torch.cat((first, second))
    assert metric.compute().item() == pytest.approx(sdlogj(both), rel=1e-9)
