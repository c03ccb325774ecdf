"""Landmark tables."""

from pathlib import Path

import pytest
import torch

from medinr.errors import UserError
from medinr.io import check_points_inside, read_points, write_points
from medinr.space import transform_points
from tests.medinr import grids
from tests.medinr.tolerances import assert_close

DOMAIN = grids.domain("left-handed")
POINTS = torch.tensor([[1.5, -2.25, 3.0], [10.0, 20.125, -30.5]], dtype=torch.float64)


@pytest.mark.parametrize(
    "text",
    [
        "x,y,z\n1.5,-2.25,3\n10,20.125,-30.5\n",
        "1.5,-2.25,3\n10,20.125,-30.5",
        "1.5\t-2.25\t3\n10\t20.125\t-30.5\n",
        "  1.5   -2.25 3e0\n10 20.125 -30.5  \n\n",
        "# from a viewer\r\nx , y , z\r\n1.5 , -2.25 , 3\r\n\r\n10, 20.125, -30.5\r\n",
        "\ufeffx,y,z,label\n1.5,-2.25,3,carina\n10,20.125,-30.5,apex\n",
        'label,Z,Y,X\n"a,",3,-2.25,1.5\n'.replace('"a,"', "a") + "b,-30.5,20.125,10\n",
    ],
)
def test_tables_in_all_the_usual_forms(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.csv").write_text(text, encoding="utf-8", newline="")
    points = read_points(tmp_path / "p.csv")
    assert points.dtype == torch.float64 and torch.equal(points, POINTS)


def test_spaces(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("x,y,z\n1.5,-2.25,3\n10,20.125,-30.5\n")
    assert torch.equal(read_points(tmp_path / "p.csv", "lps"), POINTS * torch.tensor([-1, -1, 1]))
    expected = transform_points(DOMAIN.voxel_to_world, POINTS)
    assert_close(read_points(tmp_path / "p.csv", "voxel", DOMAIN), expected)
    with pytest.raises(ValueError, match="domain"):
        read_points(tmp_path / "p.csv", "voxel")
    with pytest.raises(UserError, match="'itk'"):
        read_points(tmp_path / "p.csv", "itk")  # type: ignore[arg-type]


@pytest.mark.parametrize("space", ["ras", "lps", "voxel"])
def test_written_points_read_back(tmp_path: Path, space: str) -> None:
    points = torch.randn(30, 3, dtype=torch.float64) * 100
    write_points(tmp_path / "p.csv", points, space, DOMAIN)  # type: ignore[arg-type]
    assert (tmp_path / "p.csv").read_text(encoding="utf-8").startswith("x,y,z\n")
    again = read_points(tmp_path / "p.csv", space, DOMAIN)  # type: ignore[arg-type]
    assert (again - points).abs().max() < 1e-5
    assert [f.name for f in tmp_path.iterdir()] == ["p.csv"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "0 bytes"),
        ("\n\n# nothing\n", "no points"),
        ("x,y,z\n", "no points"),
        ("x,y,z\n1,2,3\n1,two,3\n", "number in row 3, found 'two'"),
        ("1,2,3\n1,,3\n", "number in row 2, found ''"),
        ("1,2,3\n1,nan,3\n", "number in row 2, found 'nan'"),
        ("1,2\n", r"row 1, found 2 column\(s\)"),
        ("x,y,z\n1,2,3\n4,5\n", r"row 3, found 2 column\(s\)"),
        ("lat,lon,alt\n1,2,3\n", "found the header lat, lon, alt"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=found) as caught:
        read_points(tmp_path / "p.csv")
    assert "\n" not in str(caught.value) and "p.csv" in str(caught.value)


def test_binary_data_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"\x1f\x8b\xff\xfe" * 30)
    with pytest.raises(UserError, match="binary"):
        read_points(tmp_path / "p.csv")


def test_points_outside_are_named() -> None:
    voxels = torch.tensor(
        [[0.0, 0.0, 0.0], [17.4, 21.4, 14.4], [17.6, 0.0, 0.0], [0.0, -9.0, 0.0]], dtype=torch.float64
    )
    world = transform_points(DOMAIN.voxel_to_world, voxels)
    check_points_inside(world[:2], DOMAIN, "fixed points")
    with pytest.raises(UserError, match=r"fixed points: .*2 of 4 outside.*index 2: .*voxel \(17.60, ") as caught:
        check_points_inside(world, DOMAIN, "fixed points")
    assert f"{world[2, 0]:.2f}" in str(caught.value)
