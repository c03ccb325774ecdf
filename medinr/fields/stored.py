"""A transform that another program, or medinr itself, has left as a file: displacements, or a transform of ITK."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from medinr import io
from medinr.errors import UserError
from medinr.fields.transform import PRECISION_MM, Transform
from medinr.fields.warp import chunks
from medinr.io.starts import displacement_on, least_squares_affine
from medinr.sampling import interpolate
from medinr.space import Domain, transform_points
from medinr.types import Matrix, Points

STEP_MM = 0.1
"""Half of the distance over which derivatives are taken; enough for Newton's steps of `inverse`."""
FIELDS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")


def is_stored(path: str | Path) -> bool:
    """Whether a file name is that of a displacement field, of a transform of ITK or of a text file with a matrix."""
    return str(path).lower().endswith((*FIELDS, ".txt", ".csv")) or io.is_itk_transform(path)


class StoredTransform(Transform):
    """phi from fixed to moving world as a file has it.

    A displacement field (5-D NIfTI, MetaImage or NRRD) is interpolated trilinearly, and its border continues beyond its
    grid. A Learn2Reg file is in voxels of ``reference``. A transform of ITK is asked itself. A text file holds a 4 x 4
    matrix, RAS mm.

    Args:
        path: the file.
        reference: the grid that the voxels of a Learn2Reg file mean.

    Attributes:
        grid: that of the displacements; None of a transform of ITK, which has none.
        start: the affine part, where `inverse` begins.
    """

    def __init__(self, path: str | Path, reference: Domain | None = None) -> None:
        self.grid: Domain | None = None
        self.itk: io.ItkTransform | None = None
        self.points: Callable[[Points], Points]
        self.start: Matrix
        if Path(path).suffix.lower() in (".txt", ".csv") and not io.is_itk_transform(path):
            self.start = io.read_matrix(path)
            self.points = partial(transform_points, self.start)
            return
        if io.is_itk_transform(path):
            transform = io.ItkTransform(path)
            matrix = transform.matrix
            self.itk = transform if matrix is None else None
            self.start = torch.eye(4, dtype=torch.float64) if matrix is None else matrix
            self.points = transform if matrix is None else partial(transform_points, matrix)
            return
        file = io.existing_file(path)
        if io.is_learn2reg(file):
            if reference is None:
                raise UserError(f"{file}: a Learn2Reg displacement in voxels needs --reference, the image on its grid")
            field, self.grid = displacement_on(file, reference), reference
        else:
            field, self.grid = io.read_displacement(file)
        self.start = least_squares_affine(field, self.grid)
        self.points = partial(_through, field.movedim(-1, 0), self.grid)

    @property
    def precision_mm(self) -> float:
        return PRECISION_MM if self.grid is None else min(PRECISION_MM, 0.01 * min(self.grid.spacing))

    def __call__(self, world: Points) -> Points:
        """Map points [n, 3]."""
        return self.points(world.double().cpu())

    def jacobian(self, world: Points) -> Tensor:
        """D phi at points [n, 3] -> [n, 3, 3], by central differences over 0.2 mm, or two smaller voxels."""
        size = STEP_MM if self.grid is None else min(STEP_MM, min(self.grid.spacing))
        steps = size * torch.eye(3, dtype=torch.float64)
        columns = [(self(world + step) - self(world - step)) / (2 * size) for step in steps]
        return torch.stack(columns, dim=-1)

    def displacement(self, domain: Domain) -> Tensor:
        """phi(p) - p at the voxel centres of a grid [X, Y, Z, 3], RAS mm."""
        if self.itk is not None:
            return self.itk.displacement(domain)
        out = torch.empty(domain.n_voxels, 3)
        for rows, world in chunks(domain):
            out[rows] = (self(world) - world).float()
        return out.reshape(*domain.shape, 3)


def _through(field: Tensor, grid: Domain, world: Points) -> Points:
    return world + interpolate(field, transform_points(grid.world_to_voxel, world).float()).T.double()
