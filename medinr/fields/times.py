"""Time as a coordinate network sees it, and velocities that vanish at a reference time."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn
from torch.nn import functional as F

from medinr import jets
from medinr.configured import Configured
from medinr.errors import UserError
from medinr.fields.base import Field
from medinr.jets import Jet
from medinr.types import Features


class TimeEncoding(Configured, nn.Module):
    """t -> e(t) [size], a curve of time without self-intersection; `set` tells it of the sequence.

    Attributes:
        size: number of its components.
        periodic: whether it needs a period.
    """

    size: int
    periodic = False
    reference: float = 0.0
    span: float = 1.0
    period: float | None = None

    def set(self, reference: float, span: float, period: float | None) -> None:
        """Take the reference time, the length that times are measured by, and the period (None: linear time).

        Raises:
            UserError: an encoding of phases without a period, or one of linear time with one.
        """
        name = type(self).__name__
        if self.periodic and period is None:
            raise UserError(f"time: expected times that repeat for {name}, found no period; give LinearTime")
        if not self.periodic and period is not None:
            raise UserError(
                f"time: expected linear time for {name}, found a period of {period:g}; give PhaseTime for breathing"
            )
        self.reference, self.span, self.period = reference, span, period

    def forward(self, time: Tensor) -> Tensor:
        """e(t) [size] of a time [1], in the units of the sequence."""
        raise NotImplementedError

    def at_reference(self, like: Tensor) -> Tensor:
        return self(like.new_tensor([self.reference]))  # type: ignore[no-any-return]


class PhaseTime(TimeEncoding):
    """(cos k a, sin k a) / k^2, k = 1 ... harmonics, a = 2 pi t / period: inhaling and exhaling are different points.

    With n times to train on, the reference among them, (n - 1) / 2 harmonics are determined; the factor lets a fit that
    has more of them, and begins at zero, prefer those that bend least in time.

    Args:
        harmonics: how many.
    """

    periodic = True

    def __init__(self, harmonics: int = 2) -> None:
        super().__init__()
        if harmonics < 1:
            raise UserError(f"harmonics: expected 1 or more, found {harmonics}")
        self.harmonics, self.size = harmonics, 2 * harmonics

    def forward(self, time: Tensor) -> Tensor:
        angle = 2 * math.pi * time / (self.period or 1.0)
        k = torch.arange(1, self.harmonics + 1, device=time.device)
        return torch.cat(((k * angle).cos() / k**2, (k * angle).sin() / k**2))


class LinearTime(TimeEncoding):
    """Powers s, s^2 ... of s = (t - reference) / span: dates, in any unit and at any distances.

    Args:
        degree: the highest power.
    """

    def __init__(self, degree: int = 1) -> None:
        super().__init__()
        if degree < 1:
            raise UserError(f"degree: expected 1 or more, found {degree}")
        self.degree = self.size = degree

    def forward(self, time: Tensor) -> Tensor:
        s = (time - self.reference) / self.span
        return torch.cat([s**k for k in range(1, self.degree + 1)])


class SurrogateTime(TimeEncoding):
    """(s, ds/dt) of a measured signal (a belt, the height of the skin) in place of time; both in standard deviations.

    The signal alone cannot tell inhaling from exhaling: its rate can (Low et al., Int. J. Radiat. Oncol. 63(3), 2005).
    Between its samples the signal is a cubic spline, periodic where time is.

    Args:
        times: of the samples, ascending, in the units of the sequence.
        signal: one value for each.
        rate: use ds/dt beside s.
    """

    def __init__(self, times: Sequence[float], signal: Sequence[float], rate: bool = True) -> None:
        super().__init__()
        if len(times) != len(signal) or len(times) < 3:
            raise UserError(f"signal: expected one value for each of 3 or more times, found {len(signal)} values")
        if any(b <= a for a, b in itertools.pairwise(times)) or np.std(signal) == 0:
            raise UserError("signal: expected ascending times and values that change, found others; correct them")
        self.times, self.signal, self.rate = tuple(times), tuple(signal), rate
        self.size = 2 if rate else 1
        self._spline: Any = None

    def set(self, reference: float, span: float, period: float | None) -> None:
        if period is not None and self.times[-1] - self.times[0] >= period:
            raise UserError(f"signal: expected times within one period of {period:g}, found more; give one period")
        self.reference, self.span, self.period = reference, span, period
        self._spline = None

    def spline(self) -> Any:
        """The signal between its samples, as a function of time."""
        if self._spline is None:
            t, s = np.array(self.times), np.array(self.signal)
            s = (s - s.mean()) / s.std()
            if self.period is not None:
                t, s = np.append(t, t[0] + self.period), np.append(s, s[0])
            spline = CubicSpline(t, s, bc_type="not-a-knot" if self.period is None else "periodic")
            change = spline(np.linspace(t[0], t[-1], 257), 1)
            self._spline = (spline, 1 / max(float(np.std(change)), 1e-12))
        return self._spline

    def forward(self, time: Tensor) -> Tensor:
        spline, scale = self.spline()
        t = float(time)
        if self.period is None:
            t = min(max(t, self.times[0]), self.times[-1])  # a cubic runs away beyond its samples
        else:
            t = self.times[0] + (t - self.times[0]) % self.period
        found = [float(spline(t))] + ([scale * float(spline(t, 1))] if self.rate else [])
        return time.new_tensor(found)


class TimedVelocity(Field):
    """v(x, t) = sum_k (e_k(t) - e_k(t_ref)) w_k(x, e(t)): zero at the reference time, whatever the network.

    By Hadamard's lemma every smooth v that vanishes there has this form. A common factor in place of the differences
    would not do: on the circle it has a double zero at t_ref (it cannot change its sign once), which forbids the body
    to move as it passes the reference; and net(x, t) - net(x, t_ref) asks the network twice. A network of space alone
    gives separable modes, v(x, t) = sum_k (e_k(t) - e_k(t_ref)) w_k(x): between few times it invents nothing.

    Args:
        network: w. Its outputs are 3 numbers for each component of ``time``, its inputs x, or x and the components.
        time: the encoding e; 2 harmonics have 4 components, linear time has 1.
        time_scale: factor of e as an input; the first layer of a SIREN multiplies it by its frequency, and a network
            that oscillates in time cannot be read between the times that it was trained at.

    Raises:
        UserError: a network of other dimensions.
    """

    in_features = 3
    out_features = 3
    conditions = 1

    def __init__(self, network: Field, time: TimeEncoding, time_scale: float = 0.05) -> None:
        super().__init__()
        modes = self.modes(time)
        if network.in_features not in (3, 3 + time.size) or network.out_features != 3 * modes:
            raise UserError(
                f"field: expected {3 * modes} outputs (3 for each of {modes} components of time) and 3 or "
                f"{3 + time.size} inputs, found {network.out_features} and {network.in_features}; set out_features and "
                "in_features"
            )
        self.network, self.time, self.time_scale = network, time, time_scale

    @staticmethod
    def modes(time: TimeEncoding) -> int:
        """How many w_k there are."""
        return time.size

    def factors(self, e: Tensor) -> Tensor:
        """The factor of each w_k, of e(t)."""
        return e - self.time.at_reference(e)

    def set_times(self, reference: float, span: float, period: float | None, seen: Sequence[float]) -> None:
        """Tell `time` of the sequence (see `TimeEncoding.set`); ``seen``, the trained times, change nothing here."""
        self.time.set(reference, span, period)

    def weights(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """e(t), and the matrix [3, 3 size] that sums the w_k."""
        if context is None or context.shape != (1,):
            found = None if context is None else tuple(context.shape)
            raise ValueError(f"velocity: expected one time as context, got {found}")
        e = self.time(context)
        eye = torch.eye(3, device=e.device, dtype=e.dtype)
        return e, torch.cat([f * eye for f in self.factors(e)], dim=1)

    def _inputs(self, channels: Tensor, e: Tensor) -> Tensor:
        """Channels [1 + k + m, N, 3] with the encoded time beside the value; it does not vary in space."""
        if self.network.in_features == 3:
            return channels
        value = torch.cat((channels[0], (self.time_scale * e).to(channels).expand(channels.shape[1], -1)), dim=1)
        return torch.cat((value[None], F.pad(channels[1:], (0, len(e)))))

    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        e, matrix = self.weights(context)
        modes = self.network(self._inputs(x[None], e)[0])
        return F.linear(modes, matrix.to(modes))

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        e, matrix = self.weights(context)
        modes = self.network.jet(replace(jet, channels=self._inputs(jet.channels, e)))
        return jets.linear(modes, matrix.to(modes.channels))


class RunningVelocity(TimedVelocity):
    """v(x, t) = w_0(x, e(t)) + sum_k e_k(t) w_k(x, e(t)): of a path through time, which needs not vanish anywhere.

    Args:
        network: w, with 3 outputs for each component of ``time`` and 3 more.
        time, time_scale: see `TimedVelocity`.
    """

    @staticmethod
    def modes(time: TimeEncoding) -> int:
        return 1 + time.size

    def factors(self, e: Tensor) -> Tensor:
        return torch.cat((torch.ones_like(e[:1]), e))
