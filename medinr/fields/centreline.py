"""The centreline of a tube (bowel, vessel, airway): arc length, tangents and a frame that does not twist."""

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline, splev, splprep

from medinr.errors import UserError
from medinr.io import read_points

Array = NDArray[np.floating[Any]]

EXTENSION = 0.2
"""The curve goes on straight beyond its ends; points within this share of its length belong to the tube still."""
STEP_MM = 1.0
"""Distance of the knots along the curve."""
FINE = 10
"""Samples between two knots, where lengths are summed and the frame is carried."""


def chord_lengths(points: Array) -> Array:
    """Distance along the polyline [n, 3] to each of its points, [n], 0 first."""
    return np.concatenate(([0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))))


def fit_polynomial(points: Array, degree: int, n: int) -> Array:
    """n points [n, 3] of the polynomial in the chord length that fits the points best, each axis on its own.

    As the published code (`smooth_gttrace`, degree 8); Chebyshev's basis keeps the least squares well conditioned.
    """
    t = chord_lengths(points)
    fitted = [np.polynomial.Chebyshev.fit(t, values, degree) for values in points.T]
    at = np.linspace(0, t[-1], n)
    return np.stack([f(at) for f in fitted], axis=1)


def smooth_polyline(points: Array, smooth_mm: float, n: int) -> Array:
    """n points [n, 3] of a cubic spline that stays within ``smooth_mm`` (root mean square) of the points; 0: through
    all of them."""
    t = chord_lengths(points)
    spline, _ = splprep(points.T, u=t, k=min(3, len(points) - 1), s=len(points) * smooth_mm**2)
    return np.stack(splev(np.linspace(0, t[-1], n), spline), axis=1)


def resample(points: Array, n: int) -> Array:
    """n points [n, 3] at equal arc length along a finely sampled curve."""
    t = chord_lengths(points)
    at = np.linspace(0, t[-1], n)
    return np.stack([np.interp(at, t, values) for values in points.T], axis=1)


def first_normal(tangent: Array) -> Array:
    """A unit vector across the tangent [3]: the coordinate axis least along it, made perpendicular.

    The published (t_y, -t_x, 0) vanishes for a tangent along the third axis; this one never does.
    """
    axis = np.eye(3)[np.argmin(np.abs(tangent))]
    normal = axis - tangent * (axis @ tangent)
    return np.asarray(normal / np.linalg.norm(normal))


def rotate(vector: Array, one: Array, other: Array) -> Array:
    """Rodrigues: the vector turned by the smallest rotation that takes the unit vector ``one`` to ``other``."""
    axis = np.cross(one, other)
    cosine = float(one @ other)
    return np.asarray(vector * cosine + np.cross(axis, vector) + axis * (axis @ vector) / (1 + cosine))


def parallel_transport(tangents: Array, normal: Array | None = None) -> tuple[Array, Array]:
    """Two normals [n, 3] of each of n unit tangents, carried along without twist.

    From tangent to tangent the first normal turns by the smallest rotation (Bishop, There is more than one way to
    frame a curve, 1975). Rounding is removed at each step, so that (tangent, n1, n2) stays right-handed orthonormal.
    """
    found = [first_normal(tangents[0]) if normal is None else normal]
    for one, other in itertools.pairwise(tangents):
        n = rotate(found[-1], one, other)
        n = n - other * (n @ other)
        found.append(n / np.linalg.norm(n))
    n1 = np.stack(found)
    return n1, np.cross(tangents, n1)


