"""The grid that a trained network looks at images on: the axes of RAS, the spacing that it was trained with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medinr.fields.warp import resample_labels
from medinr.sampling import gaussian_smooth, interpolate
from medinr.space import Domain, Image, transform_points
from medinr.types import Matrix, Volume


def working_grid(domain: Domain, spacing: Sequence[float]) -> Domain:
    """A grid over an image's box, its axes in the order and direction of RAS as nearly as the image's allow.

    Args:
        domain: the image's grid.
        spacing: mm along R, A and S; the number of voxels is rounded, the centre stays.
    """
    linear = domain.voxel_to_world[:3, :3]
    directions = linear / linear.norm(dim=0)
    free = [0, 1, 2]
    order = []
    for axis in range(3):
        best = max(free, key=lambda column: abs(float(directions[axis, column])))
        free.remove(best)
        order.append(best)
    shape = [max(1, round(domain.sides_mm[column] / step)) for column, step in zip(order, spacing, strict=True)]
    affine = torch.eye(4, dtype=torch.float64)
    for axis, (column, step) in enumerate(zip(order, spacing, strict=True)):
        sign = 1.0 if directions[axis, column] >= 0 else -1.0
        affine[:3, axis] = sign * step * directions[:, column]
    middle = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    centre = transform_points(domain.voxel_to_world, torch.tensor([(n - 1) / 2 for n in domain.shape]).double())
    affine[:3, 3] = centre - affine[:3, :3] @ middle
    return Domain.of(shape, affine)


def on_grid(image: Image, grid: Domain, start: Matrix) -> Volume:
    """An image [C, X, Y, Z] at ``start`` of the voxel centres of a grid; its border continues.

    Along axes on which the grid is coarser the image is smoothed first, by a Gaussian that widens the half-maximum
    width of its voxels to the grid's.
    """
    matrix = image.domain.world_to_voxel @ start.double() @ grid.voxel_to_world
    ratios = torch.linalg.inv(matrix[:3, :3]).norm(dim=0).reciprocal().tolist()
    sigmas = [max(r * r - 1, 0.0) ** 0.5 / 2.355 for r in ratios]
    data = gaussian_smooth(image.data, 1.0, [1 / s if s > 0 else float("inf") for s in sigmas])
    voxels = transform_points(matrix, grid.voxels().double()).float().to(data.device)
    return interpolate(data, voxels).reshape(-1, *grid.shape)


def labels_on_grid(labels: Tensor, source: Domain, grid: Domain, start: Matrix) -> Tensor:
    """Labels [X, Y, Z] of the grid ``source`` at ``start`` of the voxel centres of another, nearest voxel."""
    return resample_labels(labels, source, grid, start=start)
