"""Workers on clusters: SLURM through submitit, and Ray. Both are optional: pip install 'medinr[cluster]'."""

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medinr.cohorts.launchers import shared_threads
from medinr.cohorts.worker import LONGEST, Work, work_of
from medinr.errors import UserError

CLUSTERS = ("slurm", "local", "debug")
SLURM_THREADS = 4
"""Cores of a fit on SLURM where nothing says how many: the machine that submits says nothing of the nodes."""
TIMEOUT_MIN = 240
"""submitit's own defaults are 5 minutes on SLURM and 2 here. A fit that takes longer is requeued and goes on."""


def require(package: str, launcher: str) -> Any:
    """An optional package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"--launcher {launcher}: expected the package {package}, found: {error}; pip install 'medinr[cluster]'"
        ) from None


def plain_values(options: Mapping[str, str]) -> dict[str, Any]:
    """``{"mem_gb": "16"}`` -> {"mem_gb": 16}: read as the values in a YAML file are."""
    from jsonargparse import get_loader  # not at the head: a job imports this file for its `Task` alone

    return {key: get_loader("yaml")(value) for key, value in options.items()}


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]


# -- SLURM -----------------------------------------------------------------------------------------------------------


class Task:
    """What submitit runs in a job: one fit. A job that is preempted or runs out of time keeps the fit's state and is
    submitted again."""

    def __init__(self, folder: str, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.work: Work | None = None

    def __call__(self) -> str:
        self.work = work_of(self.folder, self.threads)
        try:
            return self.work.run()
        except Exception as error:  # submitit's debug executor would open a debugger
            return _one_line(error)
        finally:
            self.work = None

    def checkpoint(self) -> Any:
        """Called by submitit on its signal; what it returns is submitted."""
        if self.work is not None:
            self.work.halt()
        return require("submitit", "slurm").helpers.DelayedSubmission(Task(self.folder, self.threads))


class SubmititHandle:
    """A job of submitit."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def finished(self) -> bool:
        return bool(self.job.done())

    def reason(self) -> str:
        try:
            return f"job {self.job.job_id}: {self.job.result()}"
        except Exception as error:
            return f"job {self.job.job_id} ({self.job.state}): {_one_line(error)}"

    def stop(self) -> None:
        self.job.cancel(check=False)

    def kill(self) -> None:
        """SLURM itself kills what does not end."""
        self.stop()


class DebugHandle(SubmititHandle):
    """A job of submitit's debug executor, which runs in this process when one asks for it."""

    def finished(self) -> bool:
        if self.job.cancelled:
            return True
        if self.job.result() == "stopped":  # the worker took this process's Ctrl-C for its own
            self.job.cancel()
            raise KeyboardInterrupt
        return True


class SubmititLauncher:
    """SLURM arrays, one task a fit; or submitit's own processes here (``cluster=local``, ``cluster=debug``).

    Args:
        workers: tasks of an array that run at a time.
        threads: cores of a task; None: cpus_per_task of the options, else `SLURM_THREADS` (here: a share of the cores).
        options: ``cluster``, and what submitit's AutoExecutor takes: timeout_min, mem_gb, gpus_per_node,
            slurm_partition, slurm_account, ...
        out: submitit's files go into its ``submitit/``.
        title: name of the jobs.

    Raises:
        UserError: submitit is missing, there is no SLURM here, an option that it does not take.
    """

    def __init__(self, workers: int, threads: int | None, options: Mapping[str, str], out: Path, title: str) -> None:
        submitit = require("submitit", "slurm")
        given = plain_values(options)
        cluster = given.pop("cluster", "slurm")
        if cluster not in CLUSTERS:
            raise UserError(f"--option cluster: expected one of {', '.join(CLUSTERS)}, got {cluster}")
        here = cluster != "slurm"
        usual = shared_threads(workers) if here else SLURM_THREADS
        self.threads = int(given.pop("cpus_per_task", 0) or threads or usual)
        self.local, self.debug = here, cluster == "debug"
        self.capacity: int | None = None if not here else 1 if self.debug else workers
        chosen = {"timeout_min": TIMEOUT_MIN, "slurm_array_parallelism": workers, **given}
        try:
            self.executor = submitit.AutoExecutor(out.absolute() / "submitit" / "%j", cluster=cluster)
            self.executor.update_parameters(name=title, nodes=1, tasks_per_node=1, cpus_per_task=self.threads, **chosen)
        except RuntimeError as error:
            raise UserError(
                f"--launcher slurm: expected a SLURM cluster, found none here ({_one_line(error)}); submit from a "
                "login node, or try it with --option cluster=local"
            ) from None
        except (NameError, AssertionError, TypeError, ValueError) as error:
            raise UserError(f"--option: expected parameters of submitit, found: {_one_line(error)}") from None

    def start(self, folders: Sequence[Path]) -> list[SubmititHandle]:
        jobs = self.executor.submit_array([Task(str(folder), self.threads) for folder in folders])
        return [(DebugHandle if self.debug else SubmititHandle)(job) for job in jobs]

    def close(self) -> None:
        """Jobs are SLURM's."""


