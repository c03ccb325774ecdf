"""One subject of the adult brain phantom: a template deformed by age and by chance, with known truth.

A point x of the subject's MNI space shows the template at T(x) = psi_a(x + D(x)): D is a smooth individual
displacement, and psi_a the flow, for the time -a, of the velocity

    v = exp(-(d / 12 mm)^2) grad d        d: the template's signed distance from the lateral ventricles, smoothed

so that the walls of the ventricles move outwards by about a mm and what is around them gives way, without folding. a is
solved for so that the volume of the ventricles is the one that was drawn. The cortex thins by tau mm: what lies less
deep than tau under the surface of the brain is CSF.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from torch import Tensor

from medinr.phantoms.adult_template import CONTRAST, Template
from medinr.phantoms.brain_image import SCALP_MM, SKULL_MM, scanned, smooth_field
from medinr.phantoms.brain_shapes import Array
from medinr.sampling import interpolate, nearest
from medinr.space import Domain, transform_points

AGES = (45.0, 80.0)
VENTRICLES_ML, VENTRICLES_PER_YEAR, VENTRICLES_SD, VENTRICLES_RANGE = 18.0, 0.026, 0.28, (9.0, 85.0)
"""Median at 45 years, growth and sd of the logarithm, limits."""
THINNING_PER_YEAR, THINNING_SD = 0.016, 0.12
"""mm of cortex lost per year from 45 on, and its sd between subjects."""
DEFORMATION_MM, KNOTS = 1.6, 6
REACH_MM = 12.0
STEP_MM, WIDEST_MM = 1.0, 20.0
"""Of the flow that widens the ventricles; never further."""
NOISE, BIAS = 0.025, 0.1
SCALE_SD, ROTATION_DEGREES, TRANSLATION_MM = 0.05, 5.0, 6.0


@dataclass(frozen=True)
class AdultCase:
    """One subject, a function of its arguments alone.

    Args:
        age: years at the scan.
        ventricles_ml: volume of the lateral ventricles in MNI space.
        thinning_mm: cortex lost.
        pose: from MNI world to the scanner's, RAS mm: size and position of the head.
        template: the brain before it is deformed.
        grid: MNI space at the resolution of the scans.
        seed: of displacement and noise.
        deformed: False: the template as it is, its ventricles too.
    """

    age: float
    ventricles_ml: float
    thinning_mm: float
    pose: NDArray[np.float64]
    template: Template
    grid: Domain
    seed: tuple[int, ...]
    deformed: bool = True

    @cached_property
    def native(self) -> Domain:
        """The scanner's grid: the box of MNI space about the head's middle there, its axes those of the scanner."""
        affine = self.grid.voxel_to_world.numpy().copy()
        middle = affine @ [*((n - 1) / 2 for n in self.grid.shape), 1]
        moved = self.pose @ middle
        affine[:3, 3] += np.round(moved[:3] - middle[:3], 1)
        return Domain.of(self.grid.shape, affine)

    @cached_property
    def widening_mm(self) -> float:
        """a: how far the walls of the ventricles have moved."""
        points = self._individual(self._points(self.grid, np.eye(4)))
        voxel, step = float(np.prod(self.grid.spacing)) / 1000, float(np.mean(self.grid.spacing))
        distance = self._sampled(self.template.ventricles, points)
        points = points[distance < 25]

        def volume() -> float:
            moved = self._sampled(self.template.ventricles, points)
            return float((0.5 - moved / step).clamp(0, 1).sum()) * voxel

        before, a = volume(), 0.0
        sign = 1.0 if before < self.ventricles_ml else -1.0
        while abs(a) < WIDEST_MM:
            points = self._step(points, sign * STEP_MM)
            after = volume()
            if (after - self.ventricles_ml) * sign >= 0:
                return a + sign * STEP_MM * (self.ventricles_ml - before) / (after - before)
            before, a = after, a + sign * STEP_MM
        return a

    def tissues(self, native: bool) -> Array:
        """Shares of CSF, grey and white matter [3, X, Y, Z], in native or in MNI space."""
        return self._shown(native)[1]

    def labels(self, native: bool) -> NDArray[np.uint8]:
        """1 CSF, 2 grey matter, 3 white matter, as FAST numbers them [X, Y, Z]."""
        shares = self.tissues(native)
        found = 1 + shares.argmax(axis=0)
        return np.where(self.mask(native), found, 0).astype(np.uint8)

    def true_labels(self) -> NDArray[np.uint8]:
        """`labels` in MNI space with the lateral ventricles as 4."""
        found = self.labels(native=False)
        found[(self._shown(False)[2] < 0) & (found > 0)] = 4
        return found

    def first(self, native: bool) -> NDArray[np.uint8] | None:
        """Subcortical structures as FIRST numbers them, where the template knows them."""
        if self.template.first is None:
            return None
        grid, points = self._template_points(native)
        labels = torch.from_numpy(self.template.first)
        found = nearest(labels, transform_points(self._to_voxels, points)).reshape(grid.shape).numpy()
        return np.where(self.mask(native), found, 0).astype(np.uint8)

    def mask(self, native: bool) -> NDArray[np.bool_]:
        """Brain and the CSF around it."""
        return np.asarray(self._shown(native)[3] < 0)

    def clean(self, native: bool) -> Array:
        """The brain in T1w [X, Y, Z] without noise, 0 outside."""
        image, _, _, head = self._shown(native)
        return np.where(head < 0, image, 0).astype(np.float32)

    def t1(self, native: bool) -> Array:
        """T1w [X, Y, Z], white matter about 0.86: the whole head with bias field, or the brain alone in MNI space."""
        image, _, _, head = self._shown(native)
        rng = np.random.default_rng([*self.seed, 5 + native])
        if not native:
            noisy = scanned(image, NOISE, 0.0, rng)[1]
            return np.where(head < 0, noisy, 0).astype(np.float32)
        step, whole = float(np.mean(self.native.spacing)), np.zeros_like(image)
        shells = ((head - SKULL_MM - SCALP_MM, CONTRAST["scalp"]), (head - SKULL_MM, CONTRAST["skull"]), (head, image))
        for distance, value in shells:
            whole += np.clip(0.5 - distance / step, 0, 1) * (value - whole)
        return scanned(whole, NOISE, BIAS, rng)[0].astype(np.float32)

    # -- the map -------------------------------------------------------------------------------------------------

    @cached_property
    def _displacement(self) -> Tensor:
        rng = np.random.default_rng([*self.seed, 1])
        shape = self.template.domain.shape
        field = [DEFORMATION_MM * smooth_field(shape, KNOTS, rng) for _ in range(3)]
        return torch.from_numpy(np.stack(field).astype(np.float32))

    @cached_property
    def _outwards(self) -> Tensor:
        """v on the template's grid [3, X, Y, Z], world axes."""
        d, step = self.template.ventricles, self.template.domain.spacing[0]
        weight = np.exp(-np.square(np.maximum(d, 0) / REACH_MM))
        field = np.stack([weight * g for g in np.gradient(gaussian_filter(d, 1.5 / step), step)])
        field[0] = -field[0]  # the first voxel axis of MNI152 runs to the left
        return torch.from_numpy(field.astype(np.float32))

    def _points(self, grid: Domain, matrix: NDArray[np.float64]) -> Tensor:
        """MNI world [n, 3] of the voxel centres of a grid whose world is ``matrix`` of MNI's."""
        back = torch.from_numpy(np.linalg.inv(matrix)) @ grid.voxel_to_world
        return transform_points(back, grid.voxels())

    def _individual(self, points: Tensor) -> Tensor:
        return points + self._sampled(self._displacement, points).T

    def _step(self, points: Tensor, length: float) -> Tensor:
        return points - length * self._sampled(self._outwards, points).T

    def _widened(self, points: Tensor, a: float) -> Tensor:
        steps = max(1, math.ceil(abs(a) / STEP_MM))
        for _ in range(steps):
            points = self._step(points, a / steps)
        return points

    def _sampled(self, volume: Tensor | Array, points: Tensor) -> Tensor:
        """Values [C, n] of a volume [(C), X, Y, Z] of the template at MNI world points [n, 3]; the border continues."""
        data = torch.as_tensor(volume, dtype=torch.float32)
        found = interpolate(data if data.ndim == 4 else data[None], transform_points(self._to_voxels, points))
        return found if data.ndim == 4 else found[0]

    @property
    def _to_voxels(self) -> Tensor:
        return self.template.domain.world_to_voxel.float()

    def _template_points(self, native: bool) -> tuple[Domain, Tensor]:
        """T of the voxel centres [n, 3] of the native or the MNI grid."""
        grid, matrix = (self.native, self.pose) if native else (self.grid, np.eye(4))
        points = self._points(grid, matrix)
        return grid, self._widened(self._individual(points), self.widening_mm) if self.deformed else points

    @cached_property
    def _both(self) -> dict[bool, tuple[Array, Array, Array, Array]]:
        return {}

    def _shown(self, native: bool) -> tuple[Array, Array, Array, Array]:
        """Clean T1, tissue shares, and the distances from ventricles and head, on the native or the MNI grid."""
        if native not in self._both:
            grid, points = self._template_points(native)
            step = float(np.mean(grid.spacing))

            brain = self.template
            stack = np.stack([brain.t1, brain.ventricles, brain.head, brain.pial, *brain.tissues])
            found = self._sampled(stack, points).reshape(-1, *grid.shape).numpy()
            (t1, ventricles, head, pial), shares = found[:4], found[4:]
            lost = np.clip(0.5 + (pial + self.thinning_mm) / step, 0, 1)
            lost -= np.clip(0.5 + pial / step, 0, 1)
            lost *= (head < 0) & (ventricles > 2)
            lost = np.minimum(lost, shares[1])  # grey matter alone: white matter stays
            t1 = t1 + lost * (CONTRAST["csf"] - CONTRAST["cortex"])
            shares[0] += lost
            shares[1] -= lost
            self._both[native] = (t1, shares, ventricles, head)
        return self._both[native]


def adult_case(age: float, ventricles_ml: float, seed: int, number: int, brain: Template, grid: Domain) -> AdultCase:
    """A subject of this age and ventricular volume; all else is drawn by seed and number."""
    rng = np.random.default_rng([seed, number])
    rotation = np.deg2rad(np.clip(rng.normal(0, ROTATION_DEGREES, 3), -12, 12))
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec(rotation).as_matrix() * 0.93 * math.exp(rng.normal(0, SCALE_SD))
    pose[:3, 3] = rng.normal(0, TRANSLATION_MM, 3)
    thinning = max(0.0, THINNING_PER_YEAR * (age - AGES[0]) + rng.normal(0, THINNING_SD))
    return AdultCase(age, ventricles_ml, thinning, pose, brain, grid, (seed, number))
