"""Any cohort: a table with columns for images, labels, masks and conditions."""

from collections.abc import Mapping
from pathlib import Path

from medinr.data.cohort import SPLITS, Condition
from medinr.data.cohort_files import Entry
from medinr.data.cohort_module import CohortModule
from medinr.data.tables import Table, condition_of, read_table
from medinr.errors import UserError


class CohortDataModule(CohortModule):
    """A TSV or CSV with one row a scan.

    Columns: one image file per modality, named as the modality (``T2w``); optional ``name`` (unique), ``person``
    (whose scan it is, else the name), ``labels``, ``mask``, ``split`` (train, val or test), and any conditions. Cells
    may be empty. File names are relative to ``root``.

    Args:
        table: the file.
        modalities: columns of images, in the order of a method's outputs.
        conditions: columns, each ``name``, ``name:continuous`` or ``name:categorical``.
        label_names: of the values above 0 in the label files; None: all values that occur.
        root: folder of the files; None: that of the table.
        val, test: names of scans or persons, or a share of the persons; the column ``split`` comes first.
        spacing: mm of the working grid, one length or three (along R, A and S); None: the files' own grids.
        margin_mm: crop to the mask (else the labels) and this margin; None: whole images.
    """

    def __init__(
        self,
        table: str,
        modalities: list[str],
        conditions: list[str] | None = None,
        label_names: dict[int, str] | None = None,
        root: str | None = None,
        val: list[str] | float = 0.0,
        test: list[str] | float = 0.0,
        spacing: float | list[float] | None = None,
        margin_mm: float | None = None,
        seed: int = 0,
        steps_per_epoch: int = 100,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(Path(table).stem, modalities, val, test, spacing, margin_mm, seed, steps_per_epoch, cache_dir)
        self.table = table
        self.root = Path(root) if root is not None else Path(table).parent
        self.asked = list(conditions or [])
        self.names = label_names

    def label_names(self) -> Mapping[int, str] | None:
        return self.names

    def listed(self) -> tuple[list[Entry], list[Condition]]:
        table = read_table(self.table)
        self.notes += table.notes
        images = {modality: table.column(modality) for modality in self.modalities}
        conditions, values = conditions_of(table, self.asked, self.notes)
        columns = {what: table.find(what) for what in ("name", "person", "labels", "mask", "split")}
        entries = []
        for number, row in enumerate(table.rows):
            cells = {what: row[column] if column else "" for what, column in columns.items()}
            files = {m: self.root / row[column] for m, column in images.items() if row[column]}
            name = cells["name"] or (scan_name(next(iter(files.values()))) if files else "")
            line = f"{table.path.name}, line {table.lines[number]}"
            if not files:
                self.excluded.append((name or line, "no image of any modality"))
                continue
            if cells["split"] and cells["split"] not in SPLITS:
                raise UserError(f"{line}: split: expected {', '.join(SPLITS)}, found {cells['split']!r}; correct it")
            labels, mask = (self.root / cells[what] if cells[what] else None for what in ("labels", "mask"))
            known = {c.name: values[c.name][number] for c in conditions}
            entries.append(Entry(name, cells["person"] or name, files, labels, mask, known, cells["split"] or None))
        return entries, conditions


def conditions_of(table: Table, asked: list[str], notes: list[str]) -> tuple[list[Condition], dict[str, list[float]]]:
    """The conditions asked for (``column`` or ``column:kind``), and the values of every row by condition.

    Raises:
        UserError: no such column, or nothing in it.
    """
    conditions, values = [], {}
    for spec in asked:
        name, colon, kind = spec.partition(":")
        column = table.column(name)
        cells = [row[column] for row in table.rows]
        condition, values[column], said = condition_of(f"{column}{colon}{kind}", cells, str(table.path))
        conditions.append(condition)
        notes += said
    return conditions, values


def scan_name(file: Path) -> str:
    """The name of a file without its suffixes."""
    return file.name.partition(".")[0]
