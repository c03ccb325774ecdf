"""Resampling in chunks is resampling, and its memory does not grow with a table of points."""

import pytest
import torch

from medinr.fields import warp
from medinr.sampling import interpolate
from medinr.space import Domain, Image, transform_points
from tests.medinr import grids

START = torch.tensor([[1, 0.02, 0, 2.0], [-0.01, 1, 0, 0], [0, 0, 1.01, -3], [0, 0, 0, 1]], dtype=torch.float64)


def case() -> tuple[Image, Domain, torch.Tensor]:
    """A moving image of two channels, a fixed grid that reaches beyond it, and a displacement."""
    moving = Domain.of((14, 17, 12), grids.affine("oblique"))
    fixed = grids.domain("oblique")
    return Image(torch.rand(2, *moving.shape), moving), fixed, 3 * torch.randn(*fixed.shape, 3)


def targets(domain: Domain, displacement: torch.Tensor) -> torch.Tensor:
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    return transform_points(START, world + displacement.reshape(-1, 3).double())


@pytest.fixture(params=[1_000_000, 1001])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    size: int = request.param
    whole = warp.chunks
    monkeypatch.setattr(warp, "chunks", lambda domain: whole(domain, size))
    return size


def test_images(chunk: int) -> None:
    image, domain, displacement = case()
    found = warp.resample(image, domain, displacement, START)
    voxels = transform_points(image.domain.world_to_voxel, targets(domain, displacement)).float()
    inside = image.domain.contains_voxels(voxels)
    assert 0.2 < inside.float().mean() < 0.8
    assert torch.allclose(found.flatten(1)[:, inside], interpolate(image.data, voxels)[:, inside], atol=1e-6)
    outside = found.flatten(1)[:, ~inside]
    assert torch.equal(outside, image.data.flatten(1).amin(1)[:, None].expand_as(outside)), "of each channel"
    shifted = torch.eye(4).double()
    shifted[:3, 3] = 5
    uniform = torch.full((*domain.shape, 3), 5.0)
    assert torch.allclose(warp.resample(image, domain, uniform), warp.resample(image, domain, start=shifted), atol=1e-5)


def test_labels(chunk: int) -> None:
    image, domain, displacement = case()
    labels = (image.data[0] * 5).to(torch.int16) + 1
    found = warp.resample_labels(labels, image.domain, domain, displacement, START)
    index = transform_points(image.domain.world_to_voxel, targets(domain, displacement)).round().long()
    inside = ((index >= 0) & (index < torch.tensor(labels.shape))).all(1)
    assert torch.equal(found.flatten()[inside], labels[tuple(index[inside].T)]) and found.dtype == labels.dtype
    assert not found.flatten()[~inside].any() and found.flatten()[inside].all()


def test_chunks_cover_the_grid() -> None:
    domain = grids.domain("left-handed")
    rows, pieces = zip(*warp.chunks(domain, 1001), strict=True)
    assert [r.start for r in rows] == list(range(0, domain.n_voxels, 1001)) and rows[-1].stop == domain.n_voxels
    assert torch.equal(torch.cat(pieces), transform_points(domain.voxel_to_world, domain.voxels().double()))