# -- Ray -------------------------------------------------------------------------------------------------------------


class RayHandle:
    """A task of Ray."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray, self.reference = ray, reference

    def finished(self) -> bool:
        return bool(self.ray.wait([self.reference], timeout=0)[0])

    def reason(self) -> str:
        try:
            return f"its Ray task ended: {self.ray.get(self.reference)}"
        except Exception as error:
            return f"its Ray task ended: {_one_line(error)}"

    def stop(self) -> None:
        self.ray.cancel(self.reference, force=False)

    def kill(self) -> None:
        self.ray.cancel(self.reference, force=True)


class RayLauncher:
    """Tasks of a Ray cluster, one a fit.

    Args:
        workers: tasks at a time.
        threads: CPUs of a task; None: num_cpus of the options, else a share of the cluster's.
        options: ``address`` (default: RAY_ADDRESS, else the cluster that `ray start` began on this machine; ``local``
            begins one for this call), ``num_cpus``, ``num_gpus`` and other options of a Ray task.

    Raises:
        UserError: Ray is missing, no cluster is there, no node has so many CPUs, an option that Ray does not take.
    """

    local = False

    def __init__(self, workers: int, threads: int | None, options: Mapping[str, str]) -> None:
        self.ray = ray = require("ray", "ray")
        given = plain_values(options)
        address = str(given.pop("address", None) or os.environ.get("RAY_ADDRESS") or "auto")
        alone = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **alone)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--launcher ray: expected a Ray cluster at {address}, found: {_one_line(error)}; run "
                "`ray start --head`, or give --option address=HOST:6379 or address=local"
            ) from None
        try:
            most = max((int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]), default=0)
            total = int(ray.cluster_resources().get("CPU", 0))
            cpus = int(given.pop("num_cpus", 0) or threads or max(1, min(most, total // workers)))
            if cpus > most:
                raise UserError(f"--threads: expected at most {most}, the CPUs of the largest Ray node, got {cpus}")
            self.capacity: int | None = workers
            self.threads = cpus
            try:
                self.task = ray.remote(_function()).options(num_cpus=cpus, max_retries=0, **given)
            except (TypeError, ValueError) as error:
                raise UserError(f"--option: expected options of a Ray task, found: {_one_line(error)}") from None
        except BaseException:
            self.close()
            raise

    def start(self, folders: Sequence[Path]) -> list[RayHandle]:
        paths = [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        return [RayHandle(self.ray, self.task.remote(str(f), self.threads, paths)) for f in folders]

    def close(self) -> None:
        self.ray.shutdown()


def _function() -> Any:
    """What a Ray task runs. Made here so that Ray sends its code, not its name, for a medinr that is on PYTHONPATH."""

    def fit(folder: str, threads: int, paths: list[str]) -> str:
        import os
        import sys

        sys.path += [path for path in paths if path not in sys.path]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        from medinr.cohorts.worker import work_of

        return work_of(folder, threads).run()

    return fit
