"""What runs leave to look at: pictures during a fit, files and tables after an evaluation."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from medinr.callbacks.logs import log_rows
from medinr.data.pair import Pair
from medinr.fields import Transform
from medinr.io import write_text
from medinr.ranks import gather
from medinr.results import Evaluation, evaluate, page, save_picture, write_metrics, write_results
from medinr.space import Domain, Image


def thinned(pair: Pair, voxels: int) -> Pair:
    """The pair with every k-th voxel of the fixed grid along each axis, so that at most about ``voxels`` are left."""
    fixed = pair.fixed
    k = max(1, math.ceil((fixed.domain.n_voxels / voxels) ** (1 / 3)))
    if k == 1:
        return pair
    data = fixed.data[:, ::k, ::k, ::k]
    steps = torch.diag(torch.tensor([k, k, k, 1.0], dtype=torch.float64))
    domain = Domain.of(data.shape[1:], fixed.domain.voxel_to_world @ steps)
    names = ("fixed_mask", "fixed_exclude", "fixed_labels")
    some = {n: v[::k, ::k, ::k] for n in names if (v := getattr(pair, n)) is not None}
    return replace(pair, fixed=Image(data, domain), **some)


def log_pictures(trainer: lightning.Trainer, pictures: Mapping[str, Path]) -> None:
    """Send PNG files to W&B, if it is there."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for key, path in pictures.items():
                logger.log_image(key=key, images=[str(path)], step=trainer.global_step)


def log_files(trainer: lightning.Trainer, files: Sequence[Path]) -> None:
    """Send pictures (.png) and tables (.csv of numbers) to W&B, if it is there."""
    log_pictures(trainer, {p.stem: p for p in files if p.suffix == ".png"})
    for path in files:
        if path.suffix == ".csv" and path.stem != "moved_points":
            with path.open(encoding="utf-8") as file:
                columns, *rows = csv.reader(file)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_table(key=path.stem, columns=columns, data=[[float(v) for v in row] for row in rows])


class Preview(Callback):
    """A picture and the dense metrics a few times in a fit, on a thinned grid so that they cost little.

    The metrics have the names that `test` gives to those of the whole grid. Rank zero, at the end of an epoch.

    Args:
        run: the run folder; pictures go into its ``figures/``.
        times: how often in a fit (and after the last step).
        voxels: at most about this many are evaluated.
    """

    def __init__(self, run: Path, times: int = 4, voxels: int = 100_000) -> None:
        self.run, self.times, self.voxels = Path(run), times, voxels

    def due(self, trainer: lightning.Trainer) -> bool:
        if trainer.sanity_checking or not trainer.training:
            return False
        total, length = trainer.estimated_stepping_batches, trainer.num_training_batches
        if total == float("inf") or not length:
            return (trainer.current_epoch + 1) % 10 == 0
        epochs = math.ceil(total / length)
        return trainer.global_step >= total or (trainer.current_epoch + 1) % max(1, epochs // self.times) == 0

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        pair, transform = getattr(pl_module, "pair", None), getattr(pl_module, "transform", None)
        if not isinstance(pair, Pair) or transform is None or not self.due(trainer):
            return
        found = self._look(trainer, pair, transform()) if trainer.is_global_zero else {}
        pl_module.log_dict(gather(found)[0], sync_dist=True)

    def _look(self, trainer: lightning.Trainer, pair: Pair, transform: Transform) -> dict[str, float]:
        """Draw and log the picture; returns the metrics."""
        path = self.run / "figures" / f"step-{trainer.global_step:06d}.png"
        if path.exists():  # Lightning ends the epoch of the checkpoint once more when a fit is continued
            return {}
        few = thinned(pair.to("cpu"), self.voxels)
        with torch.random.fork_rng(devices=[]):  # looking must not change what the fit draws next
            evaluation = evaluate(transform, few)
        save_picture(path, evaluation, few, f"{pair.name}, step {trainer.global_step}")
        log_pictures(trainer, {"registration": path})
        return {k: v for k, v in evaluation.metrics.items() if not k.startswith("tre/")}


class ResultWriter(Callback):
    """Writes what `test` and `predict` computed: metrics.json and a picture, or every file of a registration.

    Args:
        out: folder of the results.
        report: also write report.html, one page with everything to look at.
        settings: what the report says of the run.

    Attributes:
        metrics: those of the evaluation. Each of several cases has a folder of its own in ``out``; the metrics are then
            the means of those that all cases have, and ``out``'s metrics.json says them.
    """

    def __init__(self, out: Path, report: bool = False, settings: Mapping[str, Any] | None = None) -> None:
        self.out, self.report, self.settings = Path(out), report, dict(settings or {})
        self.metrics: dict[str, float] = {}
        self.files: list[Path] = []
        self._cases: list[dict[str, float]] = []
        self._rows: list[dict[str, Any]] = []

    def _folder(self, pair: Pair, batches: Sequence[int | float]) -> Path:
        return self.out if sum(batches) == 1 else self.out / pair.name

    def _summarise(self, folder: Path) -> None:
        """After a case whose results are in ``folder``: the means of all cases so far, if they are several."""
        if folder == self.out:
            return
        names = [k for k in self._cases[0] if all(k in case for case in self._cases)]
        self.metrics = {k: sum(case[k] for case in self._cases) / len(self._cases) for k in names}
        write_metrics(self.out / "metrics.json", {"case": f"mean of {len(self._cases)}", **self.metrics})

    def _take(self, trainer: lightning.Trainer, evaluation: Evaluation, pair: Pair) -> None:
        self.metrics = evaluation.metrics
        self._cases.append(evaluation.metrics)
        self._rows.append({"case": pair.name, **evaluation.metrics})

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            log_rows(trainer, "cases", self._rows)

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.on_test_end(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        found = outputs.get("evaluation") if isinstance(outputs, Mapping) else None
        if not trainer.is_global_zero or not isinstance(found, Evaluation):
            return
        pair = pl_module.pair.to("cpu")
        self._take(trainer, found, pair)
        out = self._folder(pair, trainer.num_test_batches)
        out.mkdir(parents=True, exist_ok=True)
        write_metrics(out / "metrics.json", {"case": pair.name, **found.metrics})
        picture = out / "figures" / "registration.png"
        save_picture(picture, found, pair, pair.name)
        self.files = [out / "metrics.json", picture, *pl_module.report(out)]
        if self.report:
            self.files.append(out / "report.html")
            write_text(self.files[-1], page(found, pair, pl_module.transform().start, self.settings))
        self._summarise(out)
        log_files(trainer, self.files)

    def on_predict_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if not trainer.is_global_zero or not isinstance(outputs, Evaluation):
            return
        pair = pl_module.pair.to("cpu")
        self._take(trainer, outputs, pair)
        out = self._folder(pair, trainer.num_predict_batches)
        self.files = write_results(out, pl_module, pair, outputs, report=self.report, settings=self.settings)
        self._summarise(out)
        log_files(trainer, self.files)
