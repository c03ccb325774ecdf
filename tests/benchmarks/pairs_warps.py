"""Known deformations for the warped pairs: none of them is of a kind that one of the compared tools is built on alone.

- ``bspline``: cubic free-form deformation on a lattice of 50 mm with random coefficients.
- ``rbf``: a sum of Gaussians of 30 to 60 mm about points in the lungs.
- ``sliding``: the flow of a velocity that is tangential to the border of the lungs, nothing outside them. The lungs map
  onto themselves: nothing overlaps, nothing tears, but the displacement jumps across their border.

Each is scaled to a given largest displacement in the lungs. The first draw with 0.1 < det J < 8 is taken: everywhere
on the grid, for ``sliding`` inside the lungs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from medinr.space import Domain, transform_points

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
PointMap = Callable[[Floats], Floats]

KINDS = ("bspline", "sliding", "rbf")
LATTICE_MM = 50.0
MINIMAL_DET, MAXIMAL_DET = 0.1, 8.0
DIFFERENCE_MM = 0.5
BORDER_MM = 35.0
"""Depth over which the normal component of the sliding motion comes back."""
FLOW_STEPS = 24


@dataclass(frozen=True)
class Deformation:
    """phi (fixed to moving, world mm), the lungs of the fixed image as a predicate, and what was checked."""

    phi: PointMap
    inside: Callable[[Floats], Bools]
    checked: dict[str, Any]


def make(kind: str, size_mm: float, domain: Domain, lungs: Bools) -> Deformation:
    """The deformation of that kind and size; ``lungs`` [X, Y, Z] are those of the moving image."""
    grid = world(domain)
    for attempt in range(20):
        rng = np.random.default_rng([KINDS.index(kind), int(size_mm), attempt])
        if kind == "sliding":
            found = _sliding(size_mm, domain, lungs, grid, rng)
        else:
            raw = (_bspline if kind == "bspline" else _rbf)(grid, lungs, rng)
            found = _scaled(raw, size_mm, domain, lungs, grid)
        if found.checked["det_min"] > MINIMAL_DET and found.checked["det_max"] < MAXIMAL_DET:
            return Deformation(found.phi, found.inside, {**found.checked, "draw": attempt})
    raise RuntimeError(f"{kind} {size_mm}: no draw with {MINIMAL_DET} < det J < {MAXIMAL_DET}")


def world(domain: Domain) -> Floats:
    """World coordinates of all voxels [n, 3]."""
    return np.asarray(transform_points(domain.voxel_to_world, domain.voxels().double()).numpy())


def determinant(phi: PointMap, points: Floats) -> Floats:
    """det J_phi [n] by central differences."""
    rows = [(phi(points + h) - phi(points - h)) / (2 * DIFFERENCE_MM) for h in np.eye(3) * DIFFERENCE_MM]
    return np.asarray(np.linalg.det(np.stack(rows, axis=-1)))


def _scaled(raw: PointMap, size_mm: float, domain: Domain, lungs: Bools, grid: Floats) -> Deformation:
    """p -> p + c raw(p), with the largest displacement in the fixed image's lungs (those that phi maps into lungs)."""
    mask = lungs.astype(np.float64)

    def inside_of(phi: PointMap) -> Callable[[Floats], Bools]:
        return lambda p: ndimage.map_coordinates(mask, _voxels(domain, phi(p)).T, order=1) > 0.5

    scale = size_mm / np.linalg.norm(raw(grid[lungs.ravel()]), axis=1).max()
    for _ in range(5):  # the lungs of the fixed image depend on phi

        def phi(p: Floats, c: float = scale) -> Floats:
            return p + c * raw(p)

        here = inside_of(phi)(grid)
        largest = np.linalg.norm(phi(grid[here]) - grid[here], axis=1).max()
        scale *= size_mm / largest
    det = determinant(phi, grid)
    return Deformation(
        phi, inside_of(phi), {"largest_mm": float(largest), "det_min": float(det.min()), "det_max": float(det.max())}
    )


def _bspline(grid: Floats, lungs: Bools, rng: np.random.Generator) -> PointMap:
    start = grid.min(0) - 2 * LATTICE_MM
    size = np.ceil((grid.max(0) - start) / LATTICE_MM).astype(int) + 4
    coefficients = rng.normal(size=(3, *size))

    def raw(p: Floats) -> Floats:
        at = ((p - start) / LATTICE_MM).T
        # Without the prefilter these are the coefficients of cubic B-splines, as in a free-form deformation.
        return np.stack([ndimage.map_coordinates(c, at, order=3, prefilter=False) for c in coefficients], axis=-1)

    return raw


