"""4D-CT: all phases of a folder as one sequence; images, MetaImages or DICOM series."""

import itertools
import re
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as Series
from pathlib import Path
from typing import Any

import torch

from data_modules.fourdct import phase_file, phases_in
from medinr.data import layouts
from medinr.data.series import Frame, SequenceDataModule
from medinr.data.transforms import LungMaskd, ReadImaged, ReadOnGridd, ReadPointsd, domain_of, to_meta
from medinr.errors import RegistrationWarning, UserError
from medinr.io import PointsSpace, check_points_inside, existing_file, read_labels, series_under
from medinr.space import Domain, transform_points
from medinr.types import Points

SIDE = ("fixed",)


class FourDCTSequence(SequenceDataModule):
    """The breathing phases of a 4D-CT, time in percent of the cycle (period 100).

    The folder holds one image per phase (NIfTI or MetaImage, names as below), or one DICOM series per phase: in folders
    that are named by the phase (``00``, ``50``), or described as ``... Gated, 20%A`` (TCIA 4D-Lung; structure sets are
    passed over).

    Args:
        root: the folder.
        reference: phase whose grid the results are on; None: the first. The field takes the end of expiration or T00.
        held_out: phases that no method may train on.
        phases: the phases to read; None: all that are there.
        pattern: names of the files, with ``{phase}`` where the number is. None: ``*_T00.nii.gz`` (also .nii, .mha,
            .mhd), ``00-P.mhd`` (POPI model at full resolution), or DICOM.
        masks: ``auto``: lungs, from ``00-air-lungs-body.mhd`` of the POPI model where they are, else computed (HU);
            ``none``; or a folder with one mask per phase, named as the images are (or ``*_T00.nii.gz``).
        points: folder with landmarks of some or all phases, ``*_T00.csv`` (.txt, .fcsv, .mrk.json) or
            ``00-Landmarks.pts`` (POPI: mm from the first voxel); row by row the same anatomy.
        points_space: what the tables' numbers are: ``ras`` or ``lps`` mm, or ``voxel`` (0-based).
        labels: folder with label volumes of some or all phases, named as masks are.
    """

    def __init__(
        self,
        root: str,
        reference: int | None = None,
        held_out: Series[int] = (),
        phases: Series[int] | None = None,
        pattern: str | None = None,
        masks: str = "auto",
        points: str | None = None,
        points_space: PointsSpace = "ras",
        labels: str | None = None,
        steps_per_epoch: int = 100,
        spacing: float | None = None,
        margin_mm: float | None = None,
        cache_dir: str | None = None,
    ) -> None:
        name = Path(root).resolve().name
        super().__init__(
            name, reference, held_out, layouts.PHASE_PERIOD, True, steps_per_epoch, spacing, margin_mm, cache_dir
        )
        self.root, self.phases, self.pattern, self.masks = root, phases, pattern, masks
        self.points, self.labels = points, labels
        self.points_space: PointsSpace = points_space

    def frames(self) -> list[Frame]:
        images = phase_images(self.root, self.pattern, self.phases)
        if self.phases is None:
            _tell_of_gaps(self.cases[0], list(images))
        frames = []
        for phase, image in images.items():
            files = {"image": str(image)}
            if self.masks == "auto":
                regions = Path(self.root) / layouts.POPI_REGIONS.format(phase=phase)
                if regions.is_file():
                    files["mask"] = str(regions)
            elif self.masks != "none":
                files["mask"] = str(_one(self.masks, phase, self._patterns, "data.masks"))
            if self.labels is not None and phase in _phases(self.labels, self._patterns):
                files["labels"] = str(_one(self.labels, phase, self._patterns, "data.labels"))
            if self.points is not None and phase in _phases(self.points, layouts.PHASE_POINT_PATTERNS):
                files["points"] = str(
                    existing_file(_one(self.points, phase, layouts.PHASE_POINT_PATTERNS, "data.points"))
                )
            frames.append(Frame(float(phase), files))
        for what, folder in (("points", self.points), ("labels", self.labels)):
            if folder is not None and not any(what in frame.files for frame in frames):
                raise UserError(f"data.{what}: expected {what} of some phase in {folder}, found none; see data.{what}")
        return frames

    @property
    def _patterns(self) -> tuple[str, ...]:
        return layouts.PHASE_PATTERNS if self.pattern is None else (self.pattern, *layouts.PHASE_PATTERNS)

    def readers(self) -> list[Any]:
        lungs = [LungMaskd(keys=SIDE)] if self.masks == "auto" else []
        return [
            ReadImaged(SIDE),
            ReadRegionsd(("fixed_mask", "fixed_labels")),
            ReadPhasePointsd(self.points_space, ("fixed_points",)),
            *lungs,
        ]


class ReadRegionsd(ReadOnGridd):
    """Masks and labels; of the POPI model's regions the lungs are the mask."""

    def one(self, key: str, sample: Mapping[str, Any]) -> Any:
        if key != "fixed_mask" or not str(sample[key]).endswith(layouts.POPI_REGIONS.partition("}")[2]):
            return super().one(key, sample)
        domain = domain_of(sample["fixed"])
        return to_meta(read_labels(sample[key], domain) == layouts.POPI_LUNG, domain, str(sample[key]))


