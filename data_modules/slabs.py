"""The 40 adult T1 slabs of stnava/ANTsTutorial, as pairs for methods that learn."""

from pathlib import Path

from data_modules.cohort_pairs import CohortPairs, Subject
from medinr.errors import UserError

REPEATS = (
    (1, 2), (4, 5), (6, 7, 8), (9, 10, 11), (19, 20, 21), (22, 23, 24), (29, 30, 31), (34, 35), (36, 37), (39, 40),
)  # fmt: skip
"""Scans of one person: white-matter Dice 0.84 to 0.89 without any registration, all other pairs 0.47 to 0.77."""
VAL = (29, 30, 31, 32, 33, 38)
TEST = (34, 35, 36, 37, 39, 40)


class AdultSlabs(CohortPairs):
    """28 scans to train, 6 to validate, 6 to test (of 18, 4 and 3 persons); affinely aligned slabs of 18 slices.

    The 40 files are not of 40 persons: `REPEATS` says which are the same head, found by their overlap. The split is by
    person, so a test head has never been seen.

    Args:
        root: folder of ``sub-NN_T1w.nii.gz`` and ``sub-NN_dseg.nii.gz``. Labels are in 10 of the 18 slices.
        spacing: of the common grid, mm along R, A and S.
    """

    def __init__(
        self,
        root: str,
        spacing: list[float] | None = None,
        batch_size: int = 1,
        steps_per_epoch: int = 100,
        val_pairs: int = 12,
        test_pairs: int = 5,
    ) -> None:
        super().__init__(
            root, [2.0, 2.0, 1.0] if spacing is None else spacing, batch_size, steps_per_epoch, val_pairs, test_pairs
        )

    def subjects(self) -> list[Subject]:
        files = sorted(Path(self.root).glob("sub-*_T1w.nii.gz"))
        if not files:
            raise UserError(f"{self.root}: expected sub-NN_T1w.nii.gz files, found none; check data.root")
        found = []
        for file in files:
            name = file.name.split("_")[0]
            number = int(name.split("-")[1])
            split = "val" if number in VAL else "test" if number in TEST else "train"
            person = next((f"person-{group[0]:02d}" for group in REPEATS if number in group), f"person-{number:02d}")
            found.append(Subject(name, person, split, file, file.with_name(f"{name}_dseg.nii.gz")))
        return found
