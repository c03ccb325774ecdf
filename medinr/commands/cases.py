"""Folders of registration cases, and the displacement that belongs to each: rules of names, and nothing else."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medinr.errors import UserError
from medinr.io import PointsSpace

PAIR_LISTS = ("registration_val", "registration_test", "training_paired_images")
"""Keys of Learn2Reg's dataset.json that list pairs; the first that is there and not empty is taken."""
VOLUMES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")
POINTS = (".csv", ".fcsv", ".mrk.json")


@dataclass(frozen=True)
class Case:
    """Files of one pair; None for what is not there.

    Attributes:
        name: by which its displacement is found.
        points_space: what the numbers of its landmarks mean.
    """

    name: str
    fixed: Path
    moving: Path
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    fixed_points: Path | None = None
    moving_points: Path | None = None
    fixed_mask: Path | None = None
    points_space: PointsSpace = "ras"


def find_cases(data: str | Path, pairs: str | None = None, points_space: PointsSpace = "ras") -> list[Case]:
    """All cases of a folder, by name.

    With a ``dataset.json``, Learn2Reg's layout: a list of pairs ``{"fixed": "./imagesTr/A_0001_0000.nii.gz", ...}``;
    labels, masks and landmarks have the image's name in ``labelsTr``, ``masksTr`` and ``landmarksTr`` (else
    ``keypointsTr``; CSV, voxels). A case is called by the subjects' numbers, ``0001_0002``.

    Else each sub-folder with ``fixed`` and ``moving`` images is a case of its name (or the folder itself is one):
    ``fixed_labels``, ``moving_labels``, ``fixed_points``, ``moving_points`` and ``fixed_mask`` are as for `register`.

    Args:
        pairs: the key of dataset.json (default: the first of `PAIR_LISTS`).
        points_space: of landmarks in CSV; Learn2Reg's are in voxels whatever it says.

    Raises:
        UserError: no folder, no case, a pair whose files are not there.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder of cases, found {'a file' if folder.exists() else 'nothing'}")
    if (folder / "dataset.json").exists():
        cases = _learn2reg_cases(folder, pairs)
    else:
        if pairs is not None:
            raise UserError(f"--pairs {pairs}: {folder} has no dataset.json that could list pairs; leave it out")
        places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
        found = [(p, f, m) for p in places if (f := _volume(p, "fixed")) and (m := _volume(p, "moving"))]
        cases = [_case(place, fixed, moving, points_space) for place, fixed, moving in found]
    if not cases:
        raise UserError(
            f"{folder}: expected Learn2Reg's dataset.json, or folders with fixed.nii.gz and moving.nii.gz, found "
            "neither; see medinr evaluate --help"
        )
    for case in cases:
        _check_both(case)
    names = [c.name for c in cases]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"{folder}: expected one pair of each name, found several of {', '.join(twice)}")
    return cases


def find_results(results: str | Path, cases: list[Case]) -> list[Path]:
    """The displacement of each case: the first that exists of `candidates`.

    Raises:
        UserError: no folder; cases without one, all of them in one line.
    """
    folder = Path(results)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise UserError(f"{folder}: expected a folder of displacement fields, found {what}")
    found = {c.name: next((f for f in candidates(folder, c.name, len(cases) == 1) if f.is_file()), None) for c in cases}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        n, first = len(missing), missing[0]
        shown = ", ".join(missing[:8]) + (", ..." if n > 8 else "")
        raise UserError(
            f"{folder}: expected a displacement of each of {len(cases)} case(s), found none of {n}: {shown}; "
            f"add {first}/displacement.nii.gz, {first}.nii.gz or disp_{first}.nii.gz, or name those to evaluate by "
            "--cases"
        )
    return [file for file in found.values() if file is not None]


def candidates(folder: Path, name: str, alone: bool) -> list[Path]:
    """Where the displacement of a case may be, best first: `register`'s, a field of that name, Learn2Reg's."""
    stems = [f"{name}/displacement", name, f"disp_{name}"]
    files = [folder / f"{stem}{suffix}" for stem in stems for suffix in VOLUMES]
    own = [folder / f"{stem}{suffix}" for stem in ("displacement", "disp_fixed_moving") for suffix in VOLUMES]
    return files + (own if alone else [])


def _case(place: Path, fixed: Path, moving: Path, points_space: PointsSpace) -> Case:
    return Case(
        place.resolve().name,
        fixed,
        moving,
        _volume(place, "fixed_labels"),
        _volume(place, "moving_labels"),
        _first(place, "fixed_points", POINTS),
        _first(place, "moving_points", POINTS),
        _volume(place, "fixed_mask"),
        points_space,
    )


def _learn2reg_cases(folder: Path, pairs: str | None) -> list[Case]:
    file = folder / "dataset.json"
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected JSON, found something that cannot be read ({error})") from error
    lists = {k: v for k, v in content.items() if isinstance(v, list) and v} if isinstance(content, dict) else {}
    key = pairs or next((k for k in PAIR_LISTS if k in lists), None)
    if key not in lists:
        raise UserError(
            f"{file}: expected a list of pairs {key or ' or '.join(PAIR_LISTS)}, found "
            f"{', '.join(lists) or 'no list'}; name one by --pairs"
        )
    cases = []
    for row in lists[key]:
        if not isinstance(row, dict) or not {"fixed", "moving"} <= set(row):
            raise UserError(f'{file}: expected {{"fixed": FILE, "moving": FILE}} in {key}, found {row}')
        f, m = (folder / str(row[side]) for side in ("fixed", "moving"))
        for image in (f, m):
            if not image.is_file():
                raise UserError(f"{image}: expected an image that dataset.json names, found nothing; check the folder")
        cases.append(
            Case(
                f"{subject(f)}_{subject(m)}",
                f,
                m,
                _beside(f, "labels", VOLUMES),
                _beside(m, "labels", VOLUMES),
                _beside(f, "landmarks", POINTS) or _beside(f, "keypoints", POINTS),
                _beside(m, "landmarks", POINTS) or _beside(m, "keypoints", POINTS),
                _beside(f, "masks", VOLUMES),
                "voxel",
            )
        )
    return cases


def subject(image: Path) -> str:
    """``0001`` of ``OASIS_0001_0000.nii.gz``: the first number of four digits; else the name."""
    number = re.search(r"(?<!\d)\d{4}(?!\d)", image.name)
    return number.group() if number else image.name.partition(".")[0]


def _beside(image: Path, kind: str, suffixes: tuple[str, ...]) -> Path | None:
    """``labelsTr/A_0001_0000.nii.gz`` of ``imagesTr/A_0001_0000.nii.gz``."""
    place = image.parent.with_name(image.parent.name.replace("images", kind))
    return None if place == image.parent else _first(place, image.name.partition(".")[0], suffixes)


def _volume(folder: Path, stem: str) -> Path | None:
    return _first(folder, stem, VOLUMES)


def _first(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    return next((f for s in suffixes if (f := folder / f"{stem}{s}").is_file()), None)


def _check_both(case: Case) -> None:
    """Labels and landmarks are of use in pairs only: one side alone is a file that was misnamed or forgotten."""
    for kind in ("labels", "points"):
        given: dict[str, Path | None] = {side: getattr(case, f"{side}_{kind}") for side in ("fixed", "moving")}
        there = [f for f in given.values() if f is not None]
        if len(there) == 1:
            side = next(s for s, f in given.items() if f is None)
            raise UserError(f"{case.name}: expected {kind} of both images, found {there[0]} and none {side}; add them")
