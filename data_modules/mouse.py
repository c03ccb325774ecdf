"""The in-vivo mouse brains of dama-lab/mouse-brain-atlas (FVB), as pairs for methods that learn."""

from dataclasses import replace
from pathlib import Path

import torch

from data_modules.cohort_pairs import CohortPairs, Subject, read_scan
from medinr.errors import UserError
from medinr.io import read_matrix, write_text
from medinr.space import Image
from medinr.start import find_start
from medinr.types import Matrix

FOLDERS = ("template", "mask", "label")


class MouseBrains(CohortPairs):
    """Eight brains without their skulls, each brought to the first training brain by an affine map.

    There are few brains: what was trained on, and what was not, must be said with every result.

    Args:
        root: folder with ``template/``, ``mask/`` and ``label/``, one file of equal name a brain in each.
        starts: folder of the affine maps (mouse-1_to_mouse-2.txt, 4 x 4, RAS mm): read if there, else
            found (seconds a brain) and written.
        train, val, test: numbers of the brains, 1-based in the order of their names.
        spacing: of the common grid, mm along R, A and S.
    """

    def __init__(
        self,
        root: str,
        starts: str,
        train: list[int] | None = None,
        val: list[int] | None = None,
        test: list[int] | None = None,
        spacing: list[float] | None = None,
        batch_size: int = 1,
        steps_per_epoch: int = 100,
        val_pairs: int = 2,
        test_pairs: int = 2,
    ) -> None:
        super().__init__(
            root, [0.3, 0.3, 0.3] if spacing is None else spacing, batch_size, steps_per_epoch, val_pairs, test_pairs
        )
        self.starts = starts
        self.splits = {"train": train or [1, 2, 3, 4], "val": val or [5, 6], "test": test or [7, 8]}

    @staticmethod
    def files(root: str) -> list[Subject]:
        """All brains of the folder in the order of their names, as they are.

        Raises:
            UserError: there are none.
        """
        folders = [Path(root) / name for name in FOLDERS]
        names = sorted(file.name for file in folders[0].glob("*.nii.gz"))
        if not names:
            raise UserError(f"{folders[0]}: expected one .nii.gz file a brain, found none; check data.root")
        found = []
        for number, name in enumerate(names, start=1):
            image, mask, labels = (folder / name for folder in folders)
            found.append(Subject(f"mouse-{number}", f"mouse-{number}", "train", image, labels, mask=mask))
        return found

    def subjects(self) -> list[Subject]:
        brains = self.files(self.root)
        found: list[Subject] = []
        for split, numbers in self.splits.items():
            for number in numbers:
                if not 1 <= number <= len(brains):
                    raise UserError(f"data.{split}: expected numbers from 1 to {len(brains)}, found {number}")
                brain = replace(brains[number - 1], split=split)
                start = self.start(found[0] if found else brain, brain)
                found.append(replace(brain, start=start))
        return found

    def start(self, first: Subject, brain: Subject) -> Matrix:
        """The affine map from the first training brain to another, from its file or found and written there."""
        if first.name == brain.name:
            return torch.eye(4, dtype=torch.float64)
        file = Path(self.starts) / f"{first.name}_to_{brain.name}.txt"
        if file.exists():
            return read_matrix(file)
        images = [read_scan(s) for s in (first, brain)]
        found = find_start(images[0], images[1], "affine", [window(i) for i in images])
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "\n".join(" ".join(f"{v:.9f}" for v in row) for row in found.tolist()) + "\n")
        return found


def window(image: Image) -> tuple[float, float]:
    """From 0 to the 99th percentile inside the brain: the gain of the scanner differs between the scans."""
    inside = image.data[image.data > 0]
    return 0.0, float(torch.quantile(inside[:: max(1, len(inside) // 1_000_000)], 0.99))
