"""UK Biobank's brain MRI: T1 from the owner's archives (or unpacked), conditions from the phenotype table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medinr.data.archives import Source, ZipMember, members, read_bytes, source_domain
from medinr.data.cohort import Condition
from medinr.data.cohort_files import Entry, ReadScan
from medinr.data.cohort_module import CohortModule
from medinr.data.layouts_brain import (
    FAST,
    FIRST,
    MNI_CORNER,
    MNI_SHAPE,
    UKB_AGE,
    UKB_FAST,
    UKB_FIRST,
    UKB_KEYS,
    UKB_LINEAR,
    UKB_MASK,
    UKB_MNI,
    UKB_SCAN,
    UKB_SEX,
    UKB_T1,
    UKB_VENTRICLES,
    UKB_VENTRICLES_NORMALISED,
    ukb_columns,
)
from medinr.data.tables import Table, condition_of, number, read_table
from medinr.errors import UserError
from medinr.io import existing_file
from medinr.io.fsl import flirt_to_world, parse_flirt
from medinr.space import Domain
from medinr.types import Matrix

SPACES = ("linear", "native", "mni")
LABELS: Mapping[str, tuple[str, Mapping[int, str]]] = {"fast": (UKB_FAST, FAST), "first": (UKB_FIRST, FIRST)}
NAMED = {
    "age": (UKB_AGE, 1.0), "sex": (UKB_SEX, 1.0), "ventricles_ml": (UKB_VENTRICLES, 1e-3),
    "normalised_ventricles_ml": (UKB_VENTRICLES_NORMALISED, 1e-3),
}  # fmt: skip
"""Conditions by name: field, and factor from its unit."""
SEXES = {"0": "female", "1": "male"}


@dataclass(frozen=True)
class Found:
    """A scan that is there: an archive, or the folder that it was unpacked to."""

    eid: str
    visit: int
    place: Path

    @property
    def name(self) -> str:
        return f"sub-{self.eid}_ses-{self.visit}"

    def files(self) -> dict[str, Source]:
        """Where each file of the scan lies, by its name in the archive.

        Raises:
            UserError: a damaged archive.
        """
        if self.place.is_dir():
            return {str(f.relative_to(self.place).as_posix()): f for f in self.place.rglob("*") if f.is_file()}
        return {name: ZipMember(self.place, name) for name in members(self.place)}


class UKBiobank(CohortModule):
    """T1w brains of UK Biobank; archives are read without unpacking.

    Three spaces. ``linear``: the native image, placed in MNI space by FLIRT's matrix of the archive; its voxels are
    untouched, so FAST's and FIRST's labels fit, and individual shape is all there. ``native``: as scanned. ``mni``:
    ``T1_brain_to_MNI``, which FNIRT has warped, so that much of what differs between people is gone; no labels.

    Args:
        root: folder of ``EID_20252_2_0.zip`` files, or of folders of that name; one folder deeper is looked at too.
        table: phenotypes, CSV (``21003-2.0``) or R export (``f.21003.2.0``).
        conditions: ``age``, ``sex``, ``ventricles_ml``, ``normalised_ventricles_ml``, or any field by its number
            (``25010``), each with ``:continuous`` or ``:categorical`` where that is not clear.
        space: see above.
        labels: ``fast`` (1 CSF, 2 grey, 3 white matter), ``first`` (subcortical structures) or ``none``.
        visits: imaging visits: 2, and 3 for the repeat. All scans of a person are in one split.
        brain: set what is outside the brain mask to 0 (``linear`` and ``native``).
        withdrawn: file with one eid a line, of people who have withdrawn their consent.
        val, test: names (``sub-EID_ses-2``) or persons (``sub-EID``), or a share.
        spacing: mm of the working grid; None: the files' own.
        margin_mm: crop to the brain mask and this margin; None: whole images.
    """

    def __init__(
        self,
        root: str,
        table: str,
        conditions: list[str] | None = None,
        space: str = "linear",
        labels: str = "fast",
        visits: list[int] | None = None,
        brain: bool = True,
        withdrawn: str | None = None,
        val: list[str] | float = 0.0,
        test: list[str] | float = 0.0,
        spacing: float | list[float] | None = None,
        margin_mm: float | None = None,
        seed: int = 0,
        steps_per_epoch: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__("ukbiobank", ["T1w"], val, test, spacing, margin_mm, seed, steps_per_epoch, cache_dir)
        if space not in SPACES:
            raise UserError(f"data.space: expected {', '.join(SPACES)}; found {space!r}; correct it")
        if labels not in (*LABELS, "none"):
            raise UserError(f"data.labels: expected fast, first or none; found {labels!r}; correct it")
        self.root, self.table, self.space, self.withdrawn = root, table, space, withdrawn
        self.asked = ["age"] if conditions is None else conditions
        self.visits = [2] if visits is None else visits
        self.labels = "none" if space == "mni" else labels
        self.brain = brain and space != "mni"

    def label_names(self) -> Mapping[int, str]:
        return LABELS[self.labels][1] if self.labels in LABELS else {}

    def reader(self) -> ReadScan:
        return ReadScan(sorted(self.label_names()), self.spacing, self.margin_mm, masked=self.brain)

    def listed(self) -> tuple[list[Entry], list[Condition]]:
        scans = self._scans()
        table = read_table(self.table, UKB_KEYS, {scan.eid for scan in scans})
        self.notes += table.notes
        conditions, values = self._conditions(scans, table)
        gone = self._withdrawn()
        entries = []
        for row, scan in enumerate(scans):
            if scan.eid in gone:
                self.excluded.append((scan.name, f"has withdrawn: {self.withdrawn}"))
                continue
            try:
                entries.append(self._entry(scan, {c.name: values[c.name][row] for c in conditions}))
            except UserError as error:
                self.excluded.append((scan.name, str(error)))
        return entries, conditions

    def _scans(self) -> list[Found]:
        """All scans of the visits, by eid; an archive comes before a folder of its name."""
        root = Path(self.root)
        found: dict[tuple[str, int], Path] = {}
        for visit in self.visits:
            for ending in (".zip", ""):
                pattern = UKB_SCAN.format(eid="*", visit=visit) + ending
                for place in sorted([*root.glob(pattern), *root.glob(f"*/{pattern}")]):
                    eid = place.name.split("_")[0]
                    other = found.setdefault((eid, visit), place)
                    if other != place:
                        self.notes.append(f"{eid} is there twice: {other} is used, {place} is not")
        if not found:
            raise UserError(
                f"{root}: expected archives {UKB_SCAN.format(eid='EID', visit=self.visits[0])}.zip or folders of that "
                "name, found none; check data.root"
            )
        return [Found(eid, visit, place) for (eid, visit), place in sorted(found.items())]

    def _entry(self, scan: Found, known: Mapping[str, float]) -> Entry:
        files = scan.files()

        def needed(member: str) -> Source:
            if member not in files:
                raise UserError(f"{scan.place}: expected {member} in it, found none; copy the archive again")
            return files[member]

        image = needed(UKB_MNI if self.space == "mni" else UKB_T1)
        mask = None if self.space == "mni" else needed(UKB_MASK) if self.brain else files.get(UKB_MASK)
        labels = files.get(LABELS[self.labels][0]) if self.labels in LABELS else None
        start = None
        if self.space == "linear":
            start = mni_to_scan(needed(UKB_LINEAR), source_domain(image))
        return Entry(scan.name, f"sub-{scan.eid}", {"T1w": image}, labels, mask, known, start=start)

    def _conditions(self, scans: Sequence[Found], table: Table) -> tuple[list[Condition], dict[str, list[float]]]:
        key = table.column(*UKB_KEYS)
        by_eid: dict[str, dict[str, str]] = {}
        for row in table.rows:
            if row[key] in by_eid and by_eid[row[key]] != row:
                self.notes.append(f"{table.path.name}: {row[key]} is there twice: the first row is used")
            by_eid.setdefault(row[key], row)
        conditions, values = [], {}
        for spec in self.asked:
            name, colon, kind = spec.partition(":")
            field, factor = NAMED.get(name, (int(name) if name.isdigit() else 0, 1.0))
            if not field:
                known = ", ".join(NAMED)
                raise UserError(f"data.conditions: expected {known} or a field's number, found {name!r}; correct it")
            cells = []
            for scan in scans:
                column = table.column(*ukb_columns(field, scan.visit))
                cell = by_eid.get(scan.eid, {}).get(column, "")
                cells.append(SEXES.get(cell, cell) if name == "sex" else cell)
            condition, found, notes = condition_of(f"{name}{colon}{kind}", cells, str(table.path))
            conditions.append(condition)
            values[name] = [factor * v for v in found] if condition.kind == "continuous" else found
            self.notes += notes
        return conditions, values

    def _withdrawn(self) -> set[str]:
        if self.withdrawn is None:
            return set()
        lines = existing_file(self.withdrawn).read_text(encoding="utf-8-sig").splitlines()
        return {line.strip() for line in lines if number(line.strip()) > 0}


def mni_to_scan(source: Source, scan: Domain) -> Matrix:
    """MNI152 world -> the scan's world, from FLIRT's matrix of the scan to MNI152 at 1 mm."""
    affine = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([c + s * 0.5 for c, s in zip(MNI_CORNER, (-1, 1, 1), strict=True)])
    reference = Domain.of(MNI_SHAPE, affine)
    matrix = parse_flirt(read_bytes(source).decode("ascii", errors="replace"), str(source))
    inverse: Matrix = torch.linalg.inv(flirt_to_world(matrix, scan, reference))
    return inverse
