"""`medinr evaluate`: known displacements, in our files and in Learn2Reg's, and the rules by which files are found."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import medinr
from medinr import cli, io
from medinr.commands.evaluate import aggregates, markdown_table
from medinr.errors import RegistrationWarning
from medinr.metrics import common_labels, tre_learn2reg
from medinr.space import Domain, transform_points
from tests.medinr import grids

SHAPE = (18, 22, 15)
VOXELS = torch.tensor([[8.0, 9, 6], [8.5, 10, 7], [10, 12, 8]], dtype=torch.float64)
MOVED = torch.tensor([2.0, 0, 0], dtype=torch.float64)  # voxels


def cube(first: int) -> Tensor:
    labels = torch.zeros(SHAPE, dtype=torch.int16)
    labels[first : first + 5, 8:13, 5:10] = 3
    return labels


def write_case(folder: Path, domain: Domain) -> None:
    """Moving image = fixed one, two voxels further along the first axis."""
    for side, first, shift in (("fixed", 6, 0.0), ("moving", 8, 1.0)):
        io.write_image(folder / f"{side}.nii.gz", torch.rand(SHAPE), domain)
        io.write_image(folder / f"{side}_labels.nii.gz", cube(first), domain)
        io.write_points(folder / f"{side}_points.csv", transform_points(domain.voxel_to_world, VOXELS + shift * MOVED))


def field(domain: Domain, voxels: Tensor) -> Tensor:
    return (voxels @ domain.voxel_to_world[:3, :3].T).expand(*SHAPE, 3).float()


@pytest.mark.parametrize("kind", ["oblique", "flipped"])
def test_a_known_shift_in_both_forms_of_file(kind: str, tmp_path: Path) -> None:
    domain = grids.domain(kind, SHAPE)
    for name in ("a", "b"):
        write_case(tmp_path / "data" / name, domain)
    half = field(domain, MOVED / 2)
    io.write_displacement(tmp_path / "results" / "a" / "displacement.nii.gz", field(domain, MOVED), domain)
    io.write_learn2reg(tmp_path / "results" / "disp_b.nii.gz", half, domain)
    a, b = medinr.evaluate(tmp_path / "data", tmp_path / "results", tmp_path / "out")
    step = 2 * domain.spacing[0]  # mm
    assert a["case"] == "a" and a["tre/initial_mean"] == pytest.approx(step, abs=1e-4)
    for name in ("tre/mean", "tre_learn2reg", "tre/max", "hd95/mm", "hd95_learn2reg", "sdlogj", "sdlogj_learn2reg"):
        assert a[name] == pytest.approx(0, abs=1e-4), name
    assert a["dsc/mean"] == a["dsc_learn2reg"] == 1 and a["dsc/initial_mean"] == pytest.approx(0.6)
    assert a["displacement/max_mm"] == pytest.approx(step, abs=1e-4) and a["folding/det_min"] == pytest.approx(1)
    # Half the way: half of the distance in mm; one voxel is one voxel.
    assert b["tre/mean"] == pytest.approx(step / 2, abs=1e-4) == b["tre_learn2reg"]
    assert b["dsc/mean"] == b["dsc_learn2reg"] == pytest.approx(0.8)
    assert b["hd95/mm"] == pytest.approx(step / 2, abs=1e-4) and b["hd95_learn2reg"] == pytest.approx(1)

    content = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["case"] for row in content["cases"]] == ["a", "b"] and content["n"]["tre/mean"] == 2
    assert content["mean"]["tre/mean"] == pytest.approx(step / 4, abs=1e-4)
    assert content["sd"]["tre/mean"] == pytest.approx(step / 4, abs=1e-4)
    with (tmp_path / "out" / "evaluation.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["case"] for r in rows] == ["a", "b", "mean", "sd", "n"]
    assert float(rows[1]["tre_learn2reg"]) == pytest.approx(b["tre_learn2reg"])
    lines = (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7 and {line.count("|") for line in lines} == {len(a) + 1}


def test_true_and_challenge_figures_differ_where_they_should(tmp_path: Path) -> None:
    """Expansion by 1.1 along x: det 1.1 everywhere, splines and lines agree; a parabola parts them."""
    domain = Domain.of(SHAPE, np.diag([1.0, 1, 1, 1]))
    i = torch.arange(SHAPE[0]).double()
    parabola = torch.zeros(*SHAPE, 3, dtype=torch.float64)
    parabola[..., 0] = (0.05 * (i - 8) ** 2)[:, None, None]
    at = torch.tensor([[8.5, 9.0, 6.0]], dtype=torch.float64)
    goal = at + torch.tensor([[0.05 * 0.25, 0, 0]], dtype=torch.float64)
    assert tre_learn2reg(at, goal, parabola, (2.0, 1.0, 1.0)).item() == pytest.approx(0, abs=1e-3)
    assert tre_learn2reg(at, at, parabola, (2.0, 1.0, 1.0)).item() == pytest.approx(2 * 0.0125, abs=1e-3)
    for side in ("fixed", "moving"):
        io.write_image(tmp_path / f"{side}.nii", torch.rand(SHAPE), domain)
    io.write_points(tmp_path / "fixed_points.csv", at)
    io.write_points(tmp_path / "moving_points.csv", goal)
    io.write_displacement(tmp_path / "displacement.nii", parabola, domain)
    [row] = medinr.evaluate(tmp_path, tmp_path)
    assert row["tre/mean"] == pytest.approx(0.025 - 0.0125, abs=1e-6), "between voxels, a line"
    assert row["tre_learn2reg"] == pytest.approx(0, abs=1e-3)
    assert row["sdlogj"] > 3 * row["sdlogj_learn2reg"] > 0
    assert "dsc/mean" not in row and "hd95/mm" not in row


def write_challenge(folder: Path, domain: Domain) -> None:
    for number, shift in ((1, 0.0), (2, 1.0)):
        name = f"TOY_000{number}_0000"
        io.write_image(folder / "imagesTr" / f"{name}.nii.gz", torch.rand(SHAPE), domain)
        io.write_image(folder / "labelsTr" / f"{name}.nii.gz", cube(6 + int(2 * shift)), domain)
        table = "\n".join(",".join(map(str, row)) for row in (VOXELS + shift * MOVED).tolist())
        (folder / "landmarksTr").mkdir(exist_ok=True)
        (folder / "landmarksTr" / f"{name}.csv").write_text(table, encoding="utf-8")
    pair = {"fixed": "./imagesTr/TOY_0001_0000.nii.gz", "moving": "./imagesTr/TOY_0002_0000.nii.gz"}
    content = {"training_paired_images": [], "registration_val": [pair], "registration_test": [pair, pair]}
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def test_the_layout_of_the_challenge_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domain = grids.domain("flipped", SHAPE)
    data, results = tmp_path / "data", tmp_path / "results"
    write_challenge(data, domain)
    io.write_learn2reg(results / "disp_0001_0002.nii.gz", field(domain, MOVED), domain)
    assert cli.main(["evaluate", str(data), str(results)]) == 0
    assert "tre_learn2reg" in capsys.readouterr().out
    [row] = json.loads((results / "evaluation.json").read_text(encoding="utf-8"))["cases"]
    assert row["case"] == "0001_0002" and row["dsc_learn2reg"] == 1
    assert row["tre/initial_mean"] == pytest.approx(2 * domain.spacing[0], abs=1e-4), "landmarks are in voxels"
    assert row["tre/mean"] == pytest.approx(0, abs=1e-4)

    assert cli.main(["evaluate", str(data), str(results), "--pairs", "registration_test"]) == 2
    assert "expected one pair of each name" in capsys.readouterr().err
    # The affine of the moving image does not matter to the challenge; that this is so is said.
    matrix = domain.voxel_to_world.clone()
    matrix[:3, 3] += 7
    for kind, values in (("images", torch.rand(SHAPE)), ("labels", cube(8))):
        io.write_image(data / f"{kind}Tr" / "TOY_0002_0000.nii.gz", values, Domain.of(SHAPE, matrix))
    with pytest.warns(RegistrationWarning, match="taken to lie on the fixed image's affine"):
        [again] = medinr.evaluate(data, results)
    assert {k: again[k] for k in again if k != "case"} == pytest.approx({k: row[k] for k in row if k != "case"})


def test_a_lost_label_counts(tmp_path: Path) -> None:
    domain = Domain.of(SHAPE, np.diag([1.0, 1, 1, 1]))
    write_case(tmp_path / "data" / "a", domain)
    far = field(domain, torch.tensor([15.0, 0, 0], dtype=torch.float64))
    io.write_displacement(tmp_path / "results" / "a.nii.gz", far, domain)
    rows = medinr.evaluate(tmp_path / "data", tmp_path / "results")
    assert rows[0]["dsc/mean"] == rows[0]["dsc_learn2reg"] == 0 and rows[0]["hd95/without"] == 1
    assert math.isnan(rows[0]["hd95/mm"]) and math.isinf(rows[0]["hd95_learn2reg"])
    found = aggregates([*rows, {"case": "b", "hd95_learn2reg": 1.0, "hd95/mm": 2.0}])
    assert math.isinf(found["mean"]["hd95_learn2reg"]) and found["n"]["hd95/mm"] == 1
    assert "inf" in markdown_table(rows)
    assert common_labels(torch.tensor([0, 1, 2]), torch.tensor([2, 3, 0])) == [2]


MISTAKES = {
    "no data": ("no results", "no: expected a folder of cases, found nothing"),
    "no cases": ("empty results", "expected Learn2Reg's dataset.json, or folders with fixed.nii.gz"),
    "no results": ("data no", "no: expected a folder of displacement fields, found nothing"),
    "missing": (
        "data empty",
        "expected a displacement of each of 2 case(s), found none of 2: a, b; add a/",
    ),
    "one missing": ("data results", "found none of 1: b;"),
    "unknown case": ("data results --cases a,c", "--cases: expected some of a, b, got c"),
    "no list": ("data results --pairs x", "--pairs x: "),
    "another grid": ("data other --cases a", "expected displacements on the grid of"),
    "one side": ("half results", "expected labels of both images"),
    "other count": ("fewer results", "expected 3 points, as many as"),
    "series": ("data series --cases a", "expected Learn2Reg displacements of shape"),
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mistaken")
    domain = grids.domain("oblique", SHAPE)
    for name in ("data/a", "data/b", "half/a", "fewer/a"):
        write_case(root / name, domain)
    (root / "half" / "a" / "moving_labels.nii.gz").unlink()
    io.write_points(root / "fewer" / "a" / "moving_points.csv", torch.zeros(2, 3))
    (root / "empty").mkdir()
    io.write_displacement(root / "results" / "a.nii.gz", field(domain, MOVED), domain)
    small = grids.domain("oblique", (9, 9, 9))
    io.write_displacement(root / "other" / "a.nii.gz", torch.zeros(9, 9, 9, 3), small)
    io.write_learn2reg(root / "series" / "a.nii.gz", torch.zeros(9, 9, 9, 3), small)
    return root


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_one_line(
    name: str, mistaken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mistaken)
    call, said = MISTAKES[name]
    assert cli.main(["evaluate", *call.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0], lines
    assert not list(mistaken.rglob("evaluation.*"))
