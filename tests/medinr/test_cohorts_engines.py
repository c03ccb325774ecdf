"""Cohorts on SLURM (submitit's own executors, and its submission file) and on Ray. The fits are of fake_fit.py."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medinr.cohorts import claims
from medinr.cohorts.engines import RayLauncher, SubmititLauncher, Task
from medinr.cohorts.launchers import Launcher
from medinr.cohorts.schedule import Schedule
from medinr.cohorts.state import JOB, LAST, is_done, read_state, write_json
from medinr.errors import UserError
from tests.medinr.test_cohorts_schedule import steps_of
from tests.medinr.tiny_runs import ROOT, environment

FAKE = Path(__file__).with_name("fake_fit.py")
Make = Callable[..., dict[str, Path]]


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setattr("medinr.cohorts.schedule.POLL_S", 0.05)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Folders of fits, a case each."""

    def folders(cases: int, *more: str) -> dict[str, Path]:
        found = {}
        for case in range(1, cases + 1):
            folder = tmp_path / "fits" / f"case{case}"
            arguments = [f"--data.case={case}", "--seed_everything=0", *more]
            write_json(
                folder / JOB, {"command": [sys.executable, str(FAKE)], "arguments": arguments, "cwd": str(tmp_path)}
            )
            found[folder.name] = folder
        return found

    return folders


def wait_for_steps(folder: Path, n: int = 2) -> None:
    end = time.monotonic() + 60
    while not list(folder.glob(f"*/*/{LAST}")) or len(steps_of(folder)) < n:
        assert time.monotonic() < end
        time.sleep(0.02)


def run_all(folders: dict[str, Path], launcher: Launcher) -> None:
    try:
        outcome = Schedule(folders, launcher, tell=lambda line: None).run()
    finally:
        launcher.close()
    assert sorted(outcome.done) == sorted(folders), outcome.failed
    for folder in folders.values():
        assert steps_of(folder) == list(range(len(steps_of(folder)))) and read_state(folder)["state"] == "done"


# -- SLURM -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def submitit() -> None:
    pytest.importorskip("submitit", reason="submitit is not installed (pip install 'medinr[cluster]')")


def on_slurm(out: Path, cluster: str, workers: int = 2, **options: str) -> SubmititLauncher:
    return SubmititLauncher(workers, 1, {"cluster": cluster, **options}, out, "medinr-tiny")


