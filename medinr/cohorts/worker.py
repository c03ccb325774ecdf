"""``python -m medinr.cohorts.worker FOLDER``: one job of a cohort, by the commands that a person would type.

`medinr fit` and `medinr test` run as child processes, one after the other, with everything they say in log.txt. The
worker holds the claim (see `medinr.cohorts.claims`), renews it, and hands on SIGINT and SIGTERM once, so that a fit
keeps its last state. If the worker itself is killed, the child goes on and holds the claim.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from medinr.cohorts import claims
from medinr.cohorts.state import FINISHED, JOB, LAST, LOG, discard_unstarted, is_done, read_json, run_of, write_state

Outcome = Literal["done", "failed", "claimed", "stopped"]
STOPPING = (signal.SIGINT, signal.SIGTERM)
LONGEST = 300
"""Characters of an error in tables."""
RANK_KEYS = """
RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK MASTER_ADDR MASTER_PORT MEDINR_RUN
SLURM_NTASKS SLURM_NPROCS SLURM_PROCID SLURM_LOCALID SLURM_NODEID SLURM_NTASKS_PER_NODE
"""
"""What says that a process is one of several. A fit is on its own: with SLURM's, Lightning would take it for a rank,
and would requeue SLURM's job by itself."""
THREAD_KEYS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment(threads: int | None, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a fit: as here, but on its own, and with so many threads."""
    found = {k: v for k, v in (os.environ if given is None else given).items() if k not in RANK_KEYS.split()}
    return found if threads is None else {**found, **dict.fromkeys(THREAD_KEYS, str(threads))}


def error_of(log: str, code: int) -> str:
    """The one line of a command's output that says why it ended with this code."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("medinr: error: ")]
    line = told[-1].removeprefix("medinr: error: ") if told else lines[-1] if lines else "it said nothing"
    return line[:LONGEST] if told else f"exit code {code}: {line}"[:LONGEST]


class Work:
    """One attempt at the fit of a folder.

    Args:
        folder: holds the job.json that `medinr.cohorts.plan` writes.
        threads: of the fit; None: as the environment says.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self.folder, self.threads = Path(folder), threads
        self.job = read_json(self.folder / JOB)
        self._child: subprocess.Popen[bytes] | None = None
        self._claim: Any = None
        self._stopped: int | None = None

    def run(self) -> Outcome:
        """Do what is left to do of the fit, if nobody else does."""
        if is_done(self.folder):
            return "done"
        claim = self._claim = claims.take(self.folder)
        if claim is None:
            return "claimed"
        begin = time.perf_counter()
        try:
            with self._signals():
                error = "" if is_done(self.folder) else self._fit_and_test(claim)  # done: just before the claim
                spent = time.perf_counter() - begin
                if error is None or not claim.renew():
                    if claim.renew():  # else another has the fit now, and tells its state
                        write_state(self.folder, "open", spent)
                    return "stopped"
                if error:
                    write_state(self.folder, "failed", spent, error)
                    return "failed"
                return "done"
        finally:
            self._end_child()
            claim.release()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Let the fit keep its state and end; `run` then returns. The first call counts."""
        if self._stopped is None:
            self._stopped = number
            if self._child is not None and self._child.poll() is None:
                self._child.send_signal(number)

    # ------------------------------------------------------------------------------------------------ the commands

    def _fit_and_test(self, claim: claims.Claim) -> str | None:
        """The error, "" when all went well, None when it was stopped."""
        begin = time.perf_counter()
        discard_unstarted(self.folder)
        run = run_of(self.folder)
        if run is None or not (run / FINISHED).exists():
            go_on = ["--ckpt_path", str(run / LAST)] if run else []
            error = self._command(claim, "fit", *go_on)
            if error != "":
                return error
            run = run_of(self.folder)
            if run is None:
                return "fit ended well, but left no checkpoint; leave enable_checkpointing and max_steps as they are"
        error = self._command(claim, "test", "--ckpt_path", str(run / LAST))
        if error == "" and not (run / "results" / "metrics.json").exists():
            return "test ended well, but wrote no metrics.json; its method has no results to compare"
        if error == "":
            where = run.relative_to(self.folder).as_posix()
            write_state(self.folder, "done", time.perf_counter() - begin, run=where)
        return error

    def _command(self, claim: claims.Claim, name: str, *more: str) -> str | None:
        return self._execute(
            claim, [*self.job["command"], name, *self.job["arguments"], "--runs", str(self.folder), *more]
        )

    def _execute(self, claim: Any, words: list[str]) -> str | None:
        """Run a command; the error, "" when all went well, None when it was stopped."""
        if self.stopped():
            return None
        with (self.folder / LOG).open("ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            at = log.tell()
            with _ignored():
                # A session of its own: Ctrl-C in a terminal reaches the fit once, through `stop`.
                self._child = subprocess.Popen(
                    words, cwd=self.job["cwd"], env=environment(self.threads), stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
        claim.add(self._child.pid)
        if self.stopped():  # between the check and the start
            self._child.send_signal(self._stopped or signal.SIGTERM)
        code = self._wait(claim, self._child)
        if code == 0:
            return ""
        if self.stopped():
            return None
        with (self.folder / LOG).open("rb") as log:
            log.seek(at)
            return error_of(log.read().decode("utf-8", errors="replace"), code)

    def _wait(self, claim: Any, child: "subprocess.Popen[bytes]") -> int:
        while True:
            try:
                return child.wait(claims.BEAT_S)
            except subprocess.TimeoutExpired:
                if not claim.renew():
                    self._stopped = signal.SIGKILL
                    child.kill()

    def stopped(self) -> bool:
        """Whether `stop` was called, or another machine has the fit."""
        return self._stopped is not None

    def halt(self, seconds: float = 60.0) -> None:
        """`stop`, wait until the fit has ended, and give the claim back; for handlers of signals that interrupt `run`,
        before another machine goes on with the fit."""
        self.stop()
        end = time.monotonic() + seconds
        while self._child is not None and claims.started(self._child.pid) is not None and time.monotonic() < end:
            time.sleep(0.1)  # not wait(): the interrupted one may hold its lock
        if self._claim is not None:
            self._claim.release()

    def _end_child(self) -> None:
        """After an exception of another's making (submitit's timeout): the fit keeps its state."""
        if self._child is not None and self._child.poll() is None:
            self.stop()
            self._child.wait()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, lambda n, _: self.stop(n)) for number in STOPPING}
        blocked = None
        if hasattr(signal, "pthread_sigmask"):  # Ray blocks SIGINT in its workers, and a fit would inherit it
            blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        try:
            yield
        finally:
            if blocked is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            for number, handler in before.items():
                signal.signal(number, handler)


class BatchWork(Work):
    """One attempt at the fits of a batch's folder, as `medinr.cohorts.plan.write_batches` made it.

    One child fits them as one; each fit's checkpoint goes into its own run folder at every epoch. What is left of a fit
    then, its results or, if the batch was broken off, its last steps, is a work of its own.
    """

    def _fit_and_test(self, claim: Any) -> str | None:
        begin = time.perf_counter()
        fits: dict[Path, claims.Claim] = {}
        for folder in map(Path, self.job["members"]):
            if not is_done(folder) and run_of(folder) is None and (own := claims.take(folder)) is not None:
                fits[folder] = own
        members = claims.Several(list(fits.values()))
        self._claim = together = claims.Several([claim, *fits.values()])
        try:
            for folder in fits:
                discard_unstarted(folder)
            if fits:
                words = [*self.job["command"], str(self.folder), *(folder.name for folder in fits)]
                error = self._execute(together, words)
                if error != "":
                    return error
            write_state(self.folder, "done", time.perf_counter() - begin)
            return ""
        finally:
            self._end_child()
            members.release()


def work_of(folder: str | Path, threads: int | None = None) -> Work:
    """The attempt that a folder's job.json asks for: at one fit, or at those of a batch."""
    kind = BatchWork if "members" in read_json(Path(folder) / JOB) else Work
    return kind(folder, threads)


@contextmanager
def _ignored() -> Iterator[None]:
    """What is started inside ignores the signals by which SLURM announces the end to every process of a job, and which
    would end a fit at once; the worker answers them."""
    numbers = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before: dict[int, Any] = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


CODES: dict[Outcome, int] = {"done": 0, "failed": 1, "claimed": 3, "stopped": 130}

if __name__ == "__main__":
    sys.exit(CODES[work_of(sys.argv[1]).run()])
