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
    """Gaussian smoothing with a standard deviation in mm (border continued), truncated at 3 standard deviations.

    Each axis is one product with a banded matrix: the convolutions of torch write out every shifted copy of the volume
    on a CPU, gigabytes of a large one, and take longer.
    """
    if sigma_mm <= 0:
        return volume
    out = volume
    for axis, step in enumerate(spacing):
        sigma, n = sigma_mm / step, volume.shape[1 + axis]
        radius = min(math.ceil(3 * sigma), n - 1)
        if sigma < 0.25 or radius < 1:
            continue
        matrix = _smoothing_matrix(n, sigma, radius).to(volume)
        if axis == len(spacing) - 1:
            out = out @ matrix.T
        else:
            out = (matrix @ out.reshape(-1, n, math.prod(out.shape[2 + axis :]))).reshape(out.shape)
    return out


def _smoothing_matrix(n: int, sigma: float, radius: int) -> Tensor:
    """[n, n]: weights of a line's voxels in each smoothed one; beyond an end the last voxel counts again."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    columns = (torch.arange(n)[:, None] + offsets.long()).clamp(0, n - 1)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, columns, (kernel / kernel.sum()).expand(n, -1))


def near(mask: Mask, domain: Domain, margin_mm: float) -> Mask:
    """The mask grown by a box of ``margin_mm`` on every side."""
    grown = mask[None, None].float()
    for axis, step in enumerate(domain.spacing):
        radius = int(margin_mm / step)
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * radius + 1, radius
        grown = F.max_pool3d(grown, kernel, stride=1, padding=padding)
    return grown[0, 0] > 0.5


def informative(volume: Volume, domain: Domain, reach_mm: float, contrast: float = 1e-3) -> Mask:
    """Voxels [X, Y, Z] around which, within +-``reach_mm`` along each axis, some channel varies by over ``contrast``.

    In zeros around an extracted brain, in padding and in what the intensity window clips, a patch is constant and says
    nothing of the deformation. The answer is exact to some voxels on the generous side: it is found in small blocks.

    Args:
        volume: windowed to [0, 1].
        domain: its grid.
        reach_mm: half side of the patches.
        contrast: smaller differences count as none.
    """
    blocks = [min(n, max(1, int(reach_mm / 3 / s))) for n, s in zip(domain.shape, domain.spacing, strict=True)]
    high, low = (F.max_pool3d(v, blocks, ceil_mode=True) for v in (volume, -volume))
    for axis, (block, step) in enumerate(zip(blocks, domain.spacing, strict=True), start=1):
        radius = min(max(1, math.ceil(reach_mm / step / block)), high.shape[axis] - 1)
        high, low = _grown(high, axis, radius), _grown(low, axis, radius)
    varies = (high + low > contrast).any(0)
    for axis, (block, n) in enumerate(zip(blocks, domain.shape, strict=True)):
        varies = varies.repeat_interleave(block, dim=axis).narrow(axis, 0, n)
    return varies


def _grown(volume: Tensor, axis: int, radius: int) -> Tensor:
    """Maximum over +-radius voxels along one axis; the cost grows with log(radius)."""
    n, done = volume.shape[axis], 0
    while done < radius:
        step = min(radius - done, 2 * done + 1)
        grown = volume.clone()
        for into, source in ((step, 0), (0, step)):
            part = grown.narrow(axis, into, n - step)
            torch.maximum(part, volume.narrow(axis, source, n - step), out=part)
        volume, done = grown, done + step
    return volume


class PointSampler:
    """Uniform random points of a mask, continuous inside its voxels, in normalised coordinates.

    On a single slice the points lie in its plane.

    Args:
        domain: the grid.
        mask: voxels to draw from (None: all).
        jitter: draw anywhere inside a voxel; False gives voxel centres, as IDIR's code does.
        elsewhere: share of the points that are drawn from the whole grid in spite of the mask, so that regularizers
            act there too.
    """

    def __init__(self, domain: Domain, mask: Mask | None = None, jitter: bool = True, elsewhere: float = 0.0) -> None:
        self.domain, self.jitter, self.elsewhere = domain, jitter, elsewhere
        # Flat indices: three coordinates of each voxel would be as large as the images.
        self.voxels = None if mask is None else mask.flatten().nonzero()[:, 0].int()
        if self.voxels is not None and len(self.voxels) == 0:
            raise ValueError("mask: no voxel is inside it")

    def __call__(self, n: int, device: torch.device | str, generator: torch.Generator | None = None) -> Points:
        """n points [n, 3]."""
        if self.voxels is None:
            voxels = self._anywhere(n, device, generator)
        else:
            self.voxels = self.voxels.to(device)
            flat = self.voxels[torch.randint(len(self.voxels), (n,), device=device, generator=generator)]
            _, ny, nz = self.domain.shape
            voxels = torch.stack((flat // (ny * nz), flat // nz % ny, flat % nz), dim=1).float()
            if self.jitter:
                voxels = voxels + torch.rand(n, 3, device=device, generator=generator) - 0.5
            if self.elsewhere:
                anywhere = self._anywhere(n, device, generator)
                chosen = torch.rand(n, 1, device=device, generator=generator) < self.elsewhere
                voxels = torch.where(chosen, anywhere, voxels)
        if self.domain.flat_axis is not None:
            voxels[:, self.domain.flat_axis] = 0
        return transform_points(self.domain.voxel_to_normalised, voxels)

    def _anywhere(self, n: int, device: torch.device | str, generator: torch.Generator | None) -> Tensor:
        size = torch.tensor(self.domain.shape, device=device, dtype=torch.float32)
        unit = torch.rand(n, 3, device=device, generator=generator)
        return unit * size - 0.5 if self.jitter else (unit * size).floor()


def patch_offsets(radius_mm: float, per_side: int = 3) -> Tensor:
    """Offsets [P, 3] in mm of a cubic patch of per_side^3 samples from -radius to +radius."""
    line = torch.linspace(-radius_mm, radius_mm, per_side)
    return torch.cartesian_prod(line, line, line)


def fitted_offsets(offsets: Tensor, domain: Domain, distinct: bool = False) -> Tensor:
    """Patch offsets [P, 3] in world mm for an image that may be thinner than the patch.

    In a volume they are along the world's axes. Where the image has too few slices for the patch, they are along the
    axes of the image instead, and no longer across the slices than half the distance from the first to the last:
    patches of a single slice lie in its plane, and those of a few slices do not stick out of them. ``distinct`` leaves
    out offsets that have become equal.
    """
    half = torch.tensor([(n - 1) * s / 2 for n, s in zip(domain.shape, domain.spacing, strict=True)]).to(offsets)
    if bool((offsets.abs().amax(0).max() <= half).all()):
        return offsets
    axes = (domain.voxel_to_world[:3, :3] / torch.tensor(domain.spacing).double()).to(offsets)
    fitted = offsets.clamp(min=-half, max=half)
    return (fitted.unique(dim=0) if distinct else fitted) @ axes.T
