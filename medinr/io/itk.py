"""SimpleITK, which is optional, and its LPS world: what all readers through it share."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from medinr.errors import UserError
from medinr.space import Domain

RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""RAS <-> LPS; its own inverse."""


def import_sitk(name: str) -> ModuleType:
    """SimpleITK, or a UserError that tells how to install it."""
    try:
        return importlib.import_module("SimpleITK")
    except ImportError as error:
        raise UserError(
            f"{name}: expected SimpleITK for this format, found it not installed; pip install medinr[itk]"
        ) from error


@contextmanager
def silent(sitk: ModuleType) -> Iterator[None]:
    """No warnings of ITK's own on the screen: what matters is checked, and said in one line."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def ras_affine(direction: Any, spacing: Any, origin: Any) -> np.ndarray:
    """Voxel to RAS mm [4, 4] from an ITK image's direction (n x n, flat), spacing and origin; n is 2, 3 or 4."""
    n = min(len(spacing), 3)
    lps = np.eye(4)
    lps[:n, :n] = np.reshape(direction, (len(spacing), len(spacing)))[:n, :n] * np.asarray(spacing)[:n]
    lps[:n, 3] = np.asarray(origin)[:n]
    return RAS_LPS @ lps


def checked_domain(shape: Any, affine: Any, name: str) -> Domain:
    """The domain of an affine to RAS mm, or a UserError where it cannot be inverted."""
    matrix = np.asarray(affine, dtype=np.float64)
    sides = np.linalg.norm(matrix[:3, :3], axis=0)
    finite = bool(np.isfinite(matrix).all())
    if not finite or sides.min() <= 0 or abs(np.linalg.det(matrix[:3, :3] / sides)) < 1e-6:
        rows = matrix[:3].round(4).tolist()
        raise UserError(f"{name}: expected an invertible affine, found {rows}; correct sform and qform in its header")
    return Domain.of(tuple(shape)[:3], matrix)


def image_domain(image: Any, name: str) -> Domain:
    """The domain of a SimpleITK image, or of a SimpleITK reader that has read a header."""
    shape = (*image.GetSize(), 1)[:3]
    return checked_domain(shape, ras_affine(image.GetDirection(), image.GetSpacing(), image.GetOrigin()), name)
