"""Ctrl-C: `medinr register` keeps the best state so far; a second one leaves nothing behind. Real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import medinr
from medinr import io
from medinr.callbacks import BestState
from medinr.commands.presets import PRESETS, Preset
from medinr.methods import PairRegistration, load_method
from medinr.space import Domain
from tests.medinr import pairs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pair")
    # Large enough for a fit of many seconds on any machine: the signal has to come while it runs.
    grid = Domain.of((80, 80, 80), [[1.2, 0, 0, -47.4], [0, 1.2, 0, -47.4], [0, 0, 1.2, -47.4], [0, 0, 0, 1]])
    for side, through in (("fixed", pairs.warp), ("moving", None)):
        io.write_image(out / f"{side}.nii.gz", pairs.sampled(grid, pairs.texture, through).data[0], grid)
    return out


class Command:
    """`medinr register` in a process of its own, with its stderr in a file that can be watched."""

    def __init__(self, folder: Path, out: Path) -> None:
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.log = out.with_suffix(".log")
        arguments = [str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz"), "--init", "none", "--out", str(out)]
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "medinr.cli", "register", *arguments],
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
            )

    def wait_for(self, text: str, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while text not in self.log.read_text(encoding="utf-8"):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text(encoding="utf-8")
            time.sleep(0.005)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def finish(self) -> tuple[int, str, list[str]]:
        out, _ = self.process.communicate(timeout=90)
        said = [
            x
            for x in self.log.read_text(encoding="utf-8").replace("\r", "\n").splitlines()
            if x and not x.startswith("fit:")
        ]
        return self.process.returncode, out, said


def test_ctrl_c_keeps_the_best_state_so_far(folder: Path, tmp_path: Path) -> None:
    command = Command(folder, tmp_path / "out")
    command.wait_for("loss=")
    command.interrupt()
    code, out, said = command.finish()
    assert code == 130
    assert len(said) == 1 and said[0].startswith("medinr: interrupted at step "), said
    assert out.splitlines()[-1] == f"results in {tmp_path / 'out'}"
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["interrupted"] is True
    assert 0 < metrics["step"] < PRESETS["accurate"].steps
    assert f"of step {metrics['step']}," in said[0]
    names = {"warped.nii.gz", "displacement.nii.gz", "jacobian_determinant.nii.gz", "transform.ckpt", "figures"}
    assert names < {f.name for f in (tmp_path / "out").iterdir()}
    assert metrics["displacement/max_mm"] > 0.1, "a state that was fitted, not the initial one"
    transform = load_method(tmp_path / "out" / "transform.ckpt").transform()  # type: ignore[attr-defined]
    world = pairs.points()
    assert (transform(world) - world).norm(dim=1).max() > 0.05


def test_a_second_ctrl_c_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    command = Command(folder, tmp_path / "out")
    command.wait_for("loss=")
    command.interrupt()
    command.wait_for("Ctrl-C again ends at once")
    command.interrupt()
    code, out, said = command.finish()
    assert code == 130 and out == ""
    assert said[-1] == "medinr: interrupted" and len(said) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out.log"]


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send this process SIGINT in a chosen step of a fit of 40 small ones."""

    def at(step: int) -> None:
        monkeypatch.setitem(PRESETS, "fast", Preset((16, 16), 64, 40))
        original = PairRegistration.training_step

        def with_signal(self: Any, batch: Any, batch_idx: int) -> Any:
            if self.global_step == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, batch, batch_idx)

        monkeypatch.setattr(PairRegistration, "training_step", with_signal)

    return at


def register(**options: Any) -> medinr.Result:
    pair = pairs.pair()
    return medinr.register(pair.fixed, pair.moving, preset="fast", init="none", **options)


def test_in_python_ctrl_c_passes(interrupted_at: Callable[[int], None], tmp_path: Path) -> None:
    interrupted_at(5)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        register(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("step", [0, 5, 12, 25])
def test_the_step_that_is_kept(
    interrupted_at: Callable[[int], None], step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four levels of 10 steps, one record a level: it is of the level's end, else the newest state."""
    interrupted_at(step)
    handler = signal.getsignal(signal.SIGINT)
    result = register(keep_interrupted=True)
    assert result.interrupted and result.step == step + 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_in_the_last_step_changes_nothing(interrupted_at: Callable[[int], None]) -> None:
    interrupted_at(39)
    result = register(keep_interrupted=True)
    assert not result.interrupted and result.step == 40


class Scripted(torch.nn.Module):
    """Stands in for a method: a weight that tells the step, and a level chosen by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.level: Any = "coarse"


class Counter:
    global_step = 0


def played(losses: list[tuple[str, float]], every: int = 2) -> tuple[int, float]:
    """Step and weight that `BestState` restores after these (level, loss) of each step."""
    best, trainer, method = BestState(every), Counter(), Scripted()
    for level, loss in losses:
        method.level = level
        best.on_train_batch_start(trainer, method, None, 0)  # type: ignore[arg-type]
        trainer.global_step += 1
        method.weight.data.fill_(trainer.global_step)
        best.on_train_batch_end(trainer, method, {"loss": torch.tensor(loss)}, None, 0)  # type: ignore[arg-type]
    return best.restore(trainer, method), method.weight.item()  # type: ignore[arg-type]


def test_best_state_is_of_the_lowest_mean_loss_of_its_level() -> None:
    falling = [("coarse", loss) for loss in (5.0, 4.0, 3.0, 2.0)]
    assert played(falling) == (4, 4.0)
    assert played([*falling, ("coarse", 9.0), ("coarse", 9.0)]) == (4, 4.0), "from before the loss rose"
    assert played([*falling, ("coarse", 0.0), ("coarse", 9.0)]) == (4, 4.0), "one lucky step is no record"
    fine = [*falling, ("fine", 8.0), ("fine", 7.0)]
    assert played(fine) == (6, 6.0), "a higher loss on a finer level is progress"
    assert played(fine[:-1]) == (5, 5.0), "no record on the new level yet: the newest"
