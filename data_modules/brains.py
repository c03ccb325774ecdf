"""The adult slabs and the mouse brains as cohorts: the same scans, persons and splits as their pairs."""

import math
from collections.abc import Mapping, Sequence

import torch

from data_modules.cohort_pairs import Subject
from data_modules.mouse import MouseBrains
from data_modules.slabs import AdultSlabs
from medinr.data.cohort import Condition
from medinr.data.cohort_files import Entry, ReadScan
from medinr.data.cohort_module import CohortModule
from medinr.errors import UserError
from medinr.io import read_domain, read_labels

SLAB_LABELS = {1: "csf", 2: "grey_matter", 3: "white_matter", 4: "deep_grey_matter"}
CSF = "csf_ml"


class AdultSlabsCohort(CohortModule):
    """40 T1 slabs of 23 persons, the CSF volume of their labelled slices as condition (``csf_ml``, about 18 to 23).

    Labels are in 10 of the 18 slices; the others are `medinr.data.cohort.UNLABELLED`.

    Args:
        root: folder of ``sub-NN_T1w.nii.gz`` and ``sub-NN_dseg.nii.gz``.
        val, test: names (``sub-34``), persons or a share; None: the split by persons of `AdultSlabs`.
        spacing: mm along R, A and S; all slices are kept by default.
    """

    def __init__(
        self,
        root: str,
        val: list[str] | float | None = None,
        test: list[str] | float | None = None,
        spacing: float | list[float] | None = None,
        seed: int = 0,
        steps_per_epoch: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            "adult_t1_slabs", ["T1w"], 0.0 if val is None else val, 0.0 if test is None else test,
            [2.0, 2.0, 1.0] if spacing is None else spacing, None, seed, steps_per_epoch, cache_dir,
        )  # fmt: skip
        self.root, self.own_split = root, val is None and test is None

    def label_names(self) -> Mapping[int, str]:
        return SLAB_LABELS

    def reader(self) -> ReadScan:
        return ReadScan(sorted(SLAB_LABELS), self.spacing, unlabelled_planes=True)

    def listed(self) -> tuple[list[Entry], list[Condition]]:
        entries = []
        for subject in AdultSlabs(self.root).checked:
            try:
                known = {CSF: labelled_ml(subject, 1)}
            except UserError as error:
                self.excluded.append((subject.name, str(error)))
                continue
            entries.append(entry_of(subject, "T1w", known, self.own_split))
        return entries, [Condition(CSF, "continuous")]


class MouseCohort(CohortModule):
    """Eight mouse brains with 37 labelled structures, as `MouseBrains`: 0 outside the mask; no conditions.

    Args:
        root: folder with ``template/``, ``mask/`` and ``label/``.
        starts: folder of affine maps from the first brain to each (read, or found and written there): all brains are
            then given in the first one's space. None: each in its own, where they differ by some degrees and mm.
        val, test: names (``mouse-8``), or a share.
        spacing: mm of the working grid; None: 0.15 mm, as they are.
    """

    def __init__(
        self,
        root: str,
        starts: str | None = None,
        val: list[str] | float = 0.0,
        test: list[str] | float = 0.0,
        spacing: float | list[float] | None = None,
        margin_mm: float | None = None,
        seed: int = 0,
        steps_per_epoch: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__("mouse_fvb", ["MR"], val, test, spacing, margin_mm, seed, steps_per_epoch, cache_dir)
        self.root, self.starts = root, starts

    def reader(self) -> ReadScan:
        return ReadScan((), self.spacing, self.margin_mm, masked=True)

    def listed(self) -> tuple[list[Entry], list[Condition]]:
        brains: Sequence[Subject]
        if self.starts is None:
            brains = MouseBrains.files(self.root)
        else:
            count = len(MouseBrains.files(self.root))
            pairs = MouseBrains(self.root, self.starts)
            pairs.splits = {"train": list(range(1, count + 1))}
            brains = pairs.checked
        return [entry_of(brain, "MR", {}, False) for brain in brains], []


def entry_of(subject: Subject, modality: str, known: Mapping[str, float], split: bool) -> Entry:
    """A subject of pairs as an entry of a cohort."""
    start = None if torch.equal(subject.start, torch.eye(4, dtype=torch.float64)) else subject.start
    return Entry(
        subject.name, subject.person, {modality: subject.image}, subject.labels, subject.mask, known,
        subject.split if split else None, start,
    )  # fmt: skip


def labelled_ml(subject: Subject, value: int) -> float:
    """Volume of a label of a subject, ml.

    Raises:
        UserError: labels that are missing or cannot be read.
    """
    if subject.labels is None:
        return math.nan
    domain = read_domain(subject.labels)
    voxel = math.prod(domain.spacing)
    return float((read_labels(subject.labels, domain) == value).sum()) * voxel / 1000
