"""Drawing points in space, and reading images at them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medinr.space import Domain, transform_points
from medinr.types import Mask, Points, Volume


def interpolate(volume: Volume, voxels: Tensor) -> Tensor:
    """Trilinear values [C, ...] of ``volume`` at voxel coordinates [..., 3]; the border value continues outside.

    Differentiable in the coordinates. ``grid_sample`` works on one thread per batch entry on a CPU, so the points are
    dealt out to as many entries as there are threads; they share one volume.
    """
    lead = voxels.shape[:-1]
    flat = voxels.reshape(-1, 3)
    n = len(flat)
    parts = torch.get_num_threads() if flat.device.type == "cpu" and n >= 4096 else 1
    padded = F.pad(flat, (0, 0, 0, -n % parts))
    size = torch.tensor(volume.shape[1:], device=flat.device, dtype=flat.dtype)
    grid = padded * (2 / (size - 1).clamp(min=1)) - 1
    grid = grid.flip(-1).reshape(parts, 1, 1, len(padded) // parts, 3)
    stack = volume[None].expand(parts, -1, -1, -1, -1)
    values = F.grid_sample(stack, grid, mode="bilinear", padding_mode="border", align_corners=True)
    values = values[:, :, 0, 0].movedim(0, 1).reshape(len(volume), len(padded))
    return values[:, :n].reshape(len(volume), *lead)


def nearest(labels: Tensor, voxels: Tensor) -> Tensor:
    """Values of a label volume [X, Y, Z] at the voxel nearest to each coordinate [..., 3]; 0 outside the grid."""
    index = voxels.round().long()
    upper = torch.tensor(labels.shape, device=index.device) - 1
    inside = ((index >= 0) & (index <= upper)).all(-1)
    i, j, k = index.clamp(min=0).minimum(upper).unbind(-1)
    return torch.where(inside, labels[i, j, k], torch.zeros_like(labels[i, j, k]))


def gaussian_smooth(volume: Volume, sigma_mm: float, spacing: Sequence[float]) -> Volume:
    """Gaussian smoothing with a standard deviation in mm (border continued), truncated at 3 standard deviations."""
    if sigma_mm <= 0:
        return volume
    out = volume[:, None]
    for axis, step in enumerate(spacing):
        sigma = sigma_mm / step
        radius = min(math.ceil(3 * sigma), volume.shape[1 + axis] - 1)
        if sigma < 0.25 or radius < 1:
            continue
        t = torch.arange(-radius, radius + 1, device=volume.device, dtype=volume.dtype)
        kernel = torch.exp(-0.5 * (t / sigma) ** 2)
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = -1
        pad = [0] * 6
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = radius
        out = F.conv3d(F.pad(out, pad, mode="replicate"), (kernel / kernel.sum()).view(shape))
    return out[:, 0]


def near(mask: Mask, domain: Domain, margin_mm: float) -> Mask:
    """The mask grown by a box of ``margin_mm`` on every side."""
    grown = mask[None, None].float()
    for axis, step in enumerate(domain.spacing):
        radius = int(margin_mm / step)
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * radius + 1, radius
        grown = F.max_pool3d(grown, kernel, stride=1, padding=padding)
    return grown[0, 0] > 0.5


class PointSampler:
    """Uniform random points of a mask, continuous inside its voxels, in normalised coordinates.

    Args:
        domain: the grid.
        mask: voxels to draw from (None: all).
        jitter: draw anywhere inside a voxel; False gives voxel centres, as IDIR's code does.
    """

    def __init__(self, domain: Domain, mask: Mask | None = None, jitter: bool = True) -> None:
        self.domain, self.jitter = domain, jitter
        self.voxels = None if mask is None else mask.nonzero().float()
        if self.voxels is not None and len(self.voxels) == 0:
            raise ValueError("mask: no voxel is inside it")

    def __call__(self, n: int, device: torch.device | str, generator: torch.Generator | None = None) -> Points:
        """n points [n, 3]."""
        if self.voxels is None:
            size = torch.tensor(self.domain.shape, device=device, dtype=torch.float32)
            unit = torch.rand(n, 3, device=device, generator=generator)
            voxels = unit * size - 0.5 if self.jitter else (unit * size).floor()
        else:
            self.voxels = self.voxels.to(device)
            voxels = self.voxels[torch.randint(len(self.voxels), (n,), device=device, generator=generator)]
            if self.jitter:
                voxels = voxels + torch.rand(n, 3, device=device, generator=generator) - 0.5
        return transform_points(self.domain.voxel_to_normalised, voxels)


def patch_offsets(radius_mm: float, per_side: int = 3) -> Tensor:
    """Offsets [P, 3] in mm of a cubic patch of per_side^3 samples from -radius to +radius."""
    line = torch.linspace(-radius_mm, radius_mm, per_side)
    return torch.cartesian_prod(line, line, line)
