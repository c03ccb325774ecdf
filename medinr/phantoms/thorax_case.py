"""One case of the breathing-thorax phantom: images, masks, landmarks and the exact maps between phases.

The anatomy is drawn once at end-inspiration (T00). A phase is made by following each voxel back to T00, region by
region, and looking up the anatomy there; T00 itself takes the same way, so all phases are equally sharp. Noise is drawn
for every phase on its own. Nothing here uses medinr.fields: truth and method share no code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline
from scipy.ndimage import gaussian_filter, map_coordinates, spline_filter

from medinr.data.layouts import DIRLabCase, dirlab_affine, dirlab_case
from medinr.errors import UserError
from medinr.phantoms.thorax_anatomy import (
    Habitus,
    Trees,
    case_habitus,
    case_trees,
    draw_contents,
    in_lung,
    lung_distance,
)
from medinr.phantoms.thorax_canvas import Canvas, Volume
from medinr.phantoms.thorax_motion import Motion, case_motion, cavity_axes, cavity_coordinates, cavity_level
from medinr.phantoms.thorax_wall import draw_wall

Array = NDArray[np.floating[Any]]

_RAS = np.array([-1.0, -1.0, 1.0])  # the body frame runs left, posterior, superior

SMALLEST_SIZE, LARGEST_SIZE = 16, 1024


def phantom_facts(case: int, size: int | None) -> DIRLabCase:
    """The published facts of a case, at ``size`` in-plane voxels over the same field of view.

    The slice spacing becomes max(2.5, in-plane spacing) mm, so that small sizes stay nearly isotropic.

    Raises:
        UserError: no such case, or a size outside 16 ... 1024.
    """
    facts = dirlab_case(case)
    if size is None or size == facts.shape[0]:
        return facts
    if not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise UserError(f"size: expected {SMALLEST_SIZE} to {LARGEST_SIZE} voxels, found {size}; give another size")
    plane = round(facts.shape[0] * facts.spacing[0] / size, 4)
    axial = max(facts.spacing[2], plane)
    slices = round(facts.shape[2] * facts.spacing[2] / axial)
    return replace(facts, shape=(size, size, slices), spacing=(plane, plane, axial))


@dataclass(frozen=True)
class ThoraxCase:
    """A phantom case. Made by `thorax_case`.

    Args:
        facts: shape and spacing (layouts.DIRLabCase).
        seed: seed of anatomy, motion and noise.
        scale: world mm per body mm along x, y, z.
        motion: the breathing, in the body frame.
        habitus: organ sizes, in the body frame.
        noise: standard deviation of the noise in the middle of the chest, HU.
    """

    facts: DIRLabCase
    seed: int
    scale: Array
    motion: Motion
    habitus: Habitus
    noise: float

    # ---------------------------------------------------------------------------------------------- geometry

    @property
    def affine(self) -> Array:
        """Voxel -> world (RAS mm), see `medinr.data.layouts.dirlab_affine`."""
        return dirlab_affine(self.facts.spacing)

    @property
    def _centre(self) -> Array:
        # The published field of view fixes the anatomy's place, so all sizes of a case show the same body.
        return np.asarray(0.5 * (np.array(self.facts.shape) - 1.0) * np.array(self.facts.spacing))

    def world_to_body(self, points: Array) -> Array:
        """World points (RAS mm) [..., 3] in the body frame."""
        return np.asarray((np.asarray(points, dtype=np.float64) * _RAS - self._centre) / self.scale)

    def body_to_world(self, points: Array) -> Array:
        """Points [..., 3] of the body frame in world RAS mm."""
        return np.asarray((points * self.scale + self._centre) * _RAS)

    def voxel_to_world(self, voxels: Array) -> Array:
        """0-based voxel coordinates [..., 3] in world RAS mm."""
        return np.asarray(np.asarray(voxels, dtype=np.float64) * np.array(self.facts.spacing) * _RAS)

    def world_to_voxel(self, points: Array) -> Array:
        """World RAS mm [..., 3] in 0-based voxel coordinates."""
        return np.asarray(np.asarray(points, dtype=np.float64) * _RAS / np.array(self.facts.spacing))

    # ---------------------------------------------------------------------------------------------- exact maps

    def phase_map(self, points: Array, phase: int, region: str | None = None) -> Array:
        """Where the material at world points [..., 3] (RAS mm) of T00 is at a phase (50 = T50), RAS mm.

        Args:
            points: world points of T00.
            phase: percent of the breathing cycle, any number in [0, 100].
            region: "inside" or "outside" the thoracic cavity; None decides by the point. Each region's map is smooth
                and invertible over all space; across the pleura only the tangential part of the displacement jumps.
        """
        return self.body_to_world(self.motion.forward(self.world_to_body(points), phase, region))

    def inverse_phase_map(self, points: Array, phase: int, region: str | None = None) -> Array:
        """Where the material at world points (RAS mm) of a phase was at T00; inverse of `phase_map` below 1e-5 mm."""
        return self.body_to_world(self.motion.inverse(self.world_to_body(points), phase, region))

    def displacement(self, phase: int) -> NDArray[np.float32]:
        """Exact displacement T00 -> phase at T00's voxel centres, [x, y, z, 3], RAS mm."""
        out = np.empty((*self.facts.shape, 3), dtype=np.float32)
        for k in range(self.facts.shape[2]):
            i, j = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in self.facts.shape[:2]), indexing="ij")
            points = self.voxel_to_world(np.stack([i, j, np.full_like(i, k)], axis=-1))
            out[:, :, k] = self.phase_map(points, phase) - points
        return out

    # ---------------------------------------------------------------------------------------------- images

    @cached_property
    def trees(self) -> Trees:
        """Vessels and bronchi at T00, in the body frame."""
        return case_trees(self.facts.number, self.seed, self.habitus)

    @cached_property
    def _anatomy(self) -> tuple[Canvas, Volume, Volume, Volume]:
        """Canvas and spline coefficients of contents and wall, and the share of aerated lung."""
        spacing = np.array(self.facts.spacing)
        step = np.maximum(np.array([spacing[0] / 1.3, spacing[1] / 1.3, spacing[2] / 1.8]), 1.0) / self.scale
        half = 0.5 * np.array(self.facts.shape) * spacing / self.scale
        # Beyond the body and the table there is air.
        high = np.minimum(half + 3.0, np.array([145.0, 165.0, np.inf]))
        low = -high
        # Expiration brings up what lay below the field of view.
        low[2] = -half[2] - self.motion.excursion * 1.3 - 6.0
        high[2] = half[2] + 4.0
        shape = np.ceil((high - low) / step).astype(int) + 1
        canvas = Canvas(low, step, (int(shape[0]), int(shape[1]), int(shape[2])))
        rng = np.random.default_rng([self.seed, self.facts.number, 14])
        contents, air = draw_contents(canvas, self.habitus, self.trees, rng)
        wall = draw_wall(canvas, self.habitus.fat, rng)
        # The scanner's resolution: what is finer than the voxels must be averaged, not aliased.
        blur = np.sqrt(np.maximum((0.42 * spacing / self.scale) ** 2 - (0.3 * step) ** 2, 0.0)) / step
        soft = [gaussian_filter(v, blur, mode="nearest") for v in (contents, wall)]
        splines = [np.asarray(spline_filter(v, order=3, output=np.float32, mode="mirror")) for v in soft]
        return canvas, splines[0], splines[1], air

    def _body_axes(self) -> list[Array]:
        shape, spacing = self.facts.shape, self.facts.spacing
        return [(np.arange(shape[a]) * spacing[a] - self._centre[a]) / self.scale[a] for a in range(3)]

    @cached_property
    def _pullbacks(self) -> dict[int, _Pullback]:
        return {}

    def _pullback(self, phase: int) -> _Pullback:
        """The inverse maps at all voxels; only the last phase's is kept (they are large)."""
        if phase not in self._pullbacks:
            self._pullbacks.clear()
            self._pullbacks[phase] = _Pullback.make(self.motion, self._body_axes(), phase)
        return self._pullbacks[phase]

    def lung_mask(self, phase: int) -> NDArray[np.bool_]:
        """Both lungs with their vessels at a phase, [x, y, z]."""
        pull = self._pullback(phase)
        mask = np.asarray(pull.level < 1.0)
        x, y, z = (pull.contents[a][mask] for a in range(3))
        mask[mask] = lung_distance(x, y, z, self.habitus) < 0.0
        return mask

    def image(self, phase: int, noise: bool = True) -> NDArray[np.int16]:
        """CT image of a phase in HU, int16 [x, y, z], with values in [-1024, 3071]."""
        canvas, contents, wall, air = self._anatomy
        pull = self._pullback(phase)
        # Voxels at the pleura show both sides.
        share = np.clip(0.5 + (1.0 - pull.level) * pull.radius / canvas.edge, 0.0, 1.0).astype(np.float32)
        values = np.zeros(self.facts.shape, dtype=np.float32)
        inner = share > 0
        at = _canvas_points(canvas, pull.contents, inner)
        found = map_coordinates(contents, at, order=3, mode="mirror", prefilter=False, output=np.float32)
        # Lung that expands gets lighter: density goes with 1 / det J.
        aerated = map_coordinates(air, at, order=1, mode="nearest", output=np.float32)
        found += 145.0 * aerated * (pull.compression[inner] - 1.0)
        values[inner] = share[inner] * found
        outer = share < 1
        at = _canvas_points(canvas, pull.wall, outer)
        found = map_coordinates(wall, at, order=3, mode="mirror", prefilter=False, output=np.float32)
        values[outer] += (1.0 - share[outer]) * found
        if noise:
            values += self._noise(values, phase)
        return np.clip(np.rint(values), -1024, 3071).astype(np.int16)

    def sample(self, points: Array) -> Volume:
        """HU of the anatomy of T00, without noise, at world points [n, 3] (RAS mm)."""
        canvas, contents, wall, _ = self._anatomy
        body = self.world_to_body(points)
        X, Y = cavity_coordinates(body[:, 0], body[:, 1], body[:, 2])
        a, b, _ = cavity_axes(body[:, 2])
        radius = np.hypot(X * a, Y * b) / np.maximum(np.hypot(X, Y), 1e-3)
        share = np.clip(0.5 + (1.0 - cavity_level(X, Y)) * radius / canvas.edge, 0.0, 1.0)
        at = np.clip((body - canvas.origin) / canvas.step, 0.0, np.array(canvas.shape) - 1.0).T
        inner, outer = (map_coordinates(v, at, order=3, mode="mirror", prefilter=False) for v in (contents, wall))
        return np.asarray(share * inner + (1.0 - share) * outer, dtype=np.float32)

    def noise_of(self, values: Volume, scan: int) -> Volume:
        """Noise of a scan of its own of what shows ``values`` (HU)."""
        return self._noise(values, 1000 + scan)

    def _noise(self, values: Volume, phase: int) -> Volume:
        """Slightly correlated noise, stronger where the rays pass more tissue (shoulders, abdomen)."""
        rng = np.random.default_rng([self.seed, self.facts.number, 20, int(phase)])
        field = gaussian_filter(rng.standard_normal(values.shape, dtype=np.float32), (0.65, 0.65, 0.35), mode="wrap")
        field /= field.std()
        density = np.clip(values / 1000.0 + 1.0, 0.0, 2.0)
        mm = 0.019 * np.array(self.facts.spacing[:2], dtype=np.float32)  # water: 0.019 per mm
        along_x, along_y = density.sum(0) * mm[0], density.sum(1) * mm[1]
        path = gaussian_filter(0.5 * (along_x[None] + along_y[:, None]), 2.0, mode="nearest")
        return np.asarray(field * self.noise * np.exp(0.35 * (path - 2.5)).clip(0.5, 2.5), dtype=np.float32)

    # ---------------------------------------------------------------------------------------------- landmarks

    @cached_property
    def landmarks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """300 + 75 different landmarks at T00, as 0-based voxel centres next to vessel branchings."""
        from medinr.phantoms.thorax_landmarks import choose_landmarks

        return choose_landmarks(self)

    def landmark_positions(self, voxels: NDArray[np.int64], phase: int) -> Array:
        """Exact 0-based voxel coordinates at a phase of landmarks that are given as voxels of T00."""
        return self.world_to_voxel(self.phase_map(self.voxel_to_world(voxels.astype(np.float64)), phase, "inside"))

    def inside_lung(self, points: Array, margin: float = 0.0) -> NDArray[np.bool_]:
        """Whether world points (RAS mm) of T00 lie in a lung, about ``margin`` mm from its surface."""
        return in_lung(self.world_to_body(points), self.habitus, margin / float(self.scale.min()))