@pytest.mark.usefixtures("submitit")
@pytest.mark.parametrize("cluster", ["local", "debug"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit leaves its debug logs open
def test_submitit_without_slurm(make: Make, tmp_path: Path, cluster: str) -> None:
    folders = make(3)
    run_all(folders, on_slurm(tmp_path, cluster))
    assert all(claims.count(folder) == 1 for folder in folders.values())


@pytest.mark.usefixtures("submitit")
def test_job_that_runs_out_of_time_is_requeued_and_goes_on(make: Make, tmp_path: Path) -> None:
    [folder] = (folders := make(1, "--data.steps=60")).values()
    thread = threading.Thread(target=lambda: run_all(folders, on_slurm(tmp_path, "local")))
    thread.start()
    wait_for_steps(folder)
    [[task, _], _] = (claims.holder(folder) or {})["pids"]
    os.kill(task, signal.SIGUSR2)  # what SLURM sends before the end
    thread.join(60)
    assert not thread.is_alive() and is_done(folder) and steps_of(folder) == list(range(60))
    assert read_state(folder)["failures"] == 0 and claims.count(folder) == 2


def executable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


STAND_INS = {
    "sbatch": """#!{python}
import os, pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[-1])
text = script.read_text()
pathlib.Path("{folder}/kept.sh").write_text(text)
last = int(re.search(r"--array=0-(\\d+)", text)[1])
for i in range(last + 1):
    more = dict(SLURM_JOB_ID=str(70 + i), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(i), SLURM_NTASKS="1",
                SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_JOB_NUM_NODES="1")
    log = open("{folder}/log.txt", "ab")
    env = {{**os.environ, **more}}
    subprocess.Popen(["bash", str(script)], env=env, stdout=log, stderr=log, start_new_session=True)
print("Submitted batch job 7")
""",
    "srun": """#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words = words[1 if words[0] == "--unbuffered" else 2 :]
os.execvp(words[0], words)
""",
    "sacct": """#!{python}
print("JobID|State|NodeList")
for i in range(9):
    print(f"7_{{i}}|RUNNING|here")
""",
}
"""Just enough of SLURM for submitit to submit an array, and for its script to run."""


@pytest.mark.usefixtures("submitit")
def test_the_script_for_slurm_runs(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = make(3)
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        executable(tmp_path / "bin" / name, text.format(python=sys.executable, folder=tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    run_all(folders, on_slurm(tmp_path, "slurm"))
    assert all(claims.count(folder) == 1 for folder in folders.values())


@pytest.mark.usefixtures("submitit")
def test_slurm_array_is_what_was_asked_for(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The submission file, given to an sbatch that keeps it."""
    folders = make(3)
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "sbatch", f'#!/bin/sh\ncp "$1" {tmp_path}/kept.sh\necho "Submitted batch job 7"\n')
    executable(tmp_path / "bin" / "srun", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    launcher = SubmititLauncher(
        2, None, {"timeout_min": "90", "slurm_partition": "gpu", "gpus_per_node": "1"}, tmp_path, "medinr-tiny"
    )
    assert launcher.capacity is None, "SLURM holds them all, and runs two at a time"
    jobs = launcher.start(list(folders.values()))
    assert [handle.job.job_id for handle in jobs] == ["7_0", "7_1", "7_2"]
    lines = (tmp_path / "kept.sh").read_text(encoding="utf-8").splitlines()
    for expected in ("array=0-2%2", "partition=gpu", "gpus-per-node=1", "time=90", "cpus-per-task=4", "nodes=1"):
        assert f"#SBATCH --{expected}" in lines
    assert "#SBATCH --job-name=medinr-tiny" in lines and any(
        line.startswith("#SBATCH --signal=USR2@") for line in lines
    )
    [command] = [line for line in lines if "submitit.core._submit" in line]
    assert command.startswith("srun") and str(tmp_path / "submitit") in command
    for handle in jobs:
        handle.job._cancel_at_deletion = False


@pytest.mark.usefixtures("submitit")
def test_mistakes_about_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="expected a SLURM cluster, found none here"):
        on_slurm(tmp_path, "slurm")
    with pytest.raises(UserError, match="--option cluster: expected one of slurm, local, debug, got lsf"):
        on_slurm(tmp_path, "lsf")
    with pytest.raises(UserError, match="expected parameters of submitit"):
        on_slurm(tmp_path, "local", slurm_partitin="gpu")
    with pytest.raises(UserError, match="expected parameters of submitit"):
        on_slurm(tmp_path, "local", timeout_min="long")


def test_task_tells_its_error(tmp_path: Path) -> None:
    assert "KeyError" in Task(str(tmp_path), 1)()


# -- Ray -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray counts what it warns of as errors of ours otherwise."""
    pytest.importorskip("ray", reason="ray is not installed (pip install 'medinr[cluster]')")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
def test_ray(make: Make) -> None:
    run_all(make(3), RayLauncher(2, 1, {"address": "local"}))


@pytest.mark.usefixtures("ray")
@pytest.mark.filterwarnings("ignore")
def test_no_ray_cluster() -> None:
    with pytest.raises(UserError, match="expected a Ray cluster at auto, found: ConnectionError"):
        RayLauncher(2, 1, {})


def test_jobs_import_no_pytorch() -> None:
    code = "import sys; import medinr.cohorts.engines; assert not {'torch', 'jsonargparse'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
