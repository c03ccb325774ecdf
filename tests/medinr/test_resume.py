"""Runs that are killed, half-way through a file too, interrupted or terminated, and then go on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medinr.callbacks import runs
from tests.medinr.tiny_runs import Run, calls, environment, start, wait_for, write

KILLED = """\
import os, signal, sys
import lightning.fabric.plugins.io.torch_io as plugin
import torch
from medinr import cli

left, original = int(sys.argv[1]), plugin._atomic_save

def save(checkpoint, path):
    global left
    original(checkpoint, path)
    left -= 1
    if not left:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

plugin._atomic_save = save
sys.exit(cli.main(sys.argv[2:]))
"""
"""The command, killed when half of its n-th checkpoint is written."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return calls(capsys)


def only(folder: Path) -> Path:
    [found] = folder.iterdir()
    return found


def weights(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(run / runs.LAST, weights_only=True)["state_dict"]
    return found


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize("name", [pytest.param("tiny", marks=pytest.mark.slow), "conditioned"])
def test_killed_while_it_writes_a_checkpoint_in_mid_epoch(run: Run, folder: Path, name: str) -> None:
    """Checkpoints at steps 7, 10 (the end of an epoch), 14, 20, ...; the fourth is broken off: the fit goes on from
    step 14, in mid-epoch; the second from there (20, 21) is broken off: it goes on from step 20, an epoch's end."""
    common = ["--config", f"{name}.yaml", "--wandb", "false", "--checkpoint_steps", "7"]
    for left, resume, step in ((4, [], 14), (2, ["--ckpt_path", "last"], 20)):
        command = [sys.executable, "-c", KILLED, str(left), "fit", *common, "--experiment", "cut", *resume]
        process = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, encoding="utf-8", check=False
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
        place = only(folder / "runs" / "cut")
        assert {p.name for p in (place / "checkpoints").iterdir()} == {"last.ckpt", "last.part"}
        assert torch.load(place / runs.LAST, weights_only=True)["global_step"] == step
        assert not runs.is_finished(place)
    code, _, err = run("fit", *common, "--experiment", "cut", "--ckpt_path", "last")
    assert code == 0, err
    assert only(folder / "runs" / "cut") == place and runs.is_finished(place)
    assert [p.name for p in (place / "checkpoints").iterdir()] == ["last.ckpt"]
    assert run("fit", *common, "--experiment", "whole")[0] == 0
    assert largest_difference(place, only(folder / "runs" / "whole")) <= 1e-6
    header, *rows = (place / "metrics.csv").read_text(encoding="utf-8").splitlines()
    column = header.split(",").index("tre/mean")
    evaluated = [row for row in rows if row.split(",")[column]]
    assert len(evaluated) == 4, "one validation for each epoch, none twice"


def test_ctrl_c_in_mid_epoch_continues_as_if_it_had_not_been(run: Run, folder: Path) -> None:
    options = ("--config", "tiny.yaml", "--wandb", "false", "--trainer.max_steps", "80")
    options += ("--data.steps_per_epoch", "30")
    process = start(folder, "fit", *options, "--experiment", "cut")
    wait_for("runs/cut/*/checkpoints/last.ckpt", folder, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    place = only(folder / "runs" / "cut")
    said = [line for line in err.replace("\r", "\n").splitlines() if line and not line.startswith("fit:")]
    assert said == [f"medinr: {place.relative_to(folder)} keeps its last state; --ckpt_path last continues it",
                    "medinr: interrupted"]  # fmt: skip
    step = torch.load(place / runs.LAST, weights_only=True)["global_step"]
    assert 30 <= step < 80 and not runs.is_finished(place)
    assert run("fit", *options, "--experiment", "cut", "--ckpt_path", "last")[0] == 0
    assert run("fit", *options, "--experiment", "whole")[0] == 0
    assert largest_difference(place, only(folder / "runs" / "whole")) <= 1e-6


@pytest.mark.slow
def test_a_scheduler_ends_the_fit(run: Run, folder: Path) -> None:
    options = ("--config", "tiny.yaml", "--wandb", "false", "--trainer.max_steps", "100000")
    process = start(folder, "fit", *options)
    wait_for("runs/tiny/*/checkpoints/last.ckpt", folder, process)
    time.sleep(0.5)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    place = only(folder / "runs" / "tiny")
    assert torch.load(place / runs.LAST, weights_only=True)["global_step"] >= 10 and not runs.is_finished(place)


def test_checkpoint_steps_are_checked(run: Run) -> None:
    code, _, err = run("fit", "--config", "tiny.yaml", "--wandb", "false", "--checkpoint_steps", "0")
    assert code == 2 and "checkpoint_steps: expected 1 or more, got 0" in err and len(err.splitlines()) == 1


def test_another_writer_of_the_last_checkpoint_is_refused(run: Run, folder: Path) -> None:
    """Its file would not be replaced at once, and may be half-written when the process is killed."""
    (folder / "more.yaml").write_text(
        "trainer:\n  callbacks:\n  - {class_path: ModelCheckpoint, init_args: {save_last: true}}\n"
    )
    code, _, err = run("fit", "--config", "tiny.yaml", "--config", "more.yaml", "--wandb", "false")
    assert code == 2 and "save_last" in err and len(err.splitlines()) == 1 and not (folder / "runs").exists()


def test_a_lattice_that_takes_its_size_from_the_image_continues(run: Run, folder: Path) -> None:
    siren = "{class_path: SIREN, init_args: {hidden: [32, 32], omega: 20}}"
    lattice = "{class_path: CubicLattice, init_args: {spacings: [16, 8]}}"
    text = (folder / "tiny.yaml").read_text(encoding="utf-8")
    (folder / "lattice.yaml").write_text(text.replace(siren, lattice).replace("max_steps: 40", "max_steps: 10"))
    common = ("--config", "lattice.yaml", "--wandb", "false")
    assert run("fit", *common)[0] == 0
    place = only(folder / "runs" / "lattice")
    code, _, err = run("fit", *common, "--trainer.max_steps", "20", "--ckpt_path", str(place / runs.LAST))
    assert code == 0, err
    assert torch.load(place / runs.LAST, weights_only=True)["global_step"] == 20
    assert run("test", *common)[0] == 0
