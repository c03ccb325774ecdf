"""What a run needs to go on where it was broken off: its last state and the random numbers' states."""

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from medinr.callbacks.interrupt import StopOnInterrupt
from medinr.callbacks.runs import FINISHED, LAST
from medinr.errors import UserError
from medinr.ranks import any_rank, gather, rank
from medinr.space import Domain


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators as plain values and tensors (loads with weights_only)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries draw from it
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`; devices that are not here are left out."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"].cpu())
    for i, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), i)


class RandomStates(Callback):
    """Keeps the random states in every checkpoint; a continued fit draws what an unbroken one would have drawn.

    Each process draws points of its own, so the states of all are kept; all must save at the same time, as Lightning's
    `save_checkpoint` does.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": gather(random_states())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict["ranks"]
        # With more processes than before, the new ones keep the stream that they were given.
        self._restored = states[rank()] if rank() < len(states) else None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Not before: making the data loader's iterator draws a number, too, once in each process.
        if self._restored is not None:
            set_random_states(self._restored)
            self._restored = None


class ConfigInCheckpoint(Callback):
    """Lets every checkpoint carry the resolved configuration, beside what the method itself keeps."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    def _keep(self, pl_module: lightning.LightningModule) -> None:
        # A method writes its `state` into the checkpoint's "medinr" entry. It is made when the method takes its pair,
        # at the start of each stage and after the callbacks' turn: hence the later hooks.
        state = getattr(pl_module, "state", None)
        if isinstance(state, dict):
            state["config"] = self.config

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._keep(pl_module)

    def on_predict_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._keep(pl_module)


class LastCheckpoint(Checkpoint):
    """``checkpoints/last.ckpt``, whole or not at all, after every epoch; a marker file when the fit is complete.

    Ctrl-C (and SIGTERM, which schedulers send before they kill, to a single process) lets the present step finish and
    keeps its state; a second Ctrl-C ends at once with what was kept before. Of several processes all stop at the same
    step, within `ASK_EVERY`.

    Lightning's `ModelCheckpoint` writes through a temporary file on another file system, so its replacement is not
    atomic. For the best by a metric, add a `ModelCheckpoint` under ``trainer.callbacks``.

    Args:
        run: the run folder.
        every_n_steps: also after every so many steps (None: at the end of epochs only).
    """

    ASK_EVERY = 10
    """Steps between two questions whether another process was interrupted."""

    def __init__(self, run: Path, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"checkpoint_steps: expected 1 or more, got {every_n_steps}")
        self.path = Path(run) / LAST
        self.finished = Path(run) / FINISHED
        self.every_n_steps = every_n_steps
        self._interrupt = StopOnInterrupt()

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            self.finished.unlink(missing_ok=True)  # a finished run may be continued for more steps
            self._part.unlink(missing_ok=True)  # of a process that was killed while it wrote

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._interrupt.__enter__()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch or trainer.fit_loop.done:
            return  # the end of the epoch follows at once
        step = trainer.global_step
        asked = trainer.world_size == 1 or step % self.ASK_EVERY == 0
        interrupted = asked and any_rank(self._interrupt.interrupted, trainer.strategy.root_device)
        terminated = trainer.world_size == 1 and trainer.received_sigterm  # Lightning stops by itself
        if interrupted or terminated or (self.every_n_steps is not None and step % self.every_n_steps == 0):
            self.save(trainer)
        if interrupted:
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.save(trainer)
        if any_rank(self._interrupt.interrupted, trainer.strategy.root_device) and not trainer.fit_loop.done:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._interrupt.__exit__()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, KeyboardInterrupt):  # after Ctrl-C Lightning shuts down undisturbed
            self._interrupt.__exit__()

    @property
    def _part(self) -> Path:
        return self.path.with_suffix(".part")

    def save(self, trainer: lightning.Trainer) -> None:
        """Write the present state. All processes must call it.

        Raises:
            UserError: no space, or no right to write; the file of before is left as it is.
        """
        try:
            trainer.save_checkpoint(self._part)
            if trainer.is_global_zero:
                os.replace(self._part, self.path)
        except OSError as error:
            self._part.unlink(missing_ok=True)
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free some space") from None

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.interrupted:
            self.finished.write_text(f"step {trainer.global_step}\n")


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or say in one line why it cannot be used.

    Raises:
        UserError: missing, unreadable, or not written by medinr.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected a checkpoint, found {'a folder' if path.is_dir() else 'no such file'}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        kind = type(error).__name__
        raise UserError(
            f"{path}: expected a checkpoint of medinr, found a file that torch cannot read ({kind})"
        ) from None
    if not isinstance(found, dict) or "state_dict" not in found or "medinr" not in found:
        raise UserError(f"{path}: expected a checkpoint of medinr, found a file of another program")
    return found


def check_fits(path: Path, checkpoint: Mapping[str, Any], model: torch.nn.Module) -> None:
    """The checkpoint's weights have the names and shapes of the model.

    Raises:
        UserError: names the first weight that differs.
    """
    method = str(checkpoint["medinr"].get("method", {}).get("class_path", "")).rpartition(".")[2]
    if method != type(model).__name__:
        raise UserError(
            f"{path}: it was written by another model than the configuration's: expected {type(model).__name__}, found "
            f"{method or 'none'}; use the config.yaml of its own run"
        )
    restore = getattr(model, "restore", None)
    if callable(restore):  # a lattice has as many weights as its image needs
        restore(checkpoint["medinr"])
    there = {k: tuple(v.shape) for k, v in checkpoint["state_dict"].items()}
    here = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    for name in sorted(set(there) | set(here)):
        if there.get(name) != here.get(name):
            raise UserError(
                f"{path}: it was written by another model than the configuration's: {name} is "
                f"{there.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} in the model; "
                "use the config.yaml of its own run"
            )


def check_grid(path: Path, checkpoint: Mapping[str, Any], domain: Domain) -> None:
    """The checkpoint was fitted on the fixed image's grid.

    Raises:
        UserError: it was fitted on another: another case, crop or spacing.
    """
    there = Domain.from_dict(checkpoint["medinr"]["domain"])
    if not there.same_grid(domain):
        raise UserError(
            f"{path}: it was fitted on another fixed image: its grid is {there.shape} voxels, the data's "
            f"{domain.shape} (or lies elsewhere); use the data section of its own config.yaml"
        )
