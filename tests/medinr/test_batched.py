"""Batched fits against fits of their own: same points, losses and weights; what cannot be batched is refused."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from medinr import jets, losses
from medinr.callbacks import RandomStates
from medinr.callbacks.streams import Stream, Together
from medinr.commands.quiet import quiet
from medinr.data.base import step_loader
from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import MLP, SIREN, Sum
from medinr.fields.batched import BatchedSIREN, batched_seed
from medinr.losses import NCC, Barrier, Bending, Diffusion, Regularizer
from medinr.methods import PairRegistration, batched, load_method
from medinr.methods.batched import BatchedRegistration, check_batch, check_trainer, split_checkpoint
from medinr.space import Domain
from tests.medinr import pairs

TOLERANCE = 1e-6
"""Of weights after 12 steps in float32; the largest is 0.6, and 3e-8 to 6e-8 was measured."""


def some_pairs() -> list[Pair]:
    """Two sizes of grid, one pair with masks of every kind."""
    small = Domain.of((28, 30, 26), pairs.CUBE.affine)

    def mask(seed: int, share: float) -> torch.Tensor:
        return torch.rand(32, 32, 32, generator=torch.Generator().manual_seed(seed)) < share

    masked = replace(
        pairs.pair(lambda world: 0.97 * pairs.warp(world)), fixed_mask=mask(3, 0.5), fixed_exclude=mask(4, 0.1),
        moving_exclude=mask(5, 0.1), moving_mask=mask(6, 0.8),
    )  # fmt: skip
    return [pairs.pair(), pairs.pair(moving_domain=small), masked]


def method(similarity: str = "LocalNCC", **arguments: Any) -> PairRegistration:
    penalties: dict[str, Regularizer] = {
        "bend": Bending(0.1, directions="probes"),
        "whole": Bending(0.1, fraction=0.5),
        "fold": Barrier(10.0, eps=0.9),
        "smooth": Diffusion(0.1),
    }
    field = SIREN(hidden=(24, 24), omega=20.0, zero_output=False)
    given = {"points": 200, "pyramid_mm": (6.0, 0.0), "lr": 1e-3, "warmup": 0.1, "cosine": True, **arguments}
    return PairRegistration(field, getattr(losses, similarity)(), penalties, **given)


class Loaders(lightning.LightningDataModule):
    def __init__(self, train: Any, validate: Any) -> None:
        super().__init__()
        self.train, self.validate = train, validate

    def train_dataloader(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return self.validate


def trainer(steps: int = 12, **more: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, **more,
    )  # fmt: skip


def alone(given: Sequence[Pair], steps: int = 12, **arguments: Any) -> list[PairRegistration]:
    found = []
    for seed, pair in enumerate(given):
        lightning.seed_everything(seed, verbose=False)
        found.append(method(**arguments))
        found[-1].pair = pair
        with quiet():
            trainer(steps).fit(found[-1], Loaders(step_loader(4), step_loader(1)))
    return found


def together(given: Sequence[Pair], **arguments: Any) -> BatchedRegistration:
    methods, streams = [], []
    for seed, _ in enumerate(given):
        lightning.seed_everything(seed, verbose=False)
        methods.append(method(**arguments))
        streams.append(Stream())
    return BatchedRegistration(methods, given, streams)


def loaders(batch: BatchedRegistration) -> Loaders:
    return Loaders(*(Together([step_loader(n) for _ in batch.pairs], batch.streams) for n in (4, 1)))


def fit(batch: BatchedRegistration, steps: int = 12, **more: Any) -> lightning.Trainer:
    made = trainer(steps, **more)
    with quiet():
        made.fit(batch, loaders(batch))
    return made


def largest(one: PairRegistration, other: PairRegistration) -> float:
    each = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in each)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("points", [40, 700])
def test_jets_and_gradients_are_those_of_the_single_networks(order: int, points: int) -> None:
    torch.manual_seed(0)
    fields = [SIREN(hidden=(20, 21), omega=20.0, zero_output=False).double() for _ in range(3)]
    batch = BatchedSIREN(fields)
    x = 2 * torch.rand(3, points, 3).double() - 1
    found = batch.jet(batched_seed(x, order)).channels
    weight = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weight).sum(), list(batch.parameters()))
    for b, field in enumerate(fields):
        single = field.jet(jets.seed(x[b], order)).channels
        assert (found[:, b] - single).abs().max() <= 1e-12 * single.abs().max()
        expected = torch.autograd.grad((single * weight[:, b]).sum(), list(field.parameters()))
        for g, e in zip(gradients, expected, strict=True):
            assert (g[b] - e).norm() <= 1e-12 * e.norm()


@pytest.mark.parametrize("similarity", ["LocalNCC", "NCC", "MSE", "NMI", "MINDSSC"])
def test_a_batch_ends_with_the_weights_of_single_fits(similarity: str) -> None:
    given = some_pairs()
    with warnings.catch_warnings():
        singles = alone(given, similarity=similarity, use_moving_mask=True)
    batch = together(given, similarity=similarity, use_moving_mask=True)
    start = [p.clone() for p in batch.fits[0].parameters()]
    fit(batch)
    for one, of_batch in zip(singles, batch.give_back(), strict=True):
        assert largest(one, of_batch) < TOLERANCE
    moved = max((a - b).abs().max().item() for a, b in zip(start, batch.fits[0].parameters(), strict=True))
    assert moved > 1e-3, "otherwise nothing was compared"


def test_losses_are_those_of_single_fits() -> None:
    """Of one step, with the same points; the logged overlap and raw penalties too."""
    batch = together(some_pairs(), use_moving_mask=True, scale="per-axis")
    batch.attach()
    x = batch.draw()
    states = [s.generator.get_state() for s in batch.streams]
    terms, more = batch.terms(x)
    for b, single in enumerate(batch.fits):
        torch.set_rng_state(states[b])
        data, raw = single.terms(x[b])
        assert terms["similarity"][b].item() == pytest.approx(data["similarity"].item(), abs=1e-6)
        assert terms["outside"][b].item() == pytest.approx(data["outside"].item(), abs=1e-7)
        assert more["overlap"][b].item() == pytest.approx(data["overlap"].item(), abs=1e-6) and more["overlap"][b] < 1
        for name, value in raw.items():
            assert more[f"raw/{name}"][b].item() == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("similarity", ["LocalNCC", "NCC", "MINDSSC"])
def test_all_pairs_at_once_as_on_a_gpu(similarity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes of one size in one tensor, all samples in one call: what a CPU does pair by pair."""
    given = [pairs.pair(), replace(some_pairs()[2], name="masked"), pairs.pair(lambda world: 0.95 * pairs.warp(world))]
    usual, whole = (together(given, similarity=similarity, use_moving_mask=True) for _ in range(2))
    found = []
    for batch in (usual, whole):
        if batch is whole:
            monkeypatch.setattr(batched, "_volumes", lambda each: torch.stack(list(each)))
            monkeypatch.setattr(BatchedRegistration, "_parts", lambda self, channels: [(slice(None), channels)])
        batch.attach()
        terms, _ = batch.terms(batch.draw())
        loss = torch.stack(list(terms.values())).sum(0)
        found.append((loss, torch.autograd.grad(loss.sum(), list(batch.field.parameters()))))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_bfloat16_rounds_the_same_products() -> None:
    given = [pairs.pair(), pairs.pair(lambda world: 0.97 * pairs.warp(world))]
    plain, rounded = together(given), together(given)
    fit(plain)
    fit(rounded, precision="bf16-mixed")
    assert 1e-5 < largest(plain.give_back()[0], rounded.give_back()[0]) < 0.02


