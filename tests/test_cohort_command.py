"""`medinr cohort` through the real command: its fits, its table, and one line for every mistake."""

import csv
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import medinr
from medinr import cli
from medinr.cohorts.launchers import LocalLauncher, shared_threads
from medinr.commands.cohort import passed_on
from medinr.errors import UserError
from tests.medinr import tiny_runs

FAKE = [sys.executable, str(Path(__file__).parent / "medinr" / "fake_fit.py")]
FILES = [
    f"--data.{side}{kind}={{case}}/{side}{suffix}"
    for side in ("fixed", "moving")
    for kind, suffix in (("", ".nii.gz"), ("_points", ".csv"), ("_labels", "_labels.nii.gz"))
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command in a folder with tiny.yaml and a pair of images in the folder anna."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", tiny_runs.environment()["PYTHONPATH"])
    (tmp_path / "anna").mkdir()
    tiny_runs.write(tmp_path / "anna")
    (tmp_path / "tiny.yaml").write_text(tiny_runs.TINY, encoding="utf-8")

    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["cohort", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_fits_of_the_real_command_and_their_table(run: Run, tmp_path: Path) -> None:
    few = ["--trainer.max_steps", "4", "--data.steps_per_epoch=2"]
    words = ["--config", "tiny.yaml", "--cases", "anna", "--seeds", "7-7", *FILES, *few, "--wandb", "false"]
    code, out, err = run(*words)
    assert code == 0, err
    assert "[1/1]" in out and "1 fit(s) are done, 0 failed" in out and "tre/mean" in out
    place = tmp_path / "runs" / "cohorts" / "tiny"
    with (place / "cohort.csv").open(encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert (row["case"], row["seed"], row["state"]) == ("anna", "7", "done")
    [folder] = (place / "fits" / row["fit"] / "tiny").iterdir()
    made = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "finished", "results", "checkpoints"} < made
    metrics = json.loads((folder / "results" / "metrics.json").read_text(encoding="utf-8"))
    assert float(row["tre/mean"]) == metrics["tre/mean"]
    assert "seed_everything: 7\n" in (folder / "config.yaml").read_text(encoding="utf-8")

    before = {p: p.stat().st_mtime_ns for p in place.glob("fits/**/*")}
    code, out, err = run(*words)
    assert code == 0 and "1 fit(s) are done" in out and "[" not in out
    assert before == {p: p.stat().st_mtime_ns for p in place.glob("fits/**/*")}, "nothing is done twice"


MISTAKES = {
    "unknown case": (["--cases", "anna,bert"], "bert"),
    "bad range": (["--cases", "3-1"], "--cases: expected ranges from small to large such as 1-10, got 3-1"),
    "unknown key": (["--set", "model.pionts=1,2"], "did you mean points?"),
    "wrong value": (["--set", "model.points=many,2"], "model.points"),
    "key of the cohort": (["--set", "seed_everything=1"], "use --seeds"),
    "option of the cohort": (["--seed_everything", "3"], "--seed_everything: a cohort sets it itself; use --seeds"),
    "no workers": (["--workers", "0"], "--workers, --threads: expected 1 or more, got 0"),
    "bad seeds": (["--seeds", "x"], "--seeds: expected how many"),
    "unknown option": (["--worker", "2"], "--worker: no such option"),
    "launcher": (["--launcher", "pbs"], "launcher"),
    "option of an engine": (["--option", "address=auto"], "--option address: expected with slurm or ray only"),
    "no value": (["--data.root"], "--data.root: expected a value, found none"),
    "bad limit": (["--fail-above", "tre/mean=high"], "--fail-above tre/mean: expected a number, got high"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_one_line(run: Run, tmp_path: Path, name: str) -> None:
    words, expected = MISTAKES[name]
    usual = [] if "--cases" in words else ["--cases", "anna"]
    code, out, err = run("--config", "tiny.yaml", *FILES, *usual, *words)
    assert code == 2 and out == ""
    assert err.startswith("medinr: error: ") and err.count("\n") == 1, err
    assert expected in err
    assert not (tmp_path / "runs").exists()


def test_unknown_case_of_a_data_set(run: Run) -> None:
    config = tiny_runs.ROOT / "experiments" / "idir_dirlab.yaml"
    code, _, err = run("--config", str(config), "--cases", "10-11")
    assert code == 2 and err.count("\n") == 1 and "data/dirlab" in err and "(case 10)" in err
    code, _, err = run("--config", str(config), "--cases", "11")
    assert code == 2 and err.count("\n") == 1 and "11" in err


def test_missing_configuration(run: Run) -> None:
    for words, expected in ((["--config", "none.yaml"], "no file none.yaml"), ([], "config")):
        code, _, err = run(*words)
        assert code == 2 and err.count("\n") == 1 and expected in err


@pytest.mark.parametrize(("launcher", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_missing_package(run: Run, monkeypatch: pytest.MonkeyPatch, launcher: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run("--config", "tiny.yaml", *FILES, "--cases", "anna", "--launcher", launcher)
    assert code == 2 and err.count("\n") == 1
    assert f"expected the package {package}" in err and "medinr[cluster]" in err


def test_dry_run_lists_and_runs_nothing(run: Run, tmp_path: Path) -> None:
    words = ["--config", "tiny.yaml", *FILES, "--cases", "anna", "--seeds", "2", "--set", "model.points=10,20"]
    code, out, _ = run(*words, "--dry-run")
    assert code == 0 and len(out.splitlines()) == 4
    assert out.splitlines()[0] == "anna_seed0_points-10: would run"
    assert not (tmp_path / "runs").exists()


def test_options_are_shared_out() -> None:
    own, passed = passed_on(
        ["--cases", "1", "--data.root", "x y", "--model.points=3", "--wandb", "false", "--data", "A"]
    )
    assert own == ["--cases", "1"]
    assert passed == ["--data.root=x y", "--model.points=3", "--wandb=false", "--data=A"]
    with pytest.raises(UserError):
        passed_on(["--trainer.max_steps"])


def test_threads_and_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("medinr.cohorts.launchers.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [shared_threads(n) for n in (1, 2, 3, 20)] == [8, 4, 2, 1] and shared_threads(2, 7) == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert shared_threads(1) == 3 and shared_threads(4) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    launcher = LocalLauncher(3)
    handles = launcher.start([tmp_path, tmp_path, tmp_path])
    assert [handle.gpu for handle in handles] == ["4", "6", "4"]
    for handle in handles:
        handle.process.wait()


def test_failed_fits_are_listed(run: Run, tmp_path: Path) -> None:
    """In Python, with fits that fail at once."""
    said: list[str] = []
    result = medinr.cohort(
        "tiny.yaml", [1, 2], seeds=2, overrides=["--data.fail=1"], out="out", workers=2, command=FAKE, tell=said.append
    )
    assert sorted(result.done) == ["case2_seed0", "case2_seed1"]
    assert result.failed == dict.fromkeys(["case1_seed0", "case1_seed1"], "data.root: expected a folder, found nothing")
    page = (tmp_path / "out" / "cohort.md").read_text(encoding="utf-8")
    assert "| case1_seed0 | data.root: expected a folder, found nothing |" in page and "Failure rate: 50 %" in page
    assert os.listdir(tmp_path / "out" / "fits" / "case1_seed0")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(run: Run, tmp_path: Path) -> None:
    words = ["--config", "tiny.yaml", "--cases", "anna", *FILES, "--wandb", "false", "--trainer.max_steps", "100000"]
    process = tiny_runs.start(tmp_path, "cohort", *words)
    tiny_runs.wait_for("runs/cohorts/tiny/fits/*/tiny/*/checkpoints/last.ckpt", tmp_path, process, 120)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    assert err.splitlines()[-1] == "medinr: stopped; the same command goes on from there"
    assert "Traceback" not in err
    code, out, _ = run(*words, "--dry-run")
    assert code == 0 and out == "anna_seed0: would go on from its checkpoint\n"
