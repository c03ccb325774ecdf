"""Pairs of the subjects of a cohort, for methods that learn to register: the base of `AdultSlabs` and `MouseBrains`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import torch
from monai.data.dataset import CacheDataset
from monai.transforms.compose import Compose
from monai.transforms.transform import Transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medinr.data.base import step_loader
from medinr.data.pair import Pair
from medinr.data.working import labels_on_grid, on_grid, working_grid
from medinr.errors import UserError
from medinr.io import existing_file, read_image, read_labels, read_mask
from medinr.space import Domain, Image
from medinr.types import Matrix

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Subject:
    """One scan of a cohort.

    Attributes:
        name: of the scan.
        person: whose scan it is; no person is in two splits, and no pair holds one person twice.
        split: train, val or test.
        image, labels: files.
        start: from the cohort's common space to the scan's world, RAS mm.
        mask: file; what is outside becomes 0 (a brain without its skull).
    """

    name: str
    person: str
    split: str
    image: Path
    labels: Path | None = None
    start: Matrix = field(default_factory=lambda: torch.eye(4, dtype=torch.float64))
    mask: Path | None = None


def read_scan(subject: Subject) -> Image:
    """The image of a subject, 0 outside its mask if it has one."""
    image = read_image(existing_file(subject.image))
    if subject.mask is None:
        return image
    return Image(image.data * read_mask(subject.mask, image.domain), image.domain, image.source)


class ReadSubject(Transform):
    """A `Subject` as the network sees it: windowed image [1, X, Y, Z] and labels [X, Y, Z] on the common grid."""

    def __init__(self, grid: Domain, window: tuple[float, float] = (0.5, 99.5)) -> None:
        self.grid, self.window = grid, window

    def __call__(self, subject: Subject) -> dict[str, Tensor]:
        image = read_scan(subject)
        volume = on_grid(image, self.grid, subject.start)
        low, high = torch.quantile(image.data.flatten()[::7], torch.tensor(self.window) / 100)
        found = {"image": ((volume - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)}
        if subject.labels is not None:
            labels = read_labels(subject.labels, image.domain)
            found["labels"] = labels_on_grid(labels, image.domain, self.grid, subject.start).int()
        return found


class PairsOf(Dataset[dict[str, Tensor]]):
    """Pairs of prepared subjects by their numbers: ``fixed``, ``moving`` and, where known, their labels."""

    def __init__(self, subjects: Any, pairs: Sequence[tuple[int, int]]) -> None:
        self.subjects, self.pairs = subjects, list(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        fixed, moving = (self.subjects[i] for i in self.pairs[index])
        found = {"fixed": fixed["image"], "moving": moving["image"]}
        if "labels" in fixed and "labels" in moving:
            found |= {"fixed_labels": fixed["labels"], "moving_labels": moving["labels"]}
        return found


class CohortPairs(lightning.LightningDataModule):
    """All ordered pairs of different persons within each split of a cohort, on one grid.

    A data set is a subclass that gives `subjects`. Training and validation see the images on the cohort's common grid;
    tests see them as they are on disk, one `Pair` each.

    Args:
        root: the data set's folder.
        spacing: of the common grid, mm along R, A and S: what a network is trained at, and looks at a new pair at.
        batch_size: training pairs a step.
        steps_per_epoch: training steps between two validations.
        val_pairs: pairs of a validation, evenly chosen from all.
        test_pairs: pairs of a test, likewise.
    """

    def __init__(
        self,
        root: str,
        spacing: list[float],
        batch_size: int = 1,
        steps_per_epoch: int = 100,
        val_pairs: int = 12,
        test_pairs: int = 5,
    ) -> None:
        super().__init__()
        if len(spacing) != 3 or min(spacing) <= 0:
            raise UserError(f"data.spacing: expected three lengths in mm above 0, found {spacing}; correct it")
        for name, value in (
            ("batch_size", batch_size), ("steps_per_epoch", steps_per_epoch), ("val_pairs", val_pairs),
            ("test_pairs", test_pairs),
        ):  # fmt: skip
            if value < 1:
                raise UserError(f"data.{name}: expected 1 or more, found {value}; correct it")
        self.root, self.spacing, self.batch_size = root, list(spacing), batch_size
        self.steps_per_epoch, self.val_pairs, self.test_pairs = steps_per_epoch, val_pairs, test_pairs

    def subjects(self) -> list[Subject]:
        """All scans.

        Raises:
            UserError: names what is missing.
        """
        raise NotImplementedError

    @cached_property
    def checked(self) -> list[Subject]:
        """The scans; no person is in two splits."""
        found = self.subjects()
        for person in {s.person for s in found}:
            splits = {s.split for s in found if s.person == person}
            if len(splits) > 1:
                raise UserError(f"{self.root}: expected each person in one split, found {person} in {sorted(splits)}")
        return found

    def of(self, split: str) -> list[Subject]:
        """The scans of a split."""
        return [s for s in self.checked if s.split == split]

    def ordered_pairs(self, split: str, most: int | None = None) -> list[tuple[int, int]]:
        """Numbers (fixed, moving) within a split, of different persons; ``most`` of them, evenly chosen."""
        some = self.of(split)
        pairs = [(i, j) for i, a in enumerate(some) for j, b in enumerate(some) if a.person != b.person]
        if not pairs:
            raise UserError(f"{self.root}: expected scans of two persons to {split} with, found {len(some)} scans")
        if most is None or most >= len(pairs):
            return pairs
        return [pairs[int((k + 0.5) * len(pairs) / most)] for k in range(most)]

    @cached_property
    def grid(self) -> Domain:
        """The common grid: over the box of the first training scan."""
        first = self.of("train")[0]
        domain = read_image(existing_file(first.image)).domain
        inverse = torch.linalg.inv(first.start)
        return working_grid(Domain.of(domain.shape, inverse @ domain.voxel_to_world), self.spacing)

    def prepare_data(self) -> None:
        """Check that the files are there; nothing is loaded."""
        for subject in self.checked:
            for file in (subject.image, subject.labels, subject.mask):
                if file is not None:
                    existing_file(file)

    def prepared(self, split: str) -> Any:
        """The scans of a split on the common grid, read once."""
        transforms = Compose([ReadSubject(self.grid)], log_stats=False)
        return CacheDataset(self.of(split), transforms, num_workers=None, progress=False, copy_cache=False)

    def test_pair(self, index: int) -> Pair:
        """A pair of test subjects as on disk; the start is the composition of both scans' own."""
        some = self.of("test")
        i, j = self.ordered_pairs("test", self.test_pairs)[index]
        return pair_between(some[i], some[j])

    @property
    def pair(self) -> Pair:
        """The first test pair."""
        return self.test_pair(0)

    def check(self) -> list[str]:
        """What was found, one line per split."""
        return [
            f"{split}: {len(some)} scans of {len({s.person for s in some})} persons, "
            f"{len(self.ordered_pairs(split))} ordered pairs"
            for split in SPLITS
            if (some := self.of(split))
        ]

    # ------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> Any:
        pairs = PairsOf(self.prepared("train"), self.ordered_pairs("train"))
        drawn = torch.utils.data.RandomSampler(
            pairs, replacement=True, num_samples=self.steps_per_epoch * self.batch_size
        )
        return DataLoader(pairs, batch_size=self.batch_size, sampler=drawn, num_workers=0)

    def val_dataloader(self) -> Any:
        pairs = PairsOf(self.prepared("val"), self.ordered_pairs("val", self.val_pairs))
        return DataLoader(pairs, batch_size=1, shuffle=False, num_workers=0)

    def test_dataloader(self) -> Any:
        return step_loader(len(self.ordered_pairs("test", self.test_pairs)))

    def predict_dataloader(self) -> Any:
        return self.test_dataloader()


def pair_between(fixed: Subject, moving: Subject) -> Pair:
    """Two scans as a `Pair`, as they are on disk."""
    images = [read_scan(s) for s in (fixed, moving)]
    labels = {
        f"{side}_labels": read_labels(s.labels, image.domain)
        for side, s, image in zip(("fixed", "moving"), (fixed, moving), images, strict=True)
        if s.labels is not None
    }
    start = moving.start @ torch.linalg.inv(fixed.start)
    return Pair(f"{moving.name}_to_{fixed.name}", images[0], images[1], start=start, **labels)