def test_a_pair_that_diverges_does_not_touch_the_others() -> None:
    given = [pairs.pair() for _ in range(3)]
    batch = together(given)
    with torch.no_grad():
        batch.field.stacked[0][1] = torch.nan
    fit(batch)
    assert list(batch.failed) == [1] and batch.failed[1].startswith("the loss is nan at step 0")
    singles = alone(given)
    found = batch.give_back()
    assert largest(singles[0], found[0]) < TOLERANCE and largest(singles[2], found[2]) < TOLERANCE
    broken = together(given[:1])
    with torch.no_grad():
        broken.field.stacked[0][0] = torch.nan
    with pytest.raises(UserError, match="the loss is nan at step 0"):
        fit(broken)


def test_a_checkpoint_of_one_fit_goes_on_alone(tmp_path: Path) -> None:
    """8 steps in a batch, then 4 alone: the weights of 12 alone. It also loads as any other."""
    given = some_pairs()[:2]
    expected = alone(given)[1]
    batch = together(given)
    # 12 steps planned, so that the schedule is that of 12; stopped after 8
    stopped = fit(batch, 12, limit_train_batches=4, callbacks=[Stop(8)])
    stopped.save_checkpoint(tmp_path / "batch.ckpt")
    whole = torch.load(tmp_path / "batch.ckpt", weights_only=True)
    path = tmp_path / "one.ckpt"
    torch.save(split_checkpoint(whole, batch, 1), path)
    assert path.stat().st_size < (tmp_path / "batch.ckpt").stat().st_size
    loaded = load_method(path)
    assert isinstance(loaded, PairRegistration) and largest(loaded, batch.fits[1]) == 0
    assert loaded.domain == batch.fits[1].domain

    lightning.seed_everything(99, verbose=False)
    again = method()
    again.pair = given[1]
    with quiet():
        made = trainer(12, callbacks=[RandomStates()])
        made.fit(again, Loaders(step_loader(4), step_loader(1)), ckpt_path=path, weights_only=True)
    assert made.global_step == 12
    assert largest(again, expected) < TOLERANCE


