"""A velocity of space and time on lattices of cubic B-splines, with the modes that the trained times determine."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from medinr.fields.lattice import SplineField
from medinr.fields.times import TimeEncoding
from medinr.space import Domain

RANK = 1e-4
"""Combinations of modes that the trained times see more weakly than this, relative to the strongest, are not used."""


class TimedLattice(SplineField):
    """v(x, t) = sum_k f_k(t) w_k(x), f(t) = P (e(t) - e(t_ref)), w_k multilevel cubic B-splines, P = E^+ E.

    Row i of E is e(t_i) - e(t_ref) of the trained time t_i. An encoding with more components than there are trained
    times leaves combinations of the modes that no image sees; the orthogonal projection P removes them, so that of all
    velocities with the same values at the trained times v is the one of the smallest sum_k |w_k|^2. With `PhaseTime`,
    whose components are divided by k^2, this sum is the mean of |d^2 v / dt^2|^2 but for a constant: v is the smoothest
    interpolation in time, the periodic cubic spline up to the highest harmonic. v vanishes at the reference time, as
    that of `TimedVelocity`, which has a network in place of the lattices.

    Args:
        spacings: distance of the control points of each level, mm.
        time: the encoding e.
        gain: factor of the coefficients.
        unit: of ``spacings``, see `SplineField`.
    """

    conditions = 1
    determined: Tensor

    def __init__(
        self,
        spacings: Sequence[float],
        time: TimeEncoding,
        gain: float = 1.0,
        unit: Literal["mm", "voxel"] = "mm",
    ) -> None:
        super().__init__(spacings, 3, gain, unit)
        self.time = time
        self.modes = nn.ParameterList()
        self.register_buffer("determined", torch.eye(time.size), persistent=False)

    def cover(self, domain: Domain) -> None:
        before = self.shapes
        super().cover(domain)
        if self.shapes != before:
            sizes = [math.prod(n) for n in self.shapes]
            device = self.origin.device
            self.modes = nn.ParameterList(torch.zeros(n, self.time.size, 3, device=device) for n in sizes)

    def set_times(self, reference: float, span: float, period: float | None, seen: Sequence[float]) -> None:
        """Tell `time` of the sequence (see `TimeEncoding.set`), and take the projection on what ``seen`` determine."""
        self.time.set(reference, span, period)
        if not seen:
            return
        rows = torch.stack([self._change(torch.tensor([t], dtype=torch.float64)) for t in seen])
        self.determined = (torch.linalg.pinv(rows, rtol=RANK) @ rows).to(self.determined)

    def _change(self, context: Tensor) -> Tensor:
        e: Tensor = self.time(context)
        return e - self.time.at_reference(context)

    def factors(self, context: Tensor) -> Tensor:
        """f(t) [size] of a time [1]."""
        return self.determined.to(context) @ self._change(context)

    def coefficients(self, level: int, context: Tensor | None = None) -> Tensor:
        if context is None or context.shape != (1,):
            found = None if context is None else tuple(context.shape)
            raise ValueError(f"velocity: expected one time as context, got {found}")
        sizes = [math.prod(n) for n in self.shapes]
        values: Tensor = self.once(lambda: self._mixed(context), context).split(sizes)[level]
        return values

    def _mixed(self, context: Tensor) -> Tensor:
        """Coefficients of all levels at a time, one after the other [n, 3]."""
        modes = torch.cat(list(self.modes))
        return torch.einsum("k,nkc->nc", self.factors(context).to(modes), modes)
