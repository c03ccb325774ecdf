"""Workers, claims and schedulers of a cohort: killed, stopped, two at once. The fits are of fake_fit.py."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medinr.callbacks import runs
from medinr.cohorts import claims, state
from medinr.cohorts.launchers import LocalLauncher
from medinr.cohorts.schedule import Outcome, Schedule
from medinr.cohorts.state import FINISHED, JOB, LAST, is_done, read_state, write_json
from medinr.cohorts.worker import Work, environment, error_of
from tests.medinr.tiny_runs import ROOT
from tests.medinr.tiny_runs import environment as with_paths

FAKE = Path(__file__).with_name("fake_fit.py")
SCHEDULER = """\
import sys
from pathlib import Path
from medinr.cohorts.launchers import LocalLauncher
from medinr.cohorts.schedule import Schedule
folders = {p.name: p for p in sorted(Path(sys.argv[1]).iterdir())}
schedule = Schedule(folders, LocalLauncher(int(sys.argv[2])), tell=lambda line: None)
try:
    schedule.run()
except KeyboardInterrupt:
    schedule.stop()
    sys.exit(130)
"""


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", with_paths()["PYTHONPATH"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("medinr.cohorts.schedule.POLL_S", 0.02)
    monkeypatch.setattr("medinr.cohorts.schedule.LOOK_S", 0.05)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """Folders of fits, a case each."""

    def folders(cases: int, *more: str) -> dict[str, Path]:
        found = {}
        for case in range(1, cases + 1):
            folder = tmp_path / "fits" / f"case{case}_seed0"
            arguments = [f"--data.case={case}", "--seed_everything=0", *more]
            job = {"command": [sys.executable, str(FAKE)], "arguments": arguments, "cwd": str(tmp_path)}
            write_json(folder / JOB, job)
            found[folder.name] = folder
        return found

    return folders


def steps_of(folder: Path) -> list[int]:
    [last] = folder.glob(f"*/*/{LAST}")
    return [int(line) for line in last.read_text(encoding="utf-8").split()]


def run(folders: dict[str, Path], workers: int = 2) -> Outcome:
    return Schedule(folders, LocalLauncher(workers), tell=lambda line: None).run()


def wait(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def started_steps(folder: Path, n: int) -> Callable[[], bool]:
    return lambda: bool(list(folder.glob(f"*/*/{LAST}"))) and len(steps_of(folder)) >= n


def pids(folder: Path) -> list[int]:
    """The worker and the fit."""
    return [pid for pid, _ in (claims.holder(folder) or {"pids": []})["pids"]]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def scheduler(folders: dict[str, Path], workers: int) -> "subprocess.Popen[bytes]":
    fits = next(iter(folders.values())).parent
    return subprocess.Popen([sys.executable, "-c", SCHEDULER, str(fits), str(workers)], cwd=ROOT, env=with_paths())


def test_names_are_those_of_run_folders() -> None:
    assert (LAST, FINISHED) == (runs.LAST, runs.FINISHED)


def test_a_worker_needs_no_pytorch() -> None:
    code = (
        "import sys; import medinr.cohorts.worker, medinr.cohorts.schedule;"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_fit_runs_once_and_a_second_call_runs_none(make: Callable[..., dict[str, Path]]) -> None:
    folders = make(3)
    said: list[str] = []
    outcome = Schedule(folders, LocalLauncher(2), said.append).run()
    assert sorted(outcome.done) == sorted(folders) and not outcome.failed
    assert len(said) == 3 and said[-1].startswith("[3/3]")
    again = run(folders)
    assert sorted(again.done) == sorted(folders)
    for folder in folders.values():
        assert steps_of(folder) == [0, 1, 2] and claims.count(folder) == 1
        assert (folder / read_state(folder)["run"] / "results" / "metrics.json").exists()


def test_no_more_workers_than_asked_for(make: Callable[..., dict[str, Path]]) -> None:
    folders = make(4)
    most = 0
    launcher = LocalLauncher(2)
    start = launcher.start

    def watched(some: list[Path]) -> object:
        nonlocal most
        handles = start(some)
        most = max(most, sum(not h.finished() for h in launcher._handles))
        return handles

    launcher.start = watched  # type: ignore[method-assign, assignment]
    Schedule(folders, launcher, tell=lambda line: None).run()
    assert most == 2


def test_a_fit_that_fails_is_tried_once_more_and_listed(make: Callable[..., dict[str, Path]]) -> None:
    folders = make(2, "--data.fail=1")
    said: list[str] = []
    outcome = Schedule(folders, LocalLauncher(1), said.append).run()
    assert outcome.done == ["case2_seed0"]
    assert outcome.failed == {"case1_seed0": "data.root: expected a folder, found nothing"}
    assert read_state(folders["case1_seed0"])["failures"] == 2
    assert sum("once more" in line for line in said) == 1
    assert run(folders).failed, "a later call tries again"
    assert read_state(folders["case1_seed0"])["failures"] == 4


def test_a_fit_that_fails_once_is_done(make: Callable[..., dict[str, Path]]) -> None:
    folders = make(1, "--data.fail_once=1")
    assert run(folders).done == ["case1_seed0"]
    assert read_state(folders["case1_seed0"])["failures"] == 1


def test_killed_fit_goes_on_from_its_checkpoint(make: Callable[..., dict[str, Path]]) -> None:
    folders = make(1, "--data.steps=20")
    folder = folders["case1_seed0"]
    thread = threading.Thread(target=lambda: run(folders))
    thread.start()
    wait(started_steps(folder, 3))
    kill(pids(folder)[1])
    thread.join()
    assert is_done(folder) and steps_of(folder) == list(range(20))
    assert read_state(folder)["failures"] == 1


def test_killed_worker_costs_nothing(make: Callable[..., dict[str, Path]]) -> None:
    """The fit outlives it and holds the claim; then its results are made."""
    folders = make(1, "--data.steps=20")
    folder = folders["case1_seed0"]
    thread = threading.Thread(target=lambda: run(folders))
    thread.start()
    wait(lambda: started_steps(folder, 3)() and len(pids(folder)) == 2)
    kill(pids(folder)[0])
    thread.join()
    assert is_done(folder) and steps_of(folder) == list(range(20))
    assert claims.count(folder) == 2


def test_killed_worker_and_fit_cost_one_attempt(make: Callable[..., dict[str, Path]]) -> None:
    folders = make(1, "--data.steps=20")
    folder = folders["case1_seed0"]
    thread = threading.Thread(target=lambda: run(folders))
    thread.start()
    wait(lambda: started_steps(folder, 3)() and len(pids(folder)) == 2)
    for pid in pids(folder):
        kill(pid)
    thread.join()
    assert is_done(folder) and steps_of(folder) == list(range(20))


def test_killed_scheduler_is_called_again(make: Callable[..., dict[str, Path]]) -> None:
    folders = make(4, "--data.steps=30")
    first, second, *_ = folders.values()
    process = scheduler(folders, 2)
    wait(lambda: started_steps(first, 3)() and started_steps(second, 3)())
    process.kill()
    process.wait()
    assert claims.holder(first) is not None, "its workers go on"
    outcome = run(folders)
    assert sorted(outcome.done) == sorted(folders)
    for folder in folders.values():
        assert steps_of(folder) == list(range(30)) and claims.count(folder) == 1


def test_two_schedulers_share_the_fits(make: Callable[..., dict[str, Path]]) -> None:
    folders = make(5)
    process = scheduler(folders, 2)
    outcome = run(folders)
    assert process.wait(30) == 0
    assert sorted(outcome.done) == sorted(folders)
    for folder in folders.values():
        assert steps_of(folder) == [0, 1, 2]


def test_ctrl_c_keeps_the_states_and_the_next_call_goes_on(make: Callable[..., dict[str, Path]]) -> None:
    folders = make(3, "--data.steps=40")
    first = folders["case1_seed0"]
    process = scheduler(folders, 2)
    wait(started_steps(first, 3))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert claims.holder(first) is None and read_state(first)["state"] == "open"
    kept = steps_of(first)
    assert 3 <= len(kept) < 40 and read_state(first)["failures"] == 0
    assert sorted(run(folders).done) == sorted(folders)
    assert steps_of(first) == list(range(40))


def test_run_folder_without_a_checkpoint_is_removed(make: Callable[..., dict[str, Path]]) -> None:
    [folder] = make(1).values()
    (folder / "fake" / "1").mkdir(parents=True)
    (folder / "fake" / "1" / "config.yaml").touch()
    assert Work(folder).run() == "done"
    assert not (folder / "fake" / "1").exists() and len(list((folder / "fake").iterdir())) == 1


def test_signals_that_announce_the_end_of_a_job_do_not_end_the_fit(make: Callable[..., dict[str, Path]]) -> None:
    [folder] = (folders := make(1, "--data.steps=20")).values()
    thread = threading.Thread(target=lambda: run(folders))
    thread.start()
    wait(lambda: started_steps(folder, 2)() and len(pids(folder)) == 2)
    os.kill(pids(folder)[1], signal.SIGUSR2)
    thread.join()
    assert is_done(folder) and read_state(folder)["failures"] == 0 and claims.count(folder) == 1


def test_a_fit_hears_signals_that_are_blocked_here(make: Callable[..., dict[str, Path]]) -> None:
    [folder] = make(1, "--data.steps=60").values()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as in a worker of Ray
    try:
        work = Work(folder)
        stopper = threading.Thread(target=lambda: (wait(started_steps(folder, 2)), work.stop(signal.SIGINT)))
        stopper.start()
        assert work.run() == "stopped"
        stopper.join()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= {signal.SIGINT}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert len(steps_of(folder)) < 60 and claims.holder(folder) is None


# -- claims ----------------------------------------------------------------------------------------------------------


def test_one_of_many_gets_the_claim(tmp_path: Path) -> None:
    found: list[claims.Claim | None] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        found.append(claims.take(tmp_path))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in found) == 1
    next(c for c in found if c is not None).release()
    assert claims.take(tmp_path) is not None and claims.count(tmp_path) == 2


def other(tmp_path: Path, **changes: object) -> Path:
    """A claim with some entries changed."""
    claim = claims.take(tmp_path)
    assert claim is not None
    claim.record |= changes
    claim._write()
    return claim.path


def test_claims_of_the_dead_are_taken_over(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    other(tmp_path / "gone", pids=[[dead.pid, "1"]])
    assert claims.take(tmp_path / "gone") is not None
    other(tmp_path / "reused", pids=[[os.getpid(), "1"]])
    assert claims.take(tmp_path / "reused") is not None, "the same number, another process"
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    wait(lambda: claims.started(zombie.pid) is None)  # it ended, and nobody has asked how
    zombie.wait()


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_claims_of_other_machines_live_by_their_signs(tmp_path: Path) -> None:
    path = other(tmp_path, host="elsewhere")
    assert claims.take(tmp_path) is None
    age(path, claims.SILENT_S + 5)
    taken = claims.take(tmp_path)
    assert taken is not None
    late = claims.Claim(path)
    assert not late.renew(), "the first owner learns that it lost the fit"
    assert taken.renew()


def test_unwritten_claim_counts_for_a_moment(tmp_path: Path) -> None:
    path = tmp_path / claims.FOLDER / "0001.json"
    path.parent.mkdir()
    path.touch()
    assert claims.holder(tmp_path) == {} and claims.take(tmp_path) is None
    age(path, claims.UNWRITTEN_S + 5)
    assert claims.take(tmp_path) is not None


# -- small things ----------------------------------------------------------------------------------------------------


def test_environment_of_a_fit_is_its_own() -> None:
    given = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "LOCAL_RANK": "1", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "9"}
    found = environment(2, given)
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "2" and found["SLURM_JOB_ID"] == "7"
    assert not {"SLURM_NTASKS", "SLURM_PROCID", "LOCAL_RANK"} & set(found)
    assert environment(None, given)["OMP_NUM_THREADS"] == "9"


@pytest.mark.parametrize(
    ("log", "code", "expected"),
    [
        ("loss\rmedinr: error: no file\nbye\n", 2, "no file"),
        ("Traceback\nRuntimeError: shapes\n\n", 1, "exit code 1: RuntimeError: shapes"),
        ("", 1, "exit code 1: it said nothing"),
        ("medinr: error: no file", -9, "killed by SIGKILL (out of memory?)"),
        ("", -11, "killed by SIGSEGV"),
    ],
)
def test_error_in_one_line(log: str, code: int, expected: str) -> None:
    assert error_of(log, code) == expected


def test_states_add_up_and_survive_broken_files(tmp_path: Path) -> None:
    state.write_state(tmp_path, "failed", 2.0, "one")
    state.write_state(tmp_path, "open", 1.5)
    assert read_state(tmp_path) == {"state": "open", "error": "", "failures": 1, "seconds": 3.5, "run": ""}
    (tmp_path / state.STATE).write_text("[1", encoding="utf-8")
    assert read_state(tmp_path)["state"] == "open"
    assert [p.name for p in tmp_path.iterdir()] == [state.STATE]
