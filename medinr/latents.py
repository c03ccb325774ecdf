"""What an atlas knows of one brain, real or made up, and statistics over many of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medinr.errors import UserError
from medinr.fields.poses import shape_part


@dataclass(frozen=True)
class Latent:
    """One brain in the space of an atlas.

    Attributes:
        code: [D, k, k, k].
        encoded: [q], the explicit conditions as `medinr.data.encoded.encode` gives them.
        pose: [p], from the scan's frame to the atlas's (see `medinr.fields.poses`).
        centre: [3], RAS mm: the origin of the scan's frame.
    """

    code: Tensor
    encoded: Tensor
    pose: Tensor
    centre: Tensor

    def upright(self) -> "Latent":
        """As it would lie in the atlas: no rotation, no translation, centre at 0."""
        return replace(self, pose=shape_part(self.pose), centre=torch.zeros_like(self.centre))


def kernel_weights(times: Tensor, at: float, sigma: float, degree: int = 0, most: int = 100) -> Tensor:
    """Weights [S] of scans at ``times`` [S] for the time ``at``; they sum to one. A NaN time gets 0.

    Degree 0 (CINeMA, eq. 3): w_i = exp(-(t_i - t)^2 / (2 sigma^2)) / sum. Where the scans lie to one side of t, or more
    densely there, the mean age of such a mean is not t. Degree 1, local linear regression: the weights of the weighted
    least-squares line at t, so that sum w_i t_i = t; they may be negative at the ends of the range.

    Args:
        times: NaN where unknown.
        at: t, in the units of ``times``.
        sigma: of the kernel; it is widened where no scan is near enough to count.
        degree: 0 or 1.
        most: only so many of the nearest count.

    Raises:
        UserError: no time is known.
    """
    known = ~times.isnan()
    if not bool(known.any()):
        raise UserError("atlas: no scan of the training has a known time; give --condition values only")
    gap = torch.where(known, times - at, torch.inf).double()
    # The nearest scans decide: without a floor for sigma all weights would vanish far from every scan.
    second = gap.abs().sort().values[: 2 if known.sum() > 1 else 1][-1]
    width = max(sigma, float(second) / 3)
    w = torch.exp(-0.5 * (gap / width).square())
    if len(w) > most:
        w[w < w.sort(descending=True).values[most - 1]] = 0
    w = w / w.sum()
    gap = torch.where(known, gap, 0.0)
    if degree == 1:
        mean = (w * gap).sum()
        spread = (w * (gap - mean).square()).sum()
        if spread > (0.05 * width) ** 2:
            w = w * (1 - mean * (gap - mean) / spread)
    return w.to(times.dtype)


def mean_latent(latents: Sequence[Latent], weights: Tensor) -> Latent:
    """Weighted mean of codes and conditions, and of what the poses say of the shape."""
    chosen = [(latent, w) for latent, w in zip(latents, weights, strict=True) if w != 0]
    code = torch.stack([w * latent.code for latent, w in chosen]).sum(0)
    encoded = torch.stack([w * latent.encoded for latent, w in chosen]).sum(0)
    pose = torch.stack([w * shape_part(latent.pose) for latent, w in chosen]).sum(0)
    return Latent(code, encoded, pose, torch.zeros_like(latents[0].centre))


def condition_effects(
    latents: Sequence[Latent], times: Tensor, sigma: float, degree: int, columns: Sequence[int], ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """How codes and shapes change with some conditions while the time stays: [q, D, k, k, k] and [q, p].

    A decoder that is told a condition need not listen: its codes are free to hold the same thing, and their mean over
    all scans then holds the mean of it. What they hold is a partially linear model (Robinson, Econometrica 1988),

        z_i = g(t_i) + B c_i + e_i:

    B is the least-squares slope of what the kernel over time leaves of the codes, on what it leaves of the conditions.

    Args:
        latents: of the scans.
        times: [S]; scans whose time is NaN do not count.
        sigma, degree: of the kernel (`kernel_weights`).
        columns: which of the numbers in ``encoded``.
        ridge: penalty of B, relative to the mean variance of the columns.
    """
    scans = [i for i, time in enumerate(times.tolist()) if not math.isnan(time)]
    shapes = [latents[0].code.shape, latents[0].pose.shape]
    told = torch.stack([latents[i].encoded[list(columns)] for i in scans]).double()
    known = torch.stack([torch.cat((latents[i].code.flatten(), shape_part(latents[i].pose))) for i in scans]).double()
    weights = torch.stack([kernel_weights(times, float(times[i]), sigma, degree)[scans] for i in scans]).double()
    c, z = told - weights @ told, known - weights @ known
    gram = c.mT @ c
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-9)
    effects = torch.linalg.solve(gram, c.mT @ z).float()
    code, pose = effects.split([shapes[0].numel(), shapes[1].numel()], 1)
    return code.reshape(-1, *shapes[0]), pose


def between(one: Latent, other: Latent, share: float) -> Latent:
    """The brain at ``share`` of the way from one to the other, upright."""
    return mean_latent([one, other], torch.tensor([1 - share, share]))


def sampled_latent(
    latents: Sequence[Latent], weights: Tensor, generator: torch.Generator, spread: float = 1.0
) -> Latent:
    """A brain drawn from the normal distribution around the weighted mean with the weighted covariance of the codes.

    Deviations from the mean are added with random normal factors: sum_i e_i sqrt(w_i) (z_i - mean), which has exactly
    that covariance, and needs no matrix of it.

    Args:
        weights: [S], not negative (degree 0).
        spread: factor of the standard deviation.
    """
    mean = mean_latent(latents, weights)
    factors = spread * torch.randn(len(latents), generator=generator) * weights.clamp(min=0).sqrt()
    code, pose = mean.code, mean.pose
    for latent, e in zip(latents, factors, strict=True):
        if e != 0:
            code = code + e * (latent.code - mean.code)
            pose = pose + e * (shape_part(latent.pose) - mean.pose)
    return replace(mean, code=code, pose=pose)
