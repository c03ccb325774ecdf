"""DIR-LAB 4DCT (Castillo et al. 2009, doi 10.1088/0031-9155/54/7/001), cases 1-10, in its owner's layout."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from medinr.data import layouts
from medinr.data.base import MedINRDataModule
from medinr.data.dirlab import (
    find_case_root,
    hu_offset_problem,
    mask_candidates,
    read_dirlab_image,
    read_dirlab_landmarks,
    read_dirlab_mask,
    require_case_root,
    require_file,
)
from medinr.data.lungs import lung_structures
from medinr.data.pair import Pair
from medinr.data.report import landmark_motion
from medinr.data.transforms import MASKS, POINTS, SIDES, LungMaskd, Reading, domain_of, to_meta
from medinr.errors import RegistrationWarning, UserError

log = logging.getLogger(__name__)

MOTION_TOLERANCE_MM = 0.15
"""A loader whose mean landmark motion differs more from the published one reads landmarks or spacing wrongly."""

Landmarks = Literal["auto", "extreme", "sampled", "none"]


class DIRLab(MedINRDataModule):
    """Two phases of a DIR-LAB 4DCT case with landmarks and lung masks.

    Args:
        root: the folder that holds ``Case1Pack`` ..., one above it, or a case's own folder; both naming habits of the
            images (as downloaded, or ``_s`` throughout). A ``geometry.json`` there states size and spacing of cropped
            or resampled copies (`medinr.data.layouts.read_geometry`).
        case: 1 to 10.
        fixed_phase: 0 is end-inspiration, the field's choice.
        moving_phase: 50 is end-expiration.
        landmarks: ``extreme``: the 300 of T00 and T50; ``sampled``: the 75 of T00 ... T50; ``auto``: the 300 for that
            pair of phases, else the 75, and none for T60 ... T90; ``none``.
        masks: lung masks. ``auto``: computed from the images; ``none``; or a folder with ``case1_T00_mask.nii.gz`` and
            ``case1_T50_mask.nii.gz`` (also without ``_mask``), matched to the images by voxel index.
        labels: ``vessels``: label volumes computed inside the masks, 1 parenchyma and 2 vessels, for Dice and for the
            search over alpha; ``none``.
        mask_dilation_mm: grow computed masks by this much.
        hu_offset: stored value - HU. 1024 and 1000 are both reported for these data.
    """

    def __init__(
        self,
        root: str,
        case: int = 1,
        fixed_phase: int = 0,
        moving_phase: int = 50,
        landmarks: Landmarks = "auto",
        masks: str = "auto",
        labels: Literal["none", "vessels"] = "none",
        mask_dilation_mm: float = 0.0,
        hu_offset: int = layouts.DIRLAB_HU_OFFSET,
        steps_per_epoch: int = 100,
        spacing: float | None = None,
        margin_mm: float | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(steps_per_epoch, spacing, margin_mm, cache_dir)
        layouts.dirlab_case(case)
        for name, phase in (("fixed_phase", fixed_phase), ("moving_phase", moving_phase)):
            if f"T{phase:02d}" not in layouts.DIRLAB_PHASES:
                raise UserError(f"data.{name}: expected one of 0, 10, ..., 90, found {phase}; choose one of these")
        if fixed_phase == moving_phase:
            raise UserError(f"data.moving_phase: expected a phase other than the fixed one, found {moving_phase} twice")
        self.root = root
        self.case = case
        self.phases = {"fixed": f"T{fixed_phase:02d}", "moving": f"T{moving_phase:02d}"}
        self.landmarks: Landmarks = landmarks
        self.masks = masks
        if labels == "vessels" and masks == "none":
            raise UserError(
                "data.labels: expected lung masks for vessels, found data.masks none; give masks or no labels"
            )
        self.labels = labels
        self.mask_dilation_mm = mask_dilation_mm
        self.hu_offset = hu_offset
        self.cases = [f"case{case}"]

    @property
    def facts(self) -> layouts.DIRLabCase:
        """Size and spacing of the case as they hold in this folder."""
        return layouts.dirlab_geometry(require_case_root(self.root, self.case), self.case)

    @property
    def is_original(self) -> bool:
        """Whether the case is the published one: geometry.json does not name it."""
        root = require_case_root(self.root, self.case)
        return layouts.dirlab_case(self.case).name not in layouts.read_geometry(root)

    @property
    def landmark_kind(self) -> Landmarks:
        """The landmarks that ``auto`` stands for with these phases."""
        if self.landmarks != "auto":
            return self.landmarks
        if set(self.phases.values()) == set(layouts.DIRLAB_EXTREME_PHASES):
            return "extreme"
        return "sampled" if set(self.phases.values()) <= set(layouts.DIRLAB_SAMPLED_PHASES) else "none"

    def item(self) -> dict[str, Any]:
        root = require_case_root(self.root, self.case)
        item: dict[str, Any] = {"name": self.cases[0]}
        for side, phase in self.phases.items():
            what = f"DIR-LAB case {self.case}, {phase}"
            images = layouts.dirlab_image_candidates(root, self.case, phase)
            item[side] = str(require_file(images, f"{what}, image", root, "unpack the case's Images folder"))
            if self.landmark_kind != "none":
                item[f"{side}_points"] = str(self._landmark_file(root, phase, what))
            if self.masks not in ("auto", "none"):
                if not Path(self.masks).is_dir():
                    raise UserError(f"data.masks: expected auto, none or a folder, found {self.masks!r}; correct it")
                names = mask_candidates(self.masks, self.case, phase)
                advice = "name the mask so, or set data.masks to auto"
                item[f"{side}_mask"] = str(require_file(names, f"{what}, lung mask", Path(self.masks), advice))
        return item

    def readers(self) -> list[Any]:
        steps: list[Any] = [ReadDIRLabd(self.facts, self.hu_offset)]
        return [*steps, LungMaskd(self.mask_dilation_mm)] if self.masks == "auto" else steps

    def finish(self, pair: Pair) -> Pair:
        pair = super().finish(pair)
        log.info("%s: HU = stored value - %d", pair.name, self.hu_offset)
        problems = [hu_offset_problem(image, self.hu_offset) for image in (pair.fixed, pair.moving)]
        for problem in (*problems, self.landmark_problem(pair)):
            if problem:
                warnings.warn(problem, RegistrationWarning, stacklevel=2)
        if self.labels == "vessels" and pair.fixed_mask is not None and pair.moving_mask is not None:
            pair = replace(
                pair,
                fixed_labels=lung_structures(pair.fixed, pair.fixed_mask),
                moving_labels=lung_structures(pair.moving, pair.moving_mask),
            )
        return pair

    def landmark_problem(self, pair: Pair) -> str | None:
        """Why the landmarks of an original case are not the published ones, or None."""
        if pair.fixed_points is None or pair.moving_points is None or not self.is_original:
            return None
        expected = layouts.DIRLAB_EXTREME_COUNT if self.landmark_kind == "extreme" else layouts.DIRLAB_SAMPLED_COUNT
        if len(pair.fixed_points) != expected:
            return f"{pair.name}: expected {expected} landmarks, found {len(pair.fixed_points)}; copy the files again"
        if self.landmark_kind != "extreme":
            return None
        motion = landmark_motion(pair.fixed_points, pair.moving_points).mean().item()
        published = self.facts.mean_motion
        if abs(motion - published) <= MOTION_TOLERANCE_MM:
            return None
        return (
            f"{pair.name}: expected a mean landmark motion of {published:.2f} mm as published, found {motion:.2f}; "
            f"check that the landmark files belong to this case; a changed copy needs a {layouts.GEOMETRY_FILE}"
        )

    def check(self) -> list[str]:
        lines = super().check()
        facts = self.facts
        original = "published size" if self.is_original else f"size from {layouts.GEOMETRY_FILE}"
        kind = {"extreme": "300 of the extreme phases", "sampled": "75 of Sampled4D"}.get(self.landmark_kind, "none")
        published = f", published mean motion {facts.mean_motion:.2f} mm" if self.is_original else ""
        lines.append(f"{facts.name}: {original}, HU offset {self.hu_offset}, landmarks {kind}{published}")
        return lines

    def _landmark_file(self, root: Path, phase: str, what: str) -> Path:
        if self.landmark_kind == "extreme":
            if phase not in layouts.DIRLAB_EXTREME_PHASES:
                raise UserError(f"data.landmarks: expected phases T00 and T50 with extreme, found {phase}; use sampled")
            names = layouts.dirlab_extreme_landmark_candidates(root, self.case, phase)
        else:
            if phase not in layouts.DIRLAB_SAMPLED_PHASES:
                raise UserError(f"data.landmarks: expected phases T00 to T50 with sampled, found {phase}; use none")
            names = layouts.dirlab_sampled_landmark_candidates(root, self.case, phase)
        return require_file(names, f"{what}, landmarks", root, "unpack them, or set data.landmarks to none")


class ReadDIRLabd(Reading):
    """Read images, masks and landmarks of a DIR-LAB case from the paths under their keys."""

    def __init__(self, facts: layouts.DIRLabCase, hu_offset: float) -> None:
        super().__init__((*SIDES, *MASKS, *POINTS))
        self.facts = facts
        self.hu_offset = hu_offset

    def one(self, key: str, sample: Mapping[str, Any]) -> Any:
        if key in SIDES:
            image = read_dirlab_image(sample[key], self.facts, self.hu_offset)
            return to_meta(image.data, image.domain, image.source)
        domain = domain_of(sample[key.split("_")[0]])
        if key in POINTS:
            return read_dirlab_landmarks(sample[key], domain)
        return to_meta(read_dirlab_mask(sample[key], domain), domain, sample[key])


def dirlab_cases_in(root: Path | str) -> list[int]:
    """The cases of which a folder (or the one below it, see `DIRLab`) holds something."""
    return [case for case in layouts.DIRLAB_CASES if find_case_root(root, case) is not None]
