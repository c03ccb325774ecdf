"""The perinatal brain phantom on disk: many subjects in the layout of dHCP, and their truth."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medinr import io
from medinr.data.layouts_brain import DHCP_PARTICIPANTS, DHCP_PIPELINE, DHCP_WRITTEN, DRAWEM9, dhcp_file
from medinr.errors import UserError
from medinr.phantoms.perinatal import (
    AGES,
    CALLOSUM,
    MATURATION_SD,
    MODALITIES,
    VENTRICLES_ML,
    VENTRICLES_RANGE,
    VENTRICLES_SD,
    PerinatalCase,
    perinatal_case,
)  # fmt: skip
from medinr.space import Domain

AGENESIS_SHARE, NO_T1W_SHARE = 0.15, 0.1
GAIN, GAIN_SD = 600.0, 0.1
"""The scanner's intensities are arbitrary: CSF in T2w, and the sd of its logarithm between subjects."""
SMALLEST = 24
"""Voxels from back to front, 6 mm each: below that there is no cortex left."""


@dataclass(frozen=True)
class Draw:
    """What is decided for a subject before anything is drawn in voxels."""

    number: int
    age: float
    ventricles_ml: float
    callosum: bool
    has_t1w: bool
    gain: float
    sex: str
    birth_age: float

    @property
    def subject(self) -> str:
        return f"PH{self.number:05d}XX{self.number % 90 + 10}"

    @property
    def session(self) -> str:
        return str(1000 + 7 * self.number)

    @property
    def name(self) -> str:
        return f"sub-{self.subject}_ses-{self.session}"

    def case(self, seed: int, size: int | None) -> PerinatalCase:
        return perinatal_case(self.age, self.ventricles_ml, self.callosum, seed, self.number, size)


def draws(subjects: int, seed: int, ages: tuple[float, float] = AGES) -> list[Draw]:
    """Ages spread evenly over the range; ventricles, callosum and the rest independent of them."""
    rng = np.random.default_rng([seed, 71])
    low, high = ages
    age = low + (high - low) * (rng.permutation(subjects) + rng.uniform(0, 1, subjects)) / subjects
    volume = np.clip(VENTRICLES_ML * np.exp(rng.normal(0, VENTRICLES_SD, subjects)), *VENTRICLES_RANGE)
    agenesis = set(rng.permutation(subjects)[: round(AGENESIS_SHARE * subjects)].tolist())
    without = set(rng.permutation(subjects)[: round(NO_T1W_SHARE * subjects)].tolist())
    gain = GAIN * np.exp(rng.normal(0, GAIN_SD, subjects))
    sex = rng.integers(0, 2, subjects)
    born = np.maximum(age - rng.exponential(2.0, subjects), 23.0)
    return [
        Draw(
            i + 1, round(float(age[i]), 2), float(volume[i]), i not in agenesis, i not in without, float(gain[i]),
            ("female", "male")[sex[i]], round(float(min(born[i], age[i])), 2),
        )
        for i in range(subjects)
    ]  # fmt: skip


