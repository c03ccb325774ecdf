"""How a transform changes volume: det J_phi, folding, and the spread of its logarithm."""

import torch
from torch import Tensor
from torchmetrics import Metric

from medinr.jets import det as determinant
from medinr.space import Domain
from medinr.types import Mask

_SLAB_VOXELS = 2_000_000  # bounds the memory: nine derivatives per voxel


def finite_difference_jacobian(displacement: Tensor, domain: Domain) -> Tensor:
    """det J_phi [X, Y, Z] of a *written* displacement, RAS mm [X, Y, Z, 3], by central differences.

    J_phi = I + G A^-1, hence det J_phi = det(A + G) / det A: G holds the differences per voxel, A is the full 3 x 3
    part of the affine, so that oblique, flipped and sheared grids count. One-sided differences at the border; along an
    axis of one voxel the derivative is 0.
    """
    if tuple(displacement.shape) != (*domain.shape, 3):
        raise ValueError(f"displacement: expected {(*domain.shape, 3)}, got {tuple(displacement.shape)}")
    affine = domain.voxel_to_world[:3, :3].to(displacement)
    nx, ny, nz = domain.shape
    step = max(1, _SLAB_VOXELS // (ny * nz))
    out = displacement.new_empty(domain.shape)
    for start in range(0, nx, step):
        stop = min(start + step, nx)
        low, high = max(start - 1, 0), min(stop + 1, nx)
        slab = displacement[low:high]
        axes = [_difference(slab, axis)[start - low : stop - low] for axis in range(3)]
        out[start:stop] = determinant(affine + torch.stack(axes, dim=-1)) / determinant(affine)
    return out


def folding_percent(det: Tensor, mask: Mask | None = None) -> float:
    """Percentage of voxels (inside the mask) with det <= 0."""
    return 100 * (_inside(det, mask) <= 0).double().mean().item()


def sdlogj(det: Tensor, mask: Mask | None = None) -> float:
    """Standard deviation of log det over the voxels (inside the mask) with det > 0.

    Learn2Reg's figure of that name is std(log(clip(det + 3, 1e-9, 1e9))) instead, and not comparable.
    """
    values = _inside(det, mask)
    logs = values[values > 0].double().log()
    return logs.std(correction=0).item() if len(logs) else float("nan")


class FoldingPercentage(Metric):
    """Percentage of voxels with det J <= 0, over all cases. ``update(det, mask)`` takes [X, Y, Z]."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    folded: Tensor
    voxels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("folded", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("voxels", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, det: Tensor, mask: Mask | None = None) -> None:
        values = _inside(det, mask)
        self.folded += (values <= 0).sum()
        self.voxels += values.numel()

    def compute(self) -> Tensor:
        return 100 * self.folded.double() / self.voxels


class StdLogJacobian(Metric):
    """SDlogJ over the voxels with det J > 0 of all cases. ``update(det, mask)`` takes [X, Y, Z]."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    first: Tensor
    second: Tensor
    voxels: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "second", "voxels"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, det: Tensor, mask: Mask | None = None) -> None:
        values = _inside(det, mask)
        logs = values[values > 0].double().log()
        self.first += logs.sum()
        self.second += logs.square().sum()
        self.voxels += logs.numel()

    def compute(self) -> Tensor:
        mean = self.first / self.voxels
        return (self.second / self.voxels - mean.square()).clamp(min=0).sqrt()


def _difference(values: Tensor, axis: int) -> Tensor:
    return torch.gradient(values, dim=axis)[0] if values.shape[axis] > 1 else torch.zeros_like(values)


def _inside(det: Tensor, mask: Mask | None) -> Tensor:
    return det.flatten() if mask is None else det[mask]
