"""``medinr fit | validate | test | predict``: LightningCLI with run folders, tracking, and one-line mistakes."""

import importlib
import inspect
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

import data_modules
import medinr
import medinr.losses
import medinr.methods
from medinr.callbacks import (
    Artifacts,
    CaseTable,
    ConfigInCheckpoint,
    Costs,
    KeepFiles,
    LastCheckpoint,
    MetricsFile,
    Preview,
    RandomStates,
    ResultWriter,
    RunProgress,
    runs,
)
from medinr.callbacks.checkpoints import check_checkpoint, check_fits, check_grid
from medinr.callbacks.logs import STAGED, staged, wandb_logger, why_offline
from medinr.commands import help_formatter
from medinr.commands.checks import check_writable
from medinr.commands.messages import explain, one_line
from medinr.commands.sequence import times_of_run, write_sequence
from medinr.errors import UserError
from medinr.methods import Method
from medinr.methods.method import check_precision
from medinr.ranks import is_first
from medinr.results import summary

DEFAULTS = Path(medinr.__file__).parent / "defaults.yaml"
OWN_KEYS = (
    "seed_everything",
    "experiment",
    "runs",
    "wandb",
    "artifacts",
    "checkpoint_steps",
    "out",
    "report",
    "times",
    "config",
    "ckpt_path",
    "weights_only",
    "model",
    "data",
)
PER_CALL = ("config", "ckpt_path", "weights_only", "out", "report", "times")
"""Keys of one call that have no place in a run's config.yaml, so that it serves all four subcommands."""

ABOUT = """\
Runs of one experiment share runs/<experiment>/. fit makes a folder there; validate, test and predict read the newest
checkpoint on the same data (or --ckpt_path FILE); fit --ckpt_path last continues a run that was broken off.

example:
  medinr {command} --config experiments/idir_dirlab.yaml --data.root data/dirlab --data.case 1"""


def keys_of(command: str) -> list[str]:
    """Dotted keys of the trainer."""
    return [f"trainer.{name}" for name in inspect.signature(lightning.Trainer).parameters]


def import_data_modules() -> None:
    """Import every data module, so that a YAML may name its class without the package."""
    for file in sorted(Path(data_modules.__file__).parent.glob("*.py")):
        if not file.stem.startswith("_"):
            importlib.import_module(f"data_modules.{file.stem}")


@dataclass
class Place:
    """The run folder in use, and whether this call made it. LightningCLI runs inside its own constructor, so what must
    be known after a failure is kept outside of it."""

    run: Path = Path()
    results: Path = Path()
    made: bool = False
    first: bool = True  # rank 0 of several processes, or the only one: it alone writes and speaks
    offline: str | None = None

    def discard(self) -> None:
        """Take back a folder in which nothing was computed."""
        if self.made and not any((self.run / name).exists() for name in (runs.LAST, "metrics.csv")):
            runs.discard(self.run)


