"""One subject of the perinatal brain phantom: 28 to 44 weeks, T2w and T1w, tissues as dHCP labels them.

Everything that grows is a function of the *maturation*, the age plus an individual error (sd `MATURATION_SD` weeks):
size, depth of the sulci, thickness of the cortex, the Sylvian fossa, the cerebellum, and the contrast of white matter,
which loses water and, in the internal capsule, gains myelin. No method can know the age better than that error. The
volume of the lateral ventricles is drawn on its own, as is the corpus callosum's absence.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from medinr.phantoms.brain_anatomy import Anatomy, BrainShape
from medinr.phantoms.brain_case import Grid, Individual, brain
from medinr.phantoms.brain_image import automatic, layers, painted_image, painted_labels, scanned, smooth_field
from medinr.phantoms.brain_shapes import Array

AGES = (28.0, 44.0)
MATURATION_SD = 0.4
"""Weeks."""
SIZE_SD, STRETCH_SD, DEFORMATION_MM = 0.025, 0.02, 1.1
ROTATION_DEGREES, TRANSLATION_MM = 6.0, 3.0
FIELD_OF_VIEW = (124.0, 152.0, 130.0)
SPACING = 1.6
OFFSET = (0.0, 0.0, 0.0)
VENTRICLES_ML, VENTRICLES_SD, VENTRICLES_RANGE = 5.0, 0.32, (2.2, 10.5)
"""Median, sd of the logarithm, and limits of the lateral ventricles' volume."""
NOISE, BIAS = 0.025, 0.12
SEGMENTATION_VOXELS = 0.25
MODALITIES = ("T2w", "T1w")
TISSUES = {
    "skull": 4, "csf": 1, "cortex": 2, "white": 3, "callosum": 3, "capsule": 3, "deep": 7, "hippocampus": 9,
    "cerebellum": 6, "brainstem": 8, "midline": 1, "ventricles": 5,
}  # fmt: skip
"""Values of drawem9; 4 (background) is what lies inside the brain mask but is no brain."""
CALLOSUM = 10
"""The corpus callosum in the true labels, where drawem9 has white matter."""


def rise(weeks: float, middle: float, width: float) -> float:
    """From 0 to 1 around an age."""
    return 1 / (1 + math.exp(-(weeks - middle) / width))


def perinatal_shape(maturation: float, callosum: bool, size: float = 1.0) -> BrainShape:
    """The shape of a brain of so many weeks; ``size`` is the individual's."""
    scale = (0.25 + 0.75 * rise(maturation, 34.5, 4.8) / rise(40, 34.5, 4.8)) ** (1 / 3)
    return BrainShape(
        scale=size * scale,
        sulci=(
            12.0 * rise(maturation, 31.0, 2.2), 8.5 * rise(maturation, 35.5, 2.0), 5.0 * rise(maturation, 39.5, 1.8),
        ),
        cortex=1.7 + 0.6 * rise(maturation, 36, 3),
        gap=0.55,
        csf=1.6 + 2.4 * rise(-maturation, -32, 2.5),
        sylvian=rise(-maturation, -31.5, 2.0),
        ventricles=1.0,
        callosum=(1.6 + 1.6 * rise(maturation, 36, 4)) if callosum else 0.0,
        hindbrain=0.80 + 0.22 * rise(maturation, 35, 3),
    )  # fmt: skip


