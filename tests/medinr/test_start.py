"""The rigid or affine start: known transforms are found, and nothing is made up where there is nothing to find."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from medinr.methods.levels import robust_window
from medinr.space import Domain, Image, transform_points
from medinr.start import affine_matrix, centre_of_mass, coarse_image, correlation_ratio, find_start, rotation
from tests.medinr import pairs

TURN = torch.tensor([0.12, -0.18, 0.2]).double()  # up to 11 degrees
SHIFT = torch.tensor([12.0, -8.0, 6.0]).double()  # mm
STRETCH = torch.tensor([0.08, -0.08, 0.05, 0.04, -0.05, 0.03]).double()
RIGID = affine_matrix(torch.cat((TURN, SHIFT)))
AFFINE = affine_matrix(torch.cat((TURN / 2, SHIFT, STRETCH)))
CROPPED = Domain.of((32, 32, 22), [[3, 0, 0, -46.5], [0, 3, 0, -46.5], [0, 0, 3, -46.5], [0, 0, 0, 1]])


def start(fixed: Image, moving: Image, kind: str, **options: Any) -> Tensor:
    windows = [robust_window(i) for i in (fixed, moving)]
    return find_start(fixed, moving, kind, windows, **options)  # type: ignore[arg-type]


def error(found: Tensor, truth: Tensor) -> float:
    """Mean distance in mm over a body of 60 mm."""
    points = pairs.points(200, 30.0)
    return (transform_points(found, points) - transform_points(truth, points)).norm(dim=1).mean().item()


@pytest.mark.parametrize(("kind", "truth"), [("rigid", RIGID), ("affine", RIGID), ("affine", AFFINE)])
def test_known_transform_is_found(kind: str, truth: Tensor) -> None:
    fixed = pairs.sampled(pairs.CUBE, pairs.blob, pairs.affine_warp(truth))
    moving = pairs.sampled(pairs.CUBE, pairs.blob)
    assert error(torch.eye(4).double(), truth) > 10
    assert error(start(fixed, moving, kind), truth) < 1


def test_moving_image_cropped_by_30_percent() -> None:
    fixed = pairs.sampled(pairs.CUBE, pairs.blob, pairs.affine_warp(RIGID))
    moving = pairs.sampled(CROPPED, pairs.blob)
    assert error(start(fixed, moving, "rigid"), RIGID) < 1


@pytest.mark.parametrize(
    ("degrees", "axis", "multimodal"),
    [(35.0, (1.0, 1.0, 1.0), False), (-30.0, (1.0, 0.0, 0.0), True), (60.0, (0.0, 0.3, 1.0), True)],
)
def test_large_turns_of_a_cropped_image(degrees: float, axis: tuple[float, ...], multimodal: bool) -> None:
    vector = torch.nn.functional.normalize(torch.tensor(axis).double(), dim=0) * math.radians(degrees)
    truth = affine_matrix(torch.cat((vector, SHIFT)))
    fixed = pairs.sampled(pairs.CUBE, pairs.blob, pairs.affine_warp(truth))
    moving = pairs.sampled(CROPPED, pairs.blob)
    if multimodal:
        moving = replace(moving, data=1000 - moving.data)
    assert error(start(fixed, moving, "rigid", multimodal=multimodal), truth) < 1


def test_small_and_large_bodies_are_searched_alike() -> None:
    """Every length a twentieth, as from a thorax to a mouse: the same start, a twentieth."""
    size = 0.05
    scale = torch.diag(torch.tensor([size, size, size, 1.0]).double())

    def scaled(image: Image) -> Image:
        return replace(image, domain=Domain.of(image.domain.shape, scale @ image.domain.voxel_to_world))

    fixed = pairs.sampled(pairs.CUBE, pairs.blob, pairs.affine_warp(AFFINE))
    moving = pairs.sampled(pairs.CUBE, pairs.blob)
    plain = start(fixed, moving, "affine")
    found = start(scaled(fixed), scaled(moving), "affine")
    assert error(torch.linalg.inv(scale) @ found @ scale, plain) < 0.1


def test_coarser_anisotropic_voxels_in_another_order() -> None:
    fixed = pairs.sampled(pairs.CUBE, pairs.blob, pairs.affine_warp(AFFINE))
    other = Domain.of((16, 24, 20), [[0, -4, 0, 46], [0, 0, 5, -47.5], [-6, 0, 0, 45], [0, 0, 0, 1]])
    assert error(start(fixed, pairs.sampled(other, pairs.blob), "affine"), AFFINE) < 1


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_slices_turn_in_their_plane(kind: str) -> None:
    """A single slice, oblique in space: the start moves it within its plane and leaves its normal alone."""
    tilt = rotation(torch.tensor([0.4, 0.0, 0.0]).double())
    affine = torch.eye(4).double()
    affine[:3, :3] = tilt @ torch.diag(torch.tensor([2.0, 2.0, 5.0]).double())
    affine[:3, 3] = tilt @ torch.tensor([-47.0, -47.0, -8.0]).double()
    plane = Domain.of((48, 48, 1), affine)
    normal = tilt[:, 2]
    truth = affine_matrix(torch.cat((normal * math.radians(25), tilt @ torch.tensor([6.0, -4.0, 0.0]).double())))
    centre = torch.eye(4).double()
    centre[:3, 3] = plane.normalised_to_world[:3, 3]
    truth = centre @ truth @ torch.linalg.inv(centre)
    moving = pairs.sampled(plane, pairs.blob)
    fixed = pairs.sampled(plane, pairs.blob, pairs.affine_warp(truth))
    found = start(fixed, moving, kind)
    world = transform_points(plane.voxel_to_world, plane.voxels().double())
    world = world[pairs.blob(world) > 300]
    assert (transform_points(found, world) - transform_points(truth, world)).norm(dim=1).mean() < 1
    assert torch.allclose(found[:3, :3] @ normal, normal, atol=1e-6)


def test_an_affine_that_harms_the_still_parts_is_refused() -> None:
    """A breathing body: what moves correlates better after an affine, but most of the body stands still."""

    def body(organ: float) -> pairs.Warp:
        centre = torch.tensor([organ, 0, 0])
        return lambda w: 0.3 * pairs.texture(w) + 3000 * torch.exp(-((w - centre) / 14).square().sum(1))

    fixed, moving = pairs.sampled(pairs.CUBE, body(25.0)), pairs.sampled(pairs.CUBE, body(11.0))
    points = pairs.points(400, 40.0)
    away = points[points[:, 0] < 10]
    found = start(fixed, moving, "affine")
    assert (transform_points(found, away) - away).norm(dim=1).mean() < 1


def test_a_mask_says_what_the_start_follows() -> None:
    """Two bodies that part: the start follows the one in the mask."""
    middle = torch.tensor([24.0, 0.0, 0.0]).double()

    def bodies(world: Tensor, left: float, right: float) -> Tensor:
        along = torch.tensor([0.0, 1.0, 0.0]).double()
        return pairs.blob(2 * (world + middle - left * along)) + pairs.blob(2 * (world - middle - right * along))

    fixed = pairs.sampled(pairs.CUBE, lambda w: bodies(w, 0.0, 0.0))
    moving = pairs.sampled(pairs.CUBE, lambda w: bodies(w, 6.0, -6.0))
    where = transform_points(pairs.CUBE.voxel_to_world, pairs.CUBE.voxels().double())
    for side, shift in ((-1, 6.0), (1, -6.0)):
        mask = ((where - side * middle).norm(dim=1) < 15).reshape(pairs.CUBE.shape)
        moved = transform_points(start(fixed, moving, "rigid", fixed_mask=mask), side * middle[None])
        assert torch.allclose(moved - side * middle, torch.tensor([[0.0, shift, 0.0]]).double(), atol=2.0)


def test_images_far_apart_in_the_world_are_brought_together() -> None:
    truth = torch.eye(4).double()
    truth[:3, 3] = torch.tensor([200.0, -150.0, 90.0])
    affine = pairs.CUBE.voxel_to_world.clone()
    affine[:3, 3] += truth[:3, 3]
    fixed = pairs.sampled(pairs.CUBE, pairs.blob)
    moving = Image(fixed.data, Domain.of(pairs.CUBE.shape, affine))
    assert error(start(fixed, moving, "rigid"), truth) < 1
    mask = (fixed.data[0] > 400) & (torch.arange(32) > 16)  # off the centre
    assert error(start(fixed, moving, "rigid", fixed_mask=mask), truth) < 1, "one mask says nothing of the other image"


def test_identity_is_kept_where_nothing_is_better() -> None:
    image = pairs.sampled(pairs.CUBE, pairs.blob)
    for kind in ("none", "affine"):
        assert torch.equal(start(image, image, kind), torch.eye(4).double())


def test_same_seed_same_start() -> None:
    fixed = pairs.sampled(pairs.CUBE, pairs.blob, pairs.affine_warp(RIGID))
    moving = pairs.sampled(pairs.CUBE, pairs.blob)
    assert torch.equal(start(fixed, moving, "rigid"), start(fixed, moving, "rigid"))


def test_rotation_is_one() -> None:
    r = rotation(torch.tensor([0.0, 0.0, torch.pi / 2]).double())
    assert torch.allclose(r, torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]).double(), atol=1e-6)
    r = rotation(TURN)
    assert torch.allclose(r @ r.T, torch.eye(3).double()) and torch.linalg.det(r) > 0


def test_affine_matrix_is_a_turn_of_the_stretched_space_and_a_shift() -> None:
    m = affine_matrix(torch.stack([torch.cat((TURN, SHIFT, STRETCH)), torch.zeros(12).double()]))
    assert torch.equal(m[1], torch.eye(4).double())
    assert torch.allclose(transform_points(m[0], torch.zeros(1, 3).double())[0], SHIFT)
    assert torch.linalg.det(m[0, :3, :3]).log().item() == pytest.approx(STRETCH[:3].sum().item(), abs=1e-9)
    upper = rotation(TURN).T @ m[0, :3, :3]
    assert torch.allclose(upper.tril(-1), torch.zeros(3, 3).double(), atol=1e-12)


def test_centre_of_mass() -> None:
    volume = torch.zeros(1, 32, 32, 32)
    volume[0, 4, 10, 20] = 3.0
    volume[0, 8, 10, 20] = 1.0
    expected = (
        pairs.CUBE.voxel_to_world[:3, :3] @ torch.tensor([5.0, 10, 20]).double() + pairs.CUBE.voxel_to_world[:3, 3]
    )
    assert torch.allclose(centre_of_mass(volume, pairs.CUBE), expected)
    assert torch.allclose(centre_of_mass(volume, pairs.CUBE, volume[0] > 2)[0], torch.tensor(-34.5).double())
    assert torch.allclose(centre_of_mass(100 - volume, pairs.CUBE), expected, atol=1e-3), "bright or dark"


def test_coarse_image_keeps_the_place_of_things() -> None:
    """A ramp along the world stays the same function of the world, whatever the voxels."""
    world = torch.tensor([1.0, -2.0, 0.5]).double()
    for shape, affine in (((33, 40, 20), torch.diag(torch.tensor([1.0, -0.8, 3, 1]))), ((45, 45, 45), torch.eye(4))):
        image = pairs.sampled(Domain.of(shape, affine), lambda p: p @ world)
        coarse = coarse_image(image, 5.0)
        expected = pairs.sampled(coarse.domain, lambda p: p @ world)
        assert max(coarse.data.shape) < max(shape)
        middle = tuple(slice(n // 3, n - n // 3) for n in coarse.domain.shape)
        assert torch.allclose(coarse.data[0][middle], expected.data[0][middle], atol=0.6)


def test_correlation_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    fixed = torch.rand(4000, generator=generator)
    other = torch.rand(4000, generator=generator)
    weight = (fixed > 0.3).float()
    moved = torch.stack((1 - fixed, (fixed * 9).sin(), other, torch.where(fixed > 0.3, fixed, other)))
    ratio = correlation_ratio(fixed, moved, torch.stack((torch.ones(4000),) * 3 + (weight,)))
    assert (ratio[[0, 1, 3]] > 0.93).all(), "any function of the fixed image, where the weight is"
    assert ratio[2] < 0.02
