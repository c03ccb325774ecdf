"""Neighbourhoods, mean displacements, templates, label fusion: known answers."""

import math

import pytest
import torch
from torch import Tensor

from medinr import metrics
from medinr.fields.squaring import warp
from medinr.losses import Diffusion
from medinr.losses.morphology import (
    content,
    draw_neighbours,
    integrated,
    mean_displacement,
    morphology_loss,
    neighbourhood_weights,
    recentred,
)
from medinr.methods import diffusion_stages as stages

NAN = math.nan


def test_weights_are_a_gaussian_of_the_distance() -> None:
    scaled = torch.tensor([[0.5], [0.6], [0.7], [NAN]])
    weights = neighbourhood_weights(scaled, torch.tensor([0.5]), [0], 0.1)
    ratio = weights / weights[0]
    assert ratio.tolist() == pytest.approx([1.0, math.exp(-0.5), math.exp(-2.0), math.exp(-0.5)], rel=1e-5)
    assert float(weights.sum()) == pytest.approx(1.0)


def test_levels_must_agree_and_what_is_not_asked_for_is_of_no_account() -> None:
    scaled = torch.tensor([[0.5, 0.0], [0.5, 1.0], [0.9, 1.0], [0.5, NAN]])
    levels = [0, 2]
    assert neighbourhood_weights(scaled, torch.tensor([NAN, NAN]), levels, 0.1).tolist() == [0.25] * 4
    assert neighbourhood_weights(scaled, torch.tensor([NAN, 1.0]), levels, 0.1)[0] == 0
    assert neighbourhood_weights(scaled[:1], torch.tensor([0.5, 1.0]), levels, 0.1).tolist() == [1.0]
    far = neighbourhood_weights(scaled, torch.tensor([1e4, 1.0]), levels, 1e-3)
    assert far.tolist() == [0.0, 0.0, 1.0, 0.0]  # no weight but that of the nearest survives
    one = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    drawn = [draw_neighbours(torch.tensor([0.0, 0.5, 0.5]), 15, g) for g in one]
    assert torch.equal(*drawn) and set(drawn[0].tolist()) == {1, 2} and len(drawn[0]) == 15


def shift(x: float, shape: tuple[int, int, int] = (16, 8, 6)) -> Tensor:
    v = torch.zeros(1, 3, *shape)
    v[:, 0] = x
    return v


def blob(at: float, shape: tuple[int, int, int] = (16, 8, 6)) -> Tensor:
    x = torch.arange(shape[0])
    return torch.exp(-0.5 * ((x - at) / 2) ** 2).view(1, -1, 1, 1).expand(1, *shape).clone()


def test_opposite_displacements_cancel_and_their_squares_do_not() -> None:
    images = torch.stack([blob(5), blob(9)])

    def centre(volume: Tensor) -> Tensor:
        weight = volume.sum((-1, -2)).flatten()
        return (weight * torch.arange(len(weight))).sum() / weight.sum()

    def register(fixed: Tensor, moving: Tensor) -> Tensor:
        return shift(1.0) * (centre(moving) - centre(fixed))

    mean = mean_displacement(register, blob(7)[None], images, 0)
    assert morphology_loss(mean) < 1e-3
    assert float(morphology_loss(mean_displacement(register, blob(8)[None], images, 0))) == pytest.approx(1.0, abs=0.02)
    assert float(morphology_loss(mean_displacement(register, blob(7)[None], images[:1], 0))) > 3.5


@pytest.mark.parametrize("squarings", [0, 5])
def test_a_template_moves_to_the_middle_of_its_images(squarings: int) -> None:
    """Another template at 5, images at 7 and 9: image s at y shows the template at y + v_s, v = -2 and -4."""
    images, velocities = [blob(7), blob(9)], [shift(-2.0), shift(-4.0)]
    template, own = recentred(images, velocities, squarings)
    assert [float(v[0, 0].mean()) for v in own] == pytest.approx([1.0, -1.0])
    profile = template[0, :, 4, 3]
    assert int(profile.argmax()) == 8 and torch.allclose(profile[4:13], blob(8)[0, 4:13, 4, 3], atol=0.02)
    for image, v in zip(images, own, strict=True):
        again = warp(template[None], integrated(v, squarings))[0, 0, 4:12, 4, 3]
        assert torch.allclose(again, image[0, 4:12, 4, 3], atol=0.03)


