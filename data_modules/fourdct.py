"""4D-CT: two phases of a folder of images as a pair."""

import re
from pathlib import Path
from typing import Any

from medinr.data.base import MedINRDataModule
from medinr.data.layouts import PHASE_PATTERN
from medinr.data.transforms import LungMaskd, ReadImaged, ReadOnGridd, ReadPointsd
from medinr.errors import UserError
from medinr.io import PointsSpace, existing_file


class FourDCT(MedINRDataModule):
    """Two breathing phases of a folder that holds one image per phase (the POPI model's folder as it is, for instance).

    Args:
        root: the folder.
        fixed_phase: phase in percent of the breathing cycle, whose grid the results are on.
        moving_phase: phase that is warped onto it.
        pattern: names of the files, with ``{phase}`` where the number is; ``{phase:02d}-P.mhd`` for the POPI originals.
        masks: ``auto``: lungs computed from the images (HU); ``none``; or a folder with one mask per phase, named as
            the images are.
        fixed_points: CSV of landmarks of the fixed phase, row by row as ``moving_points``. Only for evaluation.
        moving_points: as above, of the moving phase.
        points_space: ``ras`` or ``lps`` mm, or ``voxel`` (0-based).
    """

    def __init__(
        self,
        root: str,
        fixed_phase: int = 0,
        moving_phase: int = 50,
        pattern: str = PHASE_PATTERN,
        masks: str = "auto",
        fixed_points: str | None = None,
        moving_points: str | None = None,
        points_space: PointsSpace = "ras",
        steps_per_epoch: int = 100,
        spacing: float | None = None,
        margin_mm: float | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(steps_per_epoch, spacing, margin_mm, cache_dir)
        if fixed_phase == moving_phase:
            raise UserError(f"data.moving_phase: expected a phase other than the fixed one, found {moving_phase} twice")
        self.root = root
        self.phases = {"fixed": fixed_phase, "moving": moving_phase}
        self.pattern = pattern
        self.masks = masks
        self.points = {"fixed_points": fixed_points, "moving_points": moving_points}
        self.points_space: PointsSpace = points_space
        self.cases = [f"{Path(root).resolve().name}_T{fixed_phase:02d}_T{moving_phase:02d}"]

    def item(self) -> dict[str, Any]:
        item: dict[str, Any] = {"name": self.cases[0]}
        for side, phase in self.phases.items():
            item[side] = str(phase_file(self.root, self.pattern, phase))
            if self.masks not in ("auto", "none"):
                item[f"{side}_mask"] = str(phase_file(self.masks, self.pattern, phase))
        item.update({key: str(existing_file(path)) for key, path in self.points.items() if path is not None})
        return item

    def readers(self) -> list[Any]:
        lungs = [LungMaskd()] if self.masks == "auto" else []
        return [ReadImaged(), ReadOnGridd(), ReadPointsd(self.points_space), *lungs]


def phase_file(root: str | Path, pattern: str, phase: int) -> Path:
    """The file of a phase.

    Raises:
        UserError: no such folder, no file of that phase (the phases that are there are named), or several.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder with one image per phase, found none; check the path")
    try:
        name = pattern.format(phase=phase)
    except (KeyError, IndexError, ValueError):
        name = ""
    if not name or name == pattern:
        raise UserError(f"data.pattern: expected a name with {{phase}} in it, as {PHASE_PATTERN}, found {pattern!r}")
    files = sorted(folder.glob(name))
    if len(files) == 1:
        return files[0]
    if files:
        found = ", ".join(f.name for f in files[:3])
        raise UserError(f"{folder / name}: expected one file, found {len(files)} ({found}); give a narrower pattern")
    phases = ", ".join(f"{p:02d}" for p in phases_in(folder, pattern)) or "no phase"
    raise UserError(
        f"{folder / name}: expected the image of phase {phase}, found {phases}; choose one, or give pattern"
    )


def phases_in(root: str | Path, pattern: str = PHASE_PATTERN) -> list[int]:
    """The phases of which a folder holds a file, in order."""
    before, after = re.split(r"\{phase[^}]*\}", pattern, maxsplit=1)
    regex = re.compile(_glob_regex(before) + r"(\d+)" + _glob_regex(after))
    return sorted({int(m.group(1)) for f in Path(root).iterdir() if (m := regex.fullmatch(f.name))})


def _glob_regex(part: str) -> str:
    return re.escape(part).replace(r"\*", ".*").replace(r"\?", ".")
