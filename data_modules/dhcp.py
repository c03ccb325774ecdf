"""The developing Human Connectome Project, neonatal and fetal: BIDS derivatives of both releases, as they are."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from medinr.data.cohort import Condition
from medinr.data.cohort_files import Entry
from medinr.data.cohort_module import CohortModule
from medinr.data.layouts_brain import (
    DHCP_ENDINGS,
    DHCP_PARTICIPANTS,
    DHCP_PIPELINE,
    DRAWEM9,
    dhcp_file,
    dhcp_folder,
    dhcp_scans,
)  # fmt: skip
from medinr.data.tables import Table, condition_of, read_table
from medinr.errors import UserError

RENAMED = {"gender": "sex"}
"""Columns of the older release by the name that they have now."""


class DHCP(CohortModule):
    """Scans of newborns (or fetuses: ask for T2w alone), tissues of drawem9, conditions of both tables.

    Args:
        root: folder of ``participants.tsv`` and ``derivatives/dhcp_anat_pipeline``, or that pipeline's folder.
        modalities: some of T2w and T1w, the restored images (T2w: else the raw one).
        conditions: columns of the sessions or participants tables, each ``name``, ``name:continuous`` or
            ``name:categorical``: ``scan_age``, ``sex``, ``birth_age``, ...
        val, test: names of scans (``sub-X_ses-Y``) or persons (``sub-X``), or a share of the persons.
        spacing: mm of the working grid; None: 0.5 mm, as they are.
        margin_mm: crop to the brain mask and this margin; None: whole images.
        cache_dir: keep the prepared scans in this folder, which several hundred at full size need.
    """

    def __init__(
        self,
        root: str,
        modalities: list[str] | None = None,
        conditions: list[str] | None = None,
        val: list[str] | float = 0.0,
        test: list[str] | float = 0.0,
        spacing: float | list[float] | None = None,
        margin_mm: float | None = None,
        seed: int = 0,
        steps_per_epoch: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        chosen = ["T2w", "T1w"] if modalities is None else modalities
        super().__init__("dhcp", chosen, val, test, spacing, margin_mm, seed, steps_per_epoch, cache_dir)
        if unknown := [m for m in chosen if m not in ("T2w", "T1w")]:
            raise UserError(f"data.modalities: expected T2w or T1w, found {unknown[0]!r}; correct it")
        self.root = root
        self.asked = ["scan_age"] if conditions is None else conditions

    def label_names(self) -> Mapping[int, str]:
        return DRAWEM9

    def listed(self) -> tuple[list[Entry], list[Condition]]:
        folder = dhcp_folder(self.root)
        if folder is None:
            raise UserError(
                f"{self.root}: expected {DHCP_PIPELINE}/sub-*/ses-*/anat or sub-*/ses-*/anat, found neither; "
                "check data.root"
            )
        scans = dhcp_scans(folder)
        cells = self._cells(folder, scans)
        where = str(folder)
        columns = {name: name for row in cells for name in row}
        conditions, values = [], {}
        for spec in self.asked:
            name, colon, kind = spec.partition(":")
            name = RENAMED.get(name, name)
            if name not in columns:
                have = ", ".join(columns) or "no table at all"
                raise UserError(f"{where}: expected a column {name} in a table, found {have}; correct data.conditions")
            condition, values[name], notes = condition_of(
                f"{name}{colon}{kind}", [row.get(name, "") for row in cells], where
            )
            conditions.append(condition)
            self.notes += notes
        entries = []
        for number, (subject, session) in enumerate(scans):
            found = {w: _first(folder, subject, session, DHCP_ENDINGS[w]) for w in (*self.modalities, "labels", "mask")}
            known = {c.name: values[c.name][number] for c in conditions}
            images = {m: file for m in self.modalities if (file := found[m]) is not None}
            name = f"sub-{subject}_ses-{session}"
            if images:
                entries.append(Entry(name, f"sub-{subject}", images, found["labels"], found["mask"], known))
            else:
                self.excluded.append((name, f"no {' or '.join(self.modalities)} image in its folder"))
        return entries, conditions

    def _cells(self, folder: Path, scans: list[tuple[str, str]]) -> list[dict[str, str]]:
        """What the tables say of each scan; sessions come before participants where both have a column."""
        people: dict[str, dict[str, str]] = {}
        file = next((p for p in (Path(self.root) / DHCP_PARTICIPANTS, folder / DHCP_PARTICIPANTS) if p.exists()), None)
        if file is None:
            self.notes.append(f"no {DHCP_PARTICIPANTS} beside the data: its columns are missing")
        else:
            people = self._by(file, ("participant_id",), "sub-")
        found = []
        for subject, session in scans:
            sessions: dict[str, dict[str, str]] = {}
            if (table := _sessions_table(self.root, folder, subject)) is not None:
                sessions = self._by(table, ("session_id",), "ses-")
            found.append({**people.get(subject, {}), **sessions.get(session, {})})
        without = sum(not row for row in found)
        if without and without < len(found):
            self.notes.append(f"{without} of {len(found)} scans are in no table")
        return found

    def _by(self, file: Path, key: tuple[str, ...], prefix: str) -> dict[str, dict[str, str]]:
        """Rows of a table by the key without its prefix, columns by their present names in lower case."""
        table = read_table(file)
        self.notes += [note for note in table.notes if note not in self.notes]
        rows: dict[str, dict[str, str]] = {}
        for name, row in _rows(table, table.column(*key), prefix):
            if name in rows and rows[name] != row:
                note = f"{file.name}: {prefix}{name} is there twice with different values: the first is used"
                self.notes += [note] if note not in self.notes else []
            rows.setdefault(name, row)
        return rows


def _rows(table: Table, key: str, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    for row in table.rows:
        if name := row[key].removeprefix(prefix):
            lower = {column.casefold(): cell for column, cell in row.items() if column != key}
            yield name, {RENAMED.get(column, column): cell for column, cell in lower.items()}


def _sessions_table(root: str | Path, folder: Path, subject: str) -> Path | None:
    names = [f"sub-{subject}/sub-{subject}_sessions.tsv", f"sub-{subject}_sessions.tsv", f"sub-{subject}/sessions.tsv"]
    return next((p for base in (folder, Path(root)) for name in names if (p := base / name).exists()), None)


def _first(folder: Path, subject: str, session: str, endings: tuple[str, ...]) -> Path | None:
    files = [dhcp_file(folder, subject, session, ending) for ending in endings]
    return next((file for file in files if file.exists()), None)
