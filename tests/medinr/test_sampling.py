"""Interpolation and smoothing against scipy, and the distribution of the drawn points."""

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor

from medinr.sampling import PointSampler, gaussian_smooth, interpolate, nearest, patch_offsets
from medinr.space import Domain, transform_points
from tests.medinr.tolerances import assert_close

SHAPE = (7, 9, 5)


def volume(dtype: torch.dtype = torch.float64, channels: int = 2) -> Tensor:
    return torch.rand(channels, *SHAPE, dtype=dtype)


def coordinates(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inside the grid and up to three voxels outside."""
    return torch.rand(n, 3, dtype=dtype) * (torch.tensor(SHAPE) + 5) - 3


@pytest.mark.parametrize("n", [1, 100, 4095, 4097, 5000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_interpolate_is_scipys(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trilinear with continued borders; few points, and many, which are dealt out to the threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    image, voxels = volume(dtype), coordinates(n, dtype)
    want = np.stack([ndimage.map_coordinates(c, voxels.T.numpy(), order=1, mode="nearest") for c in image.numpy()])
    assert_close(interpolate(image, voxels), torch.from_numpy(want))


def test_interpolate_keeps_the_shape_of_the_points() -> None:
    image, voxels = volume(), coordinates(24)
    flat = interpolate(image, voxels)
    assert_close(interpolate(image, voxels.reshape(2, 3, 4, 3)), flat.reshape(2, 2, 3, 4))
    assert_close(interpolate(image[:1], voxels), flat[:1])
    assert interpolate(image, voxels[:0]).shape == (2, 0)


def test_interpolate_is_exact_at_voxel_centres() -> None:
    image = volume()
    grid = torch.cartesian_prod(*(torch.arange(s, dtype=torch.float64) for s in SHAPE))
    assert_close(interpolate(image, grid), image.reshape(2, -1))


def test_interpolate_gradient() -> None:
    """With respect to the coordinates, inside cells; outside the grid it vanishes."""
    image = volume(channels=1)
    voxels = (torch.rand(20, 3, dtype=torch.float64) * 0.8 + 0.1 + torch.randint(0, 4, (20, 3))).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: interpolate(image, v), (voxels,))
    outside = torch.full((1, 3), -2.0, dtype=torch.float64, requires_grad=True)
    interpolate(image, outside).sum().backward()
    assert outside.grad is not None and float(outside.grad.abs().max()) == 0


def test_interpolate_many_points_has_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The points dealt out to several threads return the gradient that each has alone."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    image, voxels = volume(channels=1), coordinates(5000)
    one, other = voxels.clone().requires_grad_(), voxels.clone().requires_grad_()
    weights = torch.rand(5000, dtype=torch.float64)
    (interpolate(image, one)[0] * weights).sum().backward()
    parts = torch.cat([interpolate(image, p)[0] for p in other.split(1000)])
    (parts * weights).sum().backward()
    assert one.grad is not None and other.grad is not None
    assert_close(one.grad, other.grad)


def test_nearest() -> None:
    labels = torch.randint(1, 9, SHAPE)
    voxels = torch.tensor([[0.4, 8.4, 3.6], [6.49, 0.0, 0.0], [6.51, 0.0, 0.0], [-0.51, 0.0, 0.0], [3.0, 4.0, 9.0]])
    want = torch.stack((labels[0, 8, 4], labels[6, 0, 0], *[torch.tensor(0)] * 3))
    assert torch.equal(nearest(labels, voxels), want)
    assert torch.equal(nearest(labels, voxels[None]), want[None])


@pytest.mark.parametrize("sigma_mm", [1.0, 2.5, 6.0])
def test_gaussian_smooth_is_scipys(sigma_mm: float) -> None:
    """A standard deviation in mm on an anisotropic grid; kernels end at 3 of them or at the grid's size."""
    spacing = (1.0, 0.7, 2.0)
    image = volume()
    want = image.numpy()
    for axis, step in enumerate(spacing):
        sigma = sigma_mm / step
        radius = min(int(np.ceil(3 * sigma)), SHAPE[axis] - 1)
        want = ndimage.gaussian_filter1d(want, sigma, axis=1 + axis, mode="nearest", radius=radius)
    assert_close(gaussian_smooth(image, sigma_mm, spacing), torch.from_numpy(want))


def test_gaussian_smooth_keeps_constants_and_zero_does_nothing() -> None:
    constant = torch.full((1, *SHAPE), 3.7, dtype=torch.float64)
    assert_close(gaussian_smooth(constant, 4.0, (1.0, 1.0, 1.0)), constant)
    image = volume()
    assert torch.equal(gaussian_smooth(image, 0.0, (1.0, 1.0, 1.0)), image)


OBLIQUE = torch.tensor([[-0.9, 0.1, 0.0, 5], [0.1, 0.8, 0.2, -9], [0.0, -0.2, 2.0, 3], [0, 0, 0, 1.0]])
DOMAIN = Domain.of((4, 5, 3), OBLIQUE)


def drawn_voxels(sampler: PointSampler, n: int, seed: int) -> Tensor:
    x = sampler(n, "cpu", torch.Generator().manual_seed(seed))
    return transform_points(DOMAIN.normalised_to_voxel, x.double())


def uniform_over(counts: Tensor) -> float:
    return float(stats.chisquare(counts.numpy()).pvalue)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_points_are_uniform(masked: bool, seed: int) -> None:
    """Every voxel (of the mask) is as likely as every other, and inside a voxel every place."""
    mask = torch.ones(DOMAIN.shape, dtype=torch.bool)
    if masked:
        mask = torch.rand(DOMAIN.shape, generator=torch.Generator().manual_seed(9)) > 0.5
    voxels = drawn_voxels(PointSampler(DOMAIN, mask if masked else None), 6000, seed)
    index = voxels.round().long()
    assert mask[index.unbind(-1)].all()
    counts = torch.zeros(DOMAIN.shape).index_put_(index.unbind(-1), torch.ones(6000), accumulate=True)
    assert uniform_over(counts[mask]) > 1e-4
    for inside in (voxels - index + 0.5).unbind(-1):
        assert stats.kstest(inside.numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("masked", [True, False])
def test_without_jitter_points_are_voxel_centres(masked: bool) -> None:
    mask = torch.zeros(DOMAIN.shape, dtype=torch.bool)
    mask[1, 2:, :2] = True
    voxels = drawn_voxels(PointSampler(DOMAIN, mask if masked else None, jitter=False), 3000, 0)
    assert_close(voxels, voxels.round(), 1e-5)
    found = {tuple(v) for v in voxels.round().long().tolist()}
    want = {tuple(v) for v in (mask if masked else torch.ones_like(mask)).nonzero().tolist()}
    assert found == want


def test_points_follow_the_generator() -> None:
    sampler = PointSampler(DOMAIN)
    assert torch.equal(drawn_voxels(sampler, 10, 4), drawn_voxels(sampler, 10, 4))
    assert not torch.equal(drawn_voxels(sampler, 10, 4), drawn_voxels(sampler, 10, 5))


def test_an_empty_mask_is_an_error() -> None:
    with pytest.raises(ValueError, match="no voxel is inside"):
        PointSampler(DOMAIN, torch.zeros(DOMAIN.shape, dtype=torch.bool))


def test_a_patch_of_two_a_side_has_its_corners() -> None:
    want = torch.tensor([[i, j, k] for i in (-2.0, 2.0) for j in (-2.0, 2.0) for k in (-2.0, 2.0)])
    assert torch.equal(patch_offsets(2.0, 2), want)
