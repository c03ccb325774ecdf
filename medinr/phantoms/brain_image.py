"""From the anatomy of a brain phantom to what a scanner and a segmentation give: labels, contrasts, noise, bias."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

from medinr.phantoms.brain_anatomy import Anatomy
from medinr.phantoms.brain_shapes import Array

SKULL_MM, SCALP_MM = 1.6, 3.2
STRUCTURES = (
    "scalp", "skull", "csf", "cortex", "white", "callosum", "capsule", "deep", "hippocampus", "cerebellum",
    "brainstem", "midline", "ventricles",
)  # fmt: skip
"""In the order in which they are painted: a later one covers an earlier one."""


def layers(body: Anatomy) -> dict[str, Array]:
    """Signed distance of each of `STRUCTURES`, mm."""
    return {
        "scalp": body.head - SKULL_MM - SCALP_MM, "skull": body.head - SKULL_MM, "csf": body.head,
        "cortex": body.pial, "white": body.white, "callosum": body.callosum,
        "capsule": np.maximum(body.capsule, body.white), "deep": np.maximum(body.deep, body.white),
        "hippocampus": body.hippocampus, "cerebellum": body.cerebellum, "brainstem": body.brainstem,
        "midline": np.maximum(body.midline, body.head), "ventricles": np.maximum(body.ventricles, body.white - 1.0),
    }  # fmt: skip


def painted_labels(shapes: Mapping[str, Array], values: Mapping[str, int]) -> NDArray[np.uint8]:
    """Labels [X, Y, Z]: at each voxel centre the last structure that holds it; one without a value covers nothing."""
    labels = np.zeros(shapes["csf"].shape, dtype=np.uint8)
    for name in STRUCTURES:
        if name in values:
            labels[shapes[name] < 0] = values[name]
    return labels


def painted_image(shapes: Mapping[str, Array], contrast: Mapping[str, Array | float], voxel_mm: float) -> Array:
    """Intensities [X, Y, Z] with partial volume: each structure covers what is below by its share of the voxel."""
    image = np.zeros(shapes["csf"].shape, dtype=np.float32)
    for name in STRUCTURES:
        share = np.clip(0.5 - shapes[name] / voxel_mm, 0, 1)
        image += share * (contrast[name] - image)
    return image


def smooth_field(shape: Sequence[int], knots: int, rng: np.random.Generator) -> Array:
    """A smooth random function [X, Y, Z], sd about 1: normal values on a coarse lattice, cubic between them."""
    coarse = rng.normal(size=(knots, knots, knots)).astype(np.float32)
    return np.asarray(zoom(coarse, [n / knots for n in shape], order=3, mode="nearest", grid_mode=True))


def scanned(image: Array, noise: float, bias: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """The image with Rician noise and with a bias field, and the same with the noise alone.

    Args:
        noise: sd relative to the brightest tissue (1).
        bias: sd of the logarithm of the field.
    """
    real, imaginary = rng.normal(0, noise, (2, *image.shape)).astype(np.float32)
    noisy = np.hypot(image + real, imaginary)
    return noisy * np.exp(bias * smooth_field(image.shape, 4, rng)), noisy


def automatic(labels: NDArray[np.uint8], voxels: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Labels as an automatic segmentation gives them: borders displaced by smooth noise of so many voxels (sd)."""
    index = np.indices(labels.shape, dtype=np.float32)
    for axis in range(3):
        noise = gaussian_filter(rng.normal(size=labels.shape).astype(np.float32), 1.5)
        index[axis] += voxels * noise / noise.std()
    i, j, k = (np.clip(np.rint(index[a]).astype(int), 0, labels.shape[a] - 1) for a in range(3))
    return np.asarray(labels[i, j, k])
