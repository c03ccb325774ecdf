"""Where the workers of a cohort run. Each engine is an existing one: processes here, submitit (SLURM), Ray."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from medinr.cohorts import claims
from medinr.cohorts.worker import environment
from medinr.errors import UserError


class Handle(Protocol):
    """A worker under way."""

    def finished(self) -> bool: ...

    def reason(self) -> str:
        """Why it ended, for one that left no state."""

    def stop(self) -> None:
        """Ask it to keep its fit's state and to end."""

    def kill(self) -> None:
        """End it at once."""


class Launcher(Protocol):
    """Starts workers.

    Attributes:
        capacity: how many run, or wait in the engine's own queue, at a time; None: as many as there are.
        local: whether they run on this machine, and with those of other schedulers here share the capacity.
    """

    capacity: int | None
    local: bool

    def start(self, folders: Sequence[Path]) -> Sequence[Handle]: ...

    def close(self) -> None: ...


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_threads(workers: int, threads: int | None = None) -> int:
    """Threads of each worker: as asked for, else its share of the cores, and no more than OMP_NUM_THREADS says."""
    if threads is not None:
        return threads
    share, said = max(1, cores() // workers), os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(said)) if said.isdigit() and int(said) > 0 else share


def visible_gpus() -> list[str]:
    """Names of the GPUs that processes started here see, [] without one."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() and name.strip() != "-1"]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


class LocalHandle:
    """A process of `medinr.cohorts.worker`."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]", gpu: str | None) -> None:
        self.folder, self.process, self.gpu = folder, process, gpu

    def finished(self) -> bool:
        return self.process.poll() is not None

    def reason(self) -> str:
        code = self.process.returncode
        if code < 0:
            return f"its worker was killed by {signal.Signals(-code).name}"
        return f"its worker ended with exit code {code}; see {self.folder / 'log.txt'}"

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        record = claims.holder(self.folder) or {}
        for pid, begin in [*record.get("pids", []), [self.process.pid, claims.started(self.process.pid)]]:
            if begin is not None and claims.started(pid) == begin:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()


class LocalLauncher:
    """Processes of this machine; cores and GPUs are shared out among them.

    Args:
        workers: processes at a time.
        threads: of each; None: its share of the cores.
    """

    local = True

    def __init__(self, workers: int, threads: int | None = None) -> None:
        self.capacity: int | None = workers
        self.threads = shared_threads(workers, threads)
        self.gpus = visible_gpus()
        self._handles: list[LocalHandle] = []

    def start(self, folders: Sequence[Path]) -> list[LocalHandle]:
        return [self._start(folder) for folder in folders]

    def _start(self, folder: Path) -> LocalHandle:
        given, gpu = environment(self.threads), self._free_gpu()
        if gpu is not None:
            given["CUDA_VISIBLE_DEVICES"] = gpu
        with (folder / "worker.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "medinr.cohorts.worker", str(folder)], env=given, stdin=subprocess.DEVNULL,
                # A session of its own: Ctrl-C reaches it through the scheduler alone, and it outlives a killed one.
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        handle = LocalHandle(folder, process, gpu)
        self._handles = [h for h in self._handles if not h.finished()] + [handle]
        return handle

    def _free_gpu(self) -> str | None:
        """The GPU with the fewest workers."""
        used = [h.gpu for h in self._handles if not h.finished()]
        return min(self.gpus, key=used.count) if self.gpus else None

    def close(self) -> None:
        """Nothing is left open: workers are processes of their own."""


def make_launcher(
    name: str, workers: int, threads: int | None, options: Mapping[str, str], out: Path, title: str = "medinr"
) -> Launcher:
    """A launcher by its name.

    Args:
        name: local, slurm or ray.
        workers: at a time.
        threads: of each.
        options: of the engine.
        out: folder for the engine's own files.
        title: of the jobs.

    Raises:
        UserError: an unknown name or option; a package that is missing; no cluster there.
    """
    if name == "local":
        if options:
            raise UserError(f"--option {next(iter(options))}: expected with slurm or ray only; leave it out")
        return LocalLauncher(workers, threads)
    from medinr.cohorts import engines  # not at the head: it is for those who installed one

    if name == "slurm":
        return engines.SubmititLauncher(workers, threads, options, out, title)
    return engines.RayLauncher(workers, threads, options)
