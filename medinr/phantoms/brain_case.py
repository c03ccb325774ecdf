"""One brain phantom: pose, growth and individual deformation of the anatomy on a grid."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from medinr.phantoms.brain_anatomy import Anatomy, BrainShape, anatomy, ventricle_pieces
from medinr.phantoms.brain_image import smooth_field
from medinr.phantoms.brain_shapes import Array, tube

KNOTS = 6
"""Of the individual deformation, along each axis of the field of view."""


@dataclass(frozen=True)
class Individual:
    """How a brain differs from another of its age.

    Args:
        rotation: of the head, rotation vector in radians.
        translation: mm.
        stretch: factors of the brain along R, A, S.
        deformation: sd of the displacement, body mm.
        seed: of deformation, sulci, noise.
    """

    rotation: tuple[float, float, float]
    translation: tuple[float, float, float]
    stretch: tuple[float, float, float]
    deformation: float
    seed: tuple[int, ...]

    @property
    def pose(self) -> NDArray[np.float64]:
        """The rigid map [4, 4] from the upright head to the scanner, RAS mm."""
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_rotvec(self.rotation).as_matrix()
        matrix[:3, 3] = self.translation
        return matrix


@dataclass(frozen=True)
class Grid:
    """An isotropic grid, axes along R, A, S, the world's origin in its middle."""

    shape: tuple[int, int, int]
    spacing: float

    @property
    def affine(self) -> NDArray[np.float64]:
        matrix = np.diag([self.spacing] * 3 + [1.0])
        matrix[:3, 3] = [-(n - 1) / 2 * self.spacing for n in self.shape]
        return matrix

    def world(self) -> Array:
        """Coordinates [3, X, Y, Z] of the voxel centres, mm."""
        axes = [((np.arange(n) - (n - 1) / 2) * self.spacing).astype(np.float32) for n in self.shape]
        return np.stack(np.meshgrid(*axes, indexing="ij"))


def body_coordinates(grid: Grid, person: Individual, scale: float, offset: tuple[float, float, float]) -> Array:
    """Body mm [3, X, Y, Z] of the voxel centres: pose, size and stretch taken off, then the individual deformation.

    Args:
        offset: body mm that the middle of the grid shows before the pose.
    """
    rng = np.random.default_rng([*person.seed, 1])
    inverse = np.linalg.inv(person.pose).astype(np.float32)
    upright = np.einsum("ij,jxyz->ixyz", inverse[:3, :3], grid.world()) + inverse[:3, 3].reshape(3, 1, 1, 1)
    size = scale * np.array(person.stretch, dtype=np.float32).reshape(3, 1, 1, 1)
    body = upright / size + np.array(offset, dtype=np.float32).reshape(3, 1, 1, 1)
    moved = body + person.deformation * np.stack([smooth_field(grid.shape, KNOTS, rng) for _ in range(3)])
    return np.asarray(moved, dtype=np.float32)


def brain(
    grid: Grid, person: Individual, shape: BrainShape, volume_ml: float, offset: tuple[float, float, float]
) -> tuple[Anatomy, BrainShape]:
    """The anatomy of a brain whose lateral ventricles hold ``volume_ml``, and its shape."""
    body = body_coordinates(grid, person, shape.scale, offset)
    shape = replace(shape, ventricles=ventricle_factor(body, shape, grid.spacing, volume_ml))
    found = anatomy(body, shape, grid.spacing / shape.scale, np.random.default_rng([*person.seed, 2]))
    return found, shape


def ventricle_factor(body: Array, shape: BrainShape, spacing: float, volume_ml: float) -> float:
    """The factor of the ventricles' radii that gives their volume; partial voxels count by their share."""
    near = tube(ventricle_pieces(body, shape), 3.0) < 6
    pieces = [(d[near], np.broadcast_to(r, d.shape)[near]) for d, r in ventricle_pieces(body, shape)]
    gap = 1.0 - np.abs(body[0][near])

    def volume(factor: float) -> float:
        distance = shape.scale * np.maximum(tube(pieces, factor), gap)
        return float(np.clip(0.5 - distance / spacing, 0, 1).sum()) * spacing**3 / 1000

    return bisected(volume, volume_ml, 0.05, 3.0)


def bisected(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where an increasing function has a value, to a thousandth of the interval."""
    for _ in range(12):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return 0.5 * (low + high)
