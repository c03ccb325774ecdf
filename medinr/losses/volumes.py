"""Similarity of whole volumes: local NCC in every window of a grid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from medinr.types import Scalar


def box_mean(volumes: Tensor, radius: int) -> Tensor:
    """Mean of [n, X, Y, Z] over windows of (2 radius + 1)^3 voxels; at the border, of the voxels that exist."""
    out = volumes[:, None]
    for axis, n in enumerate(volumes.shape[1:]):
        if 1 < n < 2 * radius + 1:  # avg_pool3d refuses kernels beyond the image, padded or not
            index = torch.arange(n, device=volumes.device)
            band = ((index[:, None] - index).abs() <= radius).to(volumes)
            out = torch.tensordot(out, band / band.sum(0), dims=([2 + axis], [0])).movedim(-1, 2 + axis)
        elif n > 1:
            kernel, padding = [1, 1, 1], [0, 0, 0]
            kernel[axis] = 2 * radius + 1
            padding[axis] = radius
            out = F.avg_pool3d(out, kernel, stride=1, padding=padding, count_include_pad=False)
    return out[:, 0]


class VolumeNCC:
    """1 - mean over windows of the (signed or squared) local NCC with a fixed volume [X, Y, Z].

    Avants et al., Medical Image Analysis 12(1), 2008, with ``floor`` added to both variances. What depends on the fixed
    volume alone is computed once.

    Args:
        fixed: values in [0, 1].
        radius: half side of the window in voxels of the grid.
        floor: added to both variances: windows with less contrast count less.
        signed: False compares the square, so that an inverted contrast is as good.
    """

    def __init__(self, fixed: Tensor, radius: int, floor: float = 1e-4, signed: bool = True) -> None:
        self.fixed, self.radius, self.floor, self.signed = fixed, radius, floor, signed
        self.mean, square = box_mean(torch.stack((fixed, fixed * fixed)), radius)
        self.variance = (square - self.mean**2).clamp(min=0)

    def __call__(self, moved: Tensor, weight: Tensor) -> Scalar:
        """``weight`` [X, Y, Z] is that of the window around each voxel."""
        mean, square, product = box_mean(torch.stack((moved, moved * moved, self.fixed * moved)), self.radius)
        covariance = product - self.mean * mean
        variances = (self.variance + self.floor) * ((square - mean**2).clamp(min=0) + self.floor)
        local = covariance / variances.sqrt() if self.signed else covariance.square() / variances
        loss: Scalar = 1 - (weight * local).sum() / weight.sum().clamp(min=1)
        return loss
