"""Breathing motion of the thorax phantom: closed-form maps with a tangential jump at the pleura.

Body frame: millimetres, x to the patient's left, y to posterior, z to superior, origin in the middle of the chest.
Everything is a map of the end-inspiration anatomy (T00) to the anatomy at a phase.

Two regions are mapped each by its own diffeomorphism:

    wall            phi_out = W_t
    chest contents  phi_in  = W_t o psi_t

W_t is the antero-posterior motion of the chest wall. psi_t maps the thoracic cavity onto itself, so the two regions
fit together at every phase and only the tangential displacement jumps (lungs, heart and liver glide past the ribs).
psi_t is written in the cavity's own coordinates (X, Y, z) = (x / a(z), (y - c(z)) / b(z), z): a cranio-caudal step
at constant (X, Y), then an in-plane step that fades out at the pleura. Each step is a contraction away from the
identity, so each has an inverse by fixed-point iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

CAVITY_POWER = 2.4
"""Exponent of the superellipse that the cavity's cross-section is made of."""

INVERSE_TOLERANCE = 1e-7
"""Largest change of the last fixed-point step, mm (normalised units in the plane are about 100 mm)."""

_EXCURSION = {1: 10.5, 2: 14.5, 3: 18.0, 4: 21.5, 5: 25.0, 6: 20.0, 7: 22.0, 8: 25.0, 9: 16.0, 10: 15.0}


