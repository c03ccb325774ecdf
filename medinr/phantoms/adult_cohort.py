"""The adult brain phantom on disk: archives and a table in the layout of UK Biobank, and their truth."""

import gzip
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from medinr import io
from medinr.data.layouts_brain import (
    UKB_AGE,
    UKB_FAST,
    UKB_FIRST,
    UKB_LINEAR,
    UKB_MASK,
    UKB_MNI,
    UKB_PVE,
    UKB_SCAN,
    UKB_SEX,
    UKB_T1,
    UKB_VENTRICLES,
    UKB_VENTRICLES_NORMALISED,
)  # fmt: skip
from medinr.errors import UserError
from medinr.io.fsl import world_to_flirt
from medinr.phantoms.adult import (
    AGES,
    THINNING_PER_YEAR,
    THINNING_SD,
    VENTRICLES_ML,
    VENTRICLES_PER_YEAR,
    VENTRICLES_RANGE,
    VENTRICLES_SD,
    AdultCase,
    adult_case,
)  # fmt: skip
from medinr.phantoms.adult_template import Template, mni_grid, template
from medinr.space import Domain

SIZE, SMALLEST = 109, 24
GAIN, GAIN_SD = 900.0, 0.1
FIRST_EID = 1_000_000
TABLE = "phenotypes.csv"
TRUE_LABELS = {1: "csf", 2: "grey_matter", 3: "white_matter", 4: "lateral_ventricles"}


@dataclass(frozen=True)
class AdultDraw:
    """What is decided for a subject before anything is drawn in voxels."""

    number: int
    age: float
    sex: int
    ventricles_ml: float
    gain: float

    @property
    def eid(self) -> str:
        return str(FIRST_EID + 13 * self.number)


def adult_draws(subjects: int, seed: int) -> list[AdultDraw]:
    """Ages spread evenly over the range; the ventricles' volume follows the age and chance."""
    rng = np.random.default_rng([seed, 72])
    low, high = AGES
    age = low + (high - low) * (rng.permutation(subjects) + rng.uniform(0, 1, subjects)) / subjects
    volume = VENTRICLES_ML * np.exp(VENTRICLES_PER_YEAR * (age - low) + rng.normal(0, VENTRICLES_SD, subjects))
    volume = np.clip(volume, *VENTRICLES_RANGE)
    sex, gain = rng.integers(0, 2, subjects), GAIN * np.exp(rng.normal(0, GAIN_SD, subjects))
    return [
        AdultDraw(i + 1, round(float(age[i]), 1), int(sex[i]), float(volume[i]), float(gain[i]))
        for i in range(subjects)
    ]


