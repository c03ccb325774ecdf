"""A cohort: scans of many persons with their modalities, labels and conditions, any of which may be missing.

What a conditional atlas or a generator of deformations is trained on. The scans stay in their own space: bringing them
to a common one is the method's part. Files and tables become a `Cohort` by `medinr.data.cohort_files.build_cohort`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from medinr.errors import UserError
from medinr.space import Domain
from medinr.types import Mask

SPLITS = ("train", "val", "test")
UNLABELLED = -1
"""Value in `Scan.labels` of voxels that nobody has labelled: no loss and no metric counts them."""


@dataclass(frozen=True)
class Condition:
    """One thing known of each scan beside its images: an age, a volume, a sex.

    Args:
        name: the column of the table.
        kind: ``continuous`` or ``categorical``.
        levels: of a categorical one, in order; a scan holds the index of its level.
        low, high: of a continuous one: the range in the training split (NaN: none known there).

    Raises:
        UserError: a categorical condition without levels, or a continuous one with some.
    """

    name: str
    kind: Literal["continuous", "categorical"]
    levels: tuple[str, ...] = ()
    low: float = math.nan
    high: float = math.nan

    def __post_init__(self) -> None:
        if self.kind not in ("continuous", "categorical"):
            raise UserError(f"condition {self.name}: expected continuous or categorical, found {self.kind!r}")
        if (self.kind == "categorical") != bool(self.levels):
            need = "levels" if self.kind == "categorical" else "no levels"
            raise UserError(f"condition {self.name}: expected {need} of a {self.kind} condition, found {self.levels}")

    def value(self, text: str) -> float:
        """A number, or the index of a level, from what a person writes.

        Raises:
            UserError: neither.
        """
        if self.kind == "categorical":
            if text not in self.levels:
                expected = ", ".join(self.levels)
                raise UserError(f"condition {self.name}: expected one of {expected}; found {text!r}; correct it")
            return float(self.levels.index(text))
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"condition {self.name}: expected a number, found {text!r}; correct it")
        return number

    def text(self, value: float) -> str:
        """The opposite of `value`; ``missing`` for NaN."""
        if math.isnan(value):
            return "missing"
        return self.levels[round(value)] if self.kind == "categorical" else f"{value:g}"

    def covers(self, value: float) -> bool:
        """Whether a value is within what was trained (a missing one always is)."""
        if math.isnan(value):
            return True
        return value in range(len(self.levels)) if self.kind == "categorical" else self.low <= value <= self.high


@dataclass(frozen=True)
class Scan:
    """One scan with all that is known of it; all volumes are on one grid.

    Args:
        name: as ``sub-X_ses-Y``, unique in the cohort.
        person: whose scan it is; no person is in two splits.
        domain: the grid.
        images: [X, Y, Z] float32 by modality, intensities as in the files; a missing modality is absent.
        labels: [X, Y, Z] int32, 0 background, `UNLABELLED` where nobody has looked; None: no labels.
        mask: [X, Y, Z] bool, or None.
        conditions: a number for each of the cohort's conditions: NaN where missing, a level's index if categorical.
    """

    name: str
    person: str
    domain: Domain
    images: dict[str, Tensor]
    labels: Tensor | None = None
    mask: Mask | None = None
    conditions: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        volumes = {**self.images, "labels": self.labels, "mask": self.mask}
        for what, volume in volumes.items():
            if volume is not None and tuple(volume.shape) != self.domain.shape:
                raise ValueError(f"{self.name}: {what}: expected {self.domain.shape}, got {tuple(volume.shape)}")

    def to(self, device: torch.device | str) -> "Scan":
        """The same scan with its volumes on ``device``."""
        return replace(
            self,
            images={name: volume.to(device) for name, volume in self.images.items()},
            labels=None if self.labels is None else self.labels.to(device),
            mask=None if self.mask is None else self.mask.to(device),
        )


class Cohort:
    """Scans by name, in three splits; the volumes are read when they are asked for.

    Args:
        name: of the data set.
        modalities: in the order of a method's outputs.
        label_names: of every label value above 0.
        conditions: in the order of a method's inputs.
        splits: names of the scans of ``train``, ``val`` and ``test``.
        read: gives a scan by its name; it does the caching.
        known: the conditions of each scan, which need no volume to be read.
        excluded: (name, reason) of what was left out.
        notes: what a careful person should know of the rest.

    Raises:
        UserError: no scan to train on; a scan in two splits.
    """

    def __init__(
        self,
        name: str,
        modalities: Sequence[str],
        label_names: Mapping[int, str],
        conditions: Sequence[Condition],
        splits: Mapping[str, Sequence[str]],
        read: Callable[[str], Scan],
        known: Mapping[str, Mapping[str, float]],
        excluded: Sequence[tuple[str, str]] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.name, self.modalities, self.conditions = name, tuple(modalities), tuple(conditions)
        self.label_names = dict(sorted(label_names.items()))
        self.splits = {split: tuple(splits.get(split, ())) for split in SPLITS}
        self.excluded, self.notes = list(excluded), list(notes)
        self.known = {scan: dict(values) for scan, values in known.items()}
        self._read = read
        everybody = [scan for split in SPLITS for scan in self.splits[split]]
        if not self.splits["train"]:
            raise UserError(f"{name}: expected scans to train on, found none; {said(self.excluded)}")
        if twice := sorted({scan for scan in everybody if everybody.count(scan) > 1}):
            raise UserError(f"{name}: expected each scan once in one split, found {twice[0]} twice")

    def __len__(self) -> int:
        return sum(len(names) for names in self.splits.values())

    def names(self, split: str) -> tuple[str, ...]:
        """The scans of ``train``, ``val`` or ``test``."""
        return self.splits[split]

    def scan(self, name: str) -> Scan:
        """A scan by its name.

        Raises:
            UserError: no such scan; a file that cannot be read any more.
        """
        if name not in self.known:
            raise UserError(f"{self.name}: expected one of {len(self)} scans, found {name!r}; see the list of names")
        return self._read(name)

    def condition(self, name: str) -> Condition:
        """A condition by its name.

        Raises:
            UserError: no such condition.
        """
        found = next((c for c in self.conditions if c.name == name), None)
        if found is None:
            names = ", ".join(c.name for c in self.conditions) or "none"
            raise UserError(f"{self.name}: expected one of the conditions {names}; found {name!r}; correct it")
        return found

    def values(self, split: str) -> Tensor:
        """Conditions [scans, conditions] of a split, float32, NaN where missing; nothing is read."""
        rows = [[self.known[scan][c.name] for c in self.conditions] for scan in self.splits[split]]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(self.conditions))


def said(excluded: Sequence[tuple[str, str]]) -> str:
    """The exclusions in one line: how many, and the first reason."""
    if not excluded:
        return "nothing was excluded"
    name, reason = excluded[0]
    return f"{len(excluded)} excluded, the first: {name}: {reason}"
