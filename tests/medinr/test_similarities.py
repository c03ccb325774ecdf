"""Similarities: invariances, masks, and the patches that a field's Jacobian carries to the moving image."""

import pytest
import torch
from torch import Tensor

from medinr import jets
from medinr.fields import Map
from medinr.jets import Jet
from medinr.losses import MSE, NCC, LocalNCC, Similarity
from medinr.methods.mixins import INRMixin, Level
from medinr.sampling import interpolate, patch_offsets
from medinr.space import Domain, transform_points
from tests.medinr.tolerances import assert_close


def draw(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def test_ncc_is_the_correlation_coefficient() -> None:
    a, b = draw(500), draw(500)
    want = 1 - torch.corrcoef(torch.stack((a, b)))[0, 1]
    assert_close(NCC()(a, b), want, 1e-4)
    assert_close(NCC()(a, a), 0.0 * want, 1e-4)
    assert_close(NCC()(a, -a), 0.0 * want + 2, 1e-4)


@pytest.mark.parametrize(("gain", "shift"), [(3.0, 0.0), (1.0, -7.0), (0.2, 5.0)])
def test_ncc_ignores_gain_and_shift(gain: float, shift: float) -> None:
    a, b = draw(400), draw(400)
    b = b + a
    assert_close(NCC()(a, gain * b + shift), NCC()(a, b), 1e-3)
    patches, other = draw(30, 27), draw(30, 27)
    one = LocalNCC(floor=1e-12)
    assert_close(one(patches, gain * other + shift), one(patches, other), 1e-6)
    assert one(patches, -gain * other + shift) > 0
    assert_close(1 - one(patches, -gain * other), -(1 - one(patches, gain * other)), 1e-6)


def test_local_ncc_ignores_a_bias_field() -> None:
    """Every patch has its own gain and shift; the global correlation does not survive that."""
    patches = draw(200, 27)
    biased = (0.5 + 3 * draw(200, 1)) * patches + 10 * draw(200, 1)
    assert LocalNCC(floor=1e-9)(patches, biased) < 1e-4
    assert NCC()(patches.flatten(), biased.flatten()) > 0.5


@pytest.mark.parametrize("measure", [NCC(), MSE()])
def test_masked_samples_do_not_count(measure: Similarity) -> None:
    a, b = draw(60), draw(60)
    mask = (draw(60) > 0.4).double()
    spoiled = torch.where(mask > 0, b, 1e3)
    assert_close(measure(a, spoiled, mask), measure(a[mask > 0], b[mask > 0]))


def test_local_ncc_with_a_mask_is_the_patch_without_the_masked_samples() -> None:
    a, b = draw(1, 27), draw(1, 27)
    mask = (draw(1, 27) > 0.3).double()
    inside = mask[0] > 0
    assert 5 < inside.sum() < 27
    spoiled = torch.where(mask > 0, b, 1e3)
    assert_close(LocalNCC()(a, spoiled, mask), LocalNCC()(a[:, inside], b[:, inside]))


def test_a_patch_counts_by_its_share_inside() -> None:
    a, b = draw(2, 27), draw(2, 27)
    mask = torch.ones(2, 27, dtype=torch.float64)
    mask[1, 9:] = 0  # a third is left
    one, other = LocalNCC()(a[:1], b[:1]), LocalNCC()(a[1:, :9], b[1:, :9])
    assert_close(LocalNCC()(a, b, mask), (one + other / 3) / (1 + 1 / 3))
    outside = torch.zeros(2, 27, dtype=torch.float64)
    assert torch.isfinite(LocalNCC()(a, b, outside))


@pytest.mark.parametrize("measure", [NCC(), MSE(), LocalNCC()])
def test_gradient(measure: Similarity) -> None:
    shape = (4, 8) if isinstance(measure, LocalNCC) else (20,)
    a, b, mask = draw(*shape), draw(*shape).requires_grad_(), (draw(*shape) > 0.2).double()
    assert torch.autograd.gradcheck(lambda m: measure(a, m, mask), (b,))


@pytest.mark.parametrize("measure", [NCC(), LocalNCC()])
def test_constant_patches_are_harmless(measure: Similarity) -> None:
    flat = torch.full((3, 27), 0.5, requires_grad=True)
    value = measure(torch.full((3, 27), 0.5), flat).sum()
    value.backward()
    assert flat.grad is not None
    assert torch.isfinite(value) and torch.isfinite(flat.grad).all()


def test_patch_offsets() -> None:
    found = LocalNCC(radius_mm=4.0, per_side=3, per_level=0.5).offsets(2.0)
    assert_close(found, patch_offsets(5.0, 3))
    assert found.shape == (27, 3)
    assert sorted({float(v) for v in found.flatten()}) == [-5.0, 0.0, 5.0]
    assert len({tuple(row.tolist()) for row in found}) == 27
    assert NCC().offsets(2.0) is None
    with pytest.raises(ValueError, match="at least 2 samples a side, got 1"):
        LocalNCC(per_side=1)


# ------------------------------------------------------------------------------------------------ extrapolated patches


class AffineMap(Map):
    """x -> M x + t."""

    def __init__(self, matrix: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.matrix, self.shift = matrix, shift

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x @ self.matrix.T + self.shift

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        return jets.linear(jet, self.matrix, self.shift)


class Spy(LocalNCC):
    """Keeps what it was given."""

    def forward(self, fixed: Tensor, moved: Tensor, mask: Tensor | None = None) -> Tensor:
        self.given = (fixed, moved, mask)
        return super().forward(fixed, moved, mask)


class Host(INRMixin):
    """What the mixin needs of a method, and nothing else."""

    def __init__(self, field: Map, similarity: Similarity, fixed: Domain, moving: Domain, start: Tensor) -> None:
        self.map, self.similarity, self.domain, self.moving_mask = field, similarity, fixed, None
        self.to_moving_voxels = moving.world_to_voxel @ start @ fixed.normalised_to_world


FIXED = Domain.of(
    (24, 20, 16), torch.tensor([[-2.0, 0.1, 0.0, 20], [0.2, 1.8, 0.1, -15], [0.1, 0.0, 2.5, -18], [0, 0, 0, 1.0]])
)
MOVING = Domain.of(
    (30, 30, 30), torch.tensor([[1.7, 0.2, 0.0, -28], [0.1, -1.9, 0.1, 30], [0.0, 0.1, 1.6, -20], [0, 0, 0, 1.0]])
)
START = torch.tensor([[0.99, 0.1, 0.0, 2], [-0.1, 0.99, 0.0, -1], [0.0, 0.02, 1.0, 1], [0, 0, 0, 1.0]]).double()


def affine_case(similarity: Similarity) -> tuple[Host, Level, Tensor]:
    matrix = torch.eye(3, dtype=torch.float64) + 0.1 * torch.randn(3, 3, dtype=torch.float64)
    field = AffineMap(matrix, 0.05 * torch.randn(3, dtype=torch.float64))
    host = Host(field, similarity, FIXED, MOVING, START)
    level = Level(draw(1, *FIXED.shape), draw(1, *MOVING.shape), 1.0)
    return host, level, draw(50, 3) * 1.2 - 0.6


def test_patches_of_an_affine_map_are_exact() -> None:
    """phi(x) + J d is phi(x + d): what is sampled equals a sampling of every offset point on its own, in world mm."""
    spy = Spy(radius_mm=3.0)
    host, level, x = affine_case(spy)
    host.compare(x, host.displacement_jet(x, 1), level)
    fixed, moved, mask = spy.given
    world = transform_points(FIXED.normalised_to_world, x)[:, None] + spy.offsets(level.smoothing_mm).double()
    y = transform_points(FIXED.world_to_normalised, world)
    moving_world = transform_points(START, transform_points(FIXED.normalised_to_world, host.map(y.reshape(-1, 3))))
    voxels = transform_points(MOVING.world_to_voxel, moving_world).reshape(50, -1, 3)
    fixed_voxels = transform_points(FIXED.world_to_voxel, world)
    assert_close(fixed, interpolate(level.fixed, fixed_voxels)[0])
    assert_close(moved, interpolate(level.moving, voxels)[0])
    assert mask is not None
    assert torch.equal(mask.bool(), FIXED.contains_voxels(fixed_voxels) & MOVING.contains_voxels(voxels))
    assert 0 < float(mask.mean()) < 1


def test_point_similarity_samples_the_moved_points() -> None:
    host, level, x = affine_case(MSE())
    value, overlap, _ = host.compare(x, host.displacement_jet(x, 0), level)
    voxels = transform_points(host.to_moving_voxels, host.map(x))
    inside = MOVING.contains_voxels(voxels)
    a = interpolate(level.fixed, transform_points(FIXED.normalised_to_voxel, x))[0]
    b = interpolate(level.moving, voxels)[0]
    assert_close(value, MSE()(a[inside], b[inside]))
    assert_close(overlap, inside.double().mean())


def test_moving_mask_takes_samples_away() -> None:
    host, level, x = affine_case(MSE())
    mask = torch.zeros(MOVING.shape, dtype=torch.bool)
    mask[:15] = True
    host.moving_mask = mask
    _, overlap, _ = host.compare(x, host.displacement_jet(x, 0), level)
    voxels = transform_points(host.to_moving_voxels, host.map(x))
    inside = MOVING.contains_voxels(voxels) & (voxels[:, 0].round() < 15)
    assert_close(overlap, inside.double().mean())
    assert 0 < float(overlap) < 1


def test_leaving_the_grid_costs_its_distance() -> None:
    """Points that the start maps inside and the field carries out: mean distance in 100 mm, with a gradient back in."""
    fixed = Domain.of((11, 11, 11), torch.eye(4))
    shift = torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64).requires_grad_()
    field = AffineMap(torch.eye(3, dtype=torch.float64), shift / fixed.unit_mm)
    host = Host(field, MSE(), fixed, fixed, torch.eye(4, dtype=torch.float64))
    x = transform_points(fixed.voxel_to_normalised, torch.tensor([[3.0, 5, 5], [9.0, 5, 5]], dtype=torch.float64))
    level = Level(draw(1, 11, 11, 11), draw(1, 11, 11, 11), 0.0)
    _, overlap, outside = host.compare(x, host.displacement_jet(x, 0), level)
    assert_close(outside, torch.tensor(0.5 * 3.0 / 100, dtype=torch.float64))
    assert_close(overlap, torch.tensor(0.5, dtype=torch.float64))
    outside.backward()
    assert shift.grad is not None and shift.grad[0] > 0
