"""Grids that a careless conversion gets wrong."""

import numpy as np
from scipy.spatial.transform import Rotation

from medinr.space import Domain

SHAPE = (18, 22, 15)


def affine(kind: str) -> np.ndarray:
    """4 x 4 voxel to RAS mm; anisotropic, away from the origin."""
    linear = np.diag([1.5, 1.2, 2.5])
    oblique = Rotation.from_euler("xyz", (12, -20, 31), degrees=True).as_matrix()
    if kind == "oblique":
        linear = oblique @ linear
    elif kind == "flipped":  # L to R and A to P, as most scanners write; right-handed
        linear = np.diag([-1.0, -1.0, 1.0]) @ linear
    elif kind == "left-handed":
        linear = oblique @ np.diag([-1.0, 1.0, 1.0]) @ linear
    elif kind == "permuted":  # sagittal slices
        linear = np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]]) @ linear
    elif kind == "sheared":
        linear = linear @ np.array([[1, 0.3, 0], [0, 1, 0], [0, 0.1, 1]])
    elif kind != "identity":
        raise KeyError(kind)
    full = np.eye(4)
    full[:3, :3] = linear if kind != "identity" else np.eye(3)
    full[:3, 3] = (-31.0, 17.0, 240.0) if kind != "identity" else 0.0
    return full


RIGID = ("identity", "oblique", "flipped", "left-handed", "permuted")
ALL = (*RIGID, "sheared")


def domain(kind: str, shape: tuple[int, int, int] = SHAPE) -> Domain:
    return Domain.of(shape, affine(kind))
