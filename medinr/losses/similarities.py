"""Image similarities on random points; lower is better.

A point similarity compares values [N] of the two images. A patch similarity compares small patches [N, P] around each
point; it names the patch's offsets, and the method samples the moving patch at phi(x) + J_phi(x) d, so that one
evaluation of the field serves the whole patch (extrapolated patches).
"""

import torch
from torch import Tensor, nn

from medinr.configured import Configured
from medinr.sampling import patch_offsets
from medinr.types import Samples, Scalar


def ncc(fixed: Tensor, moved: Tensor, mask: Tensor | None = None, floor: float = 1e-6) -> Tensor:
    """Normalised cross-correlation along the last axis; ``mask`` holds weights; ``floor`` adds to both variances."""
    weight = torch.ones_like(moved) if mask is None else mask.to(moved.dtype)
    total = weight.sum(-1, keepdim=True).clamp(min=1e-6)
    a = fixed - (weight * fixed).sum(-1, keepdim=True) / total
    b = moved - (weight * moved).sum(-1, keepdim=True) / total
    wa = weight * a
    covariance = (wa * b).sum(-1) / total[..., 0]
    variances = ((wa * a).sum(-1) / total[..., 0] + floor) * ((weight * b * b).sum(-1) / total[..., 0] + floor)
    return covariance / variances.sqrt()


class Similarity(Configured, nn.Module):
    """``forward(fixed, moved, mask) -> scalar``, lower is better; values [N] or, with a patch, [N, P]."""

    def offsets(self, level_mm: float) -> Tensor | None:
        """Patch offsets [P, 3] in mm at a pyramid level (its smoothing in mm), or None for a point similarity."""
        return None

    def forward(self, fixed: Samples, moved: Samples, mask: Samples | None = None) -> Scalar:
        raise NotImplementedError


class NCC(Similarity):
    """1 - normalised cross-correlation over all points of the batch (IDIR; Wolterink et al., MIDL 2022)."""

    def forward(self, fixed: Samples, moved: Samples, mask: Samples | None = None) -> Scalar:
        return 1 - ncc(fixed, moved, mask)


class MSE(Similarity):
    """Mean squared difference of the windowed intensities."""

    def forward(self, fixed: Samples, moved: Samples, mask: Samples | None = None) -> Scalar:
        square = (fixed - moved) ** 2
        if mask is None:
            return square.mean()
        weight = mask.to(square.dtype)
        return (weight * square).sum() / weight.sum().clamp(min=1)


class LocalNCC(Similarity):
    """1 - mean over points of the signed NCC inside a small patch (local normalised cross-correlation).

    Robust to bias fields and to local changes of intensity (Cachier et al., 2003; Avants et al., 2008). Here the patch
    is sparse, sampled around random points, and carried to the moving image by the field's own Jacobian.

    Args:
        radius_mm: half side of the patch at the finest level.
        per_side: samples along each side; the centre is one of them if odd.
        per_level: the half side grows with the pyramid: radius + per_level * smoothing of the level.
        floor: added to both variances (windowed intensities in [0, 1]): patches with less contrast count less.
    """

    def __init__(self, radius_mm: float = 4.0, per_side: int = 3, per_level: float = 0.5, floor: float = 1e-4) -> None:
        super().__init__()
        if per_side < 2:
            raise ValueError(f"per_side: a patch needs at least 2 samples a side, got {per_side}")
        self.radius_mm, self.per_side, self.per_level, self.floor = radius_mm, per_side, per_level, floor

    def offsets(self, level_mm: float) -> Tensor:
        return patch_offsets(self.radius_mm + self.per_level * level_mm, self.per_side)

    def forward(self, fixed: Samples, moved: Samples, mask: Samples | None = None) -> Scalar:
        local = ncc(fixed, moved, mask, self.floor)
        if mask is None:
            return 1 - local.mean()
        # A patch counts by the share of it that lies inside both images.
        weight = mask.to(local.dtype).mean(-1)
        return 1 - (weight * local).sum() / weight.sum().clamp(min=1e-6)
