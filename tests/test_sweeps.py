"""The sweeps of Weights & Biases in experiments/sweeps/: their options are real, and a run logs what they look at."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from medinr import cli
from medinr.callbacks import runs
from tests.medinr.test_cli_runs import read_wandb

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"dirlab": "--cases 1 --size 32 --phases extremes"}
FEW = "--trainer.max_steps 4 --data.steps_per_epoch 2 --model.points 64 --model.field.hidden [16]"
SWEEPS = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))


def grid(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Points in which every value of every parameter occurs."""
    values: dict[str, list[Any]] = {k: p.get("values") or [p["value"]] for k, p in sweep["parameters"].items()}
    return [{k: v[i % len(v)] for k, v in values.items()} for i in range(max(map(len, values.values())))]


def command(sweep: dict[str, Any], point: dict[str, Any]) -> list[str]:
    """The command line as W&B's agent makes it."""
    args = create_sweep_command_args({"args": {key: {"value": value} for key, value in point.items()}})
    known = {"${env}": ["/usr/bin/env"], "${program}": [sweep["program"]], "${args}": args["args"]}
    words: list[str] = create_sweep_command(list(sweep["command"]))
    return [part for word in words for part in known.get(word, [word])]


def test_there_are_sweeps() -> None:
    assert "idir_dirlab" in {path.stem for path in SWEEPS}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_is_one_that_the_command_takes(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert sweep["method"] == "grid" and sweep["metric"]["goal"] in ("minimize", "maximize")
    for point in grid(sweep):
        first, program, *words = command(sweep, point)
        assert (first, program) == ("/usr/bin/env", "medinr")
        capsys.readouterr()
        code = cli.main([*words, "--print_config"])
        out, err = capsys.readouterr()
        assert code == 0, err
        resolved = runs.flat(yaml.safe_load(out))
        assert {key: resolved[key] for key in point} == point


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_run_of_the_sweep_logs_its_metric(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As W&B's agent starts it: with the sweep's name and the values in a file."""
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    point = grid(sweep)[0]
    given = {key: {"value": value} for key, value in point.items()}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"wandb_version": 1, **given}))
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "sweep.yaml"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    layout = path.stem.split("_")[1]
    assert cli.main(["phantom", layout, "--out", f"data/{layout}", *SMALL[layout].split()]) == 0
    # In a process of its own: wandb reads the agent's variables once in a process.
    words = [sys.executable, "-m", "medinr.cli", *command(sweep, point)[2:], *FEW.split()]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    [run] = runs.runs_of(tmp_path / "runs", path.stem)
    with (run / "metrics.csv").open(newline="") as stream:
        assert [row for row in csv.DictReader(stream) if row[sweep["metric"]["name"]]]
    [tracked] = run.glob("wandb/offline-run-*-r1/run-r1.wandb")
    records = read_wandb(tracked)
    assert {r.run.sweep_id for r in records if r.run.sweep_id} == {"s1"}
    config = {u.key: json.loads(u.value_json) for r in records for u in r.run.config.update}
    assert config["experiment"] == path.stem and config["model.lr"] == point["model.lr"]
    assert config["model"]["init_args"]["lr"] == point["model.lr"]
    summary = {".".join(u.nested_key) or u.key for r in records for u in r.summary.update}
    assert sweep["metric"]["name"] in summary
