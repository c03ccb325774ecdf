"""Every YAML in experiments/ runs through the real command, on tiny data of the layout that it is for."""

import inspect
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import yaml

from medinr import cli
from medinr.callbacks import runs
from medinr.commands.presets import PRESETS, network, recommended
from medinr.configured import spec
from medinr.losses import LocalNCC
from medinr.methods import RefinedRegistration
from tests.medinr import tiny_runs

ROOT = Path(__file__).resolve().parents[1]
COHORTS = ("slabs", "ukb", "dhcp", "crl")
"""Data of many people: see test_experiments_learned.py, test_experiments_diffusion.py and test_experiments_atlas.py."""
SEQUENCES = ("4dct",)
"""Images of many times: see test_experiments_sequence.py."""
EXPERIMENTS = [
    p for p in sorted((ROOT / "experiments").glob("*.yaml")) if p.stem.split("_")[1] not in (*COHORTS, *SEQUENCES)
]
PHANTOMS = {"dirlab": ["--cases", "1", "--size", "32", "--phases", "extremes"], "tube": ["--size", "32"]}
"""Second half of an experiment's name, the layout of the phantom that it runs on -> how that is written small."""
PAIRS = ("pair", "multimodal")
"""Layouts that are two files, whatever they show."""


def hidden(part: dict[str, Any], where: str) -> list[str]:
    """The options of all networks of a field that say how wide they are."""
    found = [f"{where}.hidden"] if "hidden" in part["init_args"] else []
    inner = {k: v for k, v in part["init_args"].items() if isinstance(v, dict) and "class_path" in v}
    return found + [option for key, value in inner.items() for option in hidden(value, f"{where}.{key}")]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write each layout once, when it is first asked for."""
    base = tmp_path_factory.mktemp("phantoms")

    def root(layout: str) -> Path:
        if layout in PAIRS and not (base / layout).exists():
            (base / layout).mkdir()
            tiny_runs.write(base / layout, (32, 32, 18))
        if not (base / layout).exists():
            where = str(base / layout)
            assert cli.main(["phantom", layout, "--out", where, *PHANTOMS[layout]]) == 0
        return base / layout

    return root


def test_there_are_experiments() -> None:
    assert {"idir_dirlab", "idir_dirlab_best", "lattice_dirlab", "hybrid_dirlab", "cidir_dirlab"} <= {
        path.stem for path in EXPERIMENTS
    }


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_runs(
    path: Path,
    phantom: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = path.stem.split("_")[1]
    assert layout in (*PHANTOMS, *PAIRS), (
        f"{path.name}: is named <method>_<data>; this test needs a small phantom of {layout}"
    )
    monkeypatch.chdir(tmp_path)
    common = ["--config", str(path), "--wandb", "false"]
    if "root" in yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["init_args"]:
        common += ["--data.root", str(phantom(layout))]
    else:  # its files are named one by one, under data/LAYOUT
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / layout).symlink_to(phantom(layout))
    if layout in PAIRS:  # an experiment names two images; what measures the error comes beside them
        for side, (kind, name) in itertools.product(
            ("fixed", "moving"), (("points", ".csv"), ("labels", "_labels.nii.gz"))
        ):
            common += [f"--data.{side}_{kind}", f"data/{layout}/{side}{name}"]
    few = ["--trainer.max_steps", "4", "--data.steps_per_epoch", "2"]
    arguments, where = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"], "--model"
    if "method" in arguments:  # of which there is one in each direction
        arguments, where = arguments["method"]["init_args"], "--model.method"
    few += [f"{where}.points", "64"]
    if arguments["field"] is not None:
        for option in hidden(arguments["field"], f"{where}.field") or [f"{where}.field.hidden"]:
            few += [option, "[32, 32, 32]"]
    out = tmp_path / "results"
    for command, more in (("fit", []), ("test", []), ("predict", ["--out", str(out)])):
        code = cli.main([command, *common, *few, *more])
        assert code == 0, capsys.readouterr().err

    [run] = runs.runs_of(tmp_path / "runs", path.stem)
    assert runs.is_finished(run)
    metrics = json.loads((run / "results" / "metrics.json").read_text(encoding="utf-8"))
    predicted = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    for found in (metrics, predicted):
        found.pop("search/seconds", None)
    assert metrics == pytest.approx(predicted, abs=1e-6), "test and predict agree"
    for name in ("tre/mean", "tre/snapped_mean", "dsc/mean", "image/psnr", "image/ssim", "folding/percent"):
        assert name in metrics
    assert 2 < metrics["tre/initial_mean"] < 15
    assert nib.load(out / "warped.nii.gz").shape[:2] == (32, 32)
    assert nib.load(out / "displacement.nii.gz").shape[3:] == (1, 3)
    if path.stem.startswith("cidir"):
        assert (run / "results" / "alpha_search.csv").read_text(encoding="utf-8") == (
            out / "alpha_search.csv"
        ).read_text(encoding="utf-8")
        assert (out / "figures" / "alpha.png").stat().st_size > 1000
    assert (out / "figures" / "registration.png").stat().st_size > 1000


def test_recommended_experiments_are_what_register_does() -> None:
    """The YAML files state every number of `medinr register --preset accurate`; the two must not drift apart."""
    preset = PRESETS["accurate"]
    lattice = recommended("accurate", regions=2)
    assert isinstance(lattice, RefinedRegistration)
    methods = {"idir_dirlab_best": network(preset, LocalNCC()), "lattice_dirlab": lattice}
    steps = {"idir_dirlab_best": preset.steps, "lattice_dirlab": sum(lattice.steps)}
    for name, method in methods.items():
        config = yaml.safe_load((ROOT / "experiments" / f"{name}.yaml").read_text(encoding="utf-8"))
        given = config["model"]["init_args"]
        assert config["model"]["class_path"] == type(method).__name__
        for key, value in given.items():
            if key == "use_moving_mask" or (name == "lattice_dirlab" and key == "use_mask"):
                assert value is False  # the experiments' masks are computed; those of `register` somebody has drawn
            elif key == "regularizers":
                assert value.keys() == method.penalties.keys()
                for penalty, part in value.items():
                    for k, v in part["init_args"].items():
                        assert getattr(method.penalties[penalty], k) == v, (name, penalty, k)
            elif isinstance(value, dict):
                part = method.map.field if key == "field" else getattr(method, key)
                assert type(part).__name__ == value["class_path"]
                defaults = {k: p.default for k, p in inspect.signature(type(part)).parameters.items()}
                told = {**defaults, **spec(part)["init_args"]}
                for k, v in value["init_args"].items():
                    assert (list(told[k]) if isinstance(told[k], tuple) else told[k]) == v, (name, key, k)
            elif value is not None:
                told = getattr(method, key)
                assert (list(told) if isinstance(told, tuple) else told) == value, (name, key)
        assert config["trainer"]["max_steps"] == steps[name]
