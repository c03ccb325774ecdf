"""Checkpoints and displacement fields as artifacts of Weights & Biases, where somebody asks for them."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from medinr.callbacks.results import ResultWriter
from medinr.callbacks.runs import LAST

FIELDS = ("displacement.nii.gz", "inverse_displacement.nii.gz", "transform.ckpt", "metrics.json")
"""Of the files of a prediction, those that an artifact holds."""


class Artifacts(Callback):
    """Puts the checkpoint of a fit, and the fields of each predicted case, into the W&B run.

    The artifacts are ``<experiment>-checkpoint`` (type ``model``) and ``<experiment>-<case>-field`` (type ``field``);
    every run adds a version, which the run's own name (its time) also names. An offline run keeps the files beside its
    log, as further names of the same data where the disk allows it, until ``wandb sync`` sends them.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = Path(run)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        checkpoint = self.run / LAST
        if checkpoint.exists():
            self._log(trainer, "checkpoint", "model", [checkpoint], {"step": trainer.global_step})

    def on_predict_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ResultWriter):
                some = [path for path in callback.files if path.name in FIELDS and path.exists()]
                if some:
                    self._log(trainer, f"{pl_module.pair.name}-field", "field", some, callback.metrics)

    def _log(
        self, trainer: lightning.Trainer, what: str, kind: str, files: Sequence[Path], metadata: dict[str, Any]
    ) -> None:
        import wandb

        name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{self.run.parent.name}-{what}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                artifact = wandb.Artifact(name, type=kind, metadata=metadata)
                folder = Path(logger.experiment.dir).parent / "artifacts" / name
                for path in files:
                    # Not W&B's own copy, which goes to the user's home and may be cleaned away before it is sent.
                    artifact.add_file(str(kept(path, folder)), name=path.name, policy="immutable")
                logger.experiment.log_artifact(artifact, aliases=["latest", self.run.name])


def kept(path: Path, folder: Path) -> Path:
    """The file as it is now, in another folder: a further name of it, or a copy on another disk.

    Checkpoints and results are replaced, never written into, so that the further name keeps the old data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / path.name
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
    return target
