"""Voxel, world and normalised coordinates."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from medinr.space import Domain, Image, transform_points
from tests.medinr import grids
from tests.medinr.tolerances import assert_close


def corners(domain: Domain) -> torch.Tensor:
    """The eight outer voxel edges."""
    ends = [(-0.5, n - 0.5) for n in domain.shape]
    return torch.tensor([[i, j, k] for i in ends[0] for j in ends[1] for k in ends[2]], dtype=torch.float64)


@pytest.mark.parametrize("kind", grids.ALL)
@pytest.mark.parametrize("scale", ["isotropic", "oriented", "per-axis"])
def test_there_and_back(kind: str, scale: str) -> None:
    domain = grids.domain(kind).with_scale(scale)  # type: ignore[arg-type]
    p = torch.rand(50, 3, dtype=torch.float64) * 20
    for there, back in (
        (domain.voxel_to_world, domain.world_to_voxel),
        (domain.world_to_normalised, domain.normalised_to_world),
        (domain.voxel_to_normalised, domain.normalised_to_voxel),
    ):
        assert_close(transform_points(back, transform_points(there, p)), p)
    direct = transform_points(domain.voxel_to_normalised, p)
    assert_close(direct, transform_points(domain.world_to_normalised, transform_points(domain.voxel_to_world, p)))


@pytest.mark.parametrize("kind", grids.ALL)
def test_world_is_nibabels(kind: str) -> None:
    domain = grids.domain(kind)
    p = np.random.default_rng(0).random((20, 3)) * 15
    expected = nib.affines.apply_affine(grids.affine(kind), p)
    assert_close(transform_points(domain.voxel_to_world, torch.from_numpy(p)), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", grids.RIGID)
def test_isotropic_keeps_angles_and_fits_the_longest_side(kind: str) -> None:
    domain = grids.domain(kind)
    x = transform_points(domain.voxel_to_normalised, corners(domain))
    assert_close(x.mean(dim=0), torch.zeros(3).double())
    sides = torch.tensor(domain.sides_mm)
    assert_close(x.norm(dim=1).max(), sides.norm() / sides.max())
    linear = domain.normalised_to_world[:3, :3]
    assert_close(linear, torch.eye(3).double() * domain.unit_mm)
    assert domain.unit_mm == pytest.approx(max(n * s for n, s in zip(domain.shape, domain.spacing, strict=True)) / 2)


@pytest.mark.parametrize("kind", grids.ALL)
def test_oriented_axes_are_orthogonal_and_next_to_the_worlds(kind: str) -> None:
    domain = grids.domain(kind).with_scale("oriented")
    axes = domain.normalised_to_world[:3, :3] / domain.unit_mm
    assert_close(axes.T @ axes, torch.eye(3).double())
    assert (axes.diagonal() > 0).all()
    if kind in grids.RIGID:  # each is a voxel axis
        assert_close(domain.voxel_to_normalised[:3, :3].abs().sort(dim=1).values[:, :2], torch.zeros(3, 2).double())
    if bool(((grids.domain(kind).voxel_to_world[:3, :3] != 0).sum(0) == 1).all()):
        assert torch.equal(domain.normalised_to_world, domain.with_scale("isotropic").normalised_to_world)


@pytest.mark.parametrize("kind", grids.ALL)
def test_per_axis_fills_the_cube(kind: str) -> None:
    domain = grids.domain(kind).with_scale("per-axis")
    assert_close(transform_points(domain.voxel_to_normalised, corners(domain)).abs(), torch.ones(8, 3).double())


@pytest.mark.parametrize("kind", grids.ALL)
def test_resampling_leaves_normalised_coordinates(kind: str) -> None:
    """Voxels of half the size over the same box: the same centre and scale."""
    coarse = grids.domain(kind)
    affine = grids.affine(kind)
    fine_affine = affine @ np.diag([0.5, 0.5, 0.5, 1])
    fine_affine[:3, 3] -= affine[:3, :3] @ np.full(3, 0.25)
    fine = Domain.of([2 * n for n in coarse.shape], fine_affine)
    assert_close(fine.world_to_normalised, coarse.world_to_normalised)


def test_voxels_run_in_c_order() -> None:
    domain = Domain.of((2, 3, 4), np.eye(4))
    expected = torch.from_numpy(np.argwhere(np.ones((2, 3, 4)))).float()
    assert torch.equal(domain.voxels(), expected)
    assert torch.equal(domain.voxels(5, 11), expected[5:11])
    assert torch.equal(domain.voxels(20, 99), expected[20:])


def test_contains_voxels_up_to_the_outer_edges() -> None:
    domain = Domain.of((2, 3, 4), np.eye(4))
    points = torch.tensor([[-0.5, 0, 0], [-0.51, 0, 0], [1.5, 2.5, 3.5], [1.5, 2.5, 3.51]])
    assert domain.contains_voxels(points).tolist() == [True, False, True, False]
    assert domain.contains_voxels(points, margin=0).tolist() == [False, False, False, False]


def test_same_grid() -> None:
    domain = grids.domain("oblique")
    moved = grids.affine("oblique")
    moved[0, 3] += 5e-3
    assert domain.same_grid(Domain.of(domain.shape, moved), tolerance_mm=1e-2)
    assert not domain.same_grid(Domain.of(domain.shape, moved))
    assert not domain.same_grid(grids.domain("oblique", (18, 22, 14)))


def test_a_domain_survives_json_and_is_hashable() -> None:
    domain = grids.domain("sheared").with_scale("per-axis")
    again = Domain.from_dict(json.loads(json.dumps(domain.to_dict())))
    assert again == domain and hash(again) == hash(domain)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="4 x 4"):
        Domain.of((2, 3, 4), np.eye(3))
    with pytest.raises(ValueError, match="three"):
        Domain.of((2, 3), np.eye(4))
    with pytest.raises(ValueError, match="expected values"):
        Image(torch.zeros(1, 2, 3, 5), Domain.of((2, 3, 4), np.eye(4)))
