"""Displacement files of the Learn2Reg challenge: ``disp_FFFF_MMMM.nii.gz``.

An array (X, Y, Z, 3) of displacements in *voxels of the fixed grid*, along its array axes, from fixed to moving; moving
images are taken to lie on a grid with the fixed one's affine (the challenge's evaluator looks at no affine at all, and
files in circulation often carry the identity's). Such a file looks like any other 4-D NIfTI: it is read only where the
caller asks for it, or where its shape fits the fixed image's.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medinr.errors import UserError
from medinr.io.files import existing_file
from medinr.io.images import NIFTI_SUFFIXES, load_nifti, nifti_values, save_nifti, suffix_of
from medinr.space import Domain


def write_learn2reg(path: str | Path, displacement: Tensor, domain: Domain) -> None:
    """Write phi(p) - p, RAS mm [X, Y, Z, 3] on the fixed grid, as the challenge's evaluator reads it."""
    if tuple(displacement.shape) != (*domain.shape, 3):
        raise ValueError(f"{path}: expected displacements {(*domain.shape, 3)}, got {tuple(displacement.shape)}")
    to_voxels = domain.world_to_voxel[:3, :3].to(displacement.device, torch.float32)
    save_nifti(path, (displacement.detach().float() @ to_voxels.T).cpu().numpy(), domain)


def check_learn2reg_grids(fixed: Domain, moving: Domain) -> None:
    """Refuse two images whose voxels lie differently: their displacements in voxels would mean nothing to a reader.

    Raises:
        UserError: another affine of the moving image.
    """
    if not Domain(fixed.shape, moving.affine).same_grid(fixed, tolerance_mm=0.1 * min(fixed.spacing)):
        raise UserError(
            "--write l2r: expected two images on one grid, since the challenge looks at no affine, found another one "
            "of the moving image; resample it onto the fixed grid, or write h5"
        )


def is_learn2reg(path: Path) -> bool:
    """Whether an existing file has the shape of such a displacement: NIfTI, (X, Y, Z, 3)."""
    return suffix_of(path) in NIFTI_SUFFIXES and tuple(load_nifti(path).shape[3:]) == (3,)


def read_learn2reg(path: str | Path, domain: Domain) -> Tensor:
    """Read a Learn2Reg displacement for the fixed grid ``domain``: phi(p) - p, RAS mm [X, Y, Z, 3] (float32).

    Raises:
        UserError: another shape than (X, Y, Z, 3) of this grid; values that are not finite; an unreadable file.
    """
    file = existing_file(path)
    image = load_nifti(file)
    if tuple(image.shape) != (*domain.shape, 3):
        raise UserError(
            f"{file}: expected Learn2Reg displacements of shape {(*domain.shape, 3)}, the fixed grid's, found "
            f"{tuple(image.shape)}; give the file of this pair at full resolution"
        )
    values = np.array(nifti_values(image, str(file)), dtype=np.float32, order="C")
    if not np.isfinite(values).all():
        raise UserError(f"{file}: expected finite displacements, found NaN or infinite ones; replace them")
    return torch.from_numpy(values) @ domain.voxel_to_world[:3, :3].float().T
