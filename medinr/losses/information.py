"""Mutual information of the two images' values at random points, for images of different contrast."""

import torch
from torch import Tensor

from medinr.losses.similarities import Similarity
from medinr.ranks import sum_over_ranks
from medinr.types import Samples, Scalar

_TINY = 1e-12  # stands in for an empty bin: p log p and its slope stay finite


def parzen_weights(values: Tensor, bins: int) -> Tensor:
    """Weights [N, bins] of values [N] in [0, 1] by a cubic B-spline window one bin wide (Mattes et al., 2003).

    0 and 1 lie one bin from the ends, so that each row has four entries and the sum 1; values outside are clipped and
    have no gradient. Only the four weights are computed: work and memory do not grow with the window's tails.
    """
    position = 1 + values.clamp(0, 1) * (bins - 3)
    first = position.detach().floor().clamp(max=bins - 3)
    t = position - first
    s = 1 - t
    window = torch.stack((s**3, 3 * t**3 - 6 * t**2 + 4, 3 * s**3 - 6 * s**2 + 4, t**3), dim=-1) / 6
    index = first.long()[:, None] + torch.arange(-1, 3, device=values.device)
    return window.new_zeros(len(values), bins).scatter(1, index, window)


def joint_histogram(fixed: Tensor, moved: Tensor, mask: Tensor | None = None, bins: int = 32) -> Tensor:
    """Joint probabilities [bins, bins] of values [N] in [0, 1]: one product of two matrices [N, bins].

    Over the points of all processes of the fit.
    """
    a, b = parzen_weights(fixed, bins), parzen_weights(moved, bins)
    if mask is not None:
        a = a * mask.to(a.dtype)[:, None]
    counts = sum_over_ranks(a.T @ b)
    return counts / counts.sum().clamp(min=_TINY)


def entropy(p: Tensor) -> Scalar:
    """-sum p log p, in nats."""
    return -(p * p.clamp(min=_TINY).log()).sum()


def mutual_information(p: Tensor) -> tuple[Scalar, Scalar, Scalar]:
    """I = H1 + H2 - H12, H1 and H2 of a joint distribution [bins, bins], in nats."""
    one, other = entropy(p.sum(1)), entropy(p.sum(0))
    return one + other - entropy(p), one, other


class NMI(Similarity):
    """1 - 2 I / (H1 + H2): one minus the normalised mutual information, in the symmetric form that SINR uses.

    0 where either value tells the other, 1 for independent values. The other customary form, (H1 + H2) / H12
    (Studholme, Hill and Hawkes, Pattern Recognition 32(1), 1999), is a monotone function of this one, 2 / (1 + loss).
    Densities are Parzen estimates with cubic B-splines (Mattes et al., IEEE TMI 22(1), 2003); SINR's code takes
    Gaussians of standard deviation 0.1, wider by far, and all voxels. A window blurs: even identical images score above
    0. Estimates from few points are too dependent: use some thousands of points a step.

    A statistic of the whole batch: values of all patches [N, P] would be pooled.

    Args:
        bins: of each image, over the intensity window; between 16 and 64 is usual.
    """

    def __init__(self, bins: int = 32) -> None:
        super().__init__()
        if bins < 4:
            raise ValueError(f"bins: a cubic window needs at least 4, got {bins}")
        self.bins = bins

    def forward(self, fixed: Samples, moved: Samples, mask: Samples | None = None) -> Scalar:
        weight = None if mask is None else mask.flatten()
        shared, one, other = mutual_information(joint_histogram(fixed.flatten(), moved.flatten(), weight, self.bins))
        return 1 - 2 * shared / (one + other).clamp(min=_TINY)
