"""Writer of the breathing-thorax phantom in the DIR-LAB 4DCT layout, with its truth beside it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medinr.data import layouts
from medinr.errors import UserError
from medinr.io import atomic_path
from medinr.phantoms.thorax_case import ThoraxCase, phantom_facts, thorax_case

__all__ = ["ThoraxCase", "thorax_case", "write_dirlab_phantom"]

ALL_PHASES = tuple(range(0, 100, 10))


def write_dirlab_phantom(
    out: Path,
    cases: Sequence[int] = (1, 2, 3, 4, 5),
    size: int | None = None,
    seed: int = 0,
    phases: Sequence[int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write breathing-thorax phantoms as a DIR-LAB 4DCT data root. Same arguments, same bytes.

    Images: headerless little-endian int16, x fastest, stored value = HU + 1024, with the names of the original
    download. Landmarks: 300 (T00, T50) and 75 (T00 ... T50), 1-based voxels; those of T00 are integers, as DIR-LAB's
    are. DIFFERENT from DIR-LAB, the other phases keep four decimals: rounding them would add up to half a voxel to
    every registration error, and readers take floats. Files of phases that are not asked for are not written.
    ``geometry.json`` states shape and spacing.

    ``truth/caseN/``, which no data module reads: ``displacement_Txx.nii.gz`` (T00 -> T50, at T00's voxel centres; 5-D,
    intent 1007, LPS mm; exact), ``lung_mask_Txx.nii.gz``, ``landmarks.csv`` (all ten phases whatever ``phases`` is;
    world RAS mm and 0-based voxels), ``parameters.json``.

    Args:
        out: the data root to make or extend.
        cases: DIR-LAB case numbers.
        size: in-plane voxels; None is each case's published size. The field of view stays the same, slices become
            max(2.5, in-plane spacing) mm.
        seed: seed of anatomy, motion and noise.
        phases: percent of the cycle (0 = T00, 50 = T50); None means all ten.
        progress: called with a line before each file that takes time.

    Returns:
        The files written.

    Raises:
        UserError: unknown case or phase, or an impossible size (before anything is written).
    """
    out = Path(out)
    wanted = _checked_phases(phases)
    for case in cases:
        phantom_facts(case, size)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: expected a folder to write to, found a file; give another path")
    written: list[Path] = []
    for case in cases:
        phantom = thorax_case(case, size, seed)
        phantom.landmarks  # noqa: B018  refuses sizes that are too coarse before anything is written
        written += _write_case(out, phantom, wanted, progress or (lambda line: None))
    # At the real size too: a case that geometry.json names is not held against the published landmark motion.
    written.append(layouts.write_geometry(out, [phantom_facts(c, size) for c in cases]))
    return written


def _checked_phases(phases: Sequence[int] | None) -> tuple[int, ...]:
    wanted = ALL_PHASES if phases is None else tuple(dict.fromkeys(phases))
    unknown = [p for p in wanted if p not in ALL_PHASES]
    if unknown or not wanted:
        raise UserError(f"phases: expected some of 0, 10, ... 90, found {list(wanted)}; correct the list")
    return wanted


