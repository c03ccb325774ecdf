"""The adult brain phantom: ventricles as large as drawn, a cortex that thins, no folding."""

import csv
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medinr.cli import main
from medinr.errors import UserError
from medinr.io import read_labels
from medinr.io.fsl import flirt_to_world, parse_flirt, voxel_to_fsl, world_to_flirt
from medinr.phantoms.adult import AdultCase, adult_case
from medinr.phantoms.adult_cohort import adult_draws, write_ukb_phantom
from medinr.phantoms.adult_template import mni_grid, nilearn_folder, template
from medinr.space import Domain

GRID = mni_grid(4.0)


@pytest.fixture(scope="module")
def case() -> AdultCase:
    return adult_case(65.0, 30.0, 3, 1, template(3.0, "synthetic"), GRID)


def ventricles_ml(case: AdultCase) -> float:
    return float((case.true_labels() == 4).sum() * np.prod(GRID.spacing) / 1000)


@pytest.mark.parametrize("source", ["synthetic", "nilearn"])
def test_the_template_is_a_brain(source: str) -> None:
    if source == "nilearn" and nilearn_folder() is None:
        pytest.skip("nilearn is not installed; pip install nilearn")
    brain = template(3.0, source)
    csf, grey, white = brain.tissues.sum(axis=(1, 2, 3)) * 27 / 1000
    assert 400 < white < 800 and 450 < grey < 1100 and 150 < csf < 500
    assert brain.t1[brain.tissues[2] > 0.95].mean() > brain.t1[brain.tissues[1] > 0.95].mean() > 0.3
    assert 6 < (brain.ventricles < 0).sum() * 27 / 1000 < 35
    affine = brain.domain.voxel_to_world.numpy()
    world = affine[:3, :3] @ np.argwhere(brain.ventricles < 0).mean(axis=0) + affine[:3, 3]
    assert abs(world[0]) < 2 and -45 < world[1] < 5 and 5 < world[2] < 30


def test_ventricles_hold_what_was_drawn_at_any_age(case: AdultCase) -> None:
    assert [ventricles_ml(replace(case, ventricles_ml=v)) for v in (14.0, 30.0, 60.0)] == [
        pytest.approx(14.0, rel=0.12), pytest.approx(30.0, rel=0.12), pytest.approx(60.0, rel=0.12),
    ]  # fmt: skip


def test_the_cortex_thins_and_the_white_matter_stays(case: AdultCase) -> None:
    thick, thin = replace(case, thinning_mm=0.0), replace(case, thinning_mm=0.8)
    before, after = (c.tissues(native=False).sum(axis=(1, 2, 3)) for c in (thick, thin))
    assert after[1] < 0.93 * before[1] and after[0] > 1.08 * before[0]
    assert after[2] == pytest.approx(before[2], rel=0.03)
    assert after.sum() == pytest.approx(before.sum(), rel=1e-3)


def test_the_map_does_not_fold(case: AdultCase) -> None:
    wide = replace(case, ventricles_ml=70.0)
    grid, points = wide._template_points(False)
    field = points.reshape(*grid.shape, 3).double().numpy()
    jacobian = np.stack([np.stack(np.gradient(field[..., a], 4.0), axis=-1) for a in range(3)], axis=-2)
    determinant = np.linalg.det(jacobian) * -1  # voxels run to the left
    assert determinant[wide.mask(False)].min() > 0


