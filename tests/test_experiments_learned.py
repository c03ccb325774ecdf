"""The experiments that train a network on a cohort run through the real command, and register a pair afterwards."""

import csv
import json
from pathlib import Path

import nibabel as nib
import pytest
import yaml

from medinr import cli
from medinr.callbacks import runs
from medinr.methods import load_method
from tests.data_modules import tiny_slabs

ROOT = Path(__file__).resolve().parents[1]
LEARNED = sorted(p for p in (ROOT / "experiments").glob("*_slabs.yaml") if not p.stem.startswith("diffdef"))


def test_there_are_two() -> None:
    assert [path.stem for path in LEARNED] == ["midir_slabs", "voxelmorph_slabs"]


@pytest.mark.parametrize("path", LEARNED, ids=lambda path: path.stem)
def test_experiment_trains_tests_and_registers(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_slabs.write(tmp_path / "slabs")
    monkeypatch.chdir(tmp_path)
    common = ["--config", str(path), "--wandb", "false", "--data.root", str(data)]
    common += ["--data.spacing", "[2, 2, 2]", "--data.steps_per_epoch", "2", "--data.test_pairs", "2"]
    common += ["--model.network.encoder", "[4, 4, 4, 4]", "--trainer.max_steps", "4"]
    if path.stem.startswith("voxelmorph"):
        common += ["--model.network.decoder", "[4, 4, 4, 4, 4, 4]"]

    def call(*words: str) -> None:
        assert cli.main(list(words)) == 0, capsys.readouterr().err

    call("fit", *common)
    [run] = runs.runs_of(tmp_path / "runs", path.stem)
    assert runs.is_finished(run)
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        curve = [row for row in csv.DictReader(file) if row["val/dice"]]
    assert [int(row["step"]) for row in curve] == [1, 3]
    for name in ("val/dice", "val/dice_initial", "val/similarity", "val/loss", "val/folding_percent"):
        assert float(curve[-1][name]) >= 0

    call("test", *common)
    found = json.loads((run / "results" / "metrics.json").read_text(encoding="utf-8"))
    assert found["case"] == "mean of 2"
    cases = [json.loads(f.read_text(encoding="utf-8")) for f in sorted((run / "results").glob("*/metrics.json"))]
    assert [c["case"] for c in cases] == ["sub-34_to_sub-36", "sub-36_to_sub-34"]
    assert found["dsc/mean"] == pytest.approx(sum(c["dsc/mean"] for c in cases) / 2)

    call("predict", *common, "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / cases[0]["case"] / "warped_labels.nii.gz").exists()

    # A pair that is no part of the cohort, on another grid, by the trained checkpoint.
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for side, scan in (("fixed", "sub-01"), ("moving", "sub-36")):
        image = nib.load(data / f"{scan}_T1w.nii.gz")
        affine = image.affine.copy()
        affine[:3, :3] *= 1.5
        nib.save(nib.Nifti1Image(image.get_fdata(), affine), tmp_path / f"{side}.nii.gz")
    files = {"fixed": str(tmp_path / "fixed.nii.gz"), "moving": str(tmp_path / "moving.nii.gz")}
    config["data"] = {"class_path": "PairDataModule", "init_args": files}
    pair = tmp_path / "pair.yaml"
    pair.write_text(yaml.safe_dump(config), encoding="utf-8")
    small = [word for k, word in enumerate(common) if k > 1 and "data." not in common[k - 1] and "data." not in word]
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    call("predict", "--config", str(pair), *small, "--ckpt_path", checkpoint, "--out", str(tmp_path / "pair"))
    displacement = nib.load(tmp_path / "pair" / "displacement.nii.gz")
    assert displacement.shape[:3] == tiny_slabs.SHAPE
    assert load_method(tmp_path / "pair" / "transform.ckpt").transform() is not None

    code = cli.main(["fit", "--config", str(pair), *small])
    assert code == 2 and "cohort of pairs" in capsys.readouterr().err
