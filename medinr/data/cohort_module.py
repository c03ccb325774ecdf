"""The base of all data modules of cohorts: listed files -> checked `Cohort` -> loaders that count steps."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import lightning

from medinr.data.base import step_loader
from medinr.data.cohort import SPLITS, Cohort, Condition
from medinr.data.cohort_build import build_cohort, split_persons
from medinr.data.cohort_files import Entry, ReadScan
from medinr.data.report import describe_domain
from medinr.errors import UserError

REMARKS = 30
"""Lines about blemishes before a fit."""


class CohortModule(lightning.LightningDataModule):
    """Scans of many persons. A data set is a subclass that gives `listed` and, where it has labels, `label_names`.

    Methods draw subjects and points themselves, so the loaders yield nothing but numbers: steps in training, scans of
    the split in validation, test and prediction. `setup` reads every scan once, and leaves out what cannot be used
    (`Cohort.excluded`), before any training starts.

    Args:
        name: of the data set, in messages and results.
        modalities: in the order of a method's outputs.
        val, test: names of scans or persons, or a share of the persons.
        spacing: mm, of the working grid: one length or three (along R, A and S); None: the files' own grids.
        margin_mm: crop each scan to its mask (else its labels) and this margin; None: whole images.
        seed: of the split.
        steps_per_epoch: training steps between two validations.
        cache_dir: keep the prepared scans in this folder; None: in memory.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        name: str,
        modalities: Sequence[str],
        val: list[str] | float = 0.0,
        test: list[str] | float = 0.0,
        spacing: float | list[float] | None = None,
        margin_mm: float | None = None,
        seed: int = 0,
        steps_per_epoch: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        lengths = [] if spacing is None else [spacing] * 3 if isinstance(spacing, float | int) else list(spacing)
        if lengths and (len(lengths) != 3 or min(lengths) <= 0):
            raise UserError(f"data.spacing: expected one or three lengths in mm above 0, found {spacing}; correct it")
        if margin_mm is not None and margin_mm < 0:
            raise UserError(f"data.margin_mm: expected 0 or more, found {margin_mm}; correct it")
        if steps_per_epoch < 1:
            raise UserError(f"data.steps_per_epoch: expected 1 or more, found {steps_per_epoch}; correct it")
        if not modalities or len(set(modalities)) < len(modalities):
            raise UserError(f"data.modalities: expected different names, found {list(modalities)}; correct it")
        self.title, self.modalities = name, tuple(modalities)
        self.val, self.test = val, test
        self.spacing, self.margin_mm, self.seed = tuple(float(v) for v in lengths), margin_mm, seed
        self.steps_per_epoch, self.cache_dir = steps_per_epoch, cache_dir
        self.excluded: list[tuple[str, str]] = []
        self.notes: list[str] = []

    # ------------------------------------------------------------------------------------- what a data set must give

    def listed(self) -> tuple[list[Entry], list[Condition]]:
        """The scans as files, nothing read yet, and the conditions; may add to ``excluded`` and ``notes``.

        Raises:
            UserError: names what is missing.
        """
        raise NotImplementedError

    def label_names(self) -> Mapping[int, str] | None:
        """Names of all label values above 0; None: whatever occurs, named by its number."""
        return None

    def reader(self) -> ReadScan:
        """How a scan is read."""
        return ReadScan(sorted(self.label_names() or ()), self.spacing, self.margin_mm)

    def splits(self, entries: Sequence[Entry]) -> Mapping[str, Sequence[str]]:
        """Names of the scans of each split."""
        return split_persons(entries, self.val, self.test, self.seed)

    # -------------------------------------------------------------------------------------------- what all share

    @cached_property
    def cohort(self) -> Cohort:
        """The scans that can be used; reads each of them once on the first use.

        Raises:
            UserError: nothing is left to train on.
        """
        self.excluded, self.notes = [], []
        entries, conditions = self.listed()
        return build_cohort(
            self.title, entries, self.modalities, conditions, self.label_names(), self.reader(), self.splits,
            self.excluded, self.notes, self.cache_dir,
        )  # fmt: skip

    def prepare_data(self) -> None:
        """Check that there is something to read; nothing is loaded."""
        self.excluded, self.notes = [], []
        self.listed()

    def setup(self, stage: str | None = None) -> None:
        """Read and check all scans, whatever the stage."""
        _ = self.cohort

    def check(self) -> list[str]:
        """What was found, one line per thing."""
        return cohort_report(self.cohort)

    @property
    def remarks(self) -> list[str]:
        """What a fit says before it starts: scans that are left out, and what others lack."""
        found = _remarks(self.cohort)
        more = len(found) - REMARKS
        return found if more <= 0 else [*found[:REMARKS], f"and {more} more; `medinr check` lists them all"]

    # ------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> Any:
        return step_loader(self.steps_per_epoch)

    def val_dataloader(self) -> Any:
        return step_loader(len(self.cohort.names("val")))

    def test_dataloader(self) -> Any:
        return step_loader(len(self.cohort.names("test")))

    def predict_dataloader(self) -> Any:
        return step_loader(len(self.cohort.names("test") or self.cohort.names("train")))


def cohort_report(cohort: Cohort) -> list[str]:
    """What a careful person looks at before an atlas is trained, one line per thing."""
    counts = ", ".join(f"{len(cohort.names(s))} {s}" for s in SPLITS if cohort.names(s))
    first = cohort.scan(cohort.names("train")[0])
    lines = [
        f"{cohort.name}: {len(cohort)} scans ({counts}), {', '.join(cohort.modalities)}, "
        f"first grid {describe_domain(first.domain)}"
    ]
    if cohort.label_names:
        some = ", ".join(f"{v} {name}" for v, name in list(cohort.label_names.items())[:9])
        more = len(cohort.label_names) - 9
        lines.append(f"labels: {some}{f', and {more} more' if more > 0 else ''}")
    for condition in cohort.conditions:
        what = ", ".join(condition.levels) or f"{condition.low:g} to {condition.high:g} in training"
        lines.append(f"condition {condition.name}: {condition.kind}, {what}")
    return lines + _remarks(cohort)


def _remarks(cohort: Cohort) -> list[str]:
    notes = [f"note: {note}" for note in cohort.notes]
    return notes + [f"excluded: {name}: {reason}" for name, reason in cohort.excluded]