@dataclass(frozen=True)
class _Pullback:
    """Voxel centres of a phase followed back to T00, once as contents and once as wall (body frame)."""

    contents: tuple[Volume, Volume, Volume]
    wall: tuple[Volume, Volume, Volume]
    level: Volume
    radius: Volume
    compression: Volume

    @staticmethod
    def make(motion: Motion, axes: list[Array], phase: int) -> _Pullback:
        # The maps are smooth within a region: exact on a lattice, quintic splines between (below 0.01 mm).
        nodes = [_lattice(axis, 6.0) for axis in axes]
        lattice = np.stack(np.meshgrid(*nodes, indexing="ij"), axis=-1)
        wall_move = motion.wall_inverse(lattice, phase) - lattice
        contents_move = motion.slip_inverse(wall_move + lattice, phase) - lattice
        weights = [make_interp_spline(n, np.eye(len(n)), k=5)(a) for n, a in zip(nodes, axes, strict=True)]
        steps = [float(n[1] - n[0]) for n in nodes]
        gradient = np.stack([np.gradient(contents_move[..., a], *steps) for a in range(3)])
        jacobian = np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3)
        compression = np.linalg.det(jacobian)

        def spread(values: Array) -> Volume:
            for weight in weights:
                # Consumes the leading axis and appends its voxels: after three rounds the order is x, y, z again.
                values = np.tensordot(values.astype(np.float32), weight.astype(np.float32), axes=(0, 1))
            return np.asarray(values, dtype=np.float32)

        grid = [axis.reshape([-1 if a == b else 1 for b in range(3)]) for a, axis in enumerate(axes)]
        contents = [np.asarray(spread(contents_move[..., a]) + grid[a], dtype=np.float32) for a in range(3)]
        wall = [np.asarray(spread(wall_move[..., a]) + grid[a], dtype=np.float32) for a in range(3)]
        X, Y = cavity_coordinates(*(np.asarray(v, dtype=np.float32) for v in wall))
        a, b, _ = cavity_axes(wall[2])
        radius = np.hypot(X * a, Y * b) / np.maximum(np.hypot(X, Y), 1e-3)
        return _Pullback(
            (contents[0], contents[1], contents[2]),
            (wall[0], wall[1], wall[2]),
            np.asarray(cavity_level(X, Y), dtype=np.float32),
            np.asarray(radius, dtype=np.float32),
            spread(compression),
        )