class Stop(lightning.Callback):
    """Ends a fit at the end of the epoch of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        trainer.should_stop = trainer.global_step >= self.step


REFUSED = {
    "network": ([PairRegistration(MLP(), NCC())], "expected plain SIREN networks in a batch, found MLP"),
    "sum": ([PairRegistration(Sum(SIREN(), SIREN()), NCC())], "found Sum"),
    "two shapes": (
        [PairRegistration(SIREN(hidden=(8,)), NCC()), PairRegistration(SIREN(hidden=(9,)), NCC())],
        "expected one configuration for all pairs of a batch, found two",
    ),
    "guides": ([PairRegistration(SIREN(), NCC(), landmark_weight=1.0)], "landmark_weight: expected 0 in a batch"),
    "method": ([pairs.conditioned_method()], "expected PairRegistration in a batch, found ConditionedRegistration"),
    "none": ([], "expected one pair or more"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_batched_is_refused(name: str) -> None:
    methods, line = REFUSED[name]
    with pytest.raises(UserError, match=line) as error:
        check_batch(methods)
    assert "one by one" in str(error.value) or name == "none"


def test_settings_that_would_act_on_all_pairs_are_refused() -> None:
    check_trainer({"precision": "bf16-mixed", "devices": 1, "max_steps": 3})
    for key, value in (("gradient_clip_val", 1.0), ("accumulate_grad_batches", 2), ("devices", 2)):
        with pytest.raises(UserError, match=f"trainer.{key}: expected its default in a batch"):
            check_trainer({key: value})


def test_slices_are_refused() -> None:
    flat = Domain.of((16, 16, 1), pairs.CUBE.affine)
    given = replace(pairs.pair(), fixed=pairs.sampled(flat, pairs.texture), moving=pairs.sampled(flat, pairs.texture))
    with pytest.raises(UserError, match="expected a volume in a batch, found a single slice"):
        together([given]).attach()
