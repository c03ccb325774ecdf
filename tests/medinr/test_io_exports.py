"""Further forms of a transform, and results of an earlier run in the same folder."""

import json
import os
from pathlib import Path

import pytest
import torch

from medinr import io
from medinr.commands.checks import REGISTER_WRITES, check_inputs_stay
from medinr.errors import RegistrationWarning, UserError
from medinr.fields import Transform
from medinr.fields.dense import evaluate_dense
from medinr.io.exports import learn2reg_name
from medinr.io.listing import LISTING, listed
from medinr.results import evaluate, inverse_displacement, write_results
from medinr.space import transform_points
from tests.medinr import grids, pairs


def test_every_form_is_the_transform(tmp_path: Path) -> None:
    """h5 by ITK itself, affine and residual by what their names say, Learn2Reg by its voxels."""
    sitk = pytest.importorskip("SimpleITK")
    transform = pairs.plain_method().transform()
    dense = evaluate_dense(transform, pairs.CUBE, exact=True).displacement
    files = io.write_transforms(tmp_path, ("h5", "affine", "l2r"), dense, transform.start, pairs.CUBE)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f.name for f in files)
    world = transform_points(pairs.CUBE.voxel_to_world, pairs.CUBE.voxels().double())
    moved = transform(world)
    assert (moved - world).norm(dim=1).min() > 0.1

    flip = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    composite = sitk.ReadTransform(str(tmp_path / "transform.h5"))
    some = torch.randint(len(world), (200,))
    theirs = [composite.TransformPoint(p) for p in (world[some] * flip).tolist()]
    assert (torch.tensor(theirs, dtype=torch.float64) * flip - moved[some]).norm(dim=1).max() < 1e-3

    matrix, _ = io.read_start(tmp_path / "affine.tfm", pairs.CUBE)
    residual, _ = io.read_displacement(tmp_path / "residual_displacement.nii.gz")
    assert (transform_points(matrix, world + residual.reshape(-1, 3).double()) - moved).norm(dim=1).max() < 1e-3
    assert (
        "affine.tfm after it"
        in json.loads((tmp_path / "residual_displacement.json").read_text(encoding="utf-8"))["note"]
    )

    voxels = io.read_learn2reg(tmp_path / "disp_fixed_moving.nii.gz", pairs.CUBE)
    assert (voxels - dense).abs().max() < 1e-4


def test_names_of_learn2reg() -> None:
    assert learn2reg_name(("a/OASIS_0412_0000.nii.gz", "b/OASIS_0413_0000.nii.gz")) == "disp_0412_0413.nii.gz"
    assert learn2reg_name(("scan_20240101.nii.gz", "OASIS_0413_0000.nii.gz")) == "disp_fixed_moving.nii.gz"
    assert learn2reg_name(()) == "disp_fixed_moving.nii.gz"


def test_unknown_forms() -> None:
    with pytest.raises(UserError, match="--write: expected some of h5, affine, l2r, separated by commas, got nii"):
        io.check_formats(("affine", "nii"))
    assert io.check_formats(["l2r", "affine", "l2r"]) == ("l2r", "affine")


def test_results_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    """Only what the list names, inside the folder; the user's own files stay, and nothing else is reached."""
    pair, method, out = pairs.pair(), pairs.plain_method(), tmp_path / "out"
    evaluation = evaluate(method.transform(), pair)
    out.mkdir()
    (out / "affine.tfm").write_text("the user's own, from before")
    first = write_results(out, method, pair, evaluation, inverse=True, formats=("l2r",))
    (out / "inverse_displacement_of_mine.nii.gz").write_text("the user's own")
    (tmp_path / "outside.txt").write_text("the user's own")
    assert (out / "inverse_displacement.nii.gz").exists() and out / "disp_fixed_moving.nii.gz" in first
    content = json.loads((out / LISTING).read_text(encoding="utf-8"))
    os.symlink(tmp_path / "outside.txt", out / "link.txt")
    content["files"] += ["../outside.txt", str(tmp_path / "outside.txt"), "figures", "link.txt", "missing.txt", 7]
    (out / LISTING).write_text(json.dumps(content))

    write_results(out, method, pair, evaluation)
    gone = {"inverse_displacement.nii.gz", "inverse_displacement.json", "disp_fixed_moving.nii.gz"}
    assert not gone & {f.name for f in out.iterdir()}
    assert gone.isdisjoint(listed(out)) and (out / "displacement.nii.gz").exists()
    for name in ("affine.tfm", "inverse_displacement_of_mine.nii.gz", "../outside.txt", "link.txt", "figures"):
        assert (out / name).exists(), name


def test_results_of_an_earlier_run_are_no_input_of_the_next(tmp_path: Path) -> None:
    """They would be removed as old."""
    pair, method, out = pairs.pair(), pairs.plain_method(), tmp_path / "out"
    write_results(out, method, pair, evaluate(method.transform(), pair), formats=("l2r",))
    (out / "mine.nii.gz").write_text("the user's own")
    for name in ("disp_fixed_moving.nii.gz", "figures/registration.png"):
        with pytest.raises(UserError, match=f"overwrite no input, found .*{name}"):
            check_inputs_stay(out, [None, [out / "mine.nii.gz", out / name]], "")
    check_inputs_stay(out, [3, "affine", out / "mine.nii.gz", tmp_path], REGISTER_WRITES)
    (out / "warped_channel2.nii.gz").write_text("the user's own")
    with pytest.raises(UserError, match="warped_channel2"):
        check_inputs_stay(out, [out / "warped_channel2.nii.gz"], REGISTER_WRITES)


@pytest.mark.parametrize("space", ["ras", "lps", "voxel"])
def test_moved_points_are_in_the_frame_of_those_given(tmp_path: Path, space: io.PointsSpace) -> None:
    domain = grids.domain("oblique")
    pair, method = pairs.pair(moving_domain=domain), pairs.plain_method()
    assert pair.fixed_points is not None
    transform = method.transform()
    write_results(tmp_path, method, pair, evaluate(transform, pair), points_space=space)
    moved = io.read_points(tmp_path / "moved_points.csv", space, domain)
    assert (moved - transform(pair.fixed_points)).norm(dim=1).max() < 1e-4


def test_voxels_without_an_inverse_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_inverse(self: Transform, world: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return world, torch.linspace(0, 0.2, len(world))

    monkeypatch.setattr(Transform, "inverse", no_inverse)
    with pytest.warns(RegistrationWarning, match=r"16384 of 32768 voxels \(50 %\) have none within 0\.1 mm"):
        inverse_displacement(pairs.plain_method().transform(), pairs.CUBE)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": ["a.txt"]}', '{"written_by": "medinr", "files": 3}'])
def test_lists_that_are_not_ours_remove_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / LISTING).write_text(text)
    (tmp_path / "a.txt").write_text("stays")
    assert listed(tmp_path) == []