def _lattice(axis: Array, pitch: float) -> Array:
    count = max(8, int(np.ceil((axis[-1] - axis[0] + 2 * pitch) / pitch)) + 1)
    return np.linspace(axis[0] - pitch, axis[-1] + pitch, count)


def _canvas_points(canvas: Canvas, where: tuple[Volume, Volume, Volume], chosen: NDArray[np.bool_]) -> Volume:
    def along(a: int) -> Volume:
        at = (where[a][chosen] - canvas.origin[a]) / canvas.step[a]
        return np.asarray(np.clip(at, 0.0, canvas.shape[a] - 1.0), dtype=np.float32)

    return np.stack([along(a) for a in range(3)])


def thorax_case(case: int, size: int | None = None, seed: int = 0) -> ThoraxCase:
    """A case of the breathing-thorax phantom, in memory.

    Args:
        case: DIR-LAB case number, 1 to 10; it sets size, spacing and how far the diaphragm moves.
        size: in-plane voxels; None is the published size.
        seed: seed of everything random.

    Raises:
        UserError: no such case or size.
    """
    facts = phantom_facts(case, size)
    published = dirlab_case(case)
    view = np.array(published.shape) * np.array(published.spacing)
    plane = float(np.clip(view[0], 240.0, 340.0)) / 260.0
    scale = np.array([plane, plane, float(view[2]) / 250.0])
    motion = case_motion(case, seed, (plane, plane, float(scale[2])))
    noise = float(np.random.default_rng([seed, case, 15]).uniform(14.0, 22.0))
    return ThoraxCase(facts, seed, scale, motion, case_habitus(case, seed), noise)
