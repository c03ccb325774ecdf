"""Image similarities on random points; lower is better.

A point similarity compares values [N] of the two images. A patch similarity compares small patches [N, P] around each
point; it names the patch's offsets, and the method samples the moving patch at phi(x) + J_phi(x) d, so that one
evaluation of the field serves the whole patch (extrapolated patches).

With several processes each has its share of the points. Where a similarity is no plain mean over points (NCC, or a mean
weighted by the overlap) the mean of the shares' values would be another number than that of all points: two halves with
their own mean intensities hide what differs between them. Sums go over all processes instead (`medinr.ranks`), so that
value and gradient are those of one process with all points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medinr.configured import Configured
from medinr.ranks import sum_over_ranks
from medinr.sampling import patch_offsets
from medinr.types import Samples, Scalar


def ncc(fixed: Tensor, moved: Tensor, mask: Tensor | None = None, floor: float = 1e-6, pooled: bool = False) -> Tensor:
    """Normalised cross-correlation along the last axis; ``mask`` holds weights; ``floor`` adds to both variances.

    ``pooled``: the axis goes on in the other processes of the fit, and the sums are taken over all of them.
    """

    def total(*terms: Tensor) -> Sequence[Tensor]:
        sums = [t.sum(-1, keepdim=True) for t in terms]
        return sum_over_ranks(torch.stack(sums)).unbind() if pooled else sums

    weight = torch.ones_like(moved) if mask is None else mask.to(moved.dtype)
    n, sum_fixed, sum_moved = total(weight, weight * fixed, weight * moved)
    n = n.clamp(min=1e-6)
    a, b = fixed - sum_fixed / n, moved - sum_moved / n
    wa = weight * a
    ab, aa, bb = ((s / n)[..., 0] for s in total(wa * b, wa * a, weight * b * b))
    return ab / ((aa + floor) * (bb + floor)).sqrt()


def weighted_mean(values: Tensor, weight: Tensor, least: float = 1e-6) -> Scalar:
    """sum(w v) / max(sum(w), least) over the points of all processes of the fit; values and weights of equal shape."""
    top, bottom = sum_over_ranks(torch.stack(((weight * values).sum(), weight.sum())))
    mean: Scalar = top / bottom.clamp(min=least)
    return mean


class Similarity(Configured, nn.Module):
    """``forward(fixed, moved, mask) -> scalar``, lower is better; values [N] or, with a patch, [N, P]."""

    unordered = False
    """Whether the samples of a patch may come in any number and order: a patch of one slice has fewer of them."""

    def offsets(self, level_mm: float) -> Tensor | None:
        """Patch offsets [P, 3] in mm at a pyramid level (its smoothing in mm), or None for a point similarity."""
        return None

    def forward(self, fixed: Samples, moved: Samples, mask: Samples | None = None) -> Scalar:
        raise NotImplementedError


class NCC(Similarity):
    """1 - normalised cross-correlation over all points of the batch (IDIR; Wolterink et al., MIDL 2022)."""

    def forward(self, fixed: Samples, moved: Samples, mask: Samples | None = None) -> Scalar:
        return 1 - ncc(fixed, moved, mask, pooled=True)


class MSE(Similarity):
    """Mean squared difference of the windowed intensities."""

    def forward(self, fixed: Samples, moved: Samples, mask: Samples | None = None) -> Scalar:
        square = (fixed - moved) ** 2
        if mask is None:
            return square.mean()
        return weighted_mean(square, mask.to(square.dtype), 1)


class LocalNCC(Similarity):
    """1 - mean over points of the signed NCC inside a small patch (local normalised cross-correlation).

    Robust to bias fields and to local changes of intensity (Cachier et al., 2003; Avants et al., 2008). Here the patch
    is sparse, sampled around random points, and carried to the moving image by the field's own Jacobian.

    Args:
        radius_mm: half side of the patch at the finest level.
        per_side: samples along each side; the centre is one of them if odd.
        per_level: the half side grows with the pyramid: radius + per_level * smoothing of the level.
        floor: added to both variances (windowed intensities in [0, 1]): patches with less contrast count less.
        signed: False takes the square of the NCC (Avants et al., Med. Image Anal. 12(1), 2008), for which falling
            brightness agrees as well as rising: images of different contrast, where each patch has one of its own.
    """

    unordered = True

    def __init__(
        self,
        radius_mm: float = 4.0,
        per_side: int = 3,
        per_level: float = 0.5,
        floor: float = 1e-4,
        signed: bool = True,
    ) -> None:
        super().__init__()
        if per_side < 2:
            raise ValueError(f"per_side: a patch needs at least 2 samples a side, got {per_side}")
        self.radius_mm, self.per_side, self.per_level, self.floor = radius_mm, per_side, per_level, floor
        self.signed = signed

    def offsets(self, level_mm: float) -> Tensor:
        return patch_offsets(self.radius_mm + self.per_level * level_mm, self.per_side)

    def forward(self, fixed: Samples, moved: Samples, mask: Samples | None = None) -> Scalar:
        local = ncc(fixed, moved, mask, self.floor)
        if not self.signed:
            local = local.square()
        if mask is None:
            return 1 - local.mean()
        # A patch counts by the share of it that lies inside both images.
        return 1 - weighted_mean(local, mask.to(local.dtype).mean(-1))
