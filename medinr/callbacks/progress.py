"""One progress bar for a whole fit, with the quantities a person watches; and what the fit costs."""

import sys
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

WATCHED = {
    "loss": "loss",
    "loss/similarity": "similarity",
    "overlap": "overlap",
    "tre/mean": "TRE",
    "folding/percent": "folding",
}
"""Logged names, and how the bar calls them."""


class RunProgress(ProgressBar):
    """A bar over all steps (Lightning's own starts anew at every epoch); silent for single evaluations.

    Before it stands what the data module remarks of its data (`remarks`, if it has any).

    Args:
        every: steps between two updates.
    """

    def __init__(self, every: int = 10) -> None:
        super().__init__()
        self.every = every
        self.bar: Tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            for line in getattr(trainer.datamodule, "remarks", ()):  # type: ignore[attr-defined]
                print(line, file=sys.stderr)
        total = trainer.estimated_stepping_batches
        self.bar = Tqdm(
            desc="fit",
            total=None if total == float("inf") else int(total),
            initial=trainer.global_step,
            disable=not self._enabled,
            dynamic_ncols=True,
            file=sys.stderr,
            # A log file gets a line now and then instead of one for every refresh.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is not None and (trainer.global_step % self.every == 0 or trainer.global_step == self.bar.total):
            self._update(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.bar is not None:
            self._update(trainer)

    def on_test_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._say(trainer)

    def on_predict_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._say(trainer)

    def _say(self, trainer: lightning.Trainer) -> None:
        """One line before an evaluation, which has no steps to count."""
        if self._enabled and trainer.is_global_zero and trainer.state.fn is not None:
            print(f"{trainer.state.fn.value}: evaluating the whole grid", file=sys.stderr)

    def _update(self, trainer: lightning.Trainer) -> None:
        assert self.bar is not None
        values = trainer.callback_metrics
        shown = {label: f"{float(values[name]):.4g}" for name, label in WATCHED.items() if name in values}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._close()


class Costs(Callback):
    """Logs ``costs/seconds`` of this call's fit and ``costs/memory_mb``, the peak: of the GPU, or of the process."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        costs = {
            "costs/seconds": time.perf_counter() - self._begin,
            "costs/memory_mb": peak_memory_mb(pl_module.device),
        }
        # Of several processes, the largest.
        found = {k: v for k, v in costs.items() if v is not None}
        pl_module.log_dict(found, sync_dist=True, reduce_fx="max")


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory of a GPU, or of this process; None where the system does not tell (Windows)."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource
    except ImportError:
        return None
    # KiB on Linux, bytes on macOS
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
