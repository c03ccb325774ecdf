"""Every YAML in experiments/ runs through the real command, on tiny data of the layout that it is for."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import pytest
import yaml

from medinr import cli
from medinr.callbacks import runs
from medinr.commands.presets import PRESETS, recommended
from medinr.configured import spec

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
PHANTOMS = ("dirlab",)
"""Second half of an experiment's name -> layout of the phantom that it runs on."""


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write each layout once, when it is first asked for."""
    base = tmp_path_factory.mktemp("phantoms")

    def root(layout: str) -> Path:
        if not (base / layout).exists():
            where = str(base / layout)
            assert (
                cli.main(["phantom", layout, "--out", where, "--cases", "1", "--size", "32", "--phases", "extremes"])
                == 0
            )
        return base / layout

    return root


def test_there_are_experiments() -> None:
    assert {"idir_dirlab", "idir_dirlab_best", "cidir_dirlab"} <= {path.stem for path in EXPERIMENTS}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_runs(
    path: Path,
    phantom: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = path.stem.split("_")[1]
    assert layout in PHANTOMS, f"{path.name}: is named <method>_<data>; this test needs a small phantom of {layout}"
    monkeypatch.chdir(tmp_path)
    common = ["--config", str(path), "--data.root", str(phantom(layout)), "--wandb", "false"]
    few = ["--trainer.max_steps", "4", "--data.steps_per_epoch", "2", "--model.points", "64"]
    few += ["--model.field.hidden", "[32, 32, 32]"]
    out = tmp_path / "results"
    for command, more in (("fit", []), ("test", []), ("predict", ["--out", str(out)])):
        code = cli.main([command, *common, *few, *more])
        assert code == 0, capsys.readouterr().err

    [run] = runs.runs_of(tmp_path / "runs", path.stem)
    assert runs.is_finished(run)
    metrics = json.loads((run / "results" / "metrics.json").read_text())
    predicted = json.loads((out / "metrics.json").read_text())
    for found in (metrics, predicted):
        found.pop("search/seconds", None)
    assert metrics == pytest.approx(predicted, abs=1e-6), "test and predict agree"
    for name in ("tre/mean", "tre/snapped_mean", "dsc/mean", "image/psnr", "image/ssim", "folding/percent"):
        assert name in metrics
    assert 2 < metrics["tre/initial_mean"] < 15
    assert nib.load(out / "warped.nii.gz").shape[:2] == (32, 32)
    assert nib.load(out / "displacement.nii.gz").shape[3:] == (1, 3)
    if path.stem.startswith("cidir"):
        assert (run / "results" / "alpha_search.csv").read_text() == (out / "alpha_search.csv").read_text()
        assert (out / "figures" / "alpha.png").stat().st_size > 1000
    assert (out / "figures" / "registration.png").stat().st_size > 1000


def test_recommended_experiment_is_what_register_does() -> None:
    """The YAML states every number of `medinr register --preset accurate`; the two must not drift apart."""
    config = yaml.safe_load((ROOT / "experiments" / "idir_dirlab_best.yaml").read_text())
    given = config["model"]["init_args"]
    method = recommended("accurate")
    told = spec(method)["init_args"]
    for name in ("points", "pyramid_mm", "lr", "warmup", "cosine", "use_moving_mask"):
        assert told[name] == given[name], name
    for key, value in told["field"]["init_args"].items():
        assert given["field"]["init_args"][key] == value, key
    assert given["similarity"]["class_path"] == type(method.similarity).__name__
    for key, value in given["similarity"]["init_args"].items():
        assert getattr(method.similarity, key) == value, key
    for name, part in given["regularizers"].items():
        for key, value in part["init_args"].items():
            assert getattr(method.penalties[name], key) == value, (name, key)
    assert given["regularizers"].keys() == method.penalties.keys()
    assert config["trainer"]["max_steps"] == PRESETS["accurate"].steps
