"""Inverse consistency of two transforms, and written displacements as maps of points."""

import math

import pytest
import torch
from torch import Tensor

from medinr.fields import SIREN, Transform, as_map
from medinr.metrics import InverseConsistencyError, displaced, inverse_consistency
from medinr.space import transform_points
from tests.medinr import grids
from tests.medinr.tolerances import assert_close

MATRIX = torch.tensor([[1.1, 0.2, -0.1, 3], [-0.1, 0.9, 0.1, -2], [0, 0.05, 1.2, 1], [0, 0, 0, 1]], dtype=torch.float64)


def affine(matrix: Tensor):  # type: ignore[no-untyped-def]
    return lambda p: transform_points(matrix, p)


def points(n: int = 50) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64) * 20


def test_an_inverse_leaves_nothing() -> None:
    assert inverse_consistency(affine(MATRIX), affine(torch.linalg.inv(MATRIX)), points()).max() < 1e-10


def test_known_answer() -> None:
    """Two pushes of 3 and 4 mm at a right angle leave 5 mm; the error is of phi first, psi second."""
    one, other = torch.eye(4).double(), torch.eye(4).double()
    one[0, 3], other[1, 3] = 3, 4
    assert_close(inverse_consistency(affine(one), affine(other), points(7)), torch.full((7,), 5.0).double())
    p = points()
    wanted = (transform_points(other @ MATRIX, p) - p).norm(dim=1)
    assert_close(inverse_consistency(affine(MATRIX), affine(other), p), wanted)


def test_of_a_field_and_its_newton_inverse() -> None:
    domain = grids.domain("oblique")
    torch.manual_seed(3)
    phi = Transform(as_map(SIREN(hidden=(16, 16), omega=2.0, zero_output=False)), domain, torch.eye(4).double())
    p = transform_points(domain.voxel_to_world, domain.voxels()[::97].double())
    length = (phi(p) - p).norm(dim=1)
    error = inverse_consistency(phi, lambda q: phi.inverse(q)[0], p)
    assert error.median() < 1e-2 < 0.5 < length.median()


@pytest.mark.parametrize("kind", grids.ALL)
def test_a_written_displacement_moves_points(kind: str) -> None:
    """A linear field is exact between the voxels too; outside the grid nothing is known."""
    domain = grids.domain(kind)
    grid = transform_points(domain.voxel_to_world, domain.voxels().double())
    d = (transform_points(MATRIX, grid) - grid).reshape(*domain.shape, 3)
    move = displaced(d, domain)
    size = torch.tensor(domain.shape).double() - 1
    inside = transform_points(domain.voxel_to_world, torch.rand(40, 3).double() * size)
    assert_close(move(inside), transform_points(MATRIX, inside))
    outside = transform_points(domain.voxel_to_world, size[None] + 3)
    assert move(outside).isnan().all()
    with pytest.raises(ValueError, match="displacement: expected"):
        displaced(d[1:], domain)


def test_metric() -> None:
    domain = grids.domain("identity")
    zero = displaced(torch.zeros(*domain.shape, 3), domain)
    push = torch.eye(4).double()
    metric = InverseConsistencyError()
    centre = transform_points(domain.voxel_to_world, torch.tensor(domain.shape).double()[None] / 2)
    for shift in (0.0, 1.0, 2.0, 1000.0):
        push[0, 3] = shift
        metric.update(affine(push.clone()), zero, centre)
    found = metric.compute()
    assert float(found["consistency/mean"]) == pytest.approx(1)
    assert float(found["consistency/p95"]) == pytest.approx(1.9)
    assert float(found["consistency/outside_percent"]) == 25
    nowhere = InverseConsistencyError()
    nowhere.update(affine(push), zero, centre)
    assert math.isnan(float(nowhere.compute()["consistency/mean"]))
