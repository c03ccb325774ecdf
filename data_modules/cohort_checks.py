"""What lies under a folder (or is listed in a table): every cohort that a data module recognises there."""

from collections.abc import Callable
from pathlib import Path

from data_modules.cohort import CohortDataModule
from data_modules.crl import FetalCRL
from data_modules.dhcp import DHCP
from data_modules.ukbiobank import UKBiobank
from medinr.data.cohort_module import CohortModule
from medinr.data.layouts_brain import UKB_KEYS, UKB_SCAN, dhcp_folder
from medinr.data.tables import Table, condition_of, read_table
from medinr.errors import UserError

IMAGES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
OWN_COLUMNS = ("name", "person", "split", "labels", "mask")


def cohort_lines(root: Path) -> list[str]:
    """``NAME: ok: ...``, then a line for each note and exclusion; every scan is read. Empty: nothing recognised.

    Raises:
        UserError: a table that cannot be read.
    """
    if root.is_file():
        return _lines(root.stem, lambda: _of_table(root))
    lines = []
    if dhcp_folder(root) is not None:
        lines += _lines("dhcp", lambda: DHCP(str(root)))
    if any(next(root.glob(f"{deeper}{UKB_SCAN.format(eid='*', visit='*')}*"), None) for deeper in ("", "*/")):
        lines += _lines("ukbiobank", lambda: UKBiobank(str(root), str(_phenotypes(root))))
    if next(root.glob("STA[0-9][0-9].nii*"), None):
        lines += _lines("fetal_crl", lambda: FetalCRL(str(root)))
    return lines


def _lines(name: str, make: Callable[[], CohortModule]) -> list[str]:
    try:
        module = make()
        found = module.check()
    except UserError as error:
        return [f"{name}: problem: {error}"]
    kind = "warning" if module.cohort.excluded else "ok"
    return [f"{name}: {kind}: {found[0].partition(': ')[2]}", *(f"{name}: {line}" for line in found[1:])]


def _phenotypes(root: Path) -> Path:
    """The table beside the archives: the first CSV or TSV with a column of eids."""
    for file in sorted([*root.glob("*.csv"), *root.glob("*.tsv"), *root.glob("*.txt")]):
        try:
            if read_table(file, UKB_KEYS, ()).find(*UKB_KEYS):
                return file
        except UserError:
            continue
    raise UserError(f"{root}: expected a table of phenotypes with a column eid or f.eid (CSV, TSV), found none; add it")


def _of_table(file: Path) -> CohortDataModule:
    """A cohort whose modalities are the columns of image files, and whose conditions all the others that can be."""
    table = read_table(file)
    images = [column for column in table.columns if _is_image(table, column) and column not in OWN_COLUMNS]
    if not images:
        raise UserError(f"{file}: expected a column of image files ({', '.join(IMAGES)}), found none; name one")
    conditions = []
    for column in table.columns:
        if column.casefold() in OWN_COLUMNS or column in images:
            continue
        try:
            condition_of(column, [row[column] for row in table.rows], str(file))
        except UserError:
            continue
        conditions.append(column)
    return CohortDataModule(str(file), images, conditions)


def _is_image(table: Table, column: str) -> bool:
    cells = [row[column] for row in table.rows if row[column]]
    return bool(cells) and all(cell.endswith(IMAGES) for cell in cells)
