"""4 x 4 matrices from fixed to moving world: RAS mm in text files of 16 numbers, LPS mm in ITK's own."""

from pathlib import Path

import numpy as np
import torch

from medinr.errors import UserError
from medinr.io.files import existing_file, write_text
from medinr.io.itk import RAS_LPS
from medinr.types import Matrix

LPS = torch.from_numpy(RAS_LPS)


def read_matrix(path: str | Path) -> Matrix:
    """A 4 x 4 homogeneous matrix (float64) from a text file of 16 numbers.

    Raises:
        UserError: no such file, other numbers, or a matrix that cannot be inverted.
    """
    file = existing_file(path)
    try:
        rows = np.loadtxt(file, dtype=np.float64, delimiter="," if "," in file.read_text(encoding="utf-8") else None)
    except UnicodeDecodeError:
        raise UserError(
            f"{file}: expected a transform as 4 x 4 numbers, displacements or a file of ITK, found other binary data; "
            "of a registration by medinr, give its displacement.nii.gz"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: expected a text file with a 4 x 4 matrix, found {error}; correct it") from None
    if rows.shape != (4, 4) or not np.isfinite(rows).all() or not np.allclose(rows[3], [0, 0, 0, 1]):
        raise UserError(
            f"{file}: expected a 4 x 4 matrix with the last row 0 0 0 1, found shape {rows.shape}; correct the file"
        )
    return invertible(torch.from_numpy(rows), str(file))


def invertible(matrix: Matrix, name: str) -> Matrix:
    """The matrix, or a UserError where it cannot be inverted."""
    if abs(float(torch.linalg.det(matrix[:3, :3]))) < 1e-9:
        raise UserError(f"{name}: expected an invertible matrix, found determinant 0; correct the file")
    return matrix


def write_itk_affine(path: str | Path, matrix: Matrix) -> None:
    """Write a RAS mm matrix as ITK's text transform (.tfm), which ITK, ANTs and Slicer read; no SimpleITK is needed."""
    lps = LPS @ matrix.double().cpu() @ LPS
    numbers = [*lps[:3, :3].flatten().tolist(), *lps[:3, 3].tolist()]
    text = " ".join(f"{v:.17g}" for v in numbers)
    write_text(
        path,
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        f"Parameters: {text}\nFixedParameters: 0 0 0\n",
    )
