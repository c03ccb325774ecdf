"""The experiments that fit a whole sequence run through the real command, on a tiny one of their layout."""

import csv
import json
from pathlib import Path

import pytest
import torch

from medinr import cli, io
from medinr.callbacks import runs
from medinr.methods import SpatioTemporalLattice, SpatioTemporalRegistration, load_method
from tests.medinr import breathing, pairs

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES = sorted((ROOT / "experiments").glob("*_4dct*.yaml"))


def test_there_are_two() -> None:
    assert [path.stem for path in SEQUENCES] == ["stnerp_4dct", "stnerp_4dct_best"]


@pytest.mark.parametrize("path", SEQUENCES, ids=lambda path: path.stem)
def test_experiment_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sequence = breathing.sequence((0, 10, 30, 60, 80))
    for time, image in zip(sequence.times, sequence.images, strict=True):
        io.write_image(tmp_path / "4dct" / f"body_T{time:02.0f}.nii.gz", image.data[0], image.domain)
    monkeypatch.chdir(tmp_path)
    common = ["--config", str(path), "--wandb", "false", "--data.root", "4dct", "--data.masks", "none"]
    common += ["--data.held_out", "[30]", "--model.window", "null"]
    common += ["--data.steps_per_epoch", "2", "--trainer.max_steps", "4"]
    if path.stem == "stnerp_4dct":
        common += ["--model.points", "64", "--model.field.hidden", "[32, 32]"]
        common += ["--model.prior.field.hidden", "[32, 32]", "--model.prior.field.frequencies", "8"]

    def call(*words: str) -> None:
        assert cli.main(list(words)) == 0, capsys.readouterr().err

    call("fit", *common)
    [run] = runs.runs_of(tmp_path / "runs", path.stem)
    assert runs.is_finished(run)
    call("test", *common)
    metrics = json.loads((run / "results" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["case"] == "4dct_60_10", "the reference, and the phase farthest from it"
    assert metrics["folding/percent"] == 0 and metrics["displacement/mean_mm"] > 0
    call("predict", *common, "--out", "out")
    with (tmp_path / "out" / "times.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["time"], row["held_out"]) for row in rows] == [
        ("0", "0"), ("10", "0"), ("30", "1"), ("60", "0"), ("80", "0"),
    ]  # fmt: skip
    method = load_method(tmp_path / "out" / "transform.ckpt")
    assert isinstance(method, SpatioTemporalRegistration | SpatioTemporalLattice)
    p = pairs.points()
    assert torch.allclose(method.transform_at(60.0)(p), p, atol=1e-3)
    moved = (method.transform_at(30.0)(p) - p).norm(dim=1).max()
    assert 0 < moved < 20
    assert hasattr(method, "rendering") == (path.stem == "stnerp_4dct")
