"""Displacements on grids: integration, composition, control points, finite differences."""

import itertools

import pytest
import torch
from torch import Tensor

from medinr.fields import CubicLattice
from medinr.fields.gridded import GridTransform
from medinr.fields.squaring import (
    compose,
    control_shape,
    dense_spline,
    grid_jet,
    inside,
    scaling_and_squaring,
    voxel_grid,
    warp,
    warp_labels,
)
from medinr.losses import Bending, Diffusion, Jacobian
from medinr.space import Domain, transform_points

SHAPE = (16, 14, 12)


def linear_velocity(matrix: Tensor) -> Tensor:
    """v(x) = M (x - centre), [1, 3, *SHAPE]."""
    centre = torch.tensor([(n - 1) / 2 for n in SHAPE], dtype=torch.float64).view(3, 1, 1, 1)
    return torch.einsum("ij,jxyz->ixyz", matrix, voxel_grid(SHAPE, matrix) - centre)[None]


def test_squaring_is_the_matrix_exponential_of_a_linear_field() -> None:
    """Contracting and turning, so that no path leaves the grid; trilinear interpolation is exact for linear fields."""
    matrix = torch.tensor([[-0.3, 0.2, 0.0], [-0.2, -0.25, 0.1], [0.05, 0.0, -0.4]], dtype=torch.float64)
    velocity = linear_velocity(matrix)
    errors = []
    for squarings in (5, 6, 7, 8):
        u = scaling_and_squaring(velocity, squarings)
        expected = linear_velocity(torch.linalg.matrix_exp(matrix) - torch.eye(3, dtype=torch.float64))
        errors.append(float((u - expected)[:, :, 2:-2, 2:-2, 2:-2].abs().max()))
    assert errors[2] < 0.01
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert ratios == pytest.approx([2, 2, 2], abs=0.1), "the first factor is an Euler step: order one in 2^-n"


def test_no_velocity_no_motion_and_the_opposite_undoes() -> None:
    torch.manual_seed(0)
    assert scaling_and_squaring(torch.zeros(1, 3, *SHAPE)).abs().max() == 0
    control = torch.randn(1, 3, *control_shape(SHAPE, 4), dtype=torch.float64)
    velocity = dense_spline(control, SHAPE, 4)
    u, back = scaling_and_squaring(velocity), scaling_and_squaring(-velocity)
    assert u.abs().max() > 1
    left = compose(back, u)[:, :, 3:-3, 3:-3, 3:-3].abs().mean()
    assert left < 0.03 * u[:, :, 3:-3, 3:-3, 3:-3].abs().mean()


def test_warp_shifts_and_knows_what_is_inside() -> None:
    volume = torch.rand(1, 1, *SHAPE)
    u = torch.zeros(1, 3, *SHAPE)
    u[:, 0] = 2
    u[:, 2] = -1
    moved = warp(volume, u)
    assert torch.allclose(moved[0, 0, :-2, :, 1:], volume[0, 0, 2:, :, :-1], atol=1e-5)
    expected = torch.zeros(SHAPE, dtype=torch.bool)
    expected[:-2, :, 1:] = True
    assert torch.equal(inside(u)[0], expected)


def test_labels_move_with_less_than_a_voxel() -> None:
    """The larger share of a voxel wins: a wall at 0.6 of a voxel moves where the wall between two voxels would."""
    labels = torch.zeros(SHAPE, dtype=torch.int32)
    labels[8:] = 7
    u = torch.zeros(3, *SHAPE)
    u[0] = 0.6
    moved = warp_labels(labels, u)
    assert torch.equal(moved[:-1], labels[1:]) and moved.dtype == labels.dtype
    assert torch.equal(warp_labels(labels, u - u), labels)
    u[0] = 0.4
    assert torch.equal(warp_labels(labels, u), labels)


