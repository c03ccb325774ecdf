"""The rigid or affine start: known transforms are found, and nothing is made up where there is nothing to find."""

import pytest
import torch
from torch import Tensor

from medinr.methods.levels import robust_window
from medinr.space import Domain, Image, transform_points
from medinr.start import affine_matrix, centre_of_mass, find_start, rotation
from tests.medinr import pairs

TURN = torch.tensor([0.12, -0.18, 0.2]).double()  # up to 11 degrees
SHIFT = torch.tensor([0.12, -0.08, 0.06]).double()  # of 100 mm
STRETCH = torch.tensor([0.08, -0.08, 0.05, 0.04, -0.05, 0.03]).double()
RIGID = affine_matrix(torch.cat((TURN, SHIFT)), torch.zeros(3).double())
AFFINE = affine_matrix(torch.cat((TURN / 2, SHIFT, STRETCH)), torch.zeros(3).double())
CROPPED = Domain.of((32, 32, 22), [[3, 0, 0, -46.5], [0, 3, 0, -46.5], [0, 0, 3, -46.5], [0, 0, 0, 1]])


def start(fixed: Image, moving: Image, kind: str, **masks: Tensor | None) -> Tensor:
    windows = [robust_window(i) for i in (fixed, moving)]
    return find_start(fixed, moving, kind, windows, **masks)  # type: ignore[arg-type]


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
    assert error(start(fixed, moving, "rigid", fixed_mask=mask, moving_mask=mask), truth) < 1


def test_identity_is_kept_where_nothing_is_better() -> None:
    image = pairs.sampled(pairs.CUBE, pairs.blob)
    for kind in ("none", "rigid", "affine"):
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


def test_affine_matrix_turns_about_the_centre() -> None:
    centre = torch.tensor([5.0, -7.0, 11.0]).double()
    m = affine_matrix(torch.cat((TURN, SHIFT, STRETCH)), centre)
    assert torch.allclose(transform_points(m, centre[None])[0], centre + 100 * SHIFT)
    assert torch.linalg.det(m[:3, :3]).log().item() == pytest.approx(STRETCH[:3].sum().item(), abs=1e-9)


def test_centre_of_mass() -> None:
    volume = torch.zeros(1, 32, 32, 32)
    volume[0, 4, 10, 20] = 3.0
    volume[0, 8, 10, 20] = 1.0
    expected = (
        pairs.CUBE.voxel_to_world[:3, :3] @ torch.tensor([5.0, 10, 20]).double() + pairs.CUBE.voxel_to_world[:3, 3]
    )
    assert torch.allclose(centre_of_mass(volume, pairs.CUBE), expected)
    assert torch.allclose(centre_of_mass(volume, pairs.CUBE, volume[0] > 2)[0], torch.tensor(-34.5).double())