def test_native_and_mni_show_one_brain(case: AdultCase) -> None:
    """The native labels, brought to MNI space by the known pose, are those of MNI space."""
    world = GRID.voxels().double() @ GRID.voxel_to_world[:3, :3].T + GRID.voxel_to_world[:3, 3]
    pose = torch.from_numpy(case.pose)
    there = world @ pose[:3, :3].T + pose[:3, 3]
    inverse = case.native.world_to_voxel
    voxels = (there @ inverse[:3, :3].T + inverse[:3, 3]).round().long()
    inside = ((voxels >= 0) & (voxels < torch.tensor(GRID.shape))).all(dim=1)
    native, mni = case.labels(native=True), case.labels(native=False).reshape(-1)
    i, j, k = voxels[inside].T
    moved = native[i, j, k]
    for value in (1, 2, 3):
        a, b = moved == value, mni[inside.numpy()] == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.65
    assert case.t1(native=False)[~case.mask(False)].max() == 0, "no skull in MNI space"
    assert case.t1(native=True)[~case.mask(True)].max() > 0.5, "the whole head in native space"
    first = case.first(native=True)
    assert first is not None and {10, 49, 11, 50, 12, 51, 16, 17, 53} == set(np.unique(first)) - {0}
    left = np.argwhere(first == 10).mean(axis=0) @ case.native.voxel_to_world[:3, :3].numpy().T
    right = np.argwhere(first == 49).mean(axis=0) @ case.native.voxel_to_world[:3, :3].numpy().T
    assert left[0] < right[0], "left is where R is negative"


def test_flirts_matrices_between_any_two_images() -> None:
    radiological = Domain.of((5, 6, 7), np.array([[-2, 0, 0, 9], [0, 1.5, 0, -3], [0, 0, 1, 4], [0, 0, 0, 1.0]]))
    neurological = Domain.of((5, 6, 7), np.array([[2, 0, 0, 9], [0, 1.5, 0, -3], [0, 0, 1, 4], [0, 0, 0, 1.0]]))
    point = torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    assert (voxel_to_fsl(radiological) @ point).tolist() == [2.0, 3.0, 3.0, 1.0]
    assert (voxel_to_fsl(neurological) @ point).tolist() == [6.0, 3.0, 3.0, 1.0], "counted from the other end"
    world = torch.eye(4, dtype=torch.float64)
    world[:3, :] += 0.1 * torch.arange(12, dtype=torch.float64).reshape(3, 4)
    matrix = world_to_flirt(world, neurological, radiological)
    assert torch.allclose(flirt_to_world(matrix, neurological, radiological), world)
    with pytest.raises(UserError, match="expected FLIRT's 4 x 4 matrix"):
        parse_flirt("1 0 0\n", "a.mat")


def test_what_is_drawn_follows_age_and_chance() -> None:
    drawn = adult_draws(300, 5)
    age, volume = (np.array([getattr(d, name) for d in drawn]) for name in ("age", "ventricles_ml"))
    assert 45 <= age.min() < 46 and 79 < age.max() <= 80
    assert abs(np.corrcoef(age, np.arange(300))[0, 1]) < 0.15, "any part of the subjects has all ages"
    slope, _ = np.polyfit(age, np.log(volume), 1)
    rest = np.log(volume) - slope * age
    assert slope == pytest.approx(0.026, abs=0.005) and rest.std() == pytest.approx(0.28, rel=0.2)


def test_the_command_writes_archives_a_table_and_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["phantom", "ukb", "--subjects", "2", "--size", "36", "--template", "synthetic", "--out"]
    assert main([*command, str(tmp_path / "a")]) == 0
    archives = sorted((tmp_path / "a").glob("*.zip"))
    with zipfile.ZipFile(archives[0]) as archive:
        assert {"T1/T1.nii.gz", "T1/T1_brain_to_MNI.nii.gz", "T1/T1_fast/T1_brain_pve_2.nii.gz"} <= set(
            archive.namelist()
        )
    with (tmp_path / "a" / "phenotypes.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    labels = tmp_path / "a" / "truth" / f"{rows[0]['eid']}_labels.nii.gz"
    grid = mni_grid(218 / 36)
    measured = float((read_labels(labels, grid) == 4).sum()) * float(np.prod(grid.spacing))
    assert float(rows[0]["25003-2.0"]) == pytest.approx(measured, abs=1)
    write_ukb_phantom(tmp_path / "b", 2, 36, 0, "synthetic")
    for file in sorted(f for f in (tmp_path / "a").rglob("*") if f.suffix in (".zip", ".csv", ".tsv")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    assert main(["phantom", "ukb", "--out", str(tmp_path / "c"), "--template", "colin"]) == 2
    assert "expected auto, nilearn or synthetic" in capsys.readouterr().err and not (tmp_path / "c").exists()
