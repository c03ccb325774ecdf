"""Images and labels of one grid seen on another, chunk by chunk: no table of all points is ever made."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.ndimage import map_coordinates, spline_filter
from torch import Tensor

from medinr.fields.base import Field, values_at
from medinr.sampling import interpolate, nearest
from medinr.space import Domain, Image, transform_points
from medinr.types import Matrix, Points, Volume

CHUNK = 500_000
"""Voxels at once: their coordinates take 12 MB in float64."""


def chunks(domain: Domain, size: int = CHUNK) -> Iterator[tuple[slice, Points]]:
    """Rows, and world coordinates (RAS mm, float64) of the voxel centres, of a grid in C order."""
    for i in range(0, domain.n_voxels, size):
        rows = slice(i, min(i + size, domain.n_voxels))
        yield rows, transform_points(domain.voxel_to_world, domain.voxels(rows.start, rows.stop).double())


def moved_chunks(
    domain: Domain, displacement: Tensor | None = None, start: Matrix | None = None
) -> Iterator[tuple[slice, Points]]:
    """Rows and A(p + d(p)) for the voxel centres p of a grid.

    Args:
        displacement: d [X, Y, Z, 3], RAS mm (None: 0).
        start: A [4, 4] (None: the identity).
    """
    flat = None if displacement is None else displacement.reshape(-1, 3)
    for rows, world in chunks(domain):
        if flat is not None:
            world = world + flat[rows].double().cpu()
        yield rows, world if start is None else transform_points(start, world)


def resample(
    image: Image, domain: Domain, displacement: Tensor | None = None, start: Matrix | None = None, order: int = 1
) -> Volume:
    """``image`` at A(p + d(p)) for the voxel centres p of ``domain``; its minimum where it does not reach.

    ``displacement`` of a whole transform, phi(p) - p, needs no ``start``. ``order`` 1 is trilinear; 3 takes the cubic
    spline through the voxels, which blurs less, within the image's range.
    """
    data = image.data.cpu()
    lowest, highest = data.flatten(1).amin(1)[:, None], data.flatten(1).amax(1)[:, None]
    out = torch.empty(len(data), domain.n_voxels, dtype=data.dtype)
    splines = [spline_filter(channel.numpy(), order, mode="mirror") for channel in data] if order > 1 else []
    for rows, world in moved_chunks(domain, displacement, start):
        voxels = transform_points(image.domain.world_to_voxel, world).float()
        if splines:
            at = voxels.T.numpy()
            some = [map_coordinates(c, at, order=order, prefilter=False, mode="mirror") for c in splines]
            values = torch.from_numpy(np.stack(some)).to(data).clamp(lowest, highest)
        else:
            values = interpolate(data, voxels)
        out[:, rows] = torch.where(image.domain.contains_voxels(voxels), values, lowest)
    return out.reshape(-1, *domain.shape)


def resample_labels(
    labels: Tensor, source: Domain, domain: Domain, displacement: Tensor | None = None, start: Matrix | None = None
) -> Tensor:
    """Labels [X, Y, Z] on the grid ``source`` at A(p + d(p)), nearest voxel; 0 where they do not reach."""
    labels = labels.cpu()
    out = torch.empty(domain.n_voxels, dtype=labels.dtype)
    for rows, world in moved_chunks(domain, displacement, start):
        out[rows] = nearest(labels, transform_points(source.world_to_voxel, world))
    return out.reshape(domain.shape)


@torch.no_grad()
def render(
    field: Field,
    domain: Domain,
    grid: Domain,
    windows: Sequence[Sequence[float]],
    through: Callable[[Points], Points] | None = None,
) -> Volume:
    """An image that a field is, on a grid: [C, X, Y, Z].

    Args:
        field: from normalised coordinates of ``domain`` to C channels.
        domain: whose coordinates the field takes.
        grid: where it is wanted.
        windows: intensities of each channel that the field's 0 and 1 stand for.
        through: from the world of the grid to that of the field (None: the identity).
    """
    device = next(field.parameters()).device
    low, high = torch.tensor(windows, dtype=torch.float32).T
    out = torch.empty(field.out_features, grid.n_voxels)
    for rows, world in chunks(grid, 65_536):
        p = world if through is None else through(world)
        x = transform_points(domain.world_to_normalised, p).float().to(device)
        out[:, rows] = (low + (high - low) * values_at(field, x).cpu()).T
    return out.reshape(-1, *grid.shape)
