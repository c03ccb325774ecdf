"""Penalties of a displacement, from its jet: functions, and thin modules that hold weight and sampling.

All take the jet of u in units of `medinr.space.REFERENCE_LENGTH_MM`, so that a weight means the same for every image
size: first derivatives have no unit, second derivatives are per 100 mm.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from medinr import jets
from medinr.configured import Configured
from medinr.jets import Jet
from medinr.types import Scalar


def deformation_gradient(u: Jet) -> Tensor:
    """I + Du, [N, 3, 3]."""
    j = u.jacobian
    return j + torch.eye(3, device=j.device, dtype=j.dtype)


def volume_change(u: Jet) -> Tensor:
    """det(I + Du), [N]."""
    return jets.det(deformation_gradient(u))


def jacobian(u: Jet) -> Scalar:
    """mean |det J - 1| (IDIR; Wolterink et al., MIDL 2022)."""
    return (volume_change(u) - 1).abs().mean()


def symmetric_jacobian(u: Jet, eps: float = 0.1, published: bool = False) -> Scalar:
    """mean of (det J - 1) + (1/det J - 1) = (det J - 1)^2 / det J, the same for a map and its inverse.

    van Harten et al., IEEE TMI 43(2), 2024. The printed min(., tau) must not be used: for det J < 0 the ratio is
    negative, so folding would be rewarded. ``published``: det J clipped to [eps, 1/eps] first, as in the authors' code;
    the gradient then vanishes at folded points. Ours: below eps the function continues linearly with its slope there,
    so that the gradient always unfolds.
    """
    d = volume_change(u)
    if published:
        d = d.clamp(eps, 1 / eps)
        return ((d - 1) ** 2 / d).mean()
    safe = d.clamp(min=eps)
    slope = 1 - 1 / eps**2
    return ((safe - 1) ** 2 / safe + slope * (d - safe)).mean()


def bending(u: Jet) -> Scalar:
    """Bending energy: mean over points of sum_c |H_c|_F^2 (Rueckert et al., IEEE TMI 18(8), 1999).

    Full basis: the mixed terms count twice. Probes: mean of (v'Hw)^2, unbiased for the same quantity. IDIR's code has
    the yz term once and divides by 3 N more: its weight 10 is 3.3e-4 here at N = 10,000 (in its normalised units).
    """
    if u.second is None:
        raise ValueError("bending: the jet holds no second derivatives")
    if not u.basis:
        return u.second.pow(2).sum(-1).mean()
    twice = torch.tensor([1.0 if a == b else 2.0 for a, b in u.pairs], device=u.value.device, dtype=u.value.dtype)
    return (u.second.pow(2).sum(-1) * twice[:, None]).sum(0).mean()


def diffusion(u: Jet) -> Scalar:
    """First-order smoothness: mean |Du|_F^2. Probes: mean of |Du v|^2 over both directions, unbiased."""
    if u.first is None:
        raise ValueError("diffusion: the jet holds no first derivatives")
    square = u.first.pow(2).sum(-1)
    return square.sum(0).mean() if u.basis else square.mean()


def total_variation(u: Jet, eps: float = 0.01) -> Scalar:
    """Isotropic total variation of the displacement, smoothed: mean sqrt(|Du|_F^2 + eps^2) - eps.

    Grows with the first power of a jump, not with its square: a field that slides along a wall pays for the step once,
    however steep it is, where `diffusion` and `bending` would smear it (Vishnevskiy et al., IEEE TMI 36(2), 2017).
    Differences of neighbours on a lattice are the discrete form. ``eps`` is a strain: below it the penalty is
    quadratic, |Du|^2 / (2 eps). Zero for translations alone.
    """
    return (u.jacobian.square().sum((-1, -2)) + eps**2).sqrt().mean() - eps


def hyperelastic(u: Jet, length: float = 1.0, area: float = 1.0, volume: float = 1.0, eps: float = 0.05) -> Scalar:
    """Hyperelastic energy of Burger, Modersitzki and Ruthotto (SIAM J. Sci. Comput. 35(1), 2013) as used by IDIR.

    length/2 |Du|^2 + area sum_i max(|cof column i|^2 - 1, 0)^2 + volume (det - 1)^4 / det^2. At det J < eps, where the
    volume term would have a pole and then reward folding, it continues linearly.
    """
    f = deformation_gradient(u)
    d = jets.det(f)
    stretch = (u.jacobian**2).sum((-1, -2)) / 2
    faces = ((jets.cofactor(f) ** 2).sum(-2) - 1).clamp(min=0).pow(2).sum(-1)
    safe = d.clamp(min=eps)
    slope = 2 * (eps - 1) ** 3 * (eps + 1) / eps**3
    change = (safe - 1) ** 4 / safe**2 + slope * (d - safe)
    return (length * stretch + area * faces + volume * change).mean()


def barrier(u: Jet, eps: float = 0.1) -> Scalar:
    """Folding barrier: mean max(eps - det J, 0)."""
    return (eps - volume_change(u)).clamp(min=0).mean()


class Regularizer(Configured, nn.Module):
    """``forward(displacement_jet) -> scalar``, the raw penalty; the method applies ``weight``.

    Args:
        weight: factor of the penalty in the loss.
        fraction: share of the batch's points that is looked at, (0, 1].
        directions: ``"exact"`` for all derivatives, ``"probes"`` for random directions drawn for every point (only for
            penalties that are quadratic forms).
    """

    order = 1
    quadratic = False

    def __init__(self, weight: float, fraction: float = 1.0, directions: Literal["exact", "probes"] = "exact") -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a share of the points in (0, 1], got {fraction}")
        if directions == "probes" and not self.quadratic:
            raise ValueError(
                f"{type(self).__name__}: random probes are unbiased only for quadratic penalties (bending, diffusion)"
            )
        self.weight, self.fraction, self.directions = weight, fraction, directions

    def forward(self, displacement_jet: Jet) -> Scalar:
        raise NotImplementedError


class Jacobian(Regularizer):
    """See `jacobian`. IDIR: weight 0.05."""

    def forward(self, displacement_jet: Jet) -> Scalar:
        return jacobian(displacement_jet)


class SymmetricJacobian(Regularizer):
    """See `symmetric_jacobian`. Cycle-consistent INR: weight 0.05."""

    def __init__(self, weight: float, fraction: float = 1.0, eps: float = 0.1, published: bool = False) -> None:
        super().__init__(weight, fraction)
        self.eps, self.published = eps, published

    def forward(self, displacement_jet: Jet) -> Scalar:
        return symmetric_jacobian(displacement_jet, self.eps, self.published)


class Bending(Regularizer):
    """See `bending`."""

    order = 2
    quadratic = True

    def forward(self, displacement_jet: Jet) -> Scalar:
        return bending(displacement_jet)


class Diffusion(Regularizer):
    """See `diffusion`."""

    quadratic = True

    def forward(self, displacement_jet: Jet) -> Scalar:
        return diffusion(displacement_jet)


class TotalVariation(Regularizer):
    """See `total_variation`."""

    def __init__(self, weight: float, fraction: float = 1.0, eps: float = 0.01) -> None:
        super().__init__(weight, fraction)
        if eps <= 0:
            raise ValueError(f"eps: expected a strain above 0 (the root has no slope at 0), got {eps}")
        self.eps = eps

    def forward(self, displacement_jet: Jet) -> Scalar:
        return total_variation(displacement_jet, self.eps)


class Hyperelastic(Regularizer):
    """See `hyperelastic`. IDIR: weight 0.25, all three factors 1."""

    def __init__(
        self,
        weight: float,
        fraction: float = 1.0,
        length: float = 1.0,
        area: float = 1.0,
        volume: float = 1.0,
        eps: float = 0.05,
    ) -> None:
        super().__init__(weight, fraction)
        self.length, self.area, self.volume, self.eps = length, area, volume, eps

    def forward(self, displacement_jet: Jet) -> Scalar:
        return hyperelastic(displacement_jet, self.length, self.area, self.volume, self.eps)


class Barrier(Regularizer):
    """See `barrier`."""

    def __init__(self, weight: float, fraction: float = 1.0, eps: float = 0.1) -> None:
        super().__init__(weight, fraction)
        self.eps = eps

    def forward(self, displacement_jet: Jet) -> Scalar:
        return barrier(displacement_jet, self.eps)
