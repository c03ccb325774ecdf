"""Two processes against one: gradients of the same points, whole fits, one run folder, whoever starts them."""

import csv
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medinr.callbacks import runs
from medinr.ranks import any_rank, from_first, gather, is_first, rank, share, sum_over_ranks, world_size
from tests.medinr import rank_worker
from tests.medinr.tiny_runs import ROOT, environment, start, wait_for, write


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `rank_worker` found in each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(ROOT / "tests" / "medinr" / "rank_worker.py")]
    running = [
        subprocess.Popen(
            [*command, str(r), "2", str(folder)], env=environment(), stderr=subprocess.PIPE, encoding="utf-8"
        )
        for r in range(2)
    ]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(2)]


@pytest.mark.parametrize("case", rank_worker.CASES)
def test_two_processes_have_the_gradient_of_one(two: list[dict[str, Any]], case: str) -> None:
    one = rank_worker.step(case)
    assert (two[0][case]["loss"] + two[1][case]["loss"]) / 2 == pytest.approx(one["loss"], abs=1e-5)
    scale = max(g.abs().max().item() for g in one["gradients"].values())
    assert scale > 1e-3
    for name, gradient in one["gradients"].items():
        for found in two:
            difference = (found[case]["gradients"][name] - gradient).abs().max().item()
            assert difference < 1e-5 * max(scale, 1), name


def test_an_average_of_shares_would_not_do() -> None:
    """So the test above can fail: the mean of two halves' NCC has another gradient."""
    host = rank_worker.Loss(rank_worker.method("NCC"))
    x = rank_worker.points()
    whole = torch.autograd.grad(host(x.reshape(-1, 3)), list(host.parameters()))
    n = x.shape[1] // 2
    halves = sum(host(part.reshape(-1, 3)) for part in (x[:, :n], x[:, n:])) / 2
    mean = torch.autograd.grad(halves, list(host.parameters()))
    assert max((a - b).abs().max().item() for a, b in zip(whole, mean, strict=True)) > 1e-3


def test_helpers_in_two_processes(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["numbers"] == {
            "share": 4, "any": [False, True], "first": [0.0], "gather": ["rank 0", "rank 1"],
        }  # fmt: skip
    assert "alone" in two[0], "without gradients no process waits for another"


def test_helpers_in_one_process() -> None:
    x = torch.rand(3, requires_grad=True)
    assert sum_over_ranks(x) is x and from_first(x) is x
    assert (world_size(), rank(), share(7), gather(3)) == (1, 0, 7, [3])
    assert any_rank(True) and not any_rank(False)


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),  # torchrun, second machine
        ({"LOCAL_RANK": "1"}, False),  # Lightning's own copy
        ({"NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
    ],
)
def test_who_is_first(variables: dict[str, str], first: bool) -> None:
    assert is_first(variables) == first


# -- whole fits -------------------------------------------------------------------------------------------------------

TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2")


def command(folder: Path, words: list[str], launcher: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """stdout, and the lines of stderr that are no progress bar."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "medinr.cli", *words],
        cwd=folder, env=environment(), capture_output=True, encoding="utf-8", check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stderr.replace("\r", "\n").splitlines()
    return done.stdout, [line for line in said if line.strip() and not line.startswith("fit:")]


def only(folder: Path, pattern: str = "*") -> Path:
    [found] = folder.glob(pattern)
    return found


def last(run: Path, name: str) -> float:
    """The newest value of a metric."""
    with (run / "metrics.csv").open(newline="") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)][-1]


def test_two_processes_fit_as_one(tmp_path: Path) -> None:
    """From a TRE of 2.24 mm to below 0.1 mm in both; they draw other points, so the results agree to 0.05 mm."""
    write(tmp_path)
    out, said = command(tmp_path, ["fit", "--config", "tiny.yaml", *TWO])
    assert said == [], "no warnings"
    assert out.count("results are in") == 1 and out.count("Weights & Biases: offline") == 1, "one process speaks"
    run = only(tmp_path / "runs" / "tiny")
    names = {"config.yaml", "metrics.csv", "finished", "checkpoints", "figures", "wandb"}
    assert {p.name for p in run.iterdir()} == names, "one writes"
    assert only(run / "wandb", "offline-run-*").is_dir()
    states = torch.load(run / runs.LAST, weights_only=True)["callbacks"]["RandomStates"]["ranks"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"]), "each draws its own points"

    command(tmp_path, ["fit", "--config", "tiny.yaml", "--wandb", "false", "--experiment", "one"])
    one = only(tmp_path / "runs" / "one")
    assert last(run, "tre/mean") < 0.1 and last(one, "tre/mean") < 0.1
    assert last(run, "tre/mean") == pytest.approx(last(one, "tre/mean"), abs=0.05)
    assert last(run, "loss") == pytest.approx(last(one, "loss"), rel=0.3)
    assert last(run, "loss") != last(one, "loss")


@pytest.mark.slow
def test_torchrun_shares_one_folder(tmp_path: Path) -> None:
    write(tmp_path)
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    out, said = command(tmp_path, ["fit", "--config", "tiny.yaml", *TWO, "--wandb", "false"], launcher)
    assert said == [] and out.count("results are in") == 1
    run = only(tmp_path / "runs" / "tiny")
    assert runs.is_finished(run) and [p.name for p in run.glob("config*")] == ["config.yaml"]
    out, _ = command(tmp_path, ["test", "--config", "tiny.yaml", *TWO, "--wandb", "false"], launcher)
    assert only(tmp_path / "runs" / "tiny") == run and (run / "results" / "metrics.json").exists()


@pytest.mark.slow
def test_ctrl_c_stops_all_at_one_step_and_each_goes_on_with_its_own_points(tmp_path: Path) -> None:
    write(tmp_path)
    options = ["fit", "--config", "tiny.yaml", *TWO, "--wandb", "false", "--data.steps_per_epoch", "30",
               "--trainer.max_steps", "90"]  # fmt: skip
    process = start(tmp_path, *options, "--experiment", "cut")
    wait_for("runs/cut/*/checkpoints/last.ckpt", tmp_path, process)
    process.send_signal(signal.SIGINT)  # to one of them: the others hear of it
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count("medinr: interrupted") == 1, err
    run = only(tmp_path / "runs" / "cut")
    assert 30 <= torch.load(run / runs.LAST, weights_only=True)["global_step"] < 90
    command(tmp_path, [*options, "--experiment", "cut", "--ckpt_path", "last"])
    command(tmp_path, [*options, "--experiment", "whole"])
    a, b = (torch.load(r / runs.LAST, weights_only=True)["state_dict"] for r in (run, only(tmp_path / "runs/whole")))
    assert max((a[k] - b[k]).abs().max().item() for k in a) <= 1e-6


@pytest.mark.slow
def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    write(tmp_path)
    words = ["fit", "--config", "tiny.yaml", *TWO, "--wandb", "false", "--model.lr", "1e30"]
    done = subprocess.run(
        [sys.executable, "-m", "medinr.cli", *words], cwd=tmp_path, env=environment(), capture_output=True,
        encoding="utf-8", check=False, timeout=120,
    )  # fmt: skip
    said = [x for x in done.stderr.replace("\r", "\n").splitlines() if x.strip() and not x.startswith("fit:")]
    assert done.returncode == 2 and len(said) == 1 and "the loss is" in said[0], done.stderr
