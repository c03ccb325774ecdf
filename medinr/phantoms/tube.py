"""The tube phantom: a bowel-like tube in a body that contracts, rests or is carried by breathing, with exact truth."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates, spline_filter
from torch import Tensor

from medinr import io
from medinr.errors import UserError
from medinr.fields.centreline import Centreline
from medinr.fields.tube import TubeCoordinates
from medinr.fields.warp import chunks
from medinr.phantoms.thorax_canvas import cover, over, texture
from medinr.phantoms.tube_motion import Breathing, Peristalsis, within
from medinr.space import Domain

Array = NDArray[np.floating[Any]]

KINDS = {
    "peristalsis": "a contraction wave, and nothing else: the prior should help",
    "motionless": "the same twice, with other noise",
    "breathing": "smooth motion of the whole body, the tube at rest: the prior should not help",
}
SIZE = 96
SIDES_MM = (240.0, 240.0, 160.0)
DIAMETER_MM = 40.0
LANDMARKS = 80
LUMEN_MM, THICKNESS_MM = 9.5, 3.0
NOISE = 12.0
TRACE_MM, TRACE_NOISE_MM = 4.0, 0.3
"""How a person traces a centreline: a point every 4 mm, 0.3 mm beside it."""


def winding(rng: np.random.Generator) -> Centreline:
    """A gently winding curve through the body, about 190 mm, bent nowhere more sharply than with 25 mm."""
    t = np.linspace(-1, 1, 400)
    side, height = rng.uniform(14, 19), rng.uniform(8, 15)
    one, two = rng.uniform(-0.5, 0.5, 2)
    turned = rng.choice([-1, 1], 2)
    y, z = turned[0] * side * np.sin(np.pi * t + one), turned[1] * height * np.sin(1.8 * t + two)
    return Centreline.of(np.stack([78 * t, y, z], axis=1), degree=None)


class Noise:
    """A smooth random function of space with unit variance and correlation width ``width`` mm."""

    def __init__(self, width: float, rng: np.random.Generator, step: float = 2.5) -> None:
        self.step, self.half = step, np.array(SIDES_MM) / 2 + 20
        shape = tuple(int(v) for v in np.ceil(2 * self.half / step))
        self.values = spline_filter(texture(shape, np.array([step] * 3), width, rng), order=3)

    def __call__(self, x: Array) -> Array:
        at = (x + self.half) / self.step
        return np.asarray(map_coordinates(self.values, at.T, order=3, mode="mirror", prefilter=False))


@dataclass(frozen=True)
class TubeCase:
    """One pair of images with its truth, a function of the arguments alone.

    Args:
        kind: one of `KINDS`.
        size: voxels in plane; the field of view stays 240 x 240 x 160 mm (96: 2.5 mm, as of abdominal cine MR).
        seed: of anatomy, wave and noise. Kinds of one seed share the anatomy and the fixed image.
    """

    kind: str
    size: int = SIZE
    seed: int = 0

    @cached_property
    def domain(self) -> Domain:
        step = SIDES_MM[0] / self.size
        shape = [round(side / step) for side in SIDES_MM]
        affine = np.diag([step, step, step, 1.0])
        affine[:3, 3] = [-step * (n - 1) / 2 for n in shape]
        return Domain.of(shape, affine)

    def _rng(self, use: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, use))

    @cached_property
    def line(self) -> Centreline:
        return winding(self._rng(0))

    @cached_property
    def motions(self) -> tuple[Peristalsis, Breathing]:
        rng = self._rng(1)
        wave = Peristalsis(self.line, phase=rng.uniform(0, 2 * math.pi), wavelength_mm=rng.uniform(50, 62))
        if self.kind != "peristalsis":
            wave = Peristalsis(self.line, 0.0, 0.0, 0.0, wave.wavelength_mm, wave.phase)
        return wave, Breathing(9.0 if self.kind == "breathing" else 0.0)

    def truth(self, x: Tensor) -> Tensor:
        """phi: fixed -> moving, RAS mm [n, 3], float64."""
        wave, breath = self.motions
        return breath.forward(wave.forward(x))

    def inverse(self, x: Tensor) -> Tensor:
        """Moving -> fixed."""
        wave, breath = self.motions
        return wave.inverse(breath.inverse(x))

    @cached_property
    def _textures(self) -> tuple[Noise, Noise, Noise]:
        rng = self._rng(2)
        return Noise(4.0, rng), Noise(12.0, rng), Noise(3.0, rng)

    def tangent(self, x: Tensor) -> tuple[NDArray[np.bool_], Array]:
        """Which points lie within 27 mm of the centreline, and the (s, u, v) of these."""
        tube = TubeCoordinates(self.line).double()
        near = within(self.line, x, 27.0)
        return near.numpy(), tube.to_tangent(x[near]).numpy()

    def surfaces(self, x: Tensor) -> tuple[NDArray[np.bool_], Array, Array]:
        """Which points of the fixed image are near the tube; signed distances of these from wall and content."""
        near, q = self.tangent(x)
        s, radius, angle = q[:, 0], np.hypot(q[:, 1], q[:, 2]), np.arctan2(q[:, 2], q[:, 1])
        lumen = LUMEN_MM + 1.0 * np.cos(2 * np.pi * s / 19) + 0.6 * np.cos(3 * angle + 2 * np.pi * s / 70)
        ends = np.maximum(-s, s - self.line.length)  # beyond its ends the tube closes
        outer, inner = (np.maximum(radius - lumen - more, ends - more) for more in (THICKNESS_MM, 0.0))
        return near, outer, inner

    def labels(self, side: str) -> Tensor:
        """1 wall, 2 content of ``fixed`` or ``moving`` image [X, Y, Z]."""
        found = torch.zeros(self.domain.n_voxels, dtype=torch.uint8)
        for rows, x in chunks(self.domain):
            near, wall, content = self.surfaces(x if side == "fixed" else self.inverse(x))
            found[rows.start + np.flatnonzero(near)] = torch.from_numpy((wall < 0).astype(np.uint8) + (content < 0))
        return found.reshape(self.domain.shape)

    def intensity(self, x: Tensor) -> Array:
        """What the fixed image shows at points [n, 3], without noise."""
        fine, coarse, content = self._textures
        p = x.numpy()
        edge = self.domain.spacing[0]
        skin = (np.sqrt((p[:, 0] / 114) ** 2 + (p[:, 1] / 98) ** 2) - 1) * 98
        body, inner = cover(skin, edge), cover(skin + 14, edge)
        values = over(np.full(len(p), 15.0), 430 + 25 * fine(p), body)
        values = over(values, 230 + 45 * fine(p) + 60 * coarse(p), inner)
        near, wall, hollow = self.surfaces(x)
        some = p[near]
        values[near] = over(values[near], 110 + 20 * fine(some), cover(wall, edge))
        values[near] = over(values[near], 520 + 80 * content(some), cover(hollow, edge))
        return values

    def image(self, side: str) -> NDArray[np.int16]:
        """``fixed`` or ``moving`` [X, Y, Z], with noise of its own (standard deviation 12 of 230)."""
        parts = [self.intensity(x if side == "fixed" else self.inverse(x)) for _, x in chunks(self.domain)]
        clean = np.concatenate(parts)
        rng = np.random.default_rng((self.seed, 3 if side == "fixed" else 4 + list(KINDS).index(self.kind)))
        # Magnitude images: noise of two channels.
        one, two = NOISE * rng.standard_normal((2, len(clean)))
        return np.asarray(np.rint(np.hypot(clean + one, two)), dtype=np.int16).reshape(self.domain.shape)

    def displacement(self) -> Tensor:
        """phi(p) - p at the voxel centres of the fixed image [X, Y, Z, 3], RAS mm."""
        parts = [self.truth(x) - x for _, x in chunks(self.domain)]
        return torch.cat(parts).float().reshape(*self.domain.shape, 3)

    def mask(self) -> Tensor:
        """The tube of 40 mm in the fixed image."""
        marked = torch.zeros(self.domain.n_voxels, dtype=torch.bool)
        for rows, x in chunks(self.domain):
            near, q = self.tangent(x)
            inside = (np.hypot(q[:, 1], q[:, 2]) <= DIAMETER_MM / 2) & (q[:, 0] >= 0) & (q[:, 0] <= self.line.length)
            marked[rows.start + np.flatnonzero(near)[inside]] = True
        return marked.reshape(self.domain.shape)

    def landmarks(self) -> Tensor:
        """Points on the wall of the tube in the fixed image [80, 3], RAS mm."""
        rng = self._rng(8)
        s = self.line.length * rng.uniform(0.05, 0.95, LANDMARKS)
        angle = rng.uniform(0, 2 * np.pi, LANDMARKS)
        radius = LUMEN_MM + THICKNESS_MM / 2
        q = np.stack([s, radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return TubeCoordinates(self.line).double().to_image(torch.from_numpy(q))

    def trace(self) -> Tensor:
        """The centreline as a person would trace it [n, 3], RAS mm."""
        at = np.linspace(0, self.line.length, 1 + round(self.line.length / TRACE_MM))
        noise = self._rng(9).normal(0, TRACE_NOISE_MM, (len(at), 3))
        return torch.from_numpy(self.line.curve(at) + noise)


def write_tube_phantom(
    out: Path, kinds: Sequence[str] = tuple(KINDS), size: int | None = None, seed: int = 0
) -> list[Path]:
    """Write pairs of the tube phantom, a folder for each kind. Same arguments, same content.

    ``KIND/``: ``fixed.nii.gz``, ``moving.nii.gz``, ``mask.nii.gz`` (tube of 40 mm in the fixed image),
    ``fixed_labels.nii.gz`` and ``moving_labels.nii.gz`` (1 wall, 2 content), ``centreline.csv``, ``fixed_points.csv``
    and ``moving_points.csv`` (80 landmarks on the wall; all RAS mm).
    ``KIND/truth/``: ``displacement.nii.gz`` (fixed to moving at the fixed voxel centres, 5-D, intent 1007, LPS mm) and
    ``parameters.json``.

    Raises:
        UserError: an unknown kind, or voxels too coarse to show the wall (before anything is written).
    """
    size = SIZE if size is None else size
    if size < 32:
        raise UserError(f"--size: expected at least 32 voxels in plane (7.5 mm), or no wall is seen; got {size}")
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"kind: expected one of {', '.join(KINDS)}, got {kind}")
    return [file for kind in kinds for file in _write(Path(out) / kind, TubeCase(kind, size, seed))]


def _write(folder: Path, case: TubeCase) -> list[Path]:
    (folder / "truth").mkdir(parents=True, exist_ok=True)
    names = ("fixed", "moving", "mask", "fixed_labels", "moving_labels")
    files = {name: folder / f"{name}.nii.gz" for name in names}
    for side in ("fixed", "moving"):
        io.write_image(files[side], torch.from_numpy(case.image(side)), case.domain)
        io.write_image(files[f"{side}_labels"], case.labels(side), case.domain)
    io.write_image(files["mask"], case.mask().to(torch.uint8), case.domain)
    fixed = case.landmarks()
    moved = case.truth(fixed)
    points = {"centreline": case.trace(), "fixed_points": fixed, "moving_points": moved}
    for name, rows in points.items():
        io.write_points(folder / f"{name}.csv", rows)
    field = folder / "truth" / "displacement.nii.gz"
    displacement = case.displacement()
    io.write_displacement(field, displacement, case.domain)
    wave, breath = case.motions
    facts = {
        "kind": case.kind,
        "seed": case.seed,
        "centreline_mm": round(case.line.length, 3),
        "smallest_radius_of_curvature_mm": round(case.line.smallest_radius, 3),
        "peristalsis": {k: v for k, v in vars(wave).items() if isinstance(v, float)},
        "breathing_mm": breath.amplitude_mm,
        "landmark_motion_mm": round((moved - fixed).norm(dim=1).mean().item(), 4),
        "largest_motion_mm": round(displacement.norm(dim=-1).max().item(), 4),
    }
    io.write_text(folder / "truth" / "parameters.json", json.dumps(facts, indent=2) + "\n")
    written = [*files.values(), *(folder / f"{name}.csv" for name in points)]
    return [*written, field, io.sidecar_path(field), folder / "truth" / "parameters.json"]
