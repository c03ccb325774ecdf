"""What all methods share, and Lightning needs of them: steps, logs, schedules, checkpoints."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import lightning
import torch
from torch import Tensor

from medinr.configured import Configured, build, spec
from medinr.errors import UserError
from medinr.fields import computed_once
from medinr.io import atomic_path
from medinr.precision import mixed
from medinr.ranks import any_rank, rank
from medinr.types import Scalar

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
Rate = Callable[[int], float]
"""Learning rate at a step."""
Group = tuple[list[Tensor], Rate]
"""Parameters and their learning rate."""


def check_precision(name: Any, accelerator: Any = None) -> None:
    """Raises `UserError` for a trainer's precision that a fit would suffer from, or that its accelerator lacks.

    On a CPU Lightning takes ``bf16-mixed`` in place of ``16-mixed``; who asks for it is told before (``accelerator``,
    as the trainer is given it; None: it is not looked at).
    """
    if str(name) not in PRECISIONS:
        raise UserError(
            f"trainer.precision: expected {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {name}: coordinates "
            "and second derivatives need float32"
        )
    on_cuda = accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()
    if str(name) == "16-mixed" and accelerator is not None and not on_cuda:
        raise UserError("trainer.precision: expected a CUDA device for 16-mixed, found none; use bf16-mixed")


def fuses(module: lightning.LightningModule) -> bool:
    """Whether a module's Adam is the fused one.

    With ``16-mixed`` the fused one would unscale the gradients itself, after `on_before_optimizer_step` and clipping.
    """
    scaled = getattr(module._trainer, "precision", None) == "16-mixed"  # a benchmark steps without a trainer
    return module.device.type in ("cpu", "cuda") and not scaled


def share_of_rate(step: int, total: int, warmup: float = 0.0, cosine: bool = False) -> float:
    """Share of the peak learning rate at a step of ``total``: a rise over ``warmup`` of them, then 1 or a cosine."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    if not cosine:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))


