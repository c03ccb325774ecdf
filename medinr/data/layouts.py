"""File names, sizes and spacings of the data sets, once for readers and phantom writers alike.

Pure facts: frozen dataclasses and functions that list candidate paths, no torch and no image library. Arrays are
indexed ``[i, j, k]`` (x, y, z); sizes and spacings are in the same order, spacings in millimetres.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medinr.errors import UserError

# ---------------------------------------------------------------------------------------------- DIR-LAB 4DCT

DIRLAB_PHASES: tuple[str, ...] = tuple(f"T{p:02d}" for p in range(0, 100, 10))
"""The ten breathing phases; T00 is end-inspiration (the fixed image), T50 end-expiration (the moving image)."""

DIRLAB_SAMPLED_PHASES: tuple[str, ...] = DIRLAB_PHASES[:6]
"""The phases T00..T50 at which the 75 ``Sampled4D`` landmarks are given."""

DIRLAB_EXTREME_PHASES: tuple[str, str] = ("T00", "T50")
DIRLAB_EXTREME_COUNT = 300
DIRLAB_SAMPLED_COUNT = 75

DIRLAB_HU_OFFSET = 1024
"""Stored value - HU. 1000 is reported as well, so readers make it an argument and log it."""

DIRLAB_DTYPE = "<i2"
"""Headerless little-endian int16, x fastest."""

DIRLAB_LANDMARK_BASE = 1
"""Landmark files count voxels from 1."""

DIRLAB_SUFFIXES: tuple[str, ...] = ("_s", "-ssm", "")

GEOMETRY_FILE = "geometry.json"

# ---------------------------------------------------------------------------------------------- 4D-CT series

PHASE_PATTERN = "*_T{phase:02d}.nii.gz"
PHASE_PATTERNS = (PHASE_PATTERN, "*_T{phase:02d}.nii", "{phase:02d}-P.mhd", "*_T{phase:02d}.mha", "*_T{phase:02d}.mhd")
"""Names of one image per breathing phase; the third is that of the POPI model at full resolution."""

PHASE_POINT_PATTERNS = (
    "*_T{phase:02d}.csv",
    "*_T{phase:02d}.txt",
    "*_T{phase:02d}.fcsv",
    "*_T{phase:02d}.mrk.json",
    "{phase:02d}-Landmarks.pts",
)
"""Names of one table of landmarks per breathing phase."""

PHASE_PERIOD = 100.0
"""Phases are percent of the breathing cycle."""

POPI_REGIONS = "{phase:02d}-air-lungs-body.mhd"
"""Masks of the POPI model: 0 lung, 1 air, 2 the rest."""
POPI_LUNG = 0
POPI_LANDMARKS = 40
"""Rows of ``XX-Landmarks.pts``; a 41st, where there is one, is an artefact of the software that wrote it."""

GATED = r"(?i)gated\D{0,3}(\d{1,3})(?:\.\d+)?\s*%?"
"""The phase in a DICOM series description, as ``4DFBCT, Gated, 20%A`` of TCIA 4D-Lung."""


@dataclass(frozen=True)
class DIRLabCase:
    """The published facts of one DIR-LAB 4DCT case.

    Args:
        number: case number, 1 to 10.
        shape: voxels along x, y, z.
        spacing: millimetres along x, y, z.
        suffix: what follows the phase in the image names of the original download.
        mean_motion: published mean length of the 300 T00 -> T50 landmark displacements, mm.
    """

    number: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    suffix: str
    mean_motion: float

    @property
    def name(self) -> str:
        """``case1`` ... ``case10``: the key in geometry.json and the beginning of every file name."""
        return f"case{self.number}"

    @property
    def folder(self) -> str:
        """The folder of the original download (case 8 is named differently)."""
        return "Case8Deploy" if self.number == 8 else f"Case{self.number}Pack"


def _dirlab_table() -> dict[int, DIRLabCase]:
    slices = (94, 112, 104, 99, 106, 128, 136, 128, 128, 120)
    in_plane = (0.97, 1.16, 1.15, 1.13, 1.10, 0.97, 0.97, 0.97, 0.97, 0.97)
    motion = (3.89, 4.34, 6.94, 9.83, 7.48, 10.89, 11.03, 14.99, 7.92, 7.30)
    table = {}
    for n in range(1, 11):
        size = 256 if n <= 5 else 512
        suffix = "_s" if n == 1 else "-ssm" if n <= 5 else ""
        s = in_plane[n - 1]
        table[n] = DIRLabCase(n, (size, size, slices[n - 1]), (s, s, 2.5), suffix, motion[n - 1])
    return table


DIRLAB_CASES: Mapping[int, DIRLabCase] = _dirlab_table()


def dirlab_case(number: int) -> DIRLabCase:
    """The published facts of a case.

    Raises:
        UserError: no such case.
    """
    if number not in DIRLAB_CASES:
        raise UserError(f"DIR-LAB case {number!r}: expected a number from 1 to 10; give one of the published cases")
    return DIRLAB_CASES[number]


def dirlab_folders(root: Path | str, case: int) -> list[Path]:
    """Folders in which a case may lie, most likely first; the root itself last (flattened copies)."""
    facts = dirlab_case(case)
    names = [facts.folder, f"Case{case}Pack", f"case{case}pack", f"Case{case}Deploy", f"Case{case}", f"case{case}"]
    unique = list(dict.fromkeys(names))
    return [Path(root) / name for name in unique] + [Path(root)]


def _prefixes(case: int) -> list[str]:
    return [f"case{case}", f"Case{case}"]


def dirlab_image_candidates(root: Path | str, case: int, phase: str) -> list[Path]:
    """Paths at which the image of a phase may lie, in the order to try them.

    The original name comes first, then the other naming habits (copies renamed to ``_s`` throughout are common).
    """
    facts = dirlab_case(case)
    suffixes = list(dict.fromkeys((facts.suffix, *DIRLAB_SUFFIXES)))
    return [
        folder / sub / f"{prefix}_{phase}{suffix}.img"
        for folder in dirlab_folders(root, case)
        for sub in ("Images", "images", "")
        for suffix in suffixes
        for prefix in _prefixes(case)
    ]


def dirlab_extreme_landmark_candidates(root: Path | str, case: int, phase: str) -> list[Path]:
    """Paths at which the 300 landmarks of an extreme phase (T00 or T50) may lie, in the order to try them."""
    plain = [f"{prefix}_300_{phase}_xyz.txt" for prefix in reversed(_prefixes(case))]
    dirlab = [f"{prefix}_dirLab300_{phase}_xyz.txt" for prefix in _prefixes(case)]
    names = dirlab + plain if case in (8, 10) else plain + dirlab
    subs = ("extremePhases", "ExtremePhases") if case == 8 else ("ExtremePhases", "extremePhases")
    return [folder / sub / name for folder in dirlab_folders(root, case) for sub in (*subs, "") for name in names]


def dirlab_sampled_landmark_candidates(root: Path | str, case: int, phase: str) -> list[Path]:
    """Paths at which the 75 ``Sampled4D`` landmarks of a phase (T00..T50) may lie, in the order to try them."""
    return [
        folder / sub / f"{prefix}_4D-75_{phase}.txt"
        for folder in dirlab_folders(root, case)
        for sub in ("Sampled4D", "sampled4D", "")
        for prefix in _prefixes(case)
    ]


def first_existing(candidates: Sequence[Path]) -> Path | None:
    """The first candidate that is a file, or None."""
    return next((path for path in candidates if path.is_file()), None)


def dirlab_affine(spacing: Sequence[float]) -> NDArray[np.float64]:
    """Voxel -> world (RAS mm) matrix ``diag(-sx, -sy, sz, 1)`` of a DIR-LAB image.

    The files have no header, so orientation is a convention: x runs to the patient's left, y to posterior, z to
    superior, with the centre of voxel (0, 0, 0) at the world's origin. In ITK's LPS this is the identity direction.
    """
    sx, sy, sz = (float(s) for s in spacing)
    return np.diag([-sx, -sy, sz, 1.0])


def read_geometry(root: Path | str) -> dict[str, DIRLabCase]:
    """Geometry overrides of a data root: ``geometry.json``, for copies that were cropped or resampled.

    The file reads ``{"case1": {"shape": [x, y, z], "spacing": [sx, sy, sz]}, ...}``; either key may be left out.

    Returns:
        The case facts with shape and spacing replaced, keyed ``case1`` ...; empty where there is no file.

    Raises:
        UserError: the file is not JSON of this form.
    """
    path = Path(root) / GEOMETRY_FILE
    if not path.is_file():
        return {}
    form = '{"case1": {"shape": [x, y, z], "spacing": [sx, sy, sz]}}'
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected JSON like {form}, found {error}; correct or remove the file") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected {form}, found a {type(table).__name__}; correct or remove the file")
    known = {facts.name: facts for facts in DIRLAB_CASES.values()}
    out: dict[str, DIRLabCase] = {}
    for name, entry in table.items():
        if name not in known:
            raise UserError(f"{path}: expected keys case1 ... case10, found {name!r}; rename or remove the entry")
        if not isinstance(entry, dict) or set(entry) - {"shape", "spacing"}:
            raise UserError(f"{path}: {name}: expected only 'shape' and 'spacing', found {entry!r}; correct the entry")
        out[name] = replace(
            known[name],
            shape=_shape(path, name, entry.get("shape", known[name].shape)),
            spacing=_spacing(path, name, entry.get("spacing", known[name].spacing)),
        )
    return out


def dirlab_geometry(root: Path | str, case: int) -> DIRLabCase:
    """The facts of a case as they hold in a data root: geometry.json where it names the case, else the published."""
    facts = dirlab_case(case)
    return read_geometry(root).get(facts.name, facts)


def write_geometry(root: Path | str, cases: Sequence[DIRLabCase]) -> Path:
    """Write (or extend) ``geometry.json`` of a data root with the shape and spacing of the given cases."""
    path = Path(root) / GEOMETRY_FILE
    merged = {**read_geometry(root), **{facts.name: facts for facts in cases}}
    ordered = sorted(merged.values(), key=lambda facts: facts.number)
    table = {facts.name: {"shape": list(facts.shape), "spacing": list(facts.spacing)} for facts in ordered}
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(table, indent=2) + "\n")
    os.replace(temporary, path)
    return path


def _shape(path: Path, name: str, value: object) -> tuple[int, int, int]:
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    integral = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    if len(numbers) != 3 or len(integral) != 3:
        raise UserError(f"{path}: {name}: shape: expected three positive integers x, y, z, found {value!r}; correct it")
    return integral[0], integral[1], integral[2]


def _spacing(path: Path, name: str, value: object) -> tuple[float, float, float]:
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    finite = [
        float(n) for n in numbers if isinstance(n, (int, float)) and not isinstance(n, bool) and 0 < n < float("inf")
    ]
    if len(numbers) != 3 or len(finite) != 3:
        raise UserError(f"{path}: {name}: spacing: expected three positive lengths in mm, found {value!r}; correct it")
    return finite[0], finite[1], finite[2]