class ReadPhasePointsd(ReadPointsd):
    """Landmarks, also those of the POPI model."""

    def one(self, key: str, sample: Mapping[str, Any]) -> Any:
        if not str(sample[key]).endswith(".pts"):
            return super().one(key, sample)
        return read_popi_landmarks(sample[key], domain_of(sample["fixed"]))


def read_popi_landmarks(path: str | Path, domain: Domain) -> Points:
    """Landmarks of the POPI model, rows ``x y z`` in mm from the first voxel along the image's axes: RAS mm [40, 3].

    Raises:
        UserError: a row that is not three numbers; a landmark outside the image.
    """
    file = existing_file(path)
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            cells = [float(cell) for cell in line.replace(",", " ").split()]
        except ValueError:
            cells = [0.0]
        if cells and len(cells) != 3:
            raise UserError(
                f"{file}: line {number}: expected three numbers x y z, found {line.strip()[:40]!r}; correct it"
            )
        rows += [cells] if cells else []
    if not rows:
        raise UserError(f"{file}: expected rows x y z, found none; copy the file again")
    mm = torch.tensor(rows[: layouts.POPI_LANDMARKS], dtype=torch.float64)
    points = transform_points(domain.voxel_to_world, mm / torch.tensor(domain.spacing, dtype=torch.float64))
    check_points_inside(points, domain, f"{file} (mm from the first voxel)")
    return points


def phase_images(root: str | Path, pattern: str | None = None, phases: Series[int] | None = None) -> dict[int, Path]:
    """Phase in percent -> its image, or a slice of its DICOM series; in ascending order.

    Raises:
        UserError: no such folder; no phases in it; one of ``phases`` is not there; two series of one phase.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder with the phases of a 4D-CT, found none; check the path")
    patterns = layouts.PHASE_PATTERNS if pattern is None else (pattern,)
    used = next((p for p in patterns if "{phase" not in p or phases_in(folder, p)), None)
    if used is not None:  # a pattern without a phase in it is refused by phase_file
        there = phases_in(folder, used) if "{phase" in used else [0]
        return {phase: phase_file(folder, used, phase) for phase in sorted(set(phases or there))}
    series = dicom_phases(folder) if pattern is None else {}
    if not series:
        looked = ", ".join(patterns) if pattern else f"{layouts.PHASE_PATTERN}, 00-P.mhd, or a DICOM series per phase"
        raise UserError(
            f"{folder}: expected images of phases ({looked}), found none; name their folder, or data.pattern"
        )
    if missing := [p for p in phases or () if p not in series]:
        found = ", ".join(f"{p:02d}" for p in series)
        raise UserError(f"{folder}: expected a DICOM series of phase {missing[0]:02d}, found {found}; choose of these")
    return {phase: series[phase] for phase in sorted(set(phases or series))}


def dicom_phases(root: Path) -> dict[int, Path]:
    """Phase in percent -> a slice of its DICOM series; by the series' descriptions, else by the names of folders.

    Raises:
        UserError: two series of one phase.
    """
    series = series_under(root)
    described = [(int(m.group(1)), path) for told, path in series if (m := re.search(layouts.GATED, told))]
    named = [
        (int(m.group(1)), path)
        for _, path in series
        if path.parent != root and (m := re.fullmatch(r"[Tt]?(\d{1,2})(?:\.\d+)?%?", path.parent.name))
    ]
    found: dict[int, Path] = {}
    for phase, path in sorted(described or named):
        if phase in found:
            raise UserError(
                f"{root}: expected one DICOM series of phase {phase:02d}, found two ({found[phase]}, {path}); name the "
                "folder of one acquisition"
            )
        found[phase] = path
    return found


def _phases(folder: str, patterns: Series[str]) -> set[int]:
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: expected a folder with one file per phase, found none; check the path")
    return {phase for pattern in patterns for phase in phases_in(folder, pattern)}


def _one(folder: str, phase: int, patterns: Series[str], key: str) -> Path:
    """The file of a phase by the first pattern that has it."""
    if not Path(folder).is_dir():
        raise UserError(f"{key}: expected auto, none or a folder, found {folder!r}; correct it")
    used = next((p for p in patterns if phase in phases_in(folder, p)), patterns[0])
    return phase_file(folder, used, phase)


def _tell_of_gaps(name: str, phases: list[int]) -> None:
    """Warn of phases that are missing between others: a file that was not copied."""
    steps = [b - a for a, b in itertools.pairwise(phases)]
    if len(steps) < 3:
        return
    step = min(steps)
    missing = [p for p in range(phases[0], phases[-1], step) if p not in phases]
    if missing and all(s % step == 0 for s in steps) and len(missing) < len(phases):
        shown = ", ".join(f"{p:02d}" for p in missing)
        warnings.warn(
            f"{name}: expected phases every {step}%, found none at {shown}; going on without "
            "(give data.phases if that is meant)",
            RegistrationWarning,
            stacklevel=2,
        )