def smoothstep(t: Array) -> Array:
    """Cubic step from 0 (t <= 0) to 1 (t >= 1)."""
    t = np.clip(t, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def cavity_axes(z: Array) -> tuple[Array, Array, Array]:
    """Half-widths a(z), b(z) along x and y and centre c(z) along y of the thoracic cavity, mm."""
    narrowing = 1.0 - np.exp(-((np.maximum(z + 60.0, 0.0) / 165.0) ** 3))
    return 104.0 - 72.0 * narrowing, 78.0 - 43.0 * narrowing, 14.0 * narrowing


def cavity_coordinates(x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """In-plane coordinates (X, Y) in which the cavity has the same cross-section at every height."""
    a, b, c = cavity_axes(z)
    return x / a, (y - c) / b


def cavity_level(X: Array, Y: Array) -> Array:
    """Level function of the cavity's cross-section: below 1 inside; the spine bulges in from behind."""
    level = (np.abs(X) ** CAVITY_POWER + np.abs(Y) ** CAVITY_POWER) ** (1.0 / CAVITY_POWER)
    return np.asarray(level + 0.30 * np.exp(-((X / 0.26) ** 2)) * smoothstep((Y - 0.1) / 0.8))


def phase_fraction(phase: float) -> float:
    """Fraction of the breathing cycle of a phase in percent (0 = T00 ... 90 = T90)."""
    return float(phase) / 100.0


def fixed_point(update: Callable[[Array], Array], start: Array, tolerance: float) -> Array:
    """Iterate x <- update(x) until the largest change is below the tolerance.

    Raises:
        ArithmeticError: no convergence in 200 steps (the map is not a contraction).
    """
    current = start
    for _ in range(200):
        following = update(current)
        change = float(np.max(np.abs(following - current), initial=0.0))
        current = following
        if change < tolerance:
            return current
    raise ArithmeticError(f"fixed-point inversion of the phantom's motion stopped at a change of {change:.2e}")


@dataclass(frozen=True)
class Motion:
    """The breathing of one phantom case, in its body frame.

    Args:
        excursion: cranio-caudal motion T00 -> T50 of the posterior diaphragm, mm of the body frame.
        wall: antero-posterior motion of the front of the chest, mm.
        hysteresis: amplitude of the loop that a point near the base describes, mm.
        asymmetry: relative difference of left and right excursion.
        centres: [K, 3] places (X, Y, z) of local variations.
        widths: [K, 3] their widths in the same coordinates.
        breathing: [K, 3] amplitudes that follow the breathing curve: (X, Y, z).
        looping: [K, 3] amplitudes of the part that differs between the two limbs.
    """

    excursion: float
    wall: float
    hysteresis: float
    asymmetry: float
    centres: Array
    widths: Array
    breathing: Array
    looping: Array

    # ------------------------------------------------------------------------------------------ whole maps

    def inside(self, points: Array) -> NDArray[np.bool_]:
        """Whether T00 points [..., 3] lie in the thoracic cavity (lungs, mediastinum, abdomen below)."""
        X, Y = cavity_coordinates(points[..., 0], points[..., 1], points[..., 2])
        return np.asarray(cavity_level(X, Y) < 1.0)

    def forward(self, points: Array, phase: float, region: str | None = None) -> Array:
        """Map T00 points [..., 3] to a phase. ``region`` ("inside", "outside") overrules where a point belongs."""
        inner = self._belongs(points, region)
        moved = np.where(inner[..., None], self.slip_forward(points, phase), points)
        return self.wall_forward(moved, phase)

    def inverse(self, points: Array, phase: float, region: str | None = None) -> Array:
        """Map points [..., 3] at a phase back to T00."""
        unwalled = self.wall_inverse(points, phase)
        inner = self._belongs(unwalled, region)
        if not inner.any():
            return unwalled
        out = unwalled.copy()
        out[inner] = self.slip_inverse(unwalled[inner], phase)
        return out

    def _belongs(self, points: Array, region: str | None) -> NDArray[np.bool_]:
        if region is None:
            return self.inside(points)
        if region not in ("inside", "outside"):
            raise ValueError(f"region: expected 'inside', 'outside' or None, got {region!r}")
        return np.full(points.shape[:-1], region == "inside")

    # ------------------------------------------------------------------------------------------ the chest wall

    def _wall_step(self, y: Array, z: Array, phase: float) -> Array:
        tau = phase_fraction(phase)
        amplitude = self.wall * (np.sin(np.pi * tau) ** 2 + 0.12 * np.sin(2 * np.pi * tau))
        height = 0.35 + 0.65 * np.exp(-(((z + 25.0) / 75.0) ** 2))
        return np.asarray(amplitude * height * smoothstep((65.0 - y) / 160.0))

    def wall_forward(self, points: Array, phase: float) -> Array:
        """W_t: the front of the chest sinks back (+y) on expiration; spine and table stay."""
        out = np.array(points, dtype=np.float64)
        out[..., 1] += self._wall_step(out[..., 1], out[..., 2], phase)
        return out

    def wall_inverse(self, points: Array, phase: float) -> Array:
        """Inverse of W_t."""
        out = np.array(points, dtype=np.float64)
        y, z = out[..., 1].copy(), out[..., 2]
        out[..., 1] = fixed_point(lambda v: y - self._wall_step(v, z, phase), y, INVERSE_TOLERANCE)
        return out

    # ------------------------------------------------------------------------------------------ the contents

    def _local(self, X: Array, Y: Array, z: Array, phase: float, axes: tuple[int, ...]) -> list[Array]:
        tau = phase_fraction(phase)
        weights = np.sin(np.pi * tau) ** 2 * self.breathing + np.sin(2 * np.pi * tau) * self.looping
        sums: list[Array] = [np.zeros(np.broadcast(X, Y, z).shape) for _ in axes]
        for centre, width, weight in zip(self.centres, self.widths, weights, strict=True):
            bump = np.exp(
                -(((X - centre[0]) / width[0]) ** 2)
                - ((Y - centre[1]) / width[1]) ** 2
                - ((z - centre[2]) / width[2]) ** 2
            )
            for total, axis in zip(sums, axes, strict=True):
                total += weight[axis] * bump
        return sums

    def _axial_step(self, X: Array, Y: Array, z: Array, phase: float) -> Array:
        tau = phase_fraction(phase)
        breathing, looping = np.sin(np.pi * tau) ** 2, np.sin(2 * np.pi * tau)
        # The whole excursion below the diaphragm, none at the apex.
        height = smoothstep((106.0 - z) / 196.0)
        # Posterior lung moves more than anterior lung, the mediastinum less than either.
        share = (0.80 + 0.20 * np.tanh(1.6 * Y)) * (1.0 - 0.30 * np.exp(-((X / 0.28) ** 2)))
        share = share * (1.0 + self.asymmetry * np.tanh(3.0 * X))
        local = self._local(X, Y, z, phase, (2,))[0]
        main = (self.excursion * breathing * share + self.hysteresis * looping) * height
        return np.asarray(main + smoothstep((112.0 - z) / 60.0) * local)

    def _plane_step(self, X: Array, Y: Array, z: Array, phase: float) -> tuple[Array, Array]:
        # Zero at the pleura: the in-plane step must keep the cavity's outline.
        window = np.maximum(1.0 - cavity_level(X, Y) ** 2, 0.0) ** 2
        dX, dY = self._local(X, Y, z, phase, (0, 1))
        return window * dX, window * dY

    def slip_forward(self, points: Array, phase: float) -> Array:
        """psi_t: the motion of the contents relative to the wall; maps the cavity onto itself."""
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        X, Y = cavity_coordinates(x, y, z)
        z = z + self._axial_step(X, Y, z, phase)
        dX, dY = self._plane_step(X, Y, z, phase)
        a, b, c = cavity_axes(z)
        return np.stack([(X + dX) * a, (Y + dY) * b + c, z], axis=-1)

    def slip_inverse(self, points: Array, phase: float) -> Array:
        """Inverse of psi_t."""
        z_now = points[..., 2]
        target = np.stack(cavity_coordinates(points[..., 0], points[..., 1], z_now), axis=-1)

        def back(v: Array) -> Array:
            return np.asarray(target - np.stack(self._plane_step(v[..., 0], v[..., 1], z_now, phase), axis=-1))

        plane = fixed_point(back, target, INVERSE_TOLERANCE / 100.0)
        X, Y = plane[..., 0], plane[..., 1]
        z = fixed_point(lambda v: z_now - self._axial_step(X, Y, v, phase), z_now, INVERSE_TOLERANCE)
        a, b, c = cavity_axes(z)
        return np.stack([X * a, Y * b + c, z], axis=-1)


def case_motion(case: int, seed: int, scale: tuple[float, float, float]) -> Motion:
    """The motion of a case. ``scale`` (world mm per body mm) makes excursions hold in world millimetres."""
    rng = np.random.default_rng([seed, case, 11])
    count = 14
    excursion = _EXCURSION[case] / scale[2]
    strength = excursion / 20.0
    side = np.where(np.arange(count) % 2 == 0, 1.0, -1.0)
    centres = np.stack(
        [side * rng.uniform(0.35, 0.75, count), rng.uniform(-0.6, 0.7, count), rng.uniform(-80.0, 70.0, count)], -1
    )
    widths = np.stack([rng.uniform(0.32, 0.5, count) for _ in range(2)] + [rng.uniform(30.0, 48.0, count)], -1)
    unit = np.array([0.035, 0.045, 1.7])
    return Motion(
        excursion=excursion,
        wall=rng.uniform(3.0, 5.5) / scale[1],
        hysteresis=0.09 * excursion,
        asymmetry=float(rng.uniform(-0.08, 0.02)),
        centres=centres,
        widths=widths,
        breathing=strength * unit * rng.normal(size=(count, 3)).clip(-1.5, 1.5),
        looping=0.45 * strength * unit * rng.normal(size=(count, 3)).clip(-1.5, 1.5),
    )