class ExperimentCLI(LightningCLI):
    """Stock LightningCLI in subclass mode, with a run folder for each fit."""

    def __init__(self, command: str, args: list[str], place: "Place") -> None:
        self.command, self.place = command, place
        strict = {"exit_on_error": False, "allow_abbrev": False, "formatter_class": help_formatter()}
        each = {
            **strict,
            "default_config_files": [str(DEFAULTS)],
            "usage": f"medinr {command} --config FILE.yaml [--KEY VALUE ...]",
            "description": ABOUT.format(command=command),
        }
        super().__init__(
            Method,
            lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={**strict, "prog": "medinr", **{name: dict(each) for name in self.subcommands()}},
            args=[command, *args],
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """As LightningCLI's, less the arguments that only some subcommands have: one config.yaml serves all."""
        return {k: {*v, "verbose", "return_predictions"} for k, v in LightningCLI.subcommands().items()}

    def validate(self, **kwargs: Any) -> None:
        """Called by LightningCLI in place of the trainer's method; `report` prints the metrics."""
        self.trainer.validate(**kwargs, verbose=False)

    def test(self, **kwargs: Any) -> None:
        """As `validate`."""
        self.trainer.test(**kwargs, verbose=False)

    def predict(self, **kwargs: Any) -> None:
        """As `validate`; predictions are written, not kept."""
        self.trainer.predict(**kwargs, return_predictions=False)
        times = times_of_run(self.command, self.value("times"), self.model, self.datamodule)
        if times and self.place.first:
            write_sequence(self.place.results / "sequence", self.model, self.datamodule, times)

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument(
            "--experiment", type=str | None, default=None, help="its name (default: the last --config's)"
        )
        parser.add_argument("--runs", type=str, default="runs", help="folder that holds all run folders")
        parser.add_argument("--wandb", type=bool, default=True, help="log to Weights & Biases, offline where need be")
        parser.add_argument(
            "--artifacts", type=bool, default=False, help="also send checkpoint and fields to Weights & Biases"
        )
        parser.add_argument(
            "--checkpoint_steps", type=int | None, default=None, help="keep the state also after every so many steps"
        )
        parser.add_argument("--out", type=str | None, default=None, help="folder for test's and predict's results")
        parser.add_argument("--report", type=bool, default=False, help="test and predict also write report.html")
        parser.add_argument(
            "--times",
            type=str | None,
            default=None,
            help="predict: also read a sequence at these times, 0:95:5 (first, last, step) or auto, into out/sequence",
        )

    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        given = self.config[self.command].get("ckpt_path")
        if given and given != "last":  # before LightningCLI looks into it
            check_checkpoint(Path(given))

    # -- configuration -------------------------------------------------------------------------------------------

    def value(self, key: str) -> Any:
        """A value of the parsed configuration."""
        return self._get(self.config, key)

    @property
    def experiment(self) -> str:
        if self.value("experiment"):
            return str(self.value("experiment"))
        files = [str(f) for f in self.value("config") or []]
        return Path(files[-1]).stem if files else str(self.value("model").class_path).rpartition(".")[2]

    def resolved(self) -> str:
        """The configuration that a run folder keeps, as YAML: everything but what belongs to this one call."""
        config = self.config[self.command].clone()
        for key in PER_CALL:
            config.pop(key, None)
        config["experiment"] = self.experiment
        return str(self._parser(self.command).dump(config, skip_none=False, skip_validation=True))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except ValueError as error:  # what a constructor refuses comes wrapped in jsonargparse's report
            raise UserError(_constructor_line(error)) from error

    # -- the run folder ------------------------------------------------------------------------------------------

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        given = self._get(self.config_init, "trainer")
        if str(given.get("precision")).startswith("16"):
            check_precision(given["precision"], given.get("accelerator", "auto"))
        if given.get("default_root_dir"):
            raise UserError("trainer.default_root_dir: every run has its own folder; choose where with --runs")
        if self.value("out") and self.command not in ("test", "predict"):
            raise UserError(f"--out: {self.command} writes into its run folder; it belongs to test and predict")
        if self.value("out"):
            check_writable(self.value("out"))
        if self.value("artifacts") and not (self.value("wandb") or given.get("logger")):
            raise UserError(
                "--artifacts: expected Weights & Biases to be on, found --wandb false; leave out one of them"
            )
        times_of_run(self.command, self.value("times"), self.model, self.datamodule)  # refuses before the work
        if any(isinstance(c, ModelCheckpoint) and c.save_last for c in _as_list(given.get("callbacks"))):
            raise UserError("trainer.callbacks: expected no save_last, last.ckpt is always kept; leave save_last out")
        text = self.resolved()
        config = runs.load_yaml(text)
        place = self.place
        place.first = not several_processes(given) or is_first()
        checkpoint, run = self._find(config)
        resumed = None
        if checkpoint is not None:
            content = check_checkpoint(checkpoint)
            if hasattr(self.datamodule, "domain") and not getattr(self.model, "amortised", False):
                check_grid(checkpoint, content, self.datamodule.domain)
            check_fits(checkpoint, content, self.model)
            resumed = int(content.get("global_step", 0)) if self.command == "fit" else None
            self._set("ckpt_path", str(checkpoint))
        place.run, place.made = run or self._new_run(), run is None and place.first
        written = runs.CONFIG
        if place.first and (place.made or self.command != "fit"):
            written = runs.write_config(place.run, text, "config" if place.made else f"config.{self.command}").name
        metrics = "metrics.csv" if self.command == "fit" else f"{self.command}/metrics.csv"
        place.results = Path(self.value("out") or place.run / "results")
        try:
            return super().instantiate_trainer(
                default_root_dir=str(place.run),
                logger=[
                    MetricsFile((place.run / metrics).parent, resumed),
                    *self._loggers(given.get("logger"), config),
                ],
                callbacks=[
                    *_as_list(given.get("callbacks")),
                    *self._callbacks(given, config),
                    KeepFiles(place.run, written, metrics),
                ],
                **kwargs,
            )
        except Exception as error:  # the trainer refuses its settings with errors of many types
            device = given.get("accelerator")
            advice = f"; set trainer.accelerator to auto or cpu, it is {device}" if device not in (None, "auto") else ""
            raise UserError(f"trainer: {one_line(str(error))}{advice}") from error

    def _set(self, key: str, value: Any) -> None:
        for config in (self.config, self.config_init):
            config[self.command][key] = value

    def _find(self, config: Mapping[str, Any]) -> tuple[Path | None, Path | None]:
        """The checkpoint to start from, and the run folder that it belongs to."""
        given, root = self.value("ckpt_path"), Path(self.value("runs"))
        if self.command == "fit" and not given:
            return None, None
        if given and given != "last":
            path = Path(given)
            return path, runs.run_of_checkpoint(path)
        run = runs.newest_run(root, self.experiment, config["data"], unfinished=self.command == "fit")
        if run is None:
            kind = "unfinished run" if self.command == "fit" else "run with a checkpoint"
            others = len(runs.runs_of(root, self.experiment))
            hint = f" ({others} there, finished or on other data)" if others else ""
            remedy = "leave out --ckpt_path to start one" if self.command == "fit" else "run `medinr fit` first"
            raise UserError(
                f"{root / self.experiment}: expected an earlier {kind} on the same data, found none{hint}; {remedy}, "
                "or give --ckpt_path FILE"
            )
        return run / runs.LAST, run

    def _new_run(self) -> Path:
        root = Path(self.value("runs"))
        if not self.place.first:
            # Lightning starts the other ranks as copies of this command, which read the variable. Those that torchrun
            # or srun starts do not know rank 0's folder, nor need to: they write nothing.
            return Path(os.environ.get("MEDINR_RUN", root / self.experiment))
        run = runs.new_run(root, self.experiment)
        os.environ["MEDINR_RUN"] = str(run)
        return run

    def _loggers(self, given: Any, config: Mapping[str, Any]) -> list[Logger]:
        chosen = [x for x in _as_list(given) if isinstance(x, Logger)]
        if chosen or given is False or not self.value("wandb"):
            return chosen
        reason = why_offline()
        self.place.offline = reason
        return [wandb_logger(self.place.run, config, self.command, bool(reason))]

    def _callbacks(self, given: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
        found: list[Any] = [RandomStates(), ConfigInCheckpoint(config)]
        if given.get("enable_progress_bar") is not False:
            found.append(RunProgress())
        if self.command == "fit":
            found += [Preview(self.place.run), Costs()]
            if given.get("enable_checkpointing") is not False:
                found.append(LastCheckpoint(self.place.run, self.value("checkpoint_steps")))
        elif self.command in ("test", "predict"):
            settings = {"experiment": self.experiment, **runs.flat({k: config[k] for k in ("model", "data")})}
            found.append(ResultWriter(self.place.results, bool(self.value("report")), settings))
            found.append(CaseTable(self.place.results))
        if self.value("artifacts"):  # after what writes the results
            found.append(Artifacts(self.place.run))
        return found


def several_processes(trainer: Mapping[str, Any]) -> bool:
    """Whether these settings of the trainer may start, or join, more than one process."""
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes") or 1
    alone = str(devices) == "1" or (isinstance(devices, list) and len(devices) == 1)
    return not alone or nodes > 1


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _constructor_line(error: ValueError) -> str:
    import argparse

    return explain(argparse.ArgumentError(None, str(error))) or one_line(str(error))


def report(trainer: lightning.Trainer) -> str:
    """The metrics that a person wants to see at the end."""
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ResultWriter):
            found |= callback.metrics
    try:
        return summary(found)
    except KeyError:  # no registration of images: landmarks alone, or an atlas
        shown = ("tre/", "image/", "dsc/", "adapt/")
        return "\n".join(f"  {name}  {value:.4g}" for name, value in found.items() if name.startswith(shown))


def main(command: str, args: list[str]) -> int:
    """Run one of LightningCLI's subcommands. Returns the exit code."""
    import_data_modules()
    begin = time.perf_counter()
    place = Place()
    try:
        cli = ExperimentCLI(command, args, place)
    except SystemExit as stop:
        if isinstance(stop, SIGTERMException):
            raise SystemExit(128 + signal.SIGTERM) from None
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's own handler ends the process with code 1
            if not place.first:
                return 130  # silently
            if (place.run / runs.LAST).exists():
                print(f"medinr: {place.run} keeps its last state; --ckpt_path last continues it", file=sys.stderr)
            raise KeyboardInterrupt from None
        raise
    except UserError:
        if place.first:
            raise
        return 2  # rank 0 met the same mistake, and says so
    except MisconfigurationException as error:
        raise UserError(f"trainer: {one_line(str(error))}") from error
    finally:
        _finish_tracking(place.run)
        place.discard()
        os.environ.pop("MEDINR_RUN", None)
    if cli.trainer.is_global_zero:
        where = place.results if command in ("test", "predict") else place.run
        lines = [report(cli.trainer), f"{command} took {time.perf_counter() - begin:.0f} s; its results are in {where}"]
        if place.offline:
            lines.append(
                f"Weights & Biases: offline ({place.offline}); later: wandb sync {place.run}/wandb/offline-run-*"
            )
        print("\n".join(line for line in lines if line))
    return 0


def _finish_tracking(run: Path) -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
    if os.environ.get(STAGED) == str(staged(run)):
        del os.environ[STAGED]