def write_dhcp_phantom(
    out: Path,
    subjects: int,
    size: int | None = None,
    seed: int = 0,
    release: str = "third",
    tell: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write the perinatal phantom. Same arguments, same content.

    ``participants.tsv``, and under ``derivatives/dhcp_anat_pipeline`` one folder a subject with its sessions table and
    ``T2w``, ``T1w`` (a tenth have none), both restored, ``drawem9`` and the brain mask. The sessions table has two
    columns more than dHCP's: ``ventricle_volume`` (lateral, ml, of the true labels) and ``callosum`` (present or
    absent). ``truth/``, which no data module reads: ``subjects.tsv`` (maturation, requested volumes, poses),
    ``SUBJECT_labels.nii.gz`` (clean; 10 is the corpus callosum) and ``parameters.json``.

    Args:
        subjects: how many, one session each.
        size: voxels from back to front; None: 1.6 mm.
        release: whose file names: ``third`` or ``second`` of dHCP.
        tell: is called with a word on each subject.

    Raises:
        UserError: no subject; too few voxels; a release that does not exist (before anything is written).
    """
    if subjects < 1:
        raise UserError(f"--subjects: expected 1 or more, got {subjects}")
    if size is not None and size < SMALLEST:
        raise UserError(f"--size: expected at least {SMALLEST} voxels from back to front, got {size}")
    if release not in DHCP_WRITTEN:
        raise UserError(f"release: expected {' or '.join(DHCP_WRITTEN)}, got {release!r}")
    out = Path(out)
    files: list[Path] = []
    truth = []
    drawn = draws(subjects, seed)
    for draw in drawn:
        case = draw.case(seed, size)
        files += list(_write_subject(out, draw, case, release))
        truth.append(_truth(draw, case))
        if tell is not None:
            tell(f"{draw.name}: {draw.age:.1f} weeks ({draw.number} of {subjects})")
    people = [[d.subject, d.sex, f"{d.birth_age:.2f}", f"{_weight(d):.2f}", "1"] for d in drawn]
    header = ["participant_id", "gender" if release == "second" else "sex", "birth_age", "birth_weight", "singleton"]
    texts = {
        DHCP_PARTICIPANTS: _table(header, people),
        "truth/subjects.tsv": _table(list(truth[0]), [list(row.values()) for row in truth]),
        "truth/parameters.json": json.dumps(_parameters(subjects, size, seed), indent=2) + "\n",
    }
    for name, text in texts.items():
        io.write_text(out / name, text)
    return [*files, *(out / name for name in texts)]


def _write_subject(out: Path, draw: Draw, case: PerinatalCase, release: str) -> Iterator[Path]:
    names, domain = DHCP_WRITTEN[release], Domain.of(case.grid.shape, case.grid.affine)
    volumes: dict[str, NDArray[Any]] = {"labels": case.segmentation, "mask": case.mask.astype(np.uint8)}
    for modality in MODALITIES:
        if modality == "T2w" or draw.has_t1w:
            scanned, restored = case.images[modality]
            volumes[modality] = np.rint(draw.gain * scanned).astype(np.int16)
            volumes[f"restored_{modality}"] = np.rint(draw.gain * restored).astype(np.int16)
    for what, volume in volumes.items():
        file = dhcp_file(out / DHCP_PIPELINE, draw.subject, draw.session, names[what])
        io.write_image(file, torch.from_numpy(volume), domain)
        yield file
    file = out / "truth" / f"{draw.name}_labels.nii.gz"
    io.write_image(file, torch.from_numpy(case.labels), domain)
    yield file
    sessions = out / DHCP_PIPELINE / f"sub-{draw.subject}" / f"sub-{draw.subject}_sessions.tsv"
    header = [
        "session_id", "scan_age", "scan_head_circumference", "radiology_score", "scan_number", "sedation",
        "ventricle_volume", "callosum",
    ]  # fmt: skip
    row = [
        draw.session, f"{draw.age:.2f}", f"{_circumference_cm(case):.1f}", "1" if draw.callosum else "4", "1", "0",
        f"{case.volumes_ml()['ventricles']:.3f}", "present" if draw.callosum else "absent",
    ]  # fmt: skip
    io.write_text(sessions, _table(header, [row]))
    yield sessions


def _circumference_cm(case: PerinatalCase) -> float:
    """Of the largest horizontal section of the head, taken as an ellipse."""
    inside = case.layers["scalp"] < 0
    sides = [np.ptp(np.flatnonzero(inside.any(axis=axes))) + 1 for axes in ((1, 2), (0, 2))]
    a, b = (0.5 * n * case.grid.spacing for n in sides)
    h = ((a - b) / (a + b)) ** 2
    return float(np.pi * (a + b) * (1 + 3 * h / (10 + np.sqrt(4 - 3 * h))) / 10)


def _weight(draw: Draw) -> float:
    """Birth weight in kg of the median child."""
    return float(3.4 * (draw.birth_age / 40) ** 3.3)


def _truth(draw: Draw, case: PerinatalCase) -> dict[str, str]:
    numbers = {
        "scan_age": case.age, "maturation": case.maturation, "requested_ventricles_ml": case.ventricles_ml,
        "size": case.size, **{f"stretch_{a}": v for a, v in zip("xyz", case.person.stretch, strict=True)},
        **{f"rotation_{a}": v for a, v in zip("xyz", case.person.rotation, strict=True)},
        **{f"translation_{a}": v for a, v in zip("xyz", case.person.translation, strict=True)},
        "gain": draw.gain, **{f"{name}_ml": volume for name, volume in case.volumes_ml().items()},
    }  # fmt: skip
    values = {name: f"{value:.6g}" for name, value in numbers.items()}
    return {"name": draw.name, **values, "callosum": "present" if draw.callosum else "absent"}


def _parameters(subjects: int, size: int | None, seed: int) -> dict[str, Any]:
    return {
        "subjects": subjects, "size": size, "seed": seed, "maturation_sd_weeks": MATURATION_SD,
        "age_noise_floor_mae_weeks": round(MATURATION_SD * float(np.sqrt(2 / np.pi)), 4),
        "rotations": "rotation vectors, radians; translations in mm; from the upright head to the scanner, RAS",
        "labels": {**{str(value): name for value, name in DRAWEM9.items()}, str(CALLOSUM): "corpus_callosum"},
    }  # fmt: skip


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in [header, *rows])
