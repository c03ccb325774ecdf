"""Tables of subjects as they are found: stray tabs, missing cells, byte-order marks, bytes that are not UTF-8."""

import csv
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medinr.data.cohort import Condition
from medinr.errors import UserError
from medinr.io import existing_file

MISSING = ("", "n/a", "na", "nan", "none", "null", "missing", "unknown", "-", ".")
"""Cells that say nothing, in lower case."""
LARGEST_LEVELS = 20
"""A column of more different words than this is no categorical condition but free text."""
SURE_COLUMNS = 3
"""Beside this many numbers a single word is a slip of the pen, not a level."""


@dataclass(frozen=True)
class Table:
    """Rows by column name; every row has every column, a missing cell is an empty string.

    Args:
        path: of the file.
        columns: names as written.
        rows: cells, stripped; `MISSING` words become empty.
        lines: line of each row in the file, 1-based.
        notes: what was mended or left out.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    lines: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())

    def column(self, *names: str) -> str:
        """The first of these columns that is there, whatever its case.

        Raises:
            UserError: none is.
        """
        found = self.find(*names)
        if found is None:
            raise UserError(
                f"{self.path}: expected a column {' or '.join(names)}, found {', '.join(self.columns)}; name it so"
            )
        return found

    def find(self, *names: str) -> str | None:
        """As `column`, but None where none is there."""
        known = {column.casefold(): column for column in reversed(self.columns)}
        return next((known[name.casefold()] for name in names if name.casefold() in known), None)


def decoded(data: bytes) -> str:
    """Text of a file in UTF-8, UTF-16 with its mark, or else in the Western code page of Windows."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace").removeprefix("\u00ef\u00bb\u00bf")


def read_table(path: str | Path, key: Sequence[str] = (), wanted: Container[str] | None = None) -> Table:
    """Read a TSV or CSV with a header.

    The separator is that of the header line: tab, else semicolon, else comma. A row with too many cells is mended where
    the empty ones are as many as there are too many (stray tabs); otherwise it is left out with a note.

    Args:
        key, wanted: keep the rows alone whose cell in the first column of these names is wanted (large tables).

    Raises:
        UserError: missing or empty file; nothing but a header; a column named twice.
    """
    file = existing_file(path)
    lines = [(n, line) for n, line in enumerate(decoded(file.read_bytes()).splitlines(), start=1) if line.strip()]
    if len(lines) < 2:
        raise UserError(f"{file}: expected a header and at least one row, found {len(lines)} line(s); complete it")
    separator = next((mark for mark in "\t;," if mark in lines[0][1]), "\t")
    split = [[cell.strip() for cell in row] for row in csv.reader([line for _, line in lines], delimiter=separator)]
    columns = [name for name in split[0] if name]
    if len(set(columns)) != len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise UserError(f"{file}: expected each column once, found {twice!r} twice; rename one")
    empty_columns = [] if split[0][-1] else [len(columns)]
    names = [name.casefold() for name in columns]
    place = next((names.index(name.casefold()) for name in key if name.casefold() in names), None)
    rows, numbers, notes = [], [], []
    for (number, _), cells in zip(lines[1:], split[1:], strict=False):
        if wanted is not None and place is not None and (len(cells) <= place or cells[place] not in wanted):
            continue
        mended = _mended(cells, len(columns))
        if mended is None:
            notes.append(f"{file.name}, line {number}: expected {len(columns)} cells, found {len(cells)}: left out")
            continue
        if len(cells) > len(columns) + len(empty_columns):
            notes.append(f"{file.name}, line {number}: {len(cells) - len(columns)} stray separator(s) taken out")
        rows.append({c: "" if v.casefold() in MISSING else v for c, v in zip(columns, mended, strict=True)})
        numbers.append(number)
    return Table(file, tuple(columns), tuple(rows), tuple(numbers), tuple(notes))


def _mended(cells: list[str], count: int) -> list[str] | None:
    """A row of exactly ``count`` cells, or None where it cannot be told which belongs where."""
    while len(cells) > count and not cells[-1]:
        cells = cells[:-1]
    surplus = len(cells) - count
    if surplus > 0 and cells.count("") == surplus:
        cells = [cell for cell in cells if cell]
    return None if len(cells) > count else cells + [""] * (count - len(cells))


def number(text: str) -> float:
    """A finite number, or NaN."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def condition_of(spec: str, cells: Sequence[str], where: str) -> tuple[Condition, list[float], list[str]]:
    """A condition from a column's cells: itself, a value for each cell (NaN: missing), and notes.

    Args:
        spec: ``column``, ``column:continuous`` or ``column:categorical``. Without a kind, a column of numbers is
            continuous (a few words among them are then missing values, and noted), one of words categorical.
        cells: empty where missing.
        where: file, for messages.

    Raises:
        UserError: a kind that does not exist; no value at all; more than `LARGEST_LEVELS` different words.
    """
    name, _, kind = spec.partition(":")
    given = [cell for cell in cells if cell]
    if not given:
        raise UserError(
            f"{where}: {name}: expected a value for some scan, found {len(cells)} empty cells; "
            "leave the condition out or correct the column"
        )
    words = [cell for cell in given if math.isnan(number(cell))]
    if not kind:
        numbers = len(given) - len(words)
        kind = "continuous" if numbers > len(words) and (not words or numbers >= SURE_COLUMNS) else "categorical"
    if kind == "continuous":
        if len(words) == len(given):
            raise UserError(f"{where}: {name}: expected numbers, found {words[0]!r}; write {name}:categorical")
        notes = [f"{name}: {word!r} is no number: kept as missing" for word in sorted(set(words))]
        return Condition(name, "continuous"), [number(cell) for cell in cells], notes
    if kind != "categorical":
        raise UserError(f"{spec}: expected {name}:continuous or {name}:categorical, found {kind!r}; correct it")
    levels = tuple(sorted(set(given)))
    if len(levels) > LARGEST_LEVELS:
        raise UserError(
            f"{where}: {name}: expected at most {LARGEST_LEVELS} levels of a categorical condition, found "
            f"{len(levels)} ({levels[0]!r}, {levels[1]!r}, ...); choose another column"
        )
    values = [float(levels.index(cell)) if cell else math.nan for cell in cells]
    return Condition(name, "categorical", levels), values, []
