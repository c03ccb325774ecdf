"""Transforms of ITK, ANTs and Slicer from and to files (.tfm, .txt, .mat, .h5), through SimpleITK.

ITK's transforms map points of the fixed image to the moving one, in LPS mm, as medinr's do in RAS mm: nothing is to be
inverted, whatever the file was made by. In a composite the transform that was added last acts first.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medinr.errors import UserError
from medinr.io.files import atomic_path, existing_file
from medinr.io.itk import RAS_LPS, import_sitk, silent
from medinr.io.matrices import LPS, invertible
from medinr.space import Domain
from medinr.types import Matrix, Points

SUFFIXES = (".tfm", ".mat", ".h5", ".hdf5", ".txt", ".xfm")
FLIP = np.array([-1.0, -1.0, 1.0])


def is_itk_transform(path: str | Path) -> bool:
    """Whether a file is a transform of ITK: by its suffix and, of a .txt, by its first line."""
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix != ".txt":
        return suffix in SUFFIXES
    try:
        with file.open("rb") as content:
            return content.read(24).startswith(b"#Insight Transform File")
    except OSError:
        return False


class ItkTransform:
    """A transform file of ITK as a map of RAS mm points.

    Raises:
        UserError: not a transform that SimpleITK can read, or not one of 3-D space.
    """

    def __init__(self, path: str | Path) -> None:
        file = existing_file(path)
        self.name = str(file)
        self.sitk: ModuleType = import_sitk(self.name)
        try:
            with silent(self.sitk):
                self.transform: Any = self.sitk.ReadTransform(self.name)
        except RuntimeError as error:
            reason = (str(error).strip() or "no reason told").splitlines()[-1]
            raise UserError(
                f"{file}: expected a transform of ITK, found a file that cannot be read ({reason}); save it again"
            ) from error
        if self.transform.GetDimension() != 3:
            found = self.transform.GetDimension()
            raise UserError(f"{file}: expected a transform of 3-D space, found {found}-D; give one of volumes")

    @property
    def matrix(self) -> Matrix | None:
        """The 4 x 4 matrix (RAS mm), exact, of a linear transform; None for any other."""
        if not self.transform.IsLinear():
            return None
        origin, *axes = (np.array(self.transform.TransformPoint(p)) for p in ([0.0] * 3, *np.eye(3).tolist()))
        lps = np.eye(4)
        lps[:3, :3] = np.stack(axes, axis=1) - origin[:, None]
        lps[:3, 3] = origin
        return invertible(torch.from_numpy(RAS_LPS @ lps @ RAS_LPS), self.name)

    def __call__(self, world: Points) -> Points:
        """Map points [n, 3], RAS mm, one by one: for landmarks. Whole grids: `displacement`."""
        points = (world.detach().cpu().double().numpy() * FLIP).tolist()
        moved = np.array([self.transform.TransformPoint(p) for p in points]).reshape(-1, 3)
        return torch.from_numpy(moved * FLIP)

    def displacement(self, domain: Domain) -> Tensor:
        """phi(p) - p at the voxel centres of a grid: [X, Y, Z, 3], RAS mm, float32."""
        lps = RAS_LPS @ domain.voxel_to_world.numpy()
        spacing = np.array(domain.spacing)
        field = self.sitk.TransformToDisplacementField(
            self.transform,
            self.sitk.sitkVectorFloat32,
            domain.shape,
            lps[:3, 3].tolist(),
            spacing.tolist(),
            (lps[:3, :3] / spacing).ravel().tolist(),
        )
        values = np.ascontiguousarray(self.sitk.GetArrayFromImage(field).transpose(2, 1, 0, 3))
        values *= FLIP.astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{self.name}: expected a transform that is finite on the image, found NaN or infinity")
        return torch.from_numpy(values)


def write_composite(path: str | Path, matrix: Matrix, residual: Tensor, domain: Domain) -> None:
    """Write phi(p) = A(p + d(p)) as a composite transform of ITK (.h5): ITK, ANTs and Slicer read it as it is.

    Args:
        path: name ending in .h5.
        matrix: A, RAS mm.
        residual: d at the voxel centres of ``domain`` [X, Y, Z, 3], RAS mm. Beyond the grid ITK takes it as 0, and
            phi is A alone.
        domain: the fixed image's grid.
    """
    sitk = import_sitk(str(path))
    values = residual.detach().cpu().double().numpy() * FLIP
    field = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0, 3)), isVector=True)
    del values
    lps = RAS_LPS @ domain.voxel_to_world.numpy()
    spacing = np.array(domain.spacing)
    field.SetOrigin(lps[:3, 3].tolist())
    field.SetSpacing(spacing.tolist())
    field.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    start = (LPS @ matrix.double().cpu() @ LPS).numpy()
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(start[:3, :3].ravel().tolist())
    affine.SetTranslation(start[:3, 3].tolist())
    # Last added acts first. The field's image is given away here: SimpleITK empties it.
    composite = sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(field)])
    with atomic_path(path) as temporary:
        try:
            sitk.WriteTransform(composite, str(temporary))
        except RuntimeError as error:
            raise OSError(0, (str(error).strip() or "ITK told no reason").splitlines()[-1]) from error