def test_labels_are_fused_where_most_have_looked() -> None:
    shape = (16, 8, 6)
    one = torch.zeros(shape, dtype=torch.int32)
    one[6:10] = 1
    two = one.roll(2, 0)
    two[:, :, :2] = -1
    probabilities, seen = stages.fused_labels([one, two, two], [shift(0.0), shift(-2.0), shift(0.0)], [1], 4)
    assert seen[:, :, 2:].all() and not seen[:, :, :2].any() and probabilities[:, :, :, :2].abs().max() == 0
    found = probabilities[0, :, 4, 4]
    assert found[8] == pytest.approx(1.0, abs=1e-5) and float(found[6]) == pytest.approx(2 / 3, abs=1e-5)
    labels = stages.likeliest(torch.stack((0.4 * one.float(), 0.5 * two.clamp(min=0).float())), [3, 7])
    assert set(labels.unique().tolist()) == {0, 7}


def test_refinement_lowers_the_loss_and_leaves_the_background_alone() -> None:
    torch.manual_seed(0)
    shape = (24, 16, 12)
    x, y, z = torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij")

    def ball(at: float) -> Tensor:
        return torch.sigmoid(3 - ((x - at) ** 2 + (y - 8) ** 2 + (z - 6) ** 2).sqrt())[None, None]

    compare = stages.Comparison(1, 4, (1.0, 1.0, 1.0), {"diffusion": Diffusion(0.01)})
    still = torch.zeros(1, 3, *shape)
    fixed, moving = ball(10), ball(11.5)
    found = stages.refined(compare, fixed, moving, still, (4, 2), 15, 0.3)
    before, after = (float(compare(fixed, moving, v)[1]["similarity"]) for v in (still, found))
    assert after < 0.8 * before
    surface = (fixed[0, 0] > 0.2) & (fixed[0, 0] < 0.8)
    assert float(found[0, 0][surface].mean()) > 0.6
    assert found[0, :, 20:].abs().max() < 0.5


def test_only_what_shows_something_counts() -> None:
    image = torch.zeros(2, 1, 20, 9, 9)
    image[0, 0, :5], image[1, 0, :3] = 0.5, 0.01
    seen = content(image, 1)
    assert seen.shape == (20, 9, 9) and seen[:3].min() == 1 and seen[8:].max() == 0 and 0 < float(seen[5, 4, 4]) < 1
    mean = torch.zeros(3, 20, 9, 9)
    mean[0, 10:] = 7.0
    assert morphology_loss(mean, seen) == 0 and morphology_loss(mean) == pytest.approx(24.5)
    mean[1, :2] = 2.0
    assert float(morphology_loss(mean, (seen == 1).float())) == pytest.approx(4 * 2 / 3)


def test_labels_differ_where_somebody_has_looked() -> None:
    labels = torch.zeros(4, 4, 4, dtype=torch.int32)
    labels[:2] = 3
    probabilities = torch.zeros(1, 4, 4, 4)
    probabilities[0, :3] = 1.0
    still = torch.zeros(1, 3, 4, 4, 4)
    assert float(stages.label_difference(probabilities, labels, [3], still)) == pytest.approx(0.25)
    labels[2] = -1
    assert stages.label_difference(probabilities, labels, [3], still) == 0
    shifted = still.clone()
    shifted[:, 0] = -1.0  # the atlas at v shows the general one at v - 1
    assert float(stages.label_difference(probabilities, labels, [3], shifted)) == pytest.approx(1 / 3)


def test_conditions_are_dropped_one_by_one_and_together() -> None:
    torch.manual_seed(0)
    found = stages.dropped(torch.ones(4000, 2), 0.2).isnan()
    assert float(found.float().mean()) == pytest.approx(1 - 0.8 * 0.8, abs=0.03)
    assert float(found.all(1).float().mean()) == pytest.approx(0.2 + 0.8 * 0.04, abs=0.03)
    assert not stages.dropped(torch.ones(50, 2), 0.0).isnan().any()


def test_centrality_and_smoothness_of_known_fields() -> None:
    one = torch.zeros(2, 4, 4, 4, 3)
    one[0, ..., 0], one[1, ..., 0], one[1, ..., 1] = 1.0, -1.0, 6.0
    assert metrics.centrality_mm(one) == pytest.approx(3.0)
    mask = torch.zeros(4, 4, 4, dtype=torch.bool)
    mask[0] = True
    one[:, 0] = 0
    assert metrics.centrality_mm(one, mask) == 0
    ramp = 0.5 * torch.arange(4.0).view(4, 1, 1).expand(4, 4, 4)
    assert metrics.jacobian_gradient(ramp, (2.0, 1.0, 1.0)) == pytest.approx(0.25)
