"""``medinr fit | validate | test | predict``: LightningCLI with run folders, tracking, and one-line mistakes."""

import importlib
import inspect
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger

import data_modules
import medinr
import medinr.losses
import medinr.methods
from medinr.callbacks import ConfigInCheckpoint, LastCheckpoint, MetricsFile, RandomStates, RunProgress, runs
from medinr.callbacks.checkpoints import check_checkpoint, check_fits
from medinr.callbacks.logs import wandb_logger, why_offline
from medinr.commands.messages import explain, one_line
from medinr.errors import UserError
from medinr.methods import RegistrationMethod

DEFAULTS = Path(medinr.__file__).parent / "defaults.yaml"
OWN_KEYS = ("seed_everything", "experiment", "runs", "wandb", "out", "config", "ckpt_path", "weights_only", "model", "data")
PER_CALL = ("config", "ckpt_path", "weights_only", "out", "verbose", "return_predictions")
"""Keys of one call that have no place in a run's config.yaml, so that it serves all four subcommands."""


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
    made: bool = False

    def discard(self) -> None:
        """Take back a folder in which no fit got as far as its first checkpoint."""
        if self.made and not (self.place.run / runs.LAST).exists():
            runs.discard(self.place.run)


class ExperimentCLI(LightningCLI):
    """Stock LightningCLI in subclass mode, with a run folder for each fit."""

    def __init__(self, command: str, args: list[str], place: "Place") -> None:
        self.command, self.place = command, place
        strict = {"exit_on_error": False, "allow_abbrev": False}
        each = {**strict, "default_config_files": [str(DEFAULTS)]}
        super().__init__(
            RegistrationMethod,
            lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={**strict, "prog": "medinr", **{name: dict(each) for name in self.subcommands()}},
            args=[command, *args],
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--experiment", type=str | None, default=None, help="its name (default: the last --config's)")
        parser.add_argument("--runs", type=str, default="runs", help="folder that holds all run folders")
        parser.add_argument("--wandb", type=bool, default=True, help="log to Weights & Biases, offline where need be")
        parser.add_argument("--out", type=str | None, default=None, help="folder for test's and predict's results")

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

    def resolved(self) -> dict[str, Any]:
        """The configuration that `run folders` keep: everything but what belongs to this one call."""
        text = self.parser.dump(self.config, skip_none=False)
        found: dict[str, Any] = yaml.safe_load(text)[self.command]
        found = {k: v for k, v in found.items() if k not in PER_CALL}
        return found | {"experiment": self.experiment}

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
        if given.get("default_root_dir"):
            raise UserError("trainer.default_root_dir: every run has its own folder; choose where with --runs")
        if self.value("out") and self.command not in ("test", "predict"):
            raise UserError(f"--out: {self.command} writes into its run folder; it belongs to test and predict")
        config = self.resolved()
        checkpoint, run = self._find(config)
        resumed = None
        if checkpoint is not None:
            content = check_checkpoint(checkpoint)
            check_fits(checkpoint, content, self.model)
            resumed = int(content.get("global_step", 0)) if self.command == "fit" else None
            self._set("ckpt_path", str(checkpoint))
        place = self.place
        place.run, place.made = run or self._new_run(), run is None
        if place.made or self.command != "fit":
            runs.write_config(place.run, config, "config" if place.made else f"config.{self.command}")
        folder = place.run if self.command == "fit" else place.run / self.command
        return super().instantiate_trainer(
            default_root_dir=str(place.run),
            logger=[MetricsFile(folder, resumed), *self._loggers(given.get("logger"), config)],
            callbacks=[*_as_list(given.get("callbacks")), *self._callbacks(given, config)],
            **kwargs,
        )

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
        # Lightning starts the other ranks as copies of this command: they must not make folders of their own.
        if "LOCAL_RANK" in os.environ and "MEDINR_RUN" in os.environ:
            return Path(os.environ["MEDINR_RUN"])
        run = runs.new_run(Path(self.value("runs")), self.experiment)
        os.environ["MEDINR_RUN"] = str(run)
        return run

    def _loggers(self, given: Any, config: Mapping[str, Any]) -> list[Logger]:
        chosen = [x for x in _as_list(given) if isinstance(x, Logger)]
        if chosen or given is False or not self.value("wandb"):
            return chosen
        reason = why_offline()
        if reason:
            print(f"Weights & Biases: offline ({reason}); send later with: wandb sync {self.place.run}/wandb/offline-run-*")
        return [wandb_logger(self.place.run, config, self.command, bool(reason))]

    def _callbacks(self, given: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
        found: list[Any] = [RandomStates(), ConfigInCheckpoint(config)]
        if given.get("enable_progress_bar") is not False:
            found.append(RunProgress())
        if self.command == "fit" and given.get("enable_checkpointing") is not False:
            found.append(LastCheckpoint(self.place.run))
        return found


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _constructor_line(error: ValueError) -> str:
    import argparse

    return explain(argparse.ArgumentError(None, str(error))) or one_line(str(error))


def report(metrics: Mapping[str, Any]) -> str:
    """The main metrics as a small table."""
    rows = {k: float(v) for k, v in metrics.items() if k.split("/")[0] in ("tre", "dsc", "image", "folding", "displacement")}
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value:.4g}" for name, value in rows.items())


def main(command: str, args: list[str]) -> int:
    """Run one of LightningCLI's subcommands. Returns the exit code."""
    import_data_modules()
    begin = time.perf_counter()
    place = Place()
    try:
        cli = ExperimentCLI(command, args, place)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's own handler ends the process with code 1
            raise KeyboardInterrupt from None
        raise
    except UserError:
        _finish_tracking()
        place.discard()
        raise
    finally:
        _finish_tracking()
        os.environ.pop("MEDINR_RUN", None)
    print(report(cli.trainer.callback_metrics))
    print(f"{command} took {time.perf_counter() - begin:.0f} s; everything is in {place.run}")
    return 0


def _finish_tracking() -> None:
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
