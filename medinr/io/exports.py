"""The transform of a registration in the forms that other programs read, beside displacement.nii.gz."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from medinr.errors import UserError
from medinr.io.itk import import_sitk
from medinr.io.itk_transforms import write_composite
from medinr.io.learn2reg import write_learn2reg
from medinr.io.matrices import write_itk_affine
from medinr.io.starts import residual_displacement
from medinr.io.transforms import sidecar_path, write_displacement
from medinr.space import Domain
from medinr.types import Matrix

FORMATS = {
    "h5": "transform.h5: affine and displacement in one file of ITK",
    "affine": "affine.tfm and residual_displacement.nii.gz: the same in two files",
    "l2r": "disp_FFFF_MMMM.nii.gz: Learn2Reg's displacement in voxels",
}
NOTE = "apply this displacement first and affine.tfm after it: moved(p) = moving(A(p + d(p)))"


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats, each once, if they are known and can be written here: asked before a fit, not after it.

    Raises:
        UserError: an unknown one; h5 without SimpleITK.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--write: expected some of {', '.join(FORMATS)}, separated by commas, got {name}")
    if "h5" in formats:
        import_sitk("--write h5")
    return tuple(dict.fromkeys(formats))


def write_transforms(
    out: Path, formats: Sequence[str], displacement: Tensor, matrix: Matrix, domain: Domain, images: Sequence[str] = ()
) -> list[Path]:
    """Write phi(p) = A(p + d(p)) in some `FORMATS`.

    Args:
        out: folder.
        formats: which.
        displacement: phi(p) - p of the whole transform at the voxel centres [X, Y, Z, 3], RAS mm.
        matrix: A, RAS mm.
        domain: the fixed image's grid.
        images: names of the fixed and moving image, whose numbers the name of a Learn2Reg file has.
    """
    files: list[Path] = []
    if {"h5", "affine"} & set(formats):
        residual = residual_displacement(displacement, matrix, domain)
        if "h5" in formats:
            write_composite(out / "transform.h5", matrix, residual, domain)
            files.append(out / "transform.h5")
        if "affine" in formats:
            field = out / "residual_displacement.nii.gz"
            write_itk_affine(out / "affine.tfm", matrix)
            write_displacement(field, residual, domain, NOTE)
            files += [out / "affine.tfm", field, sidecar_path(field)]
    if "l2r" in formats:
        files.append(out / learn2reg_name(images))
        write_learn2reg(files[-1], displacement, domain)
    return files


def learn2reg_name(images: Sequence[str]) -> str:
    """``disp_0001_0002.nii.gz`` of ``OASIS_0001_0000.nii.gz`` and ``OASIS_0002_0000.nii.gz``; else in words."""
    numbers = [re.search(r"(?<!\d)\d{4}(?!\d)", Path(name).name) for name in images]
    first, second = [n.group() if n else "" for n in numbers] if len(numbers) == 2 else ("", "")
    return f"disp_{first}_{second}.nii.gz" if first and second else "disp_fixed_moving.nii.gz"
