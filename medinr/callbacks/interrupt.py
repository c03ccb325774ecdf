"""Ctrl-C in a fit: stop after the present step, and keep the best state so far."""

import signal
import threading
from typing import Any, Self

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class BestState(Callback):
    """Remembers the weights of the lowest mean loss of ``every`` steps within the present pyramid level.

    Losses of two levels cannot be compared: a finer image has a higher loss at the same deformation. What a coarse
    level found is where the finer one starts, so a new level forgets the record of the last, and until it has one of
    its own the newest weights are the best. Within a level the loss of a single step says little, as each step draws
    other points: hence the mean. In a healthy fit the best state is a few steps old; where the learning rate was too
    high it is the one from before the loss rose.

    Args:
        every: steps whose losses are averaged.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.step = 0
        self._level: Any = None
        self._losses: list[Tensor] = []
        self._lowest = float("inf")
        self._weights: dict[str, Tensor] | None = None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        level = getattr(pl_module, "level", None)
        if level is not self._level:
            self._level, self._losses, self._lowest, self._weights = level, [], float("inf"), None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append(outputs["loss"].detach())
        if len(self._losses) < self.every:
            return
        mean = torch.stack(self._losses).mean().item()
        self._losses = []
        if mean < self._lowest:
            self._lowest, self.step = mean, trainer.global_step
            self._weights = {k: v.detach().clone() for k, v in pl_module.state_dict().items()}

    def restore(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> int:
        """Put the best weights back; returns the step that they are of."""
        if self._weights is None:
            return trainer.global_step
        pl_module.load_state_dict(self._weights)
        return self.step


class StopOnInterrupt(Callback):
    """While its ``with`` block runs, the first Ctrl-C ends the fit after the present step; the second is Python's own.

    In a thread other than the main one, where Python allows no signal handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: Any) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._previous)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.interrupted:
            trainer.should_stop = True
