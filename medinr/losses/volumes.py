"""Similarities and penalties of whole volumes, which know the neighbours of every point."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medinr.errors import UserError
from medinr.jets import Jet
from medinr.losses.regularizers import Regularizer
from medinr.losses.similarities import Similarity
from medinr.types import Scalar


class VolumeSimilarity(Protocol):
    """Compares volumes [X, Y, Z] with one fixed volume; lower is better.

    Attributes:
        fixed: values in [0, 1].
        radius: half side of the windows that it looks at, 0 for single points.
    """

    @property
    def fixed(self) -> Tensor: ...

    @property
    def radius(self) -> int: ...

    def __call__(self, moved: Tensor, weight: Tensor) -> Scalar: ...


class VolumePoints:
    """A similarity of single points (NCC, NMI, MSE), taken over all points of a volume.

    Args:
        fixed: values in [0, 1].
        similarity: of values [N] and weights [N].
    """

    radius = 0

    def __init__(self, fixed: Tensor, similarity: Similarity) -> None:
        self.fixed, self.similarity = fixed, similarity

    def __call__(self, moved: Tensor, weight: Tensor) -> Scalar:
        loss: Scalar = self.similarity(self.fixed.flatten(), moved.flatten(), weight.flatten())
        return loss


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
        inside: voxels [X, Y, Z] that the windows see (None: all). A window across the border of a lung compares what
            moves with the lung and what slides along it; with the lung as ``inside`` it sees the lung alone.
    """

    def __init__(
        self, fixed: Tensor, radius: int, floor: float = 1e-4, signed: bool = True, inside: Tensor | None = None
    ) -> None:
        self.fixed, self.radius, self.floor, self.signed = fixed, radius, floor, signed
        self.inside = None if inside is None else inside.to(fixed)
        if self.inside is not None:
            self.share = box_mean(self.inside[None], radius)[0].clamp(min=1e-3)
        self.mean, square = self._means(torch.stack((fixed, fixed * fixed)))
        self.variance = (square - self.mean**2).clamp(min=0)

    def _means(self, volumes: Tensor) -> Tensor:
        """Means over the windows, [n, X, Y, Z]."""
        if self.inside is None:
            return box_mean(volumes, self.radius)
        return box_mean(self.inside * volumes, self.radius) / self.share

    def __call__(self, moved: Tensor, weight: Tensor) -> Scalar:
        """``weight`` [X, Y, Z] is that of the window around each voxel."""
        loss: Scalar = 1 - (weight * self.local(moved)).sum() / weight.sum().clamp(min=1)
        return loss

    def local(self, moved: Tensor) -> Tensor:
        """Local NCC (or its square) of every window, [X, Y, Z]."""
        mean, square, product = self._means(torch.stack((moved, moved * moved, self.fixed * moved)))
        covariance = product - self.mean * mean
        variances = (self.variance + self.floor) * ((square - mean**2).clamp(min=0) + self.floor)
        ncc: Tensor = covariance / variances.sqrt() if self.signed else covariance.square() / variances
        return ncc

    def agreement(self, moved: Tensor, weight: Tensor) -> float:
        """Mean over the windows whose contrast is far above the floor: a constant one agrees with nothing."""
        telling = weight * (self.variance > 10 * self.floor)
        return float((telling * self.local(moved)).sum() / telling.sum().clamp(min=1))


def differences(u: Tensor, steps: Sequence[float]) -> list[Tensor]:
    """Forward differences of [X, Y, Z, c] along each axis by normalised length; zero along an axis of one point."""
    return [u.diff(dim=axis) / step if step else torch.zeros_like(u) for axis, step in enumerate(steps)]


class ForwardDiffusion(Regularizer):
    """mean sum_(i,c) (u_c(v + e_i) - u_c(v))^2 over the voxels v of a grid: what SINR's code calls bending.

    Sideri-Lampretsa et al. (MIDL 2024) print the bending energy; in B-spline mode their code takes forward differences
    of the dense displacement, in normalised units between neighbouring voxels, with weight 50. Here the mean is over
    the differences that exist (there: a last one of 0 along each axis is among them), a voxel is the geometric mean of
    the image's sides, and on a coarser grid the difference is divided by its distance in voxels.
    `medinr.losses.Diffusion` is the same without the grid and with lengths in 100 mm.
    """

    def forward(self, displacement_jet: Jet) -> Scalar:
        raise UserError(
            "ForwardDiffusion: looks at neighbours on a grid, use it with VolumeRegistration; else Diffusion"
        )

    def on_grid(self, u: Tensor, steps: Sequence[float], voxel: float) -> Scalar:
        """Of u [X, Y, Z, 3]; distances of the grid's points and of the voxels in the same unit as u."""
        parts = [d.square().sum(-1).mean() for d in differences(u, steps)]
        raw: Scalar = voxel**2 * torch.stack(parts).sum()
        return raw
