"""The longitudinal phantom: maps with inverses, a tumour of known volume, and files that say the same."""

import ast
import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

import medinr.phantoms.longitudinal as module
from data_modules import LongitudinalSequence
from medinr import cli, io
from medinr.phantoms.longitudinal import DAYS, LANDMARKS, LongitudinalCase
from medinr.phantoms.thorax_wall import body_distance

SIZE = 40


@pytest.fixture(scope="module")
def case() -> LongitudinalCase:
    return LongitudinalCase(SIZE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("longitudinal")
    assert cli.main(["phantom", "longitudinal", "--out", str(out), "--size", str(SIZE)]) == 0
    return out


def points(case: LongitudinalCase, n: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(1)
    near = case.centre + rng.normal(size=(n // 2, 3)) * 20
    anywhere = rng.uniform([-130, -110, -100], [130, 140, 100], size=(n // 2, 3))
    return case.thorax.body_to_world(np.concatenate([near, anywhere]))


@pytest.mark.parametrize("day", [9, 86])
def test_maps_have_inverses_and_do_not_fold(case: LongitudinalCase, day: float) -> None:
    x = points(case)
    assert np.abs(case.inverse(case.phi(x, day), day) - x).max() < 1e-5
    h = 1e-3
    jacobian = np.stack([(case.phi(x + h * e, day) - case.phi(x - h * e, day)) / (2 * h) for e in np.eye(3)], -1)
    det = np.linalg.det(jacobian)
    assert det.min() > 0.9 * case.shrinkage(day) ** 3 and det.max() < 2
    inside = np.linalg.norm((case.thorax.world_to_body(x) - case.centre) / module.RADII, axis=1) < 0.98
    assert inside.sum() > 100
    assert np.allclose(det[inside], case.shrinkage(day) ** 3, rtol=1e-4)


def test_the_first_date_is_the_reference(case: LongitudinalCase) -> None:
    x = points(case)
    assert np.abs(case.phi(x, 0) - x).max() < 1e-9 and case.shrinkage(0) == 1


def test_weight_is_lost_at_the_skin_and_the_back_stays(case: LongitudinalCase) -> None:
    x = points(case)
    body = case.thorax.world_to_body(x)
    moved = np.linalg.norm(case.phi(x, 86) - x, axis=1)
    d = body_distance(body[:, 0], body[:, 1], body[:, 2])
    front = (np.abs(d) < 3) & (body[:, 1] < -60)
    assert front.sum() > 5 and moved[front].min() > 4 and moved[front].max() < 9
    far = np.linalg.norm((body - case.centre) / module.RADII, axis=1) > module.REACH
    assert moved[far & (body[:, 1] > 66)].max() < 1e-9
    assert moved[far & (d < -module.INNER_MM)].max() < 1e-9


def test_label_volumes_are_the_truth(case: LongitudinalCase) -> None:
    """A fine grid around the tumour counts its volume at a date through the inverse map."""
    for day in (0, 44):
        centre = case.phi(case.thorax.body_to_world(case.centre[None]), day)[0]
        line = np.linspace(-24, 24, 49)
        x = centre + np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
        start = case.thorax.world_to_body(case.inverse(x, day))
        inside = np.linalg.norm((start - case.centre) / module.RADII, axis=1) <= 1
        assert inside.sum() / 1000 == pytest.approx(case.tumour_volume(day), rel=0.01)
        assert np.allclose(x[inside].mean(0), centre, atol=0.1)
    volumes = [case.tumour_volume(day) for day in DAYS]
    assert all(b < a for a, b in itertools.pairwise(volumes)) and volumes[-1] < 0.25 * volumes[0]


def test_images_show_the_map(case: LongitudinalCase) -> None:
    first, last = (case.image(day, noise=False).astype(float) for day in (0, 86))
    field = case.displacement(86).reshape(-1, 3)
    target = case.thorax.world_to_voxel(case._voxels + field)
    warped = map_coordinates(last, target.T, order=1, mode="nearest").reshape(first.shape)
    changed = np.linalg.norm(field, axis=1).reshape(first.shape) > 2
    assert (warped - first)[changed].std() < 0.45 * (last - first)[changed].std()
    tumour = case.labels(0) == 1
    assert first[tumour].mean() > -150 and case.image(0).std() > 100


def test_anatomy_at_points_is_that_of_the_images(case: LongitudinalCase) -> None:
    drawn = case.thorax.image(0, noise=False).astype(float)
    sampled = case.thorax.sample(case._voxels).reshape(drawn.shape)
    assert np.abs(sampled - drawn).mean() < 1.0


def test_files_hold_what_the_phantom_says(root: Path, case: LongitudinalCase) -> None:
    data = LongitudinalSequence(str(root / "series.tsv"), held_out=[23.0])
    sequence = data.sequence
    assert sequence.times == tuple(map(float, DAYS)) and sequence.one_grid and sequence.period is None
    assert torch.equal(sequence.images[3].data[0], torch.from_numpy(case.image(44).astype(np.float32)))
    start = sequence.points[0]
    assert start is not None and start.shape == (LANDMARKS, 3)
    assert sequence.points[5] is not None
    assert np.abs(case.phi(start.numpy(), 86) - sequence.points[5].numpy()).max() < 1e-4
    counts = [int((v == 1).sum()) for v in sequence.labels if v is not None]
    voxel = np.prod(sequence.domain.spacing) / 1000
    with (root / "truth/curves.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, count, day in zip(rows, counts, DAYS, strict=True):
        assert float(row["volume_ml"]) == pytest.approx(case.tumour_volume(day), abs=1e-5)
        assert count * voxel == pytest.approx(float(row["volume_ml"]), rel=0.25)  # voxels of 0.4 ml
    field, domain = io.read_displacement(root / "truth" / "displacement_2024-04-03.nii.gz")
    assert domain.same_grid(case.domain)
    assert np.allclose(field.reshape(-1, 3).numpy(), case.displacement(86).reshape(-1, 3), atol=1e-4)
    assert json.loads((root / "truth/parameters.json").read_text())["days"] == list(DAYS)


def test_landmarks_lie_where_something_moves(case: LongitudinalCase) -> None:
    moved = np.linalg.norm(case.phi(case.landmarks, 86) - case.landmarks, axis=1)
    third = LANDMARKS // 3
    assert moved[:third].mean() > 2 and moved[2 * third :].mean() > 3


def test_same_seed_same_patient_another_seed_another(case: LongitudinalCase) -> None:
    again, other = LongitudinalCase(SIZE), LongitudinalCase(SIZE, seed=1)
    assert np.array_equal(case.image(9), again.image(9)) and not np.allclose(case.centre, other.centre)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "no")
    assert cli.main(["phantom", "longitudinal", "--out", out, "--size", "20"]) == 2
    assert "--size: expected at least 32" in capsys.readouterr().err
    assert cli.main(["phantom", "longitudinal", "--out", out, "--cases", "1"]) == 2
    assert "dirlab only, got longitudinal" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_truth_uses_no_code_of_the_methods() -> None:
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith(("medinr.fields", "medinr.jets", "medinr.methods"))