@pytest.mark.parametrize("shape", [(16, 12, 8), (13, 10, 7)])
def test_dense_spline_is_the_control_lattice(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    domain = Domain.of(shape, torch.eye(4))
    lattice = CubicLattice(spacings=[4.0], unit="voxel")
    lattice.cover(domain)
    assert list(lattice.shapes[0]) == control_shape(shape, 4)
    control = torch.randn(1, 3, *lattice.shapes[0])
    lattice.levels[0].data = control[0].flatten(1).T.contiguous()
    x = transform_points(domain.voxel_to_normalised, domain.voxels())
    with torch.no_grad():
        expected = lattice(x).reshape(*shape, 3).movedim(-1, 0)
    assert torch.allclose(dense_spline(control, shape, 4)[0], expected, atol=1e-4)


def test_jet_of_a_grid_is_exact_for_quadratic_fields() -> None:
    """u = (x^2 + y z, 3 x, z) with unequal voxels: second derivatives exact, first ones forward differences."""
    spacing = (2.0, 1.0, 3.0)
    x, y, z = voxel_grid((8, 7, 6), torch.zeros((), dtype=torch.float64)) * torch.tensor(spacing).view(3, 1, 1, 1)
    u = torch.stack((x**2 + y * z, 3 * x, z))
    jet = grid_jet(u, spacing, 10.0, 2)
    assert jet.first is not None and jet.second is not None
    assert len(jet.value) == 6 * 5 * 4
    hessian = {pair: jet.second[m] for m, pair in enumerate(jet.pairs)}
    assert torch.allclose(hessian[0, 0][:, 0], torch.tensor(20.0, dtype=torch.float64)), "2 / mm is 20 per 10 mm"
    assert torch.allclose(hessian[1, 2][:, 0], torch.tensor(10.0, dtype=torch.float64))
    assert torch.allclose(hessian[0, 1], torch.zeros((), dtype=torch.float64), atol=1e-9)
    assert torch.allclose(jet.jacobian[:, 1, 0], torch.tensor(3.0, dtype=torch.float64))
    assert torch.allclose(jet.jacobian[:, 2, 2], torch.tensor(1.0, dtype=torch.float64))


def test_regularizers_of_the_project_take_the_jet_of_a_grid() -> None:
    matrix = 0.1 * torch.eye(3, dtype=torch.float64)
    u = linear_velocity(matrix)[0]
    jet = grid_jet(u, (1.0, 1.0, 1.0), 100.0, 2)
    assert float(Diffusion(1.0)(jet)) == pytest.approx(0.03)
    assert float(Jacobian(1.0)(jet)) == pytest.approx(1.1**3 - 1)
    assert float(Bending(1.0)(jet)) == pytest.approx(0, abs=1e-9)


def test_grid_transform_is_the_affine_map_it_holds() -> None:
    """On an oblique grid, with a start: values, Jacobian and inverse."""
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = turn * torch.tensor([2.0, 1.5, 3.0])
    affine[:3, 3] = torch.tensor([10.0, -20.0, 5.0])
    grid = Domain.of((10, 12, 8), affine)
    matrix = torch.tensor([[0.1, 0.02, 0], [0, -0.05, 0.03], [0.04, 0, 0.08]], dtype=torch.float64)
    world = transform_points(grid.voxel_to_world, grid.voxels().double())
    d = ((world - world.mean(0)) @ matrix.T).T.reshape(3, *grid.shape)
    start = torch.eye(4, dtype=torch.float64)
    start[:3, :3] = 1.2 * turn
    transform = GridTransform(d, grid, start)
    some = world.reshape(*grid.shape, 3)[2:-2, 2:-2, 2:-2].reshape(-1, 3)
    expected = (some + (some - world.mean(0)) @ matrix.T) @ start[:3, :3].T
    assert torch.allclose(transform(some), expected, atol=1e-3)
    assert torch.allclose(
        transform.jacobian(some), start[:3, :3] @ (torch.eye(3).double() + matrix).expand(len(some), 3, 3), atol=1e-4
    )
    back, residual = transform.inverse(transform(some))
    assert residual.max() < 1e-3 and torch.allclose(back, some, atol=1e-2)
