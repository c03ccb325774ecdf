"""Landmarks from and to text tables and files of Slicer."""

import math
import re
from pathlib import Path
from typing import Literal

import torch

from medinr.errors import UserError
from medinr.io.files import existing_file, write_text
from medinr.io.slicer import read_slicer_points, slicer_suffix, write_slicer_points
from medinr.space import Domain, transform_points
from medinr.types import Points

PointsSpace = Literal["ras", "lps", "voxel"]
"""World RAS mm, world LPS mm (ITK, Slicer), or 0-based voxel indices."""

_LPS = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)


def read_points(path: str | Path, space: PointsSpace = "ras", domain: Domain | None = None) -> Points:
    """Read landmarks: float64 [n, 3], RAS mm.

    Slicer's ``.fcsv`` and ``.mrk.json`` say their own frame, and ``space`` is not asked. All else is a text table: one
    point a row, separated by commas, tabs or spaces. A first row ``x,y,z`` is optional; with it the columns are found
    by name, without it the first three count. Further columns, blank rows and rows that start with ``#`` are skipped.

    Args:
        path: the table.
        space: what its numbers mean.
        domain: the image whose voxels are meant; needed for ``space="voxel"`` (Slicer: IJK) only.

    Raises:
        UserError: missing or empty file; a row with too few columns or with something that is no finite number.
    """
    if slicer_suffix(path):
        rows, frame = read_slicer_points(path)
        if frame == "voxel" and domain is None:
            raise UserError(f"{path}: expected points in mm, found voxels (IJK) and no image; give its image too")
        return to_ras(torch.tensor(rows, dtype=torch.float64), frame, domain)  # type: ignore[arg-type]
    file = existing_file(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: expected a text table x,y,z, found binary data; export the points as CSV") from error
    columns = (0, 1, 2)
    points: list[list[float]] = []
    first, named, width = True, False, 0
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        cells = _cells(line)
        if first and not any(_is_number(cell) for cell in cells[:3]):
            columns, named = _named_columns(cells, file), True
        else:
            width = len(cells)
            points.append(_row(cells, columns, file, number))
        first = False
    if not named and width > 3 and _counted(points):
        raise UserError(f"{file}: expected x, y and z, found a first column that counts the rows; name the columns")
    if not points:
        raise UserError(f"{file}: expected at least one row x,y,z, found no points; give a table that is not empty")
    return to_ras(torch.tensor(points, dtype=torch.float64), space, domain)


def write_points(path: str | Path, points: Points, space: PointsSpace = "ras", domain: Domain | None = None) -> None:
    """Write RAS mm points [n, 3]; whole or not at all.

    A name that ends in ``.fcsv`` or ``.mrk.json`` gives a file of Slicer (LPS mm, whatever ``space``), any other a CSV
    with the header ``x,y,z`` in the chosen space.
    """
    if slicer_suffix(path):
        return write_slicer_points(path, from_ras(points.detach().cpu().double(), "lps").tolist())
    rows = from_ras(points.detach().cpu().double(), space, domain).tolist()
    write_text(path, "x,y,z\n" + "".join(f"{x:.6f},{y:.6f},{z:.6f}\n" for x, y, z in rows))


def to_ras(points: Points, space: PointsSpace, domain: Domain | None = None) -> Points:
    """Points [n, 3] of ``space`` in RAS mm."""
    if space == "voxel":
        return transform_points(_needed(domain).voxel_to_world, points)
    return points * _LPS.to(points) if _known(space) == "lps" else points


def from_ras(points: Points, space: PointsSpace, domain: Domain | None = None) -> Points:
    """Points [n, 3] in RAS mm in ``space``."""
    if space == "voxel":
        return transform_points(_needed(domain).world_to_voxel, points)
    return points * _LPS.to(points) if _known(space) == "lps" else points


def check_points_inside(points: Points, domain: Domain, name: str) -> None:
    """Check that RAS mm points [n, 3] lie in the image, outer voxel edges included.

    Raises:
        UserError: names the first point that does not (0-based index) and how many there are.
    """
    voxels = transform_points(domain.world_to_voxel, points.double())
    outside = (~domain.contains_voxels(voxels)).nonzero()[:, 0].tolist()
    if outside:
        i = outside[0]
        world, voxel = (", ".join(f"{v:.2f}" for v in p[i].tolist()) for p in (points, voxels))
        raise UserError(
            f"{name}: expected points inside the image, found {len(outside)} of {len(points)} outside, the first at "
            f"index {i}: ({world}) mm RAS, voxel ({voxel}) of {domain.shape}; check --points-space (ras, lps, voxel)"
        )


def _known(space: str) -> str:
    if space not in ("ras", "lps"):
        raise UserError(f"points space: expected ras, lps or voxel, found {space!r}; choose one of these")
    return space


def _needed(domain: Domain | None) -> Domain:
    if domain is None:
        raise ValueError("points in voxels need the domain of their image")
    return domain


def _cells(line: str) -> list[str]:
    for separator in (",", ";", "\t"):
        if separator in line:
            return [cell.strip().strip("\"'") for cell in line.split(separator)]
    return re.split(r"\s+", line.strip())


def _counted(points: list[list[float]]) -> bool:
    """Whether the first column is 0, 1, 2, ... or 1, 2, 3, ..."""
    first = [p[0] for p in points]
    return len(first) > 1 and first[0] in (0, 1) and first == [first[0] + i for i in range(len(first))]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _named_columns(header: list[str], file: Path) -> tuple[int, int, int]:
    names = [cell.lower() for cell in header]
    if not {"x", "y", "z"} <= set(names):
        raise UserError(
            f"{file}: expected columns x, y and z, found the header {', '.join(header[:6])}; rename the columns"
        )
    return names.index("x"), names.index("y"), names.index("z")


def _row(cells: list[str], columns: tuple[int, int, int], file: Path, number: int) -> list[float]:
    if len(cells) <= max(columns):
        raise UserError(f"{file}: expected x, y and z in row {number}, found {len(cells)} column(s); correct that row")
    values = []
    for cell in (cells[c] for c in columns):
        value = float(cell) if _is_number(cell) else math.nan
        if not math.isfinite(value):
            raise UserError(f"{file}: expected a number in row {number}, found {cell!r}; correct that row")
        values.append(value)
    return values
