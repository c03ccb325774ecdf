"""Where metrics go: a CSV file in the run folder always, and Weights & Biases beside it."""

import csv
import netrc
import os
import shutil
import socket
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, WandbLogger

PROJECT = "medinr"
STAGED = "WANDB_DATA_DIR"
"""Names the folder in which W&B keeps tables and artifacts until they are sent."""


class MetricsFile(CSVLogger):
    """``metrics.csv`` in a folder; a continued run keeps the rows from before its checkpoint.

    Args:
        folder: where the file is.
        resume_step: the first step that is logged anew (None: start an empty file).
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)
        self._earlier: list[dict[str, Any]] = []
        file = Path(folder) / "metrics.csv"
        if resume_step is not None and file.exists():
            with file.open(newline="") as stream:
                rows = [{k: v for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(stream)]
            self._earlier = [r for r in rows if int(float(r.get("step", 0))) < resume_step]

    @property
    def experiment(self) -> Any:
        with warnings.catch_warnings():
            # The folder holds other files of the run, and the rows that the writer deletes are put back at once.
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            writer: Any = super().experiment
        if self._earlier and isinstance(writer.metrics, list):  # on other ranks a stand-in, every name a function
            writer.metrics, self._earlier = self._earlier + writer.metrics, []
            writer.save()
        return writer


def why_offline(timeout: float = 3.0) -> str | None:
    """The reason why W&B has to work offline, None if it can work online. ``WANDB_MODE`` is obeyed first."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return None if mode in ("online", "run", "shared") else f"WANDB_MODE={mode}"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    name = host.hostname or "api.wandb.ai"
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(name):
        return "no account"
    try:
        socket.create_connection((name, host.port or (80 if host.scheme == "http" else 443)), timeout).close()
    except OSError:
        return "no network"
    return None


def _in_netrc(host: str) -> bool:
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if name and netrc.netrc(os.path.expanduser(name)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def staged(run: Path) -> Path:
    """Where tables wait for being sent: in the run's own folder, as a home folder may be full, or gone by then."""
    return run.absolute() / "wandb"


def wandb_logger(run: Path, config: Mapping[str, Any], job: str, offline: bool) -> WandbLogger:
    """A W&B run named ``experiment/time`` (with the subcommand, if it is not the fit), files in the run folder.

    All that is done in one run folder shares a group. The resolved configuration becomes the run's config. Offline,
    `STAGED` is set, if the user has not set it; who ends the run takes it back.
    """
    import wandb

    name = f"{run.parent.name}/{run.name}"
    if offline:
        os.environ.setdefault(STAGED, str(staged(run)))
    logger = WandbLogger(
        name=name if job == "fit" else f"{name}/{job}",
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        save_dir=run.absolute(),  # W&B's process, which outlives a run, has a working directory of its own
        offline=offline,
        group=name,
        job_type=job,
        config=dict(config),
        # W&B stays silent: the end of the run says where everything is.
        settings=wandb.Settings(silent=True, console="off"),
    )
    # Lightning hands on a setting that W&B dropped, and W&B complains of it on every start.
    logger._wandb_init.pop("anonymous", None)
    return logger


def log_rows(trainer: lightning.Trainer, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Send a table to W&B, if it is there: the columns of all rows; a cell that a row has not got stays empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for logger in trainer.loggers:
        if rows and isinstance(logger, WandbLogger):
            logger.log_table(key=key, columns=columns, data=[[row.get(name) for name in columns] for row in rows])


class KeepFiles(Callback):
    """Puts the configuration and the metrics into the W&B run as files: an offline run then holds them in plain text.

    Args:
        run: the run folder.
        config: name of the configuration's file in it.
        metrics: name of the metrics' file in it.
    """

    def __init__(self, run: Path, config: str, metrics: str) -> None:
        self.run, self.config, self.metrics = Path(run), config, metrics

    def _keep(self, trainer: lightning.Trainer, name: str) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero and (self.run / name).exists():
                # A copy, because W&B itself would link to the file, and says so every time.
                folder = Path(logger.experiment.dir)
                target = folder / f"medinr-{Path(name).name}"  # W&B writes a config.yaml of its own
                shutil.copyfile(self.run / name, target)
                logger.experiment.save(str(target), base_path=str(folder), policy="now")

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._keep(trainer, self.config)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._keep(trainer, self.metrics)