def write_ukb_phantom(
    out: Path,
    subjects: int,
    size: int | None = None,
    seed: int = 0,
    source: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write the adult phantom. Same arguments, same content.

    ``EID_20252_2_0.zip`` a subject: T1 (whole head, native space), brain mask, FAST labels and shares, FIRST labels
    (synthetic template), the brain in MNI space and FLIRT's matrix to it; ``phenotypes.csv`` with age, sex and the
    ventricles' volume, normalised (MNI) and native. The brain in MNI space is brought there by that matrix alone: UK
    Biobank's is warped too, which takes most of the differences in shape away. ``atlas/``: the template and its labels,
    4 being the lateral ventricles. ``truth/``: the same labels of each subject in MNI space, ``subjects.tsv``,
    ``parameters.json``.

    Args:
        size: voxels from back to front (218 is real); None: 109, 2 mm.
        source: of the template: ``auto``, ``nilearn`` or ``synthetic``.
        tell: is called with a word on each subject.

    Raises:
        UserError: no subject; too few voxels; a template that is not there (before anything is written).
    """
    if subjects < 1:
        raise UserError(f"--subjects: expected 1 or more, got {subjects}")
    size = SIZE if size is None else size
    if size < SMALLEST:
        raise UserError(f"--size: expected at least {SMALLEST} voxels from back to front, got {size}")
    grid = mni_grid(218 / size)
    brain = template(max(1.0, 0.75 * 218 / size), source)
    out = Path(out)
    files = _write_atlas(out / "atlas", brain, grid, seed)
    drawn, people, truth = adult_draws(subjects, seed), [], []
    for draw in drawn:
        case = adult_case(draw.age, draw.ventricles_ml, seed, draw.number, brain, grid)
        archive = out / f"{UKB_SCAN.format(eid=draw.eid, visit=2)}.zip"
        _write_archive(archive, case, draw)
        labels = out / "truth" / f"{draw.eid}_labels.nii.gz"
        true = case.true_labels()
        io.write_image(labels, torch.from_numpy(true), grid)
        files += [archive, labels]
        measured = float((true == 4).sum() * np.prod(grid.spacing) / 1000)
        head = abs(np.linalg.det(case.pose[:3, :3]))
        people.append(
            [draw.eid, f"{draw.age:g}", str(draw.sex), f"{1000 * measured:.0f}", f"{1000 * measured * head:.0f}"]
        )
        truth.append(
            [draw.eid, f"{draw.age:g}", f"{draw.ventricles_ml:.4f}", f"{measured:.4f}", f"{case.thinning_mm:.4f}",
             f"{case.widening_mm:.4f}", f"{draw.gain:.2f}", *(f"{v:.6f}" for v in case.pose[:3].ravel())]
        )  # fmt: skip
        if tell is not None:
            tell(f"{draw.eid}: {draw.age:.0f} years ({draw.number} of {subjects})")
    fields = [
        f"{field}-{visit}.0"
        for field, visit in ((UKB_AGE, 2), (UKB_SEX, 0), (UKB_VENTRICLES_NORMALISED, 2), (UKB_VENTRICLES, 2))
    ]
    header = ["eid", "age", "requested_ml", "ventricles_ml", "thinning_mm", "widening_mm", "gain"]
    header += [f"pose_{i}{j}" for i in range(3) for j in range(4)]
    texts = {
        TABLE: _rows(["eid", *fields], people, ","),
        "truth/subjects.tsv": _rows(header, truth, "\t"),
        "truth/parameters.json": json.dumps(_parameters(subjects, size, seed, brain), indent=2) + "\n",
    }
    for name, text in texts.items():
        io.write_text(out / name, text)
    return [*files, *(out / name for name in texts)]


def _write_atlas(folder: Path, brain: Template, grid: Domain, seed: int) -> list[Path]:
    """The template as a subject of no age: without displacement, widening or thinning."""
    case = AdultCase(0.0, 0.0, 0.0, np.eye(4), brain, grid, (seed, 0), deformed=False)
    files = [folder / "T1_brain.nii.gz", folder / "labels.nii.gz"]
    io.write_image(files[0], torch.from_numpy(GAIN * case.clean(native=False)), grid)
    io.write_image(files[1], torch.from_numpy(case.true_labels()), grid)
    return files


def _write_archive(path: Path, case: AdultCase, draw: AdultDraw) -> None:
    """The zip of a subject; the same bytes for the same subject."""
    shares = case.tissues(native=True)
    inside = case.mask(native=True)
    volumes: dict[str, tuple[NDArray[Any], Domain]] = {
        UKB_T1: (np.rint(draw.gain * case.t1(native=True)).astype(np.int16), case.native),
        UKB_MASK: (inside.astype(np.uint8), case.native),
        UKB_FAST: (case.labels(native=True), case.native),
        UKB_MNI: (np.rint(draw.gain * case.t1(native=False)).astype(np.int16), case.grid),
        **{UKB_PVE.format(tissue=i): ((shares[i] * inside).astype(np.float32), case.native) for i in range(3)},
    }
    first = case.first(native=True)
    if first is not None:
        volumes[UKB_FIRST] = (first, case.native)
    matrix = world_to_flirt(torch.from_numpy(np.linalg.inv(case.pose)), case.native, mni_grid(1.0))
    text = "".join("  ".join(f"{v:.10g}" for v in row) + "\n" for row in matrix.tolist())
    members = {name: _nifti(*volume) for name, volume in volumes.items()} | {UKB_LINEAR: text.encode()}
    with io.atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, data in sorted(members.items()):
            archive.writestr(zipfile.ZipInfo(name), data)


def _nifti(values: NDArray[Any], domain: Domain) -> bytes:
    affine = domain.voxel_to_world.numpy()
    image = nib.nifti1.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def _parameters(subjects: int, size: int, seed: int, brain: Template) -> dict[str, Any]:
    return {
        "subjects": subjects, "size": size, "seed": seed, "template": brain.name,
        "ventricles": {
            "median_ml_at_45": VENTRICLES_ML, "log_per_year": VENTRICLES_PER_YEAR, "log_sd": VENTRICLES_SD,
            "limits_ml": list(VENTRICLES_RANGE),
        },
        "thinning_mm_per_year": THINNING_PER_YEAR, "thinning_sd_mm": THINNING_SD,
        "pose": "rows of the affine map from MNI world to the scanner's, RAS mm",
        "labels": {str(value): name for value, name in TRUE_LABELS.items()},
    }  # fmt: skip


def _rows(header: list[str], rows: list[list[str]], separator: str) -> str:
    return "".join(separator.join(row) + "\n" for row in [header, *rows])
