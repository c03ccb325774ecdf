"""DIR-LAB 4DCT as a sequence: all phases of a case, with the 75 landmarks of ``Sampled4D``."""

from collections.abc import Sequence as Series
from pathlib import Path
from typing import Any

from data_modules.dirlab import ReadDIRLabd
from medinr.data import layouts
from medinr.data.dirlab import mask_candidates, require_case_root, require_file
from medinr.data.series import Frame, SequenceDataModule
from medinr.data.transforms import LungMaskd
from medinr.errors import UserError


class DIRLabSequence(SequenceDataModule):
    """The phases of a DIR-LAB 4DCT case, time in percent of the cycle (period 100; T00 is the end of inspiration).

    Args:
        root: the folder that holds ``Case1Pack`` ..., as for `DIRLab`.
        case: 1 to 10.
        reference: phase whose grid the results are on.
        held_out: phases that no method may train on.
        phases: the phases to read; None: all that are there.
        landmarks: ``sampled``: the 75 that are given at T00 ... T50, row by row the same anatomy; ``none``.
        masks: lung masks. ``auto``: computed; ``none``; or a folder with ``case1_T00_mask.nii.gz`` ... (also without
            ``_mask``), matched to the images by voxel index.
        mask_dilation_mm: grow computed masks by this much.
        hu_offset: stored value - HU. 1024 and 1000 are both reported for these data.
    """

    def __init__(
        self,
        root: str,
        case: int = 1,
        reference: int = 0,
        held_out: Series[int] = (),
        phases: Series[int] | None = None,
        landmarks: str = "sampled",
        masks: str = "auto",
        mask_dilation_mm: float = 0.0,
        hu_offset: int = layouts.DIRLAB_HU_OFFSET,
        steps_per_epoch: int = 100,
        spacing: float | None = None,
        margin_mm: float | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            f"case{case}",
            reference,
            held_out,
            layouts.PHASE_PERIOD,
            True,
            steps_per_epoch,
            spacing,
            margin_mm,
            cache_dir,
        )
        layouts.dirlab_case(case)
        if landmarks not in ("sampled", "none"):
            raise UserError(f"data.landmarks: expected sampled or none, found {landmarks!r}; choose one of these")
        unknown = [p for p in phases or () if f"T{p:02d}" not in layouts.DIRLAB_PHASES]
        if unknown:
            raise UserError(f"data.phases: expected some of 0, 10, ..., 90, found {unknown[0]}; choose of these")
        self.root, self.case, self.phases = root, case, phases
        self.landmarks, self.masks = landmarks, masks
        self.mask_dilation_mm, self.hu_offset = mask_dilation_mm, hu_offset

    @property
    def facts(self) -> layouts.DIRLabCase:
        """Size and spacing of the case as they hold in this folder."""
        return layouts.dirlab_geometry(require_case_root(self.root, self.case), self.case)

    def frames(self) -> list[Frame]:
        root = require_case_root(self.root, self.case)
        wanted = None if self.phases is None else {f"T{p:02d}" for p in self.phases}
        frames = []
        for phase in layouts.DIRLAB_PHASES:
            images = layouts.dirlab_image_candidates(root, self.case, phase)
            if phase not in wanted if wanted is not None else layouts.first_existing(images) is None:
                continue
            what = f"case {self.case}, {phase}"
            files = {"image": str(require_file(images, f"{what}, image", root, "unpack the case's Images folder"))}
            if self.landmarks == "sampled" and phase in layouts.DIRLAB_SAMPLED_PHASES:
                names = layouts.dirlab_sampled_landmark_candidates(root, self.case, phase)
                advice = "unpack them, or set data.landmarks to none"
                files["points"] = str(require_file(names, f"{what}, landmarks", root, advice))
            if self.masks not in ("auto", "none"):
                if not Path(self.masks).is_dir():
                    raise UserError(f"data.masks: expected auto, none or a folder, found {self.masks!r}; correct it")
                names = mask_candidates(self.masks, self.case, phase)
                advice = "name the mask so, or set data.masks to auto"
                files["mask"] = str(require_file(names, f"{what}, lung mask", Path(self.masks), advice))
            frames.append(Frame(float(phase[1:]), files))
        return frames

    def readers(self) -> list[Any]:
        lungs = [LungMaskd(self.mask_dilation_mm, ("fixed",))] if self.masks == "auto" else []
        return [ReadDIRLabd(self.facts, self.hu_offset), *lungs]
