"""Curves and images of tubes that several tests share."""

import numpy as np

from medinr.space import Domain

CUBE = Domain.of(
    (96, 96, 64), np.array([[2.5, 0, 0, -118.75], [0, 2.5, 0, -118.75], [0, 0, 2.5, -78.75], [0, 0, 0, 1]])
)
"""240 x 240 x 160 mm."""


def bent(n: int = 40) -> list[list[float]]:
    """A gently winding curve in all three directions, about 190 mm."""
    t = np.linspace(-1, 1, n)
    return np.stack([80 * t, 18 * np.sin(np.pi * t), 15 * np.sin(np.pi * t / 2 + 0.3)], axis=1).tolist()


def straight(n: int = 9) -> list[list[float]]:
    """100 mm along the third axis, where the published first normal is not defined."""
    return [[3.0, -2.0, z] for z in np.linspace(-50, 50, n)]


RADIUS, CLIMB = 40.0, 10.0
CURVATURE = RADIUS / (RADIUS**2 + CLIMB**2)
TORSION = CLIMB / (RADIUS**2 + CLIMB**2)


def helix(turns: float = 0.8, n: int = 200) -> list[list[float]]:
    """Radius 40 mm, climbing 10 mm a radian."""
    t = np.linspace(0, 2 * np.pi * turns, n)
    return np.stack([RADIUS * np.cos(t), RADIUS * np.sin(t), CLIMB * t - 25], axis=1).tolist()
