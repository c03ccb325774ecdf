"""Matrices of FSL's FLIRT: between FSL's own millimetres of two images, and as maps between worlds (RAS mm).

FSL's millimetres are voxel indices times voxel sizes; the first axis counts from the other end where the image's affine
has a positive determinant (a "neurological" image).
"""

import numpy as np
import torch

from medinr.errors import UserError
from medinr.io.matrices import invertible
from medinr.space import Domain
from medinr.types import Matrix


def voxel_to_fsl(domain: Domain) -> Matrix:
    """Voxel indices -> FSL's millimetres of an image."""
    matrix = torch.diag(torch.tensor([*domain.spacing, 1.0], dtype=torch.float64))
    if float(torch.linalg.det(domain.voxel_to_world[:3, :3])) > 0:
        matrix[0, 3] = (domain.shape[0] - 1) * domain.spacing[0]
        matrix[0, 0] *= -1
    return matrix


def flirt_to_world(matrix: Matrix, moving: Domain, reference: Domain) -> Matrix:
    """World of the moving image -> world of the reference, from FLIRT's matrix (``-omat``) of the two."""
    fsl = [voxel_to_fsl(d) @ d.world_to_voxel for d in (moving, reference)]
    found: Matrix = torch.linalg.inv(fsl[1]) @ matrix.double() @ fsl[0]
    return found


def world_to_flirt(matrix: Matrix, moving: Domain, reference: Domain) -> Matrix:
    """The opposite of `flirt_to_world`."""
    fsl = [voxel_to_fsl(d) @ d.world_to_voxel for d in (moving, reference)]
    found: Matrix = fsl[1] @ matrix.double() @ torch.linalg.inv(fsl[0])
    return found


def parse_flirt(text: str, name: str) -> Matrix:
    """The matrix [4, 4] of FLIRT's text.

    Raises:
        UserError: not 16 numbers, or no invertible affine matrix.
    """
    try:
        rows = np.array([[float(v) for v in line.split()] for line in text.splitlines() if line.strip()])
    except ValueError:
        rows = np.zeros(0)
    if rows.shape != (4, 4) or not np.isfinite(rows).all() or not np.allclose(rows[3], [0, 0, 0, 1]):
        raise UserError(
            f"{name}: expected FLIRT's 4 x 4 matrix with the last row 0 0 0 1, found another text; copy again"
        )
    return invertible(torch.from_numpy(rows), name)
