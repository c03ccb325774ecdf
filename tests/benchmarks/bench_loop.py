"""Lightning's loop against a bare loop: the same steps of `PairRegistration` on a small synthetic pair."""

import statistics
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from medinr.data.pair import Pair
from medinr.fields import SIREN
from medinr.losses import NCC, Barrier, Jacobian, LocalNCC
from medinr.methods import PairRegistration
from medinr.space import Domain, Image
from tests.benchmarks import measure as timing
from tests.benchmarks.measure import ratio, table

TARGET = 1.10


class Row(NamedTuple):
    title: str
    make: Callable[[], PairRegistration]
    target: float | None


def idir() -> PairRegistration:
    """IDIR's size: 3 x 256, 10,000 points, NCC and the Jacobian penalty."""
    return PairRegistration(SIREN(zero_output=False), NCC(), {"jacobian": Jacobian(0.05)}, points=10_000)


def small() -> PairRegistration:
    """A quick registration's size: 2 x 128, 2,048 points, local NCC and the barrier. Here a loop's overhead shows."""
    return PairRegistration(SIREN(hidden=(128, 128)), LocalNCC(), {"barrier": Barrier(1.0)}, points=2048)


ROWS = {
    "idir": Row("3 x 256, 10,000 points, NCC + Jacobian", idir, TARGET),
    "small": Row("2 x 128, 2,048 points, local NCC + barrier", small, None),
}


def synthetic_pair(size: int = 48) -> Pair:
    """Two smooth random images that have nothing to do with each other: a loop does not care."""
    generator = torch.Generator().manual_seed(0)
    domain = Domain.of((size, size, size), torch.eye(4))
    images = [Image(torch.rand(1, size, size, size, generator=generator), domain) for _ in range(2)]
    return Pair("synthetic", *images)


class Run(NamedTuple):
    """Seconds from the first draw of points to the end of the last step, and the weights."""

    seconds: float
    weights: torch.Tensor


def bare(make: Callable[[], PairRegistration], pair: Pair, steps: int) -> Run:
    """The least that trains: draw, loss, backward, step."""
    method = prepare(make, pair)
    with patch.object(type(method), "total_steps", steps):  # which else the trainer says; the rate is constant
        optimizer = method.configure_optimizers()["optimizer"]
    torch.manual_seed(1)
    start = timing.clock()
    for _ in range(steps):
        loss = torch.stack(list(method.objective(method.sampler(method.points, "cpu")).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Run(timing.clock() - start, weights(method))


class _Clock(lightning.Callback):
    """Starts with the first step. Both loops draw the same points, although a data loader draws a number of its own."""

    start = end = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            torch.manual_seed(1)
            self.start = timing.clock()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end = timing.clock()


def lightnings(make: Callable[[], PairRegistration], pair: Pair, steps: int) -> Run:
    """The same through Trainer.fit, with the CSV log; checkpoints and pictures left out."""
    method, clock = prepare(make, pair), _Clock()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=CSVLogger(folder),
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        numbers: Any = range(steps)
        trainer.fit(method, DataLoader(numbers, batch_size=None))
    return Run(clock.end - clock.start, weights(method))


def prepare(make: Callable[[], PairRegistration], pair: Pair) -> PairRegistration:
    torch.manual_seed(0)
    method = make()
    method.attach(pair)
    return method


def weights(method: PairRegistration) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in method.parameters()])


def measure(threads: int, repeats: int, steps: int) -> list[dict[str, Any]]:
    """One record a row; the two loops take turns."""
    pair = synthetic_pair()
    records: list[dict[str, Any]] = []
    for name, row in ROWS.items():
        if not torch.equal(bare(row.make, pair, 2).weights, lightnings(row.make, pair, 2).weights):
            raise RuntimeError(f"{row.title}: the two loops do not end with the same weights")
        n = steps if row.target else 4 * steps
        times: dict[str, list[float]] = {"bare": [], "lightning": []}
        for _ in range(repeats):
            times["bare"].append(bare(row.make, pair, n).seconds)
            times["lightning"].append(lightnings(row.make, pair, n).seconds)
        records.append(
            {
                "benchmark": "loop",
                "name": name,
                "title": row.title,
                "threads": threads,
                "steps": n,
                "bare_seconds": statistics.median(times["bare"]),
                "lightning_seconds": statistics.median(times["lightning"]),
                "ratio": ratio(times["lightning"], times["bare"]),
                "target": row.target,
            }
        )
    return records


def report(records: list[dict[str, Any]]) -> str:
    rows = [
        {
            "loop": r["title"],
            "bare, ms a step": f"{1e3 * r['bare_seconds'] / r['steps']:.1f}",
            "Lightning, ms a step": f"{1e3 * r['lightning_seconds'] / r['steps']:.1f}",
            "ratio": f"{r['ratio']:.3f}",
            "target": ""
            if r["target"] is None
            else f"{r['target']:g} {'met' if r['ratio'] <= r['target'] else 'MISSED'}",
        }
        for r in records
    ]
    return table(rows)
