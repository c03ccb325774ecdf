"""Longitudinal series: images of one patient at several dates, listed in a table."""

import csv
from collections.abc import Sequence as Series
from datetime import date
from pathlib import Path
from typing import Any

from medinr.data.series import Frame, SequenceDataModule
from medinr.data.transforms import LungMaskd, ReadImaged, ReadOnGridd, ReadPointsd
from medinr.errors import UserError
from medinr.io import PointsSpace, existing_file, existing_source

COLUMNS = ("file", "time", "date", "mask", "points", "labels")
SIDE = ("fixed",)


class LongitudinalSequence(SequenceDataModule):
    """Images at several dates or times, in linear time; their grids may differ.

    Args:
        table: TSV (or CSV) with a header: ``file``, and ``date`` (2024-03-31; time is then in days from the first) or
            ``time`` (any unit), in ascending order; optional columns ``mask``, ``points`` and ``labels``, whose cells
            may be empty. Names are relative to the table's folder. Images of one patient must lie in one frame: align
            them rigidly first where they do not.
        reference: time or date of the image whose grid the results are on; None: the first.
        held_out: times or dates that no method may train on.
        masks: ``auto``: computed lungs (HU) where the table gives no mask; ``none``: only those of the table.
        points_space: what the tables of landmarks hold: ``ras`` or ``lps`` mm, or ``voxel`` (0-based).
    """

    def __init__(
        self,
        table: str,
        reference: float | str | None = None,
        held_out: Series[float | str] = (),
        masks: str = "none",
        points_space: PointsSpace = "ras",
        steps_per_epoch: int = 100,
        spacing: float | None = None,
        margin_mm: float | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            Path(table).stem, reference, held_out, None, False, steps_per_epoch, spacing, margin_mm, cache_dir
        )
        if masks not in ("auto", "none"):
            raise UserError(f"data.masks: expected auto or none, found {masks!r}; name masks in the table")
        self.table, self.masks = table, masks
        self.points_space: PointsSpace = points_space

    def frames(self) -> list[Frame]:
        return [frame for frame, _ in self._rows()]

    def _rows(self) -> list[tuple[Frame, str]]:
        """The frames, and each one's date or time as it is written."""
        file = existing_file(self.table)
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        rows = [
            [cell.strip() for cell in row] for row in csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ",")
        ]
        header, rows = [name.lower() for name in rows[0]], rows[1:]
        kinds = [name for name in ("time", "date") if name in header]
        if "file" not in header or len(kinds) != 1:
            raise UserError(
                f"{file}: expected a header with file and time, or file and date, found {', '.join(header[:6])}; "
                "correct the first row"
            )
        frames: list[tuple[Frame, str]] = []
        first: date | None = None
        for number, row in enumerate(rows, start=2):
            if len(row) != len(header):
                raise UserError(f"{file}: row {number}: expected {len(header)} cells, found {len(row)}; correct it")
            cells = dict(zip(header, row, strict=True))
            given = cells[kinds[0]]
            if kinds[0] == "date":
                day = _date(given, f"{file}: row {number}")
                first = first or day
                time = float((day - first).days)
            else:
                time = _number(given, f"{file}: row {number}")
            files = {"image": str(existing_source(_at(file, cells["file"], number)))}
            for kind in ("mask", "points", "labels"):
                if cells.get(kind):
                    files[kind] = str(existing_file(_at(file, cells[kind], number)))
            frames.append((Frame(time, files), given))
        return frames

    def time_of(self, given: float | str) -> float:
        """The time of a number, or of a date of the table."""
        if not isinstance(given, str):
            return float(given)
        rows = self._rows()
        found = next((frame.time for frame, written in rows if written == given), None)
        if found is not None:
            return found
        try:
            return float(given)
        except ValueError:
            there = ", ".join(written for _, written in rows)
            raise UserError(f"{self.table}: expected one of {there}, found {given!r}; choose one of these") from None

    def readers(self) -> list[Any]:
        lungs = [LungMaskd(keys=SIDE)] if self.masks == "auto" else []
        return [
            ReadImaged(SIDE),
            ReadOnGridd(("fixed_mask", "fixed_labels")),
            ReadPointsd(self.points_space, ("fixed_points",)),
            *lungs,
        ]


def _at(table: Path, name: str, number: int) -> Path:
    if not name:
        raise UserError(f"{table}: row {number}: expected the name of a file, found an empty cell; correct that row")
    return table.parent / name


def _date(text: str, where: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{where}: expected a date as 2024-03-31, found {text!r}; correct that row") from None


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: expected a time as a number, found {text!r}; correct that row") from None
