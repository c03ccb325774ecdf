"""Points of Slicer: the frame comes from the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medinr.errors import UserError
from medinr.io import read_points, write_points
from medinr.space import transform_points
from tests.medinr import grids
from tests.medinr.tolerances import assert_close

POINTS = torch.tensor([[1.5, -2.25, 3.0], [10.0, 20.125, -30.5]], dtype=torch.float64)
LPS = POINTS * torch.tensor([-1.0, -1.0, 1.0])
COLUMNS = "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"


def rows(points: torch.Tensor, form: str = "vtkMRMLMarkupsFiducialNode_{i},{p},0,0,0,1,1,1,0,F-{i},,\n") -> str:
    return "".join(form.format(i=i, p=",".join(f"{v:.3f}" for v in row)) for i, row in enumerate(points.tolist()))


FCSV = {
    "4.10": f"# Markups fiducial file version = 4.10\n# CoordinateSystem = 0\n{COLUMNS}{rows(POINTS)}",
    "4.10 as LPS": f"# Markups fiducial file version = 4.10\n# CoordinateSystem = 1\n{COLUMNS}{rows(LPS)}",
    "4.11": f"# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n{COLUMNS}{rows(LPS)}",
    "5.2 as RAS": f"# Markups fiducial file version = 5.2\n# CoordinateSystem = RAS\n{COLUMNS}{rows(POINTS)}",
    "3": "# Fiducial List file x.fcsv\n# numPoints = 2\n# columns = label,x,y,z,sel,vis\n"
    + rows(POINTS, "F{i},{p},1,1\n"),
    "a comma in a label": f"# CoordinateSystem = LPS\n{COLUMNS}" + rows(LPS, '{i},{p},0,0,0,1,1,1,0,"a, b",,\n'),
}


@pytest.mark.parametrize("version", FCSV)
def test_fcsv_of_all_versions(tmp_path: Path, version: str) -> None:
    (tmp_path / "p.fcsv").write_text(FCSV[version])
    for space in ("ras", "lps"):
        assert torch.equal(read_points(tmp_path / "p.fcsv", space), POINTS), "the space that is asked for is not used"


def test_fcsv_in_voxels(tmp_path: Path) -> None:
    domain = grids.domain("oblique")
    (tmp_path / "p.fcsv").write_text(f"# CoordinateSystem = 2\n{COLUMNS}{rows(POINTS)}")
    assert_close(read_points(tmp_path / "p.fcsv", domain=domain), transform_points(domain.voxel_to_world, POINTS))
    with pytest.raises(UserError, match="IJK"):
        read_points(tmp_path / "p.fcsv")


def markups(**changes: Any) -> dict[str, Any]:
    points = [{"id": str(i), "label": f"F-{i}", "position": p} for i, p in enumerate(LPS.tolist())]
    return {"markups": [{"type": "Fiducial", "controlPoints": points, **changes}]}


@pytest.mark.parametrize("frame", [{}, {"coordinateSystem": "LPS"}, {"coordinateUnits": "mm"}])
def test_markups(tmp_path: Path, frame: dict[str, str]) -> None:
    (tmp_path / "p.mrk.json").write_text(json.dumps(markups(**frame)))
    assert torch.equal(read_points(tmp_path / "p.mrk.json"), POINTS)
    (tmp_path / "p.mrk.json").write_text(json.dumps(markups(**{**frame, "coordinateSystem": "RAS"})))
    assert torch.equal(read_points(tmp_path / "p.mrk.json", "voxel"), LPS)


@pytest.mark.parametrize("name", ["p.fcsv", "p.mrk.json"])
@pytest.mark.parametrize("space", ["ras", "voxel"])
def test_written_points_read_back(tmp_path: Path, name: str, space: str) -> None:
    points = torch.randn(30, 3, dtype=torch.float64) * 100
    write_points(tmp_path / name, points, space)  # type: ignore[arg-type]
    assert (read_points(tmp_path / name) - points).abs().max() < 1e-5
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert "LPS" in text and f"{-points[0, 0]:.4f}"[:-1] in text, "the numbers in the file are LPS"


UNPLACED = [{"label": "F-1", "position": [1, 2, 3], "positionStatus": "undefined"}]
MISTAKES = {
    "no number": ("p.fcsv", f"{COLUMNS}a,1,two,3\n", r"x, y and z of line 2, found \['1', 'two', '3'\]"),
    "too short": ("p.fcsv", f"{COLUMNS}a,1,2\n", "line 2"),
    "empty": ("p.fcsv", COLUMNS, "at least one point"),
    "frame": ("p.fcsv", f"# CoordinateSystem = XYZ\n{COLUMNS}{rows(POINTS)}", "found 'XYZ'"),
    "no json": ("p.mrk.json", "x,y,z\n1,2,3\n", "Markups file of Slicer"),
    "other json": ("p.mrk.json", '{"a": 1}', "Markups file of Slicer"),
    "no points": ("p.mrk.json", '{"markups": []}', "at least one point"),
    "two lists": ("p.mrk.json", json.dumps({"markups": markups()["markups"] * 2}), "one list of points, found 2"),
    "not placed": ("p.mrk.json", json.dumps(markups(controlPoints=UNPLACED)), "point F-1, found None"),
    "not finite": ("p.mrk.json", json.dumps(markups(controlPoints=[{"position": [1, 2, None]}])), "point 0"),
    "unit": ("p.mrk.json", json.dumps(markups(coordinateUnits="um")), "found 'um'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path: Path, mistake: str) -> None:
    name, text, found = MISTAKES[mistake]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=found) as caught:
        read_points(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)