@dataclass(frozen=True)
class PerinatalCase:
    """One subject, a function of its arguments alone.

    Args:
        age: weeks after the last menstrual period, at the scan.
        maturation: the age that the brain looks.
        ventricles_ml: volume of the lateral ventricles.
        callosum: False: agenesis.
        person: pose and individual shape.
        size: factor of the brain's length.
        grid: of the scans.
    """

    age: float
    maturation: float
    ventricles_ml: float
    callosum: bool
    person: Individual
    size: float
    grid: Grid

    @cached_property
    def _made(self) -> tuple[Anatomy, BrainShape]:
        shape = perinatal_shape(self.maturation, self.callosum, self.size)
        return brain(self.grid, self.person, shape, self.ventricles_ml, OFFSET)

    @property
    def shape(self) -> BrainShape:
        return self._made[1]

    @cached_property
    def layers(self) -> dict[str, Array]:
        """Signed distances of the structures, mm."""
        return layers(self._made[0])

    @cached_property
    def labels(self) -> NDArray[np.uint8]:
        """The true tissues of drawem9 [X, Y, Z], and `CALLOSUM`."""
        return painted_labels(self.layers, {**TISSUES, "callosum": CALLOSUM})

    @cached_property
    def segmentation(self) -> NDArray[np.uint8]:
        """The tissues as an automatic segmentation gives them, without the corpus callosum."""
        found = np.where(self.labels == CALLOSUM, TISSUES["callosum"], self.labels).astype(np.uint8)
        return automatic(found, SEGMENTATION_VOXELS, self._rng(4))

    def contrast(self, modality: str) -> dict[str, Array | float]:
        """Intensity of each structure, CSF in T2w being 1."""
        m = self.maturation
        myelin, water = rise(m, 39.5, 2.0), rise(-m, -37, 3.5)
        depth = np.clip((-self.layers["white"] - 1.0) / 7.0, 0, 1)
        texture = 1 + 0.02 * smooth_field(self.grid.shape, 12, self._rng(5))
        folia = self._made[0].folia / self.shape.scale
        if modality == "T2w":
            white = texture * (0.56 + 0.16 * water + 0.05 * water * (1 - depth))
            return {
                "scalp": 0.62, "skull": 0.10, "csf": 1.0, "cortex": 0.40, "white": white, "callosum": 0.45,
                "capsule": texture * (0.50 + 0.06 * water - 0.16 * myelin), "deep": texture * (0.44 - 0.05 * myelin),
                "hippocampus": 0.46, "cerebellum": 0.43 + 0.03 * folia, "brainstem": texture * (0.44 - 0.06 * myelin),
                "midline": 1.0, "ventricles": 1.0,
            }  # fmt: skip
        white = texture * (0.42 - 0.05 * water + 0.03 * myelin)
        return {
            "scalp": 0.85, "skull": 0.10, "csf": 0.16, "cortex": 0.56, "white": white, "callosum": 0.50,
            "capsule": texture * (0.48 + 0.24 * myelin), "deep": texture * (0.56 + 0.05 * myelin),
            "hippocampus": 0.53, "cerebellum": 0.56 - 0.03 * folia, "brainstem": texture * (0.58 + 0.08 * myelin),
            "midline": 0.16, "ventricles": 0.15,
        }  # fmt: skip

    @cached_property
    def images(self) -> dict[str, tuple[Array, Array]]:
        """Each modality as scanned, and restored (without the bias field) [X, Y, Z]."""
        found = {}
        for number, modality in enumerate(MODALITIES):
            clean = painted_image(self.layers, self.contrast(modality), self.grid.spacing)
            found[modality] = scanned(clean, NOISE, BIAS, self._rng(6 + number))
        return found

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Brain and the CSF around it, and the inner edge of the skull."""
        return np.asarray(self.layers["skull"] < 0)

    def volumes_ml(self) -> dict[str, float]:
        """Volumes of the true labels, and of the brain (all tissue but CSF and ventricles)."""
        voxel = self.grid.spacing**3 / 1000
        counts = np.bincount(self.labels.ravel(), minlength=CALLOSUM + 1) * voxel
        names = {
            1: "csf", 2: "cortex", 3: "white", 5: "ventricles", 6: "cerebellum", 7: "deep", 8: "brainstem",
            9: "hippocampus", CALLOSUM: "callosum",
        }  # fmt: skip
        brain_ml = float(sum(counts[value] for value in names if value not in (1, 5)))
        return {**{name: float(counts[value]) for value, name in names.items()}, "brain": brain_ml}

    def _rng(self, part: int) -> np.random.Generator:
        return np.random.default_rng([*self.person.seed, part])


def field_of_view(size: int | None) -> Grid:
    """The grid of the scans: ``size`` voxels along the longest side (from back to front); None: 1.6 mm."""
    spacing = SPACING if size is None else max(FIELD_OF_VIEW) / size
    x, y, z = (round(length / spacing) for length in FIELD_OF_VIEW)
    return Grid((x, y, z), spacing)


def perinatal_case(
    age: float, ventricles_ml: float, callosum: bool, seed: int, number: int, size: int | None = None
) -> PerinatalCase:
    """A subject of this age, ventricular volume and callosum; all else is drawn by seed and number."""
    rng = np.random.default_rng([seed, number])
    rotation = np.deg2rad(np.clip(rng.normal(0, ROTATION_DEGREES, 3), -2 * ROTATION_DEGREES, 2 * ROTATION_DEGREES))
    translation = np.clip(rng.normal(0, TRANSLATION_MM, 3), -2 * TRANSLATION_MM, 2 * TRANSLATION_MM)
    stretch = np.exp(rng.normal(0, STRETCH_SD, 3))
    stretch /= np.prod(stretch) ** (1 / 3)
    person = Individual(_three(rotation), _three(translation), _three(stretch), DEFORMATION_MM, (seed, number))
    maturation = age + rng.normal(0, MATURATION_SD)
    return PerinatalCase(
        age, float(maturation), ventricles_ml, callosum, person, float(np.exp(rng.normal(0, SIZE_SD))),
        field_of_view(size),
    )  # fmt: skip


def _three(values: NDArray[np.floating]) -> tuple[float, float, float]:
    a, b, c = (float(v) for v in values)
    return a, b, c
