"""Implicit shapes for the brain phantoms: signed distances in mm, negative inside, on points [3, ...]."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def ellipsoid(p: Array, centre: Sequence[float], radii: Sequence[float]) -> Array:
    """Distance from an ellipsoid, to first order (exact on it)."""
    q = [(p[a] - centre[a]) / radii[a] for a in range(3)]
    k = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2) + 1e-6
    slope = np.sqrt(sum((q[a] / radii[a]) ** 2 for a in range(3))) + 1e-6
    return np.asarray(k * (k - 1) / slope)


def tube_distances(p: Array, nodes: Array) -> list[tuple[Array, Array]]:
    """For each piece of a polyline of nodes [m, 4] (x, y, z, radius): distance from its axis, and radius there."""
    found = []
    for a, b in pairwise(nodes):
        axis = b[:3] - a[:3]
        offset = [p[i] - a[i] for i in range(3)]
        t = np.clip(sum(offset[i] * axis[i] for i in range(3)) / (axis @ axis), 0, 1)
        distance = np.sqrt(sum((offset[i] - t * axis[i]) ** 2 for i in range(3)))
        found.append((distance, a[3] + t * (b[3] - a[3])))
    return found


def tube(pieces: list[tuple[Array, Array]], factor: float = 1.0) -> Array:
    """Distance from a tube whose radii are ``factor`` times those of `tube_distances`."""
    return np.asarray(np.min([distance - factor * radius for distance, radius in pieces], axis=0))


def smooth_union(a: Array, b: Array, width: float) -> Array:
    """The union of two shapes, rounded over ``width`` mm where they meet (cubic polynomial blend)."""
    h = np.maximum(width - np.abs(a - b), 0) / width
    return np.asarray(np.minimum(a, b) - h**3 * width / 6)


def smooth_cut(a: Array, b: Array, width: float) -> Array:
    """The intersection of two shapes, rounded likewise."""
    return -smooth_union(-a, -b, width)


class Waves:
    """A smooth random function of space: a sum of plane waves, sd 1, wavelengths about ``length`` mm."""

    def __init__(self, length: float, rng: np.random.Generator, count: int = 9, spread: float = 1.3) -> None:
        direction = rng.normal(size=(count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        wavelength = length * np.exp(rng.uniform(-1, 1, (count, 1)) * np.log(spread))
        self.k = (2 * np.pi * direction / wavelength).astype(np.float32)
        self.phase = rng.uniform(0, 2 * np.pi, count).astype(np.float32)

    def __call__(self, p: Array) -> Array:
        total = np.zeros(p.shape[1:], dtype=np.float32)
        for k, phase in zip(self.k, self.phase, strict=True):
            total += np.cos(k[0] * p[0] + k[1] * p[1] + k[2] * p[2] + phase)
        return np.asarray(total * np.sqrt(2 / len(self.k)))


def sheet_distance(values: Array, spacing: float) -> Array:
    """Distance in mm from the zero level of a function on a grid of isotropic ``spacing``, to first order."""
    slope = np.sqrt(sum(g**2 for g in np.gradient(values, spacing)))
    # Where the function is flat it has no zero level nearby that this estimate could find.
    return np.asarray(np.abs(values) / np.maximum(slope, 0.35 * np.sqrt(np.mean(slope**2))))
