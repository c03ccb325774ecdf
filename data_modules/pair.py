"""Any two images: the data module behind ``medinr register``."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from medinr.data.base import MedINRDataModule
from medinr.data.pair import Pair
from medinr.data.transforms import LungMaskd, ReadImaged, ReadOnGridd, ReadPointsd
from medinr.errors import UserError
from medinr.io import PointsSpace, existing_file
from medinr.types import Matrix


class PairDataModule(MedINRDataModule):
    """Two files, whatever their grids, orientations and fields of view.

    Args:
        fixed: the image whose grid the results are on (NIfTI; MetaImage, NRRD and DICOM with SimpleITK); a list of
            files on one grid: the channels of the image. A 2-D image is a single slice.
        moving: the image that is warped onto it, with the same channels.
        fixed_mask: region that counts, on the grid of ``fixed``: a file, or ``auto`` for the lungs of a CT in HU.
        moving_mask: the same on the grid of ``moving``.
        fixed_points: CSV of landmarks ``x,y,z``; row i corresponds to row i of ``moving_points``. Only for evaluation.
        moving_points: as above, in the moving image.
        points_space: ``ras`` or ``lps`` mm, or ``voxel`` (0-based, of each point's own image).
        fixed_guides: CSV of landmarks that the registration is to follow, none of them used for evaluation; they need a
            ``landmark_weight`` of the method.
        moving_guides: the corresponding points in the moving image.
        fixed_exclude: mask of a region that is not compared, as a lesion that the other image does not have.
        moving_exclude: the same on the grid of ``moving``.
        fixed_labels: label volume on the grid of ``fixed``. Only for evaluation.
        moving_labels: label volume on the grid of ``moving``; carried along.
        start: ``none``, or a text file with the 4 x 4 matrix from fixed to moving world (RAS mm).
        multichannel: the last axis of the 4-D images holds channels; without it a 4-D image is an error.
    """

    def __init__(
        self,
        fixed: str | list[str],
        moving: str | list[str],
        fixed_mask: str | None = None,
        moving_mask: str | None = None,
        fixed_points: str | None = None,
        moving_points: str | None = None,
        points_space: PointsSpace = "ras",
        fixed_labels: str | None = None,
        moving_labels: str | None = None,
        start: str = "none",
        steps_per_epoch: int = 100,
        spacing: float | None = None,
        margin_mm: float | None = None,
        cache_dir: str | None = None,
        fixed_guides: str | None = None,
        moving_guides: str | None = None,
        fixed_exclude: str | None = None,
        moving_exclude: str | None = None,
        multichannel: bool = False,
    ) -> None:
        super().__init__(steps_per_epoch, spacing, margin_mm, cache_dir)
        self.files: dict[str, str | list[str] | None] = {
            "fixed": fixed,
            "moving": moving,
            "fixed_mask": fixed_mask,
            "moving_mask": moving_mask,
            "fixed_points": fixed_points,
            "moving_points": moving_points,
            "fixed_labels": fixed_labels,
            "moving_labels": moving_labels,
            "fixed_guides": fixed_guides,
            "moving_guides": moving_guides,
            "fixed_exclude": fixed_exclude,
            "moving_exclude": moving_exclude,
        }
        self.multichannel = multichannel
        self.points_space: PointsSpace = points_space
        self.start = start
        self.cases = ["pair"]

    def item(self) -> dict[str, Any]:
        given = {key: name for key, name in self.files.items() if name is not None and name != "auto"}
        return {"name": self.cases[0], **{key: _existing(name) for key, name in given.items()}}

    def readers(self) -> list[Any]:
        auto = tuple(side for side in ("fixed", "moving") if self.files[f"{side}_mask"] == "auto")
        lungs = [LungMaskd(keys=auto)] if auto else []
        return [ReadImaged(multichannel=self.multichannel), ReadOnGridd(), ReadPointsd(self.points_space), *lungs]

    def finish(self, pair: Pair) -> Pair:
        pair = super().finish(pair)
        return pair if self.start == "none" else replace(pair, start=read_matrix(self.start))


def _existing(name: str | list[str]) -> str | list[str]:
    """The file, or the files of the channels, as text; each must be there."""
    return [str(existing_file(n)) for n in name] if isinstance(name, list) else str(existing_file(name))


def read_matrix(path: str) -> Matrix:
    """A 4 x 4 homogeneous matrix (float64) from a text file of 16 numbers.

    Raises:
        UserError: no such file, other numbers, or a matrix that cannot be inverted.
    """
    file = existing_file(path)
    try:
        rows = np.loadtxt(file, dtype=np.float64, delimiter="," if "," in file.read_text() else None)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: expected a text file with a 4 x 4 matrix, found {error}; correct it") from None
    if rows.shape != (4, 4) or not np.isfinite(rows).all() or not np.allclose(rows[3], [0, 0, 0, 1]):
        raise UserError(
            f"{file}: expected a 4 x 4 matrix with the last row 0 0 0 1, found shape {rows.shape}; correct the file"
        )
    if abs(np.linalg.det(rows[:3, :3])) < 1e-9:
        raise UserError(f"{file}: expected an invertible matrix, found determinant 0; correct the file")
    return torch.from_numpy(rows)
