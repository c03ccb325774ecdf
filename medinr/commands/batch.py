"""``python -m medinr.commands.batch FOLDER FIT ...``: some fits of a cohort as one, each with its own run folder.

The child of a batch's worker (`medinr.cohorts.worker.BatchWork`); a person calls ``medinr cohort --batch N``. Every fit
is made by `medinr fit`'s own command line, seed, parts and run folder, up to the first step; then all are stepped by
one trainer. metrics.csv and checkpoints/last.ckpt of each fit are what it would have written alone, so that `medinr
test` reads it, and `medinr fit --ckpt_path` goes on with it. Pictures during the fit are left out, and costs/ is what
the batch cost as a whole.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medinr.callbacks import Costs, LastCheckpoint, runs
from medinr.callbacks.streams import Stream, Together
from medinr.cohorts.state import JOB, read_json, write_state
from medinr.commands.experiment import ExperimentCLI, Place, import_data_modules
from medinr.commands.messages import explain
from medinr.commands.quiet import quiet
from medinr.errors import UserError
from medinr.io import atomic_path
from medinr.methods.batched import BatchedRegistration, check_batch, check_trainer, split_checkpoint


class Part(ExperimentCLI):
    """One fit of a batch: its parts and its run folder, as `medinr fit` makes them, and nothing run."""

    def _run_subcommand(self, subcommand: str) -> None:
        return None

    @property
    def settings(self) -> dict[str, Any]:
        """Of the trainer, as configured."""
        return dict(self._get(self.config_init, "trainer"))


def check_cli(cli: ExperimentCLI) -> None:
    """Whether fits of a configuration can be batched.

    Raises:
        UserError: names the key that they cannot be with.
    """
    if cli.value("wandb"):
        raise UserError(
            "--batch: expected --wandb false, found true: a process has one W&B run, a batch several; add it"
        )
    check_batch([cli.model])
    check_trainer(dict(cli._get(cli.config_init, "trainer")))


class SplitLogger(Logger):
    """Hands values named ``0/loss``, ``1/loss``, ... to the logger of each fit, and any others to all.

    Args:
        each: loggers of the fits.
    """

    def __init__(self, each: Sequence[Logger]) -> None:
        super().__init__()
        self.each = list(each)

    @property
    def name(self) -> str:
        return "batch"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Each fit's are in its config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        whole = {k: v for k, v in metrics.items() if not k.partition("/")[0].isdigit()}
        for b, logger in enumerate(self.each):
            own = {k.partition("/")[2]: v for k, v in metrics.items() if k.partition("/")[0] == str(b)}
            if own or not any(k.partition("/")[0].isdigit() for k in metrics):
                logger.log_metrics({**own, **whole}, step)

    def save(self) -> None:
        for logger in self.each:
            logger.save()

    def finalize(self, status: str) -> None:
        for logger in self.each:
            logger.finalize(status)


class SplitCheckpoint(LastCheckpoint):
    """The last checkpoint of each fit in its own run folder, when a single fit would have kept it.

    Args:
        folder: of the batch, for what is kept in between.
        each: run folders.
        configs: the resolved configuration of each fit.
        every_n_steps: also after every so many steps.
    """

    def __init__(
        self, folder: Path, each: Sequence[Path], configs: Sequence[Mapping[str, Any]], every_n_steps: int | None
    ) -> None:
        super().__init__(folder, every_n_steps)
        self.each, self.configs = list(each), list(configs)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        for method, config in zip(pl_module.fits, self.configs, strict=True):
            method.state["config"] = dict(config)

    def save(self, trainer: lightning.Trainer) -> None:
        super().save(trainer)
        whole = torch.load(self.path, map_location="cpu", weights_only=True)
        self.path.unlink()
        batch: Any = trainer.lightning_module
        for b, run in enumerate(self.each):
            if b not in batch.failed:
                with atomic_path(run / runs.LAST) as part:
                    torch.save(split_checkpoint(whole, batch, b), part)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        for b, run in enumerate(self.each):
            if not trainer.interrupted and b not in pl_module.failed:
                (run / runs.FINISHED).write_text(f"step {trainer.global_step}\n", encoding="utf-8")


def make_parts(folders: Sequence[Path]) -> tuple[list[Part], list[Stream]]:
    """Each fit as its own command would begin it, one after the other, and the random numbers that it begins with."""
    parts, streams = [], []
    for folder in folders:
        arguments = read_json(folder / JOB)["arguments"]
        part = Part("fit", [*arguments, "--runs", str(folder)], Place())
        os.environ.pop("MEDINR_RUN", None)
        check_cli(part)
        streams.append(Stream())
        parts.append(part)
        with streams[-1].everywhere():
            part.datamodule.prepare_data()
            part.datamodule.setup("fit")
    return parts, streams


def run(folder: Path, names: Sequence[str]) -> BatchedRegistration:
    """Fit some members of a batch's folder.

    Raises:
        UserError: they cannot be batched, or no fit is left that has not failed.
    """
    begin = time.perf_counter()
    import_data_modules()
    folders = [Path(f) for f in read_json(folder / JOB)["members"] if Path(f).name in names]
    parts, streams = make_parts(folders)
    modules = [part.datamodule for part in parts]
    batch = BatchedRegistration([part.model for part in parts], [m.pair for m in modules], streams)
    each = [part.place.run for part in parts]
    configs = [runs.load_yaml(part.resolved()) for part in parts]
    callbacks = [SplitCheckpoint(folder, each, configs, parts[0].value("checkpoint_steps")), Costs()]
    settings = {
        "default_root_dir": str(folder),
        "logger": [SplitLogger([part.trainer.loggers[0] for part in parts])],
        "callbacks": callbacks,
    }
    trainer = lightning.Trainer(**{**parts[0].settings, **settings})
    trainer.fit(
        batch,
        Together([m.train_dataloader() for m in modules], streams),
        Together([m.val_dataloader() for m in modules], streams),
    )
    share = (time.perf_counter() - begin) / len(folders)
    for b, fit in enumerate(folders):
        error = batch.failed.get(b, "")
        write_state(fit, "failed" if error else "open", share, error)
    return batch


def main(args: Sequence[str]) -> int:
    """Returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        with quiet():
            run(Path(args[0]), args[1:])
    except SystemExit as stop:
        if isinstance(stop, SIGTERMException):
            return 128 + signal.SIGTERM
        if isinstance(stop.__context__, KeyboardInterrupt):
            return 130
        raise
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        line = explain(error, "fit", [])
        if line is None:
            raise
        print(f"medinr: error: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