def _write_case(out: Path, phantom: ThoraxCase, phases: Sequence[int], progress: Callable[[str], None]) -> list[Path]:
    number = phantom.facts.number
    truth = out / "truth" / phantom.facts.name
    extreme, sampled = phantom.landmarks
    written: list[Path] = []
    for phase in phases:
        name = f"T{phase:02d}"
        progress(f"case {number}, {name}")
        stored = (phantom.image(phase) + layouts.DIRLAB_HU_OFFSET).astype(layouts.DIRLAB_DTYPE)
        image = layouts.dirlab_image_candidates(out, number, name)[0]
        written.append(_write(image, stored.tobytes(order="F")))
        written.append(_write_nifti(truth / f"lung_mask_{name}.nii.gz", _mask_image(phantom, phase)))
        if name in layouts.DIRLAB_EXTREME_PHASES:
            path = layouts.dirlab_extreme_landmark_candidates(out, number, name)[0]
            written.append(_write(path, _landmark_lines(phantom, extreme, phase)))
        if name in layouts.DIRLAB_SAMPLED_PHASES:
            path = layouts.dirlab_sampled_landmark_candidates(out, number, name)[0]
            written.append(_write(path, _landmark_lines(phantom, sampled, phase)))
    if 50 in phases:
        progress(f"case {number}, true displacement")
        written.append(_write_nifti(truth / "displacement_T50.nii.gz", _displacement_image(phantom, 50)))
    written.append(_write(truth / "landmarks.csv", _landmark_table(phantom)))
    written.append(_write(truth / "parameters.json", _parameters(phantom)))
    return written


def _landmark_lines(phantom: ThoraxCase, voxels: NDArray[np.int64], phase: int) -> bytes:
    positions = phantom.landmark_positions(voxels, phase) + layouts.DIRLAB_LANDMARK_BASE
    text = "%d\t%d\t%d\n" if phase == 0 else "%.4f\t%.4f\t%.4f\n"
    rows = np.rint(positions) if phase == 0 else positions
    return "".join(text % tuple(row) for row in rows).encode()


def _landmark_table(phantom: ThoraxCase) -> bytes:
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["set", "index", "phase", "x", "y", "z", "i", "j", "k"])
    for name, voxels in zip(("extreme", "sampled"), phantom.landmarks, strict=True):
        for phase in ALL_PHASES:
            positions = phantom.landmark_positions(voxels, phase)
            world = phantom.voxel_to_world(positions)
            for index, (w, v) in enumerate(zip(world, positions, strict=True)):
                table.writerow([name, index, f"T{phase:02d}", *(f"{n:.6f}" for n in (*w, *v))])
    return buffer.getvalue().encode()


def _parameters(phantom: ThoraxCase) -> bytes:
    moves = {}
    for name, voxels in zip(("extreme", "sampled"), phantom.landmarks, strict=True):
        start = phantom.voxel_to_world(voxels.astype(float))
        lengths = np.linalg.norm(phantom.phase_map(start, 50, "inside") - start, axis=-1)
        moves[name] = {"mean": round(float(lengths.mean()), 4), "maximum": round(float(lengths.max()), 4)}
    content = {
        "case": asdict(phantom.facts),
        "seed": phantom.seed,
        "affine": phantom.affine.tolist(),
        "landmark_motion_T00_T50_mm": moves,
        "noise_hu": phantom.noise,
        "scale_world_mm_per_body_mm": phantom.scale.tolist(),
        "habitus": asdict(phantom.habitus),
        "motion": {key: np.asarray(value).tolist() for key, value in vars(phantom.motion).items()},
    }
    # The published mean motion is a fact of the real case, not of its phantom.
    del content["case"]["mean_motion"]
    return (json.dumps(content, indent=2) + "\n").encode()


def _mask_image(phantom: ThoraxCase, phase: int) -> nib.nifti1.Nifti1Image:
    return nib.nifti1.Nifti1Image(phantom.lung_mask(phase).astype(np.uint8), phantom.affine)


def _displacement_image(phantom: ThoraxCase, phase: int) -> nib.nifti1.Nifti1Image:
    field = phantom.displacement(phase)
    field[..., :2] *= -1.0  # ITK, ANTs and Slicer read vectors in LPS
    image = nib.nifti1.Nifti1Image(field[:, :, :, None, :], phantom.affine)
    image.header.set_intent(1007)
    return image


def _write_nifti(path: Path, image: nib.nifti1.Nifti1Image) -> Path:
    image.header.set_xyzt_units("mm")
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    # A fixed time stamp keeps the bytes the same from run to run.
    return _write(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write(path: Path, content: bytes) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path