def _rbf(grid: Floats, lungs: Bools, rng: np.random.Generator) -> PointMap:
    centres = rng.permutation(grid[lungs.ravel()])[:8]
    widths = rng.uniform(30, 60, len(centres))
    vectors = rng.normal(size=(len(centres), 3))

    def raw(p: Floats) -> Floats:
        out = np.zeros_like(p)
        for c, w, v in zip(centres, widths, vectors, strict=True):
            out += np.exp(-((p - c) ** 2).sum(1) / (2 * w**2))[:, None] * v
        return out

    return raw


def _sliding(size_mm: float, domain: Domain, lungs: Bools, grid: Floats, rng: np.random.Generator) -> Deformation:
    """dp/dt = m (w - k (w.g) g / (k |g|^2 + 1 - k)): g the gradient of the depth s, k = exp(-(s / 35 mm)^2).

    On the border k = 1: exactly the tangential part of w is left, so no point crosses it. m = 1 - k max(0, 1 - |g|^2)
    stops the motion in thin parts of the lungs, where both borders are near and no direction is tangential to both.
    """
    sides = [ndimage.distance_transform_edt(m, sampling=domain.spacing) for m in (lungs, ~lungs)]
    depth = ndimage.gaussian_filter(sides[0] - sides[1], [6.0 / s for s in domain.spacing], mode="nearest")
    spline = ndimage.spline_filter(depth, order=3, mode="nearest")

    def depth_at(p: Floats) -> Floats:
        return np.asarray(
            ndimage.map_coordinates(spline, _voxels(domain, p).T, order=3, prefilter=False, mode="nearest")
        )

    centre = grid.mean(0)
    waves = [
        (rng.normal(size=3) * 2 * np.pi / 250, rng.uniform(0, 2 * np.pi), rng.normal(size=3) * [0.2, 0.2, 0.3])
        for _ in range(4)
    ]

    def wish(p: Floats) -> Floats:
        return np.array([0.0, 0.0, 1.0]) + sum(np.sin((p - centre) @ k + a)[:, None] * v for k, a, v in waves)

    def velocity(p: Floats) -> Floats:
        s = depth_at(p)
        h = np.eye(3) * DIFFERENCE_MM
        g = np.stack([(depth_at(p + e) - depth_at(p - e)) / (2 * DIFFERENCE_MM) for e in h], axis=-1)
        k = np.exp(-((np.maximum(s, 0) / BORDER_MM) ** 2))
        w = wish(p)
        gg = (g * g).sum(1)
        factor = k * (w * g).sum(1) / (k * gg + 1 - k + 1e-6)
        return np.asarray((1 - k * np.maximum(0, 1 - gg))[:, None] * (w - factor[:, None] * g))

    def flow(p: Floats, length: float) -> Floats:
        dt = length / FLOW_STEPS
        for _ in range(FLOW_STEPS):  # Heun's method
            first = velocity(p)
            p = p + dt / 2 * (first + velocity(p + dt * first))
        return p

    def inside(p: Floats) -> Bools:
        return np.asarray(depth_at(p) > 0)

    within = grid[inside(grid)]
    length = 1.5 * size_mm  # about what the border and the thin parts leave of it
    motion = np.linalg.norm(flow(within, length) - within, axis=1)
    far = within[np.argsort(motion)[-3000:]]
    for _ in range(4):
        length *= size_mm / np.linalg.norm(flow(far, length) - far, axis=1).max()

    def phi(p: Floats) -> Floats:
        out = p.copy()
        here = inside(p)
        out[here] = flow(p[here], length)
        return out

    some = rng.permutation(within[depth_at(within) > 1])[:6000]
    det = determinant(lambda p: flow(p, length), some)
    moved = phi(within)
    return Deformation(
        phi,
        inside,
        {
            "largest_mm": float(np.linalg.norm(moved - within, axis=1).max()),
            "det_min": float(det.min()),
            "det_max": float(det.max()),
            "left_the_lungs_by_mm": float(max(0.0, -depth_at(moved).min())),
        },
    )


def _voxels(domain: Domain, points: Floats) -> Floats:
    return np.asarray(transform_points(domain.world_to_voxel, torch.tensor(points)).numpy())