@dataclass(frozen=True)
class Centreline:
    """A curve c(s) by its arc length s in mm, with two normals n1(s), n2(s): points ``knots`` [m, 3] at equal steps."""

    knots: Array

    @classmethod
    def of(
        cls, points: Array, degree: int | None = 8, smooth_mm: float = 0.0, source: str = "centreline"
    ) -> "Centreline":
        """The curve through, or near, given points.

        Args:
            points: [n, 3] mm, in order from one end to the other.
            degree: least-squares polynomial of each axis (published: 8); None: a spline through the points.
            smooth_mm: for the spline: root mean square distance by which it may miss them.
            source: named in errors.

        Raises:
            UserError: fewer than two different points, or fewer than the polynomial needs.
        """
        points = np.asarray(points, dtype=float)
        if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
            raise UserError(f"{source}: expected finite points [n, 3], found {points.shape}; correct them")
        points = points[np.concatenate(([True], np.linalg.norm(np.diff(points, axis=0), axis=1) > 1e-6))]
        if len(points) < 2:
            raise UserError(f"{source}: expected at least two different points, found {len(points)}; trace the tube")
        if degree is not None and not 1 <= degree < len(points):
            raise UserError(
                f"{source}: expected over {degree} points for a polynomial of degree {degree}, found {len(points)}; "
                "give more points, or a smaller degree, or null for a spline through the points"
            )
        fine = FINE * max(8, round(chord_lengths(points)[-1] / STEP_MM))
        curve = smooth_polyline(points, smooth_mm, fine) if degree is None else fit_polynomial(points, degree, fine)
        return cls(resample(curve, 1 + max(4, round(chord_lengths(curve)[-1] / STEP_MM))))

    @property
    def length(self) -> float:
        """mm."""
        return float(chord_lengths(self.knots)[-1])

    @property
    def step(self) -> float:
        """mm between two knots."""
        return self.length / (len(self.knots) - 1)

    @cached_property
    def curve(self) -> CubicSpline:
        """c(s), without curvature at its ends, so that it goes on straight and smoothly."""
        return CubicSpline(np.linspace(0, self.length, len(self.knots)), self.knots, bc_type="natural")

    @cached_property
    def frame(self) -> tuple[Array, Array, Array]:
        """Unit tangents and the two normals at the knots, [m, 3] each."""
        at = np.linspace(0, self.length, 1 + FINE * (len(self.knots) - 1))
        tangents = self.curve(at, 1)
        tangents = tangents / np.linalg.norm(tangents, axis=1, keepdims=True)
        n1, n2 = parallel_transport(tangents)
        return tangents[::FINE], n1[::FINE], n2[::FINE]

    @cached_property
    def curvatures(self) -> Array:
        """c'' along the two normals at the knots, [m, 2], 1/mm."""
        second = self.curve(self.curve.x, 2)
        _, n1, n2 = self.frame
        return np.stack(((second * n1).sum(1), (second * n2).sum(1)), axis=1)

    @property
    def smallest_radius(self) -> float:
        """Smallest radius of curvature, mm (infinite for a straight line)."""
        # A spline that must end straight oscillates in its last knots; a few knots may be all there are.
        inner = self.curvatures[3:-3] if len(self.knots) > 8 else self.curvatures
        largest = float(np.linalg.norm(inner, axis=1).max())
        return 1 / largest if largest > 1e-9 else float("inf")

    def table(self) -> Array:
        """[4, m - 1, 11]: cubic polynomials of (c, n1, n2, curvatures) on each step, highest power first.

        The normals end without slope, so that they stay constant beyond the ends.
        """
        _, n1, n2 = self.frame
        frame = CubicSpline(self.curve.x, np.concatenate((n1, n2), axis=1), bc_type="clamped")
        curvatures = CubicSpline(self.curve.x, self.curvatures, bc_type="clamped")
        return np.concatenate((self.curve.c, frame.c, curvatures.c), axis=-1)

    def overlap(self, radius: float) -> float:
        """Share of the tube's surface that lies nearer to another part of the curve: there a point of space has more
        than one pair of coordinates, and the nearest of them counts."""
        _, n1, n2 = self.frame
        angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)[:, None, None]
        surface = self.knots + radius * (np.cos(angles) * n1 + np.sin(angles) * n2)
        every = self.knots[:: max(1, len(self.knots) // 200)]
        nearest = np.stack([np.linalg.norm(ring[:, None] - every, axis=-1).min(1) for ring in surface])
        # A knot that is left out may be nearer by some hundredths of a millimetre.
        return float((nearest < 0.99 * radius - 0.1).mean())


def read_centreline(path: str | Path) -> Array:
    """Points [n, 3] of a centreline, RAS mm: a table x,y,z, or a list or curve of points of Slicer."""
    return read_points(path).numpy()
