"""Where a registration starts: phi_0(p) = A(p + d(p)) from a matrix, a transform or a displacement file."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from medinr.errors import UserError
from medinr.io.files import existing_file
from medinr.io.images import ITK_SUFFIXES, NIFTI_SUFFIXES, suffix_of
from medinr.io.itk_transforms import ItkTransform, is_itk_transform
from medinr.io.learn2reg import is_learn2reg, read_learn2reg
from medinr.io.matrices import invertible, read_matrix
from medinr.io.transforms import read_displacement
from medinr.sampling import interpolate
from medinr.space import Domain, transform_points
from medinr.types import Matrix

CHUNK = 1_000_000
"""Voxels at once."""
LINEAR_MM = 1e-3
"""A displacement field that is no further from an affine map than this is one."""


def read_start(path: str | Path, domain: Domain) -> tuple[Matrix, Tensor | None]:
    """A start phi_0(p) = A(p + d(p)), fixed to moving world, from a file.

    - text file of 16 numbers: A itself, RAS mm;
    - transform of ITK, ANTs or Slicer (.tfm, .txt, .mat, .h5; needs SimpleITK): linear ones exactly, all others at the
      voxel centres of ``domain``;
    - displacement field, 5-D NIfTI of intent 1007 or 1006, or MetaImage or NRRD of LPS mm vectors, on any grid: its
      border continues beyond it;
    - Learn2Reg's (X, Y, Z, 3) in voxels, on the grid of ``domain``.

    Where the transform is not linear, A is its least-squares affine over the voxel centres, so that d stays small.

    Args:
        path: the file.
        domain: the fixed image's grid.

    Returns:
        A [4, 4] (float64), and d [X, Y, Z, 3] (float32, RAS mm) on ``domain``, or None where d is 0 everywhere.

    Raises:
        UserError: a file that cannot be read or is none of these.
    """
    file = existing_file(path)
    if is_itk_transform(file):
        transform = ItkTransform(file)
        matrix = transform.matrix
        return (matrix, None) if matrix is not None else split(transform.displacement(domain), domain, str(file))
    if suffix_of(file) in (*NIFTI_SUFFIXES, *ITK_SUFFIXES):
        return split(displacement_on(file, domain), domain, str(file))
    return read_matrix(file), None


def displacement_on(file: Path, domain: Domain) -> Tensor:
    """The displacement of a field file at the voxel centres of a grid: [X, Y, Z, 3], RAS mm (float32)."""
    if is_learn2reg(file):
        return read_learn2reg(file, domain)
    field, own = read_displacement(file)
    return field if own.same_grid(domain) else sample(field, own, domain)


def sample(field: Tensor, own: Domain, domain: Domain) -> Tensor:
    """Vectors [x, y, z, 3] of a grid at the voxel centres of another, trilinearly; the border continues."""
    volume = field.movedim(-1, 0)
    out = torch.empty(domain.n_voxels, 3)
    for rows, voxels in _chunks(domain):
        out[rows] = interpolate(volume, transform_points(own.world_to_voxel @ domain.voxel_to_world, voxels).float()).T
    return out.reshape(*domain.shape, 3)


def split(displacement: Tensor, domain: Domain, name: str) -> tuple[Matrix, Tensor | None]:
    """A by least squares over the voxel centres p, and d with A(p + d(p)) = p + displacement(p); None for no d."""
    matrix = invertible(least_squares_affine(displacement, domain), name)
    residual = residual_displacement(displacement, matrix, domain)
    return matrix, None if float(residual.abs().max()) < LINEAR_MM else residual


def least_squares_affine(displacement: Tensor, domain: Domain) -> Matrix:
    """The affine map [4, 4] nearest to p + displacement(p) over all voxel centres p of a grid.

    Along an axis of one voxel it moves nothing but the origin.
    """
    # Normal equations about the centre, in voxels: well conditioned, and nothing of the grid's size is kept.
    centre = (torch.tensor(domain.shape).double() - 1) / 2
    gram, right = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    flat = displacement.reshape(-1, 3)
    for rows, voxels in _chunks(domain):
        basis = torch.cat((voxels - centre, torch.ones(len(voxels), 1, dtype=torch.float64)), dim=1)
        gram += basis.T @ basis
        right += basis.T @ flat[rows].double()
    solution = torch.linalg.pinv(gram, hermitian=True) @ right  # [4, 3]: displacement per voxel, and at the centre
    to_centred = domain.world_to_voxel.clone()
    to_centred[:3, 3] -= centre
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3] += solution.T @ to_centred
    return matrix


def residual_displacement(displacement: Tensor, matrix: Matrix, domain: Domain) -> Tensor:
    """d with A(p + d(p)) = p + displacement(p) at the voxel centres p: A^-1(p + displacement(p)) - p, float32."""
    inverse = torch.linalg.inv(matrix.double().cpu())
    flat = displacement.reshape(-1, 3)
    out = torch.empty_like(flat, dtype=torch.float32, device="cpu")
    for rows, voxels in _chunks(domain):
        p = transform_points(domain.voxel_to_world, voxels)
        out[rows] = (transform_points(inverse, p + flat[rows].double().cpu()) - p).float()
    return out.reshape(*domain.shape, 3)


def linear_only(start: tuple[Matrix, Tensor | None], name: str) -> Matrix:
    """A of a start, where only a linear one can be used.

    Raises:
        UserError: there is a residual displacement.
    """
    matrix, residual = start
    if residual is not None:
        largest = float(residual.norm(dim=-1).max())
        raise UserError(
            f"{name}: expected a linear start here, found a displacement of up to {largest:.3g} mm beside its affine "
            "part; give a matrix or a linear transform"
        )
    return matrix


def _chunks(domain: Domain) -> Iterator[tuple[slice, Tensor]]:
    """Rows and voxel coordinates (float64) of all voxels, a million at a time."""
    for i in range(0, domain.n_voxels, CHUNK):
        yield slice(i, min(i + CHUNK, domain.n_voxels)), domain.voxels(i, i + CHUNK).double()
