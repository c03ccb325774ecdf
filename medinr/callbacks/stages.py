"""Stages of a fit that end when they have converged."""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback


class EndStages(Callback):
    """Ends a stage of a coarse-to-fine fit when its loss has stopped improving; after the last one, the fit.

    A stage has converged when its last ``window`` steps took less than the share ``tolerance`` off its loss, of all
    that the stage has taken off it: no threshold depends on the similarity, or on how well the images can be matched.
    The steps that are left over are not done. For methods with `stage` and `end_stage`, such as `RefinedRegistration`,
    whose stages compare the same points in every step: there the loss falls without noise, and the same seed stops at
    the same step.

    Args:
        window: steps over which the improvement is looked at; no stage ends before twice as many.
        tolerance: share of the stage's whole improvement.
    """

    def __init__(self, window: int = 10, tolerance: float = 0.002) -> None:
        self.window, self.tolerance = window, tolerance
        self._stage: int | None = None
        self._losses: list[float] = []
        self._ended: dict[int, int] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage, "losses": self._losses, "ended": self._ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stage, self._losses, self._ended = (state_dict[k] for k in ("stage", "losses", "ended"))

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A continued fit goes on where the broken one was in its stages."""
        method: Any = pl_module
        method.ended = self._ended

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: torch.Tensor
    ) -> None:
        """Before the optimizer's step, so that the schedule of the next one knows."""
        method: Any = pl_module
        stage = method.stage
        if stage != self._stage:
            self._stage, self._losses = stage, []
        if stage is None:
            return
        self._losses.append(loss.item())
        if self.converged(self._losses):
            method.end_stage()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        method: Any = pl_module
        if trainer.global_step >= method.schedule()[-1]:
            trainer.should_stop = True

    def converged(self, losses: list[float]) -> bool:
        """Whether a stage with these losses so far is at its end."""
        if len(losses) < 2 * self.window:
            return False
        now, before = min(losses), min(losses[: -self.window])
        little = self.tolerance * (losses[0] - now)
        return before - now <= little and losses[-1] - now <= little  # not where it rises, or swings
