"""Motion of the tube phantom: a contraction wave in the tube's own coordinates, and breathing of the whole body."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from medinr.fields.centreline import Centreline
from medinr.fields.tube import TubeCoordinates

WALL_MM = 11.0
"""Radius at which the wave moves most: the wall."""
REACH_MM = 19.5
"""Radius from which on nothing moves with the wave."""
TAPER_MM = 25.0
"""At either end of the tube the wave fades in over this length."""


def fall(v: Tensor) -> Tensor:
    """1 below 0, 0 above 1, smooth between."""
    t = v.clamp(0, 1)
    return 1 - t**3 * (10 - 15 * t + 6 * t * t)


def within(line: Centreline, x: Tensor, radius: float) -> Tensor:
    """Which points [n, 3] lie within ``radius`` mm of a knot of the centreline, bool [n]."""
    distance, _ = cKDTree(line.knots).query(x.numpy(), distance_upper_bound=radius)
    return torch.from_numpy(np.isfinite(distance))


@dataclass(frozen=True)
class Peristalsis:
    """A standing picture of a contraction wave: the tube at rest -> the tube with rings of contraction.

    The wall at arc length s moves inwards by ``mean_mm + wave_mm cos(2 pi s / wavelength + phase)`` (negative:
    outwards), and the content gives way along the tube, away from the rings. Both are in tangent coordinates, radial
    and along, so the truth is exact.
    """

    line: Centreline
    wave_mm: float = 3.5
    mean_mm: float = 1.0
    along_mm: float = 3.0
    wavelength_mm: float = 55.0
    phase: float = 0.0

    def shift(self, q: Tensor) -> Tensor:
        """Change of (s, u, v) [n, 3] mm."""
        s, across = q[:, :1], q[:, 1:]
        radius = across.norm(dim=1, keepdim=True)
        near = fall((radius - WALL_MM) / (REACH_MM - WALL_MM))
        ends = (1 - fall(s / TAPER_MM)) * fall((s - self.line.length + TAPER_MM) / TAPER_MM)
        angle = 2 * np.pi * s / self.wavelength_mm + self.phase
        inwards = (self.mean_mm + self.wave_mm * angle.cos()) / WALL_MM
        return near * ends * torch.cat((self.along_mm * angle.sin(), -inwards * across), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Rest -> contracted, RAS mm [n, 3]."""
        return self._through(x, self.shift)

    def inverse(self, x: Tensor) -> Tensor:
        """Contracted -> rest, by relaxed fixed-point steps.

        The stretches of q + shift(q) are between 0.3 and 2.3: whole steps would diverge, steps of 0.6 shrink every
        error to less than 0.82 of it.
        """

        def back(q: Tensor) -> Tensor:
            rest = q.clone()
            for _ in range(200):
                gap = q - self.shift(rest) - rest
                rest = rest + 0.6 * gap
                if gap.abs().amax() < 1e-10:
                    break
            return rest - q

        return self._through(x, back)

    def _through(self, x: Tensor, shift: Callable[[Tensor], Tensor]) -> Tensor:
        if not (self.wave_mm or self.mean_mm or self.along_mm):
            return x
        tube = TubeCoordinates(self.line).double()
        near = within(self.line, x, REACH_MM + 1)  # the knots are a millimetre apart
        if not near.any():
            return x
        q = tube.to_tangent(x[near])
        out = x.clone()
        out[near] = tube.to_image(q + shift(q))
        return out


@dataclass(frozen=True)
class Breathing:
    """Smooth motion of the whole body, mostly head to foot: x -> x + d(x), RAS mm."""

    amplitude_mm: float = 0.0

    def shift(self, x: Tensor) -> Tensor:
        a, b, c = (np.pi * x / 320).unbind(1)
        down = -0.9 * a.cos() * b.cos()
        return self.amplitude_mm * torch.stack((0.25 * c.sin(), 0.4 * a.cos() * c.cos(), down), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift(x)

    def inverse(self, x: Tensor) -> Tensor:
        found = x
        for _ in range(100):
            found, before = x - self.shift(found), found
            if (found - before).abs().max() < 1e-10:
                break
        return found
