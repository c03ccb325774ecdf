"""The flow of a velocity that changes with time: from the reference time to any other, along time itself."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from medinr.fields.flow import Flow
from medinr.fields.times import RunningVelocity
from medinr.jets import Jet
from medinr.types import Points, Scalar

PLACES = 3
"""Times along a path at which its Lipschitz constant is estimated."""


class PathFlow(Flow):
    """phi_t(x) = y(t), dy/dt = v(y, t) / unit, y(t_ref) = x: a body's own path (Beg et al., LDDMM, IJCV 61(2), 2005).

    `Flow` takes each time on a way of its own, exp(v(., t)), whose length has nothing to do with the path that the body
    went. Here a point goes through all earlier times, so that a later one cannot be reached without them; one velocity
    serves all, and phi_t o phi_s^-1 is the flow from s to t. Where time repeats, a path starts at the reference time
    and goes forward; after one period it should be back, which nothing forces: `closure` is by how much it is not.

    Args:
        velocity: v, in normalised units a `unit` of time.
        steps, scheme: see `Flow`; for each path, however short.
    """

    velocity: RunningVelocity

    @property
    def unit(self) -> float:
        """Of time: the length of the sequence, or a radian of a period: velocities are then as large as motions."""
        time = self.velocity.time
        return time.span if time.period is None else time.period / (2 * math.pi)

    def way(self, context: Tensor | None) -> tuple[float, float]:
        """Where a path begins, and how far it goes: from the reference to a time [1], or from one to another [2].

        Where time repeats, a single time lies less than a period ahead of the reference.
        """
        assert context is not None, "a path ends at a time"
        if len(context) == 2:
            return float(context[0]), float(context[1] - context[0])
        time = self.velocity.time
        ahead = float(context) - time.reference
        return time.reference, ahead if time.period is None else ahead % time.period

    def slope_at(self, y: Jet, s: float, context: Tensor | None) -> Jet:
        begin, way = self.way(context)
        share = s if self.duration > 0 else 1 + s  # backwards: from the time to the reference
        slope = self.slope(y, torch.tensor([begin + share * way], device=y.channels.device))
        return replace(slope, channels=way / self.unit * slope.channels)

    @torch.no_grad()
    def lipschitz(self, context: Tensor | None = None) -> Scalar:
        """Of the whole path: the largest at some times along it, times its length in units."""
        begin, way = self.way(context)
        times = torch.linspace(begin, begin + way, PLACES, device=self.probes.device)
        largest = torch.stack([super(PathFlow, self).lipschitz(t[None]) for t in times]).amax()
        return largest * abs(way) / self.unit

    def closure(self, x: Points) -> Points:
        """Where a whole period brings points, minus the points [N, 3]: zero for a motion that repeats.

        Raises:
            ValueError: time does not repeat.
        """
        time = self.velocity.time
        if time.period is None:
            raise ValueError("closure: expected times that repeat, found linear ones")
        around = torch.tensor([time.reference, time.reference + time.period], device=x.device)
        moved: Points = self(x, around)
        return moved - x