class Method(Configured, lightning.LightningModule):
    """What every method of medinr has: steps that sum named terms, schedules, logs, and checkpoints that rebuild it.

    A subclass says what it is fitted to (`subject`), how it takes that (`size`, `attach`), what a step looks at
    (`draw`), what the loss is there (`objective`), which parameters learn how fast (`groups`), and what a checkpoint
    must hold beside the weights (``state``, `restore`). It may be part of another module, which then draws, sums and
    optimizes; what the part logs goes through its ``journal``.
    """

    lr: float

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {}
        self.journal: Callable[[dict[str, Tensor]], None] | None = None

    # -- what a subclass defines ---------------------------------------------------------------------------------

    @property
    def subject(self) -> Any:
        """What the method is fitted to; `size` and `attach` get it."""
        raise NotImplementedError

    def attach(self, subject: Any) -> None:
        """Take the subject: all that the steps need of it, on the module's device."""
        raise NotImplementedError

    @property
    def attached(self) -> bool:
        raise NotImplementedError

    def size(self, subject: Any) -> None:
        """Make the parameters whose number depends on the data; called before the optimizer takes them."""
        raise NotImplementedError

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take what `state` held when the checkpoint was written, before the weights are loaded."""
        raise NotImplementedError

    def draw(self) -> Any:
        """What a step looks at."""
        raise NotImplementedError

    def objective(self, batch: Any) -> dict[str, Scalar]:
        """Named terms whose sum is the loss, for what `draw` gave; raw values for the log are kept out of the sum."""
        raise NotImplementedError

    def groups(self) -> list[Group]:
        """Parameters and their learning rates."""
        raise NotImplementedError

    def report(self, out: Path) -> list[Path]:
        """Write what the method has to say beside the usual results; returns the files."""
        return []

    # -- steps ---------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    @property
    def _log_every(self) -> int:
        return int(getattr(self.trainer, "log_every_n_steps", 50)) or 50

    def _log(self, values: dict[str, Tensor], **how: Any) -> None:
        if self._trainer is None or self.global_step % self._log_every:
            return
        if self.journal is not None:
            self.journal(values)
        else:
            self.log_dict(values, sync_dist=True, **how)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with mixed(self.device.type), computed_once(self):
            terms = self.objective(self.draw())
            loss = torch.stack(list(terms.values())).sum()
        if any_rank(not bool(torch.isfinite(loss)), self.device):  # all stop, or those who go on wait for ever
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step}: lower the learning rate (lr: {self.lr}) "
                "or look for invalid intensities"
            )
        self._log({"loss": loss.detach()}, prog_bar=True)
        self._log({f"loss/{k}": v.detach() for k, v in terms.items()})
        return loss

    def configure_optimizers(self) -> Any:
        """Adam over all groups, each with its own schedule."""
        groups = self.groups()
        parameters = [{"params": parameters, "lr": 1.0} for parameters, _ in groups]
        optimizer = torch.optim.Adam(parameters, lr=1.0, fused=fuses(self))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [rate for _, rate in groups])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- Lightning's hooks ---------------------------------------------------------------------------------------

    def _ready(self) -> None:
        """Take the subject, once, and after Lightning has moved the method to its device."""
        if not self.attached:
            self.attach(self.subject)

    def setup(self, stage: str) -> None:
        check_precision(self.trainer.precision)
        self.size(self.subject)

    def on_fit_start(self) -> None:
        self._ready()
        if rank():  # weights are rank 0's; from here on each rank draws numbers of its own
            torch.manual_seed(torch.initial_seed() + rank())

    def on_validation_start(self) -> None:
        self._ready()

    def on_test_start(self) -> None:
        self._ready()

    def on_predict_start(self) -> None:
        self._ready()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["medinr"] = {"method": spec(self), **self.state}

    def save(self, path: str | Path) -> None:
        """Write the weights and all that is needed to use the method again; no optimizer, no images."""
        checkpoint: dict[str, Any] = {
            "state_dict": {k: v.detach().cpu() for k, v in self.state_dict().items()},
            "pytorch-lightning_version": lightning.__version__,
        }
        self.on_save_checkpoint(checkpoint)
        with atomic_path(path) as part:
            torch.save(checkpoint, part)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, map_location: Any = "cpu", **kwargs: Any) -> Self:  # type: ignore[override]
        """Rebuild a method with its weights and ``state``; no further argument is needed."""
        method = load_method(checkpoint_path, map_location)
        if not isinstance(method, cls):
            raise UserError(
                f"{checkpoint_path}: expected a checkpoint of {cls.__name__}, found {type(method).__name__}"
            )
        return method


def load_method(path: str | Path, map_location: Any = "cpu") -> Method:
    """Any method from its checkpoint.

    Raises:
        UserError: no such file, not a checkpoint, or not one of medinr's.
    """
    file = Path(path)
    if not file.is_file():
        inside = file / "transform.ckpt"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise UserError(f"{path}: no such checkpoint; expected a .ckpt file that medinr wrote{hint}")
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except Exception:  # torch raises many kinds: pickle, zip, runtime and key errors
        raise UserError(f"{path}: not a readable checkpoint; expected a .ckpt file that medinr wrote") from None
    if not isinstance(checkpoint, dict) or "medinr" not in checkpoint:
        raise UserError(f"{path}: a checkpoint of another program; expected a .ckpt file that medinr wrote")
    kept = checkpoint["medinr"]
    try:
        method = build(kept["method"])
        if not isinstance(method, Method):
            raise UserError(f"{path}: holds {type(method).__name__}, which is no method of medinr")
        method.restore(kept)
        method.load_state_dict(checkpoint["state_dict"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        what = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: an incomplete or changed checkpoint ({what}); expected one that medinr wrote"
        ) from None
    method.state = {k: v for k, v in kept.items() if k != "method"}
    return method.to(map_location).eval()
