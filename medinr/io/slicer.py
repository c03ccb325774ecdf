"""Points of 3D Slicer: ``.fcsv`` (Markups up to 4.11 and as an export today) and ``.mrk.json`` (since 4.11).

Both files say themselves which frame their numbers are in. Slicer's own documents: Markups module, "Information for
advanced users".
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

from medinr.errors import UserError
from medinr.io.files import existing_file, write_text

FCSV, MARKUPS = ".fcsv", ".mrk.json"
COLUMNS = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
FRAMES = {"0": "ras", "1": "lps", "2": "voxel", "ras": "ras", "lps": "lps", "ijk": "voxel"}
"""Words of ``CoordinateSystem``; numbers up to Slicer 4.10."""
Rows = list[list[float]]


def slicer_suffix(path: str | Path) -> str:
    """``.fcsv``, ``.mrk.json`` (which plain ``.json`` is taken for) or nothing."""
    name = Path(path).name.lower()
    if name.endswith(FCSV):
        return FCSV
    return MARKUPS if name.endswith(".json") else ""


def read_slicer_points(path: str | Path) -> tuple[Rows, str]:
    """Rows x, y, z as they are in the file, and their frame: ``ras``, ``lps`` or ``voxel``.

    Raises:
        UserError: a file that is not what its name says; an unknown frame; a point without a position.
    """
    file = existing_file(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: expected points of Slicer, found binary data; export the points again") from error
    rows, frame = (_fcsv if slicer_suffix(file) == FCSV else _markups)(text, file)
    if frame.lower() not in FRAMES:
        raise UserError(f"{file}: expected the coordinate system RAS, LPS or IJK, found {frame!r}; export it again")
    if not rows:
        raise UserError(f"{file}: expected at least one point, found none; give a list that is not empty")
    return rows, FRAMES[frame.lower()]


def write_slicer_points(path: str | Path, rows: Rows) -> None:
    """Write LPS mm rows x, y, z as Slicer does, labelled 1, 2, ...; whole or not at all."""
    if slicer_suffix(path) == FCSV:
        head = f"# Markups fiducial file version = 5.6\n# CoordinateSystem = LPS\n# columns = {COLUMNS}\n"
        points = (f"{i},{x:.6f},{y:.6f},{z:.6f},0,0,0,1,1,1,0,{i},,\n" for i, (x, y, z) in enumerate(rows, start=1))
        write_text(path, head + "".join(points))
        return
    control = [
        {"id": str(i), "label": str(i), "position": [round(v, 6) for v in row], "positionStatus": "defined"}
        for i, row in enumerate(rows, start=1)
    ]
    schema = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    content = {
        "@schema": f"{schema}markups-schema-v1.0.3.json#",
        "markups": [{"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": control}],
    }
    write_text(path, json.dumps(content, indent=2) + "\n")


def _fcsv(text: str, file: Path) -> tuple[Rows, str]:
    """Without a frame: RAS, as Slicer wrote before the line existed. Without columns: the usual order."""
    frame, columns, rows = "ras", COLUMNS.split(","), []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#"):
            key, _, value = line[1:].partition("=")
            if key.strip() == "CoordinateSystem":
                frame = value.strip()
            elif key.strip() == "columns":
                columns = [name.strip() for name in value.split(",")]
        elif line.strip():
            cells = dict(zip(columns, next(csv.reader([line])), strict=False))
            rows.append(_position([cells.get(k) for k in "xyz"], file, f"line {number}"))
    return rows, frame


def _markups(text: str, file: Path) -> tuple[Rows, str]:
    try:
        content = json.loads(text)
        lists = [m for m in content["markups"] if m.get("controlPoints")]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: expected a Markups file of Slicer (.mrk.json), found other text; export it") from None
    if len(lists) > 1:
        raise UserError(f"{file}: expected one list of points, found {len(lists)}; save them one by one")
    if not lists:
        return [], "lps"
    unit = lists[0].get("coordinateUnits", "mm")
    unit = unit[-1] if isinstance(unit, list) and unit else unit
    if unit != "mm":
        raise UserError(f"{file}: expected coordinateUnits mm, found {unit!r}; save the points in millimetres")
    rows = []
    for i, point in enumerate(lists[0]["controlPoints"]):
        name = f"point {point.get('label', i)}" if isinstance(point, dict) else f"point {i}"
        told = isinstance(point, dict) and point.get("positionStatus", "defined") == "defined"
        rows.append(_position(point.get("position") if told else None, file, name))
    return rows, str(lists[0].get("coordinateSystem", "LPS"))


def _position(values: Any, file: Path, where: str) -> list[float]:
    """Three finite numbers. A point without them is no row that may be left out: rows correspond to rows."""
    try:
        row = [float(v) for v in values]
    except (TypeError, ValueError):
        row = []
    if len(row) != 3 or not all(math.isfinite(v) for v in row):
        raise UserError(f"{file}: expected x, y and z of {where}, found {values}; place or delete that point")
    return row
