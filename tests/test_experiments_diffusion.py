"""The experiments of Diff-Def run through the real command on tiny data, stage by stage, and generate atlases."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medinr import cli
from medinr.callbacks import runs
from tests.data_modules import tiny_slabs
from tests.medinr import alexnet

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("diffdef_*.yaml"))
SMALL = [
    "--model.network.encoder", "[4, 4]", "--model.network.decoder", "[4, 4]",
    "--model.network.strides", "[[2, 2, 2], [2, 2, 1]]", "--model.autoencoder.channels", "[8, 8]",
    "--model.autoencoder.groups", "8", "--model.autoencoder.residual", "1", "--model.denoiser.channels", "[8, 8]",
    "--model.denoiser.attention", "[false, true]", "--model.denoiser.head_channels", "8",
    "--model.denoiser.residual", "1", "--model.denoiser.groups", "8", "--model.denoiser.context", "8",
    "--model.embedding.width", "8", "--model.morphology.steps", "2", "--model.morphology.differentiable", "1",
    "--model.morphology.per_step", "1", "--model.radius", "1", "--data.steps_per_epoch", "2",
]  # fmt: skip


def test_there_are_three() -> None:
    assert [path.stem for path in EXPERIMENTS] == ["diffdef_slabs", "diffdef_ukb", "diffdef_ukb_best"]


def data_of(path: Path, folder: Path) -> list[str]:
    """Options of tiny data of an experiment's layout."""
    if path.stem.endswith("slabs"):
        root = tiny_slabs.write(folder / "slabs")
        return ["--data.root", str(root), "--data.spacing", "2", "--model.spacing", "[4, 4, 4]", "--model.refine", "1"]
    root = folder / "ukb"
    assert cli.main(["phantom", "ukb", "--out", str(root), "--subjects", "5", "--size", "24"]) == 0
    table = str(root / "phenotypes.csv")
    some = ["--data.root", str(root), "--data.table", table, "--data.val", "0.2", "--data.test", "0.2"]
    return [*some, "--model.spacing", "[12, 12, 12]", "--model.autoencoder.checkpoint", "false"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_runs_all_stages_and_generates(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--config", str(path), "--wandb", "false", *SMALL, *data_of(path, tmp_path)]

    def call(*words: str, code: int = 0) -> str:
        assert cli.main(list(words)) == code, capsys.readouterr().err
        return capsys.readouterr().err

    every = "{registration: 2, autoencoder: 2, diffusion: 2, morphology: 1}"
    stages = ["--model.steps", every, "--trainer.max_steps", "7"]
    assert "AlexNet" in call("fit", *common, *stages, "--model.lpips", "absent.pth", code=2)
    begun = runs.runs_of(tmp_path / "runs", path.stem)
    call("fit", *common, *stages)
    [run] = set(runs.runs_of(tmp_path / "runs", path.stem)) - set(begun)
    assert runs.is_finished(run)
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("val/similarity", "val/psnr", "val/denoising"):
        assert any(row[name] for row in rows), name
    last = str(run / runs.LAST)
    config = str(run / "config.yaml")
    weights = str(alexnet.write(tmp_path / "alexnet.pth", alexnet.alexnet(0)))
    call("test", "--config", config, "--ckpt_path", last, "--model.lpips", weights)
    with (run / "results" / "cases.csv").open(encoding="utf-8") as file:
        assert all(float(row["atlas/lpips"]) > 0 for row in csv.DictReader(file) if row["case"] != "mean")
    assert "medinr generate" in call("predict", "--config", config, "--ckpt_path", last, code=2)

    condition = "csf_ml" if path.stem.endswith("slabs") else "age"
    out = tmp_path / "atlas"
    call("generate", last, "--out", str(out), "--condition", f"{condition}=50", "--samples", "2", "--steps", "2")
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert found["conditions"] == {condition: "50"} and found["samples"] == 2
    assert any(name.startswith("volume_ml/") and value > 0 for name, value in found.items())
    atlas = nib.load(out / "atlas.nii.gz")
    for name in ("labels", "jacobian_determinant", "spread_mm"):
        assert nib.load(out / f"{name}.nii.gz").shape == atlas.shape
    assert nib.load(out / "displacement.nii.gz").shape[:3] == atlas.shape and (out / "montage.png").stat().st_size > 0
    if condition == "age":
        return

    # Several atlases, and an image of another resolution in the same space.
    fine = nib.Nifti1Image(np.kron(atlas.get_fdata(), np.ones((2, 2, 2))), atlas.affine @ np.diag([0.5, 0.5, 0.5, 1]))
    nib.save(fine, tmp_path / "fine.nii.gz")
    words = ["generate", last, "--steps", "2", "--atlas", str(tmp_path / "fine.nii.gz")]
    call(*words, "--out", str(tmp_path / "many"), "--condition", "csf_ml=1;csf_ml=2")
    assert nib.load(tmp_path / "many" / "csf_ml-2" / "atlas_full.nii.gz").shape == fine.shape
    assert "outside of the trained range" in call(*words, "--out", str(out), "--condition", "csf_ml=900")

    affine = fine.affine.copy()
    affine[:3, 3] = 1e4
    far = nib.Nifti1Image(fine.get_fdata(), affine)
    nib.save(far, tmp_path / "far.nii.gz")
    for more, words_ in (
        (["--atlas", str(tmp_path / "far.nii.gz")], "in the space of the general atlas"),
        (["--condition", "age=60"], "expected any of csf_ml, found 'age'"),
        (["--condition", "csf_ml"], "expected NAME=VALUE"),
        (["--condition", "csf_ml=much"], "expected a number"),
        (["--samples", "0"], "expected 1 or more"),
        (["--labels", str(tmp_path / "fine.nii.gz")], "give --atlas too"),
    ):
        message = call("generate", last, "--out", str(tmp_path / "no"), *more, code=2)
        assert words_ in message and message.count("\n") == 1, message
        assert not (tmp_path / "no").exists()


def test_stages_one_by_one_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [path] = [p for p in EXPERIMENTS if p.stem == "diffdef_slabs"]
    monkeypatch.chdir(tmp_path)
    common = ["fit", "--config", str(path), "--wandb", "false", *SMALL, *data_of(path, tmp_path)]

    def fit(name: str, steps: str, total: int, *more: str, code: int = 0) -> tuple[Path, str]:
        words = ["--experiment", name, "--model.steps", steps, "--trainer.max_steps", str(total), *more]
        assert cli.main([*common, *words]) == code, capsys.readouterr().err
        found = runs.runs_of(tmp_path / "runs", name)
        return (found[-1] / runs.LAST if found else Path(), capsys.readouterr().err)

    first, _ = fit("shared", "{registration: 2, autoencoder: 2}", 4)
    second, _ = fit("seed1", "{diffusion: 2}", 2, "--model.earlier", str(first), "--seed_everything", "1")
    fit("seed1_morphology", "{morphology: 1}", 1, "--model.earlier", str(second))
    assert "expected a checkpoint with the stages registration, autoencoder" in fit("x", "{diffusion: 2}", 2, code=2)[1]
    assert "trainer.max_steps: expected the sum" in fit("y", "{registration: 2}", 9, code=2)[1]
    assert "stages that follow each other" in fit("z", "{registration: 2, diffusion: 1}", 3, code=2)[1]
    assert cli.main(["generate", str(first), "--out", str(tmp_path / "out")]) == 2
    assert "stage diffusion: expected a checkpoint in which it was trained" in capsys.readouterr().err
