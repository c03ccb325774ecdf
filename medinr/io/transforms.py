"""Displacement fields from and to files, as ITK, ANTs and Slicer read them.

Inside medinr a displacement is a vector in RAS mm at a voxel of the fixed image: phi(p) = p + d(p) maps fixed world to
moving world. On disk it is a 5-D NIfTI (X, Y, Z, 1, 3) of intent 1007 (vector) that holds LPS mm, with a JSON beside
it that says so.
"""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medinr.errors import UserError
from medinr.io.files import existing_file, write_text
from medinr.io.images import ITK_SUFFIXES, NIFTI_SUFFIXES, load_nifti, load_sitk, nifti_values, save_nifti, suffix_of
from medinr.io.itk import checked_domain, image_domain, import_sitk
from medinr.space import Domain

INTENT_DISPLACEMENT = 1006
INTENT_VECTOR = 1007


def write_displacement(path: str | Path, displacement: Tensor, domain: Domain, note: str = "") -> None:
    """Write a displacement, RAS mm [X, Y, Z, 3] on ``domain``, and its JSON; each is whole or not there.

    ``note`` goes into the JSON: what a reader must know beside the convention.

    Raises:
        UserError: a suffix other than .nii or .nii.gz; a folder that cannot be written to; a full disk.
    """
    values = displacement.detach().cpu().float().numpy()
    if values.shape != (*domain.shape, 3):
        raise ValueError(f"{path}: expected displacements {(*domain.shape, 3)}, got {values.shape}")
    lps = values * np.array([-1, -1, 1], dtype=np.float32)
    save_nifti(path, lps[:, :, :, None, :], domain, intent="vector")
    told = _convention(domain) | ({"note": note} if note else {})
    write_text(sidecar_path(path), json.dumps(told, indent=2) + "\n")


def read_displacement(path: str | Path) -> tuple[Tensor, Domain]:
    """Read a displacement: RAS mm [X, Y, Z, 3] (float32) and its domain.

    NIfTI (X, Y, Z, 1, 3): intent 1007 (vector) holds LPS mm, as ITK and ANTs write it. Intent 1006 (displacement
    vector) holds RAS mm: ITK and Slicer flip x and y when they read it. MetaImage and NRRD (plastimatch, elastix):
    three components a voxel, LPS mm.

    Raises:
        UserError: any other shape or intent; values that are not finite; a file that cannot be read.
    """
    file = existing_file(path)
    if suffix_of(file) in ITK_SUFFIXES:
        return _vectors(file)
    if suffix_of(file) not in NIFTI_SUFFIXES:
        raise UserError(
            f"{file}: expected a displacement as .nii or .nii.gz, found {file.name}; convert it to 5-D NIfTI"
        )
    image = load_nifti(file)
    shape, intent = tuple(image.shape), int(image.header["intent_code"])
    if len(shape) != 5 or shape[3:] != (1, 3):
        raise UserError(
            f"{file}: expected a displacement of shape (X, Y, Z, 1, 3), found {shape}; "
            "convert it to a 5-D NIfTI of intent 1007 in LPS mm"
        )
    if intent not in (INTENT_DISPLACEMENT, INTENT_VECTOR):
        raise UserError(
            f"{file}: expected intent 1007 (vector, LPS mm) or 1006 (displacement, RAS mm), found {intent}: unit and "
            "frame of its vectors are unknown; set the intent in its header"
        )
    values = np.array(nifti_values(image, str(file))[:, :, :, 0, :], dtype=np.float32, order="C")
    domain = checked_domain(shape, image.affine, str(file))
    return _finite_ras(values, intent == INTENT_VECTOR, file), domain


def _vectors(file: Path) -> tuple[Tensor, Domain]:
    """A vector image of ITK: LPS mm."""
    image = load_sitk(file)
    found = (image.GetDimension(), image.GetNumberOfComponentsPerPixel())
    if found != (3, 3):
        raise UserError(
            f"{file}: expected displacements, three numbers a voxel of a volume, found {found[0]}-D with {found[1]}; "
            "give a displacement field in LPS mm"
        )
    values = import_sitk(str(file)).GetArrayFromImage(image).transpose(2, 1, 0, 3)
    return _finite_ras(np.array(values, dtype=np.float32, order="C"), True, file), image_domain(image, str(file))


def _finite_ras(values: NDArray[np.float32], lps: bool, file: Path) -> Tensor:
    """Checked vectors in RAS; changes ``values``."""
    if not np.isfinite(values).all():
        raise UserError(f"{file}: expected finite displacements, found NaN or infinite ones; replace them")
    if lps:
        values *= np.array([-1, -1, 1], dtype=np.float32)
    return torch.from_numpy(values)


def sidecar_path(path: str | Path) -> Path:
    """``displacement.nii.gz`` -> ``displacement.json``."""
    file = Path(path)
    return file.with_name(file.name[: -len(suffix_of(file))] + ".json")


def _convention(domain: Domain) -> dict[str, object]:
    return {
        "kind": "displacement field",
        "unit": "mm",
        "space": "LPS",
        "direction": "fixed to moving: add the vector at a fixed point to get the corresponding moving point",
        "convention": "NIfTI (X, Y, Z, 1, 3), intent 1007 (vector); moved(p) = moving(p + d(p)); "
        + ("ITK reads no sheared grid: use transform.h5" if domain.sheared else "reads unchanged in ITK, ANTs, Slicer"),
        "grid": {"of": "fixed image", "shape": list(domain.shape), "affine_ras": [list(r) for r in domain.affine]},
    }
