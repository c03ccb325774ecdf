"""Any two images: the data module behind ``medinr register``."""

from dataclasses import replace
from typing import Any

from medinr.data.base import MedINRDataModule
from medinr.data.pair import Pair
from medinr.data.transforms import LungMaskd, ReadImaged, ReadOnGridd, ReadPointsd
from medinr.io import PointsSpace, existing_source, linear_only, read_start


class PairDataModule(MedINRDataModule):
    """Two files, whatever their grids, orientations and fields of view.

    Args:
        fixed: the image whose grid the results are on: NIfTI or, with SimpleITK, MetaImage, NRRD, and a DICOM series by
            its folder or by one of its slices; a list of files on one grid: the channels of the image. A 2-D image is
            a single slice.
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
        start: ``none``, or a file with a linear transform from fixed to moving world: 4 x 4 numbers (RAS mm), or a
            transform of ITK, ANTs or Slicer (.tfm, .txt, .mat, .h5).
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
        if self.start == "none":
            return pair
        return replace(pair, start=linear_only(read_start(self.start, pair.domain), self.start))


def _existing(name: str | list[str]) -> str | list[str]:
    """The file, or the files of the channels, as text; each must be there."""
    return [str(existing_source(n)) for n in name] if isinstance(name, list) else str(existing_source(name))
