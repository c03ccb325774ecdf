"""Reading DIR-LAB 4DCT files as their owner gives them (names and sizes: `medinr.data.layouts`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from medinr.data import layouts
from medinr.data.layouts import DIRLabCase
from medinr.errors import UserError
from medinr.io import check_points_inside, existing_file, read_image, read_mask
from medinr.space import Domain, Image, transform_points
from medinr.types import Mask, Points

AIR_HU = (-1100.0, -900.0)
SOFT_TISSUE_HU = (-200.0, 200.0)


def find_case_root(root: Path | str, case: int) -> Path | None:
    """The folder that holds a case: ``root``, a folder in it, or (``root`` is the case's own folder) the one above.

    Returns:
        The folder under which `medinr.data.layouts` finds the case, or None.
    """
    base = Path(root)
    own = {folder.name for folder in layouts.dirlab_folders(base, case)[:-1]}
    if base.name in own and base.is_dir():
        return base.parent
    if not base.is_dir():
        return None
    below = sorted(p for p in base.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "truth")
    for folder in (base, *below):
        if any(p.is_dir() for p in layouts.dirlab_folders(folder, case)[:-1]):
            return folder
    flat = [p for phase in layouts.DIRLAB_PHASES for p in layouts.dirlab_image_candidates(base, case, phase)]
    return base if layouts.first_existing(flat) else None


def require_case_root(root: Path | str, case: int) -> Path:
    """`find_case_root`, or a UserError that says what was looked for and what is there."""
    facts = layouts.dirlab_case(case)
    base = Path(root)
    if not base.is_dir():
        raise UserError(f"{base}: expected the folder that holds {facts.folder}, found none; check data.root")
    found = find_case_root(base, case)
    if found is None:
        raise UserError(
            f"{base}: expected {facts.folder} in it, one level below, or the images of case {case} themselves, found "
            f"{_listing(base)}; set data.root to the folder that holds the unpacked cases"
        )
    return found


def require_file(candidates: Sequence[Path], what: str, root: Path, remedy: str) -> Path:
    """The first candidate that is a file, or one line with the names looked for and what is there instead."""
    found = layouts.first_existing(candidates)
    if found is not None:
        return found
    folders = [p.parent for p in candidates if p.parent.is_dir()]
    others = list(dict.fromkeys(p.name for p in candidates))[1:]
    there = _listing(folders[0]) if folders else _listing(root)
    where = folders[0] if folders else root
    raise UserError(
        f"{what}: expected {candidates[0]} (or named {', '.join(others)}), found {there} in {where}; {remedy}"
    )


def read_dirlab_image(path: Path | str, facts: DIRLabCase, hu_offset: float) -> Image:
    """A headerless int16 image (x fastest) in HU: stored value - ``hu_offset``; float32 [1, X, Y, Z].

    Raises:
        UserError: the file's size is not that of the case.
    """
    file = existing_file(path)
    x, y, z = facts.shape
    expected, found = 2 * x * y * z, file.stat().st_size
    if found != expected:
        raise UserError(
            f"{file}: expected {expected} bytes ({x} x {y} x {z} int16), found {found}; copy it again, or state the "
            f"size of a cropped or resampled copy in {layouts.GEOMETRY_FILE} beside the case folders"
        )
    stored = np.fromfile(file, dtype=layouts.DIRLAB_DTYPE).reshape(z, y, x).transpose(2, 1, 0)
    hu = torch.from_numpy(np.ascontiguousarray(stored, dtype=np.float32)) - hu_offset
    return Image(hu[None], Domain.of(facts.shape, layouts.dirlab_affine(facts.spacing)), str(file))


def hu_offset_problem(image: Image, hu_offset: float) -> str | None:
    """Why the offset is wrong, or None: a thorax must show air near -1000 HU and soft tissue near 0 HU.

    1000 and 1024 cannot be told apart by this (both are reported for these data); 0 or a doubled offset can.
    """
    stored = image.data + hu_offset

    def shares(offset: float) -> tuple[float, float]:
        hu = stored - offset
        air = ((hu > AIR_HU[0]) & (hu < AIR_HU[1])).float().mean().item()
        soft = ((hu > SOFT_TISSUE_HU[0]) & (hu < SOFT_TISSUE_HU[1])).float().mean().item()
        return air, soft

    def plausible(offset: float) -> bool:
        air, soft = shares(offset)
        return air >= 0.01 and soft >= 0.05

    if plausible(hu_offset):
        return None
    better = [f"{o:g}" for o in (1024.0, 1000.0, 0.0) if plausible(o)]
    advice = f"set data.hu_offset to {' or '.join(better)}" if better else "look at the image"
    air, soft = shares(hu_offset)
    return (
        f"{image.source}: with hu_offset {hu_offset:g}, {100 * air:.1f}% of the voxels are near -1000 HU (air) and "
        f"{100 * soft:.1f}% near 0 HU (soft tissue), too few for a thorax; {advice}"
    )


def read_dirlab_landmarks(path: Path | str, domain: Domain) -> Points:
    """Landmarks, rows ``x y z`` of voxels counted from 1, as RAS mm float64 [n, 3].

    Raises:
        UserError: a row that is not three numbers, no row, or a landmark outside the image.
    """
    file = existing_file(path)
    rows = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        cells = line.replace(",", " ").split()
        if not cells:
            continue
        try:
            x, y, z = (float(cell) for cell in cells)
        except ValueError:
            raise UserError(
                f"{file}: line {number}: expected three numbers x y z, found {line.strip()[:40]!r}; correct the file"
            ) from None
        rows.append((x, y, z))
    if not rows:
        raise UserError(f"{file}: expected rows x y z, found none; copy the file again")
    voxels = torch.tensor(rows, dtype=torch.float64) - layouts.DIRLAB_LANDMARK_BASE
    points = transform_points(domain.voxel_to_world, voxels)
    check_points_inside(points, domain, f"{file} (voxels counted from {layouts.DIRLAB_LANDMARK_BASE})")
    return points


def mask_candidates(folder: Path | str, case: int, phase: str) -> list[Path]:
    """Names under which a lung mask of a phase is looked for: ``case1_T00_mask.nii.gz``, ``case1_T00.nii.gz``, ..."""
    return [
        Path(folder) / sub / f"{prefix}_{phase}{suffix}{ending}"
        for sub in ("", f"case{case}", f"Case{case}", layouts.dirlab_case(case).folder)
        for ending in (".nii.gz", ".nii", ".mha", ".mhd")
        for suffix in ("_mask", "_lungs", "_s", "")
        for prefix in (f"case{case}", f"Case{case}")
    ]


def read_dirlab_mask(path: Path | str, domain: Domain) -> Mask:
    """A user's lung mask, bool [X, Y, Z], matched to the image **by voxel index**.

    The images have no header, so the orientation and origin in a mask's header are those of whatever conversion it
    came from; only its shape must agree. Landmarks outside the mask betray one that is flipped.
    """
    image = read_image(path)
    if image.domain.shape != domain.shape:
        raise UserError(
            f"{path}: expected a mask of shape {domain.shape} as its image, found {image.domain.shape}; "
            "make it on the image's own grid"
        )
    return read_mask(Image(image.data, domain, str(path)), domain)


def _listing(folder: Path, most: int = 5) -> str:
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    if not names:
        return "nothing"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
