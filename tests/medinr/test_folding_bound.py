"""Early stopping at a bound of folding: what is kept, when it ends, and fits that go on."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from medinr.callbacks import FoldingBound
from medinr.callbacks.checkpoints import RandomStates
from medinr.commands.quiet import quiet
from medinr.data.base import step_loader
from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import CubicLattice, Transform
from medinr.losses import NCC
from medinr.methods import VolumeRegistration
from medinr.results import evaluate
from medinr.space import transform_points
from tests.medinr import pairs

STEPS = 30


def noisy() -> VolumeRegistration:
    """Two images that have nothing in common, and nothing that keeps the lattice smooth: it folds soon."""
    torch.manual_seed(0)
    images = [pairs.sampled(pairs.CUBE, pairs.texture, through) for through in (None, lambda world: 40 - 1.3 * world)]
    found = VolumeRegistration(CubicLattice((12.0,)), NCC(), shrinks=(2.0,), points=8, lr=1e-2)
    found.pair = Pair("noise", *images)
    return found


def train(bound: FoldingBound, *more: Any, resume: Path | None = None, steps: int = STEPS) -> VolumeRegistration:
    found = noisy()
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch")
        trainer = lightning.Trainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False, callbacks=[RandomStates(), bound, *more],
        )  # fmt: skip
        trainer.fit(found, train_dataloaders=step_loader(7), ckpt_path=resume)
    bound.ended = trainer.global_step  # type: ignore[attr-defined]
    return found


class Watch(lightning.Callback):
    """Folding after each step, and a checkpoint after one of them."""

    def __init__(self, bound: FoldingBound, file: Path | None = None, at: int = 0) -> None:
        self.bound, self.file, self.at = bound, file, at
        self.percent: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.percent[trainer.global_step] = self.bound.folding(pl_module)
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.file)
            trainer.should_stop = True


def test_the_last_state_within_the_bound_is_the_result() -> None:
    free = FoldingBound(99.0, every=100, points=4000)
    watch = Watch(free)
    train(free, watch)
    assert free.step == STEPS == free.ended, "the last step is looked at whatever the interval"
    assert watch.percent[3] < 1 < 3 < watch.percent[STEPS], watch.percent
    over = next(step for step in range(4, STEPS, 4) if watch.percent[step] > 2.0)
    assert over < STEPS - 4, "or the test shows nothing"

    bound = FoldingBound(2.0, every=4, points=4000)
    found = train(bound)
    assert (bound.ended, bound.step) == (over, over - 4)
    assert bound.folding(found) == pytest.approx(watch.percent[over - 4])
    assert found.pair is not None
    metrics = evaluate(found.transform(), found.pair).metrics
    assert metrics["folding/percent"] == pytest.approx(bound.folding(found), abs=1.0)


def test_folding_is_that_of_the_mask() -> None:
    """A lattice that folds on one side alone: x -> -x where x > 0, say."""

    class Half(Transform):
        def jacobian(self, world: torch.Tensor) -> torch.Tensor:
            found = super().jacobian(world)
            found[world[:, 0] > 0, 0] *= -1
            return found

    method = noisy()
    pair = method.pair
    assert pair is not None
    method.attach(pair)
    half = Half(method.map, method.domain, method.start)
    method.transform = lambda context=None: half  # type: ignore[method-assign]
    left = transform_points(pair.domain.voxel_to_world, pair.domain.voxels().double())[:, 0] < -3
    found = []
    for mask in (None, left.reshape(pair.domain.shape), ~left.reshape(pair.domain.shape)):
        method.pair = replace(pair, fixed_mask=mask)
        found.append(FoldingBound(points=2000).folding(method))
    assert 40 < found[0] < 60 and found[1] == 0 and found[2] > 80


@pytest.mark.parametrize("cut", [2, 6])
def test_a_fit_goes_on_as_if_unbroken(tmp_path: Path, cut: int) -> None:
    whole_bound, broken, again = (FoldingBound(2.0, every=4, points=4000) for _ in range(3))
    whole = train(whole_bound).state_dict()
    train(broken, Watch(broken, tmp_path / "cut.ckpt", cut))
    assert broken.ended == cut < whole_bound.ended
    torch.load(tmp_path / "cut.ckpt", weights_only=True)
    found = train(again, resume=tmp_path / "cut.ckpt").state_dict()
    assert (again.ended, again.step) == (whole_bound.ended, whole_bound.step)
    for name, value in whole.items():
        assert float((found[name] - value).abs().max()) <= 1e-6, name


def test_a_fit_that_never_comes_within_the_bound_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    class Folded(FoldingBound):
        def folding(self, pl_module: Any) -> float:
            return 5.0

    bound = Folded(2.0, every=2)
    train(bound, steps=6)
    assert "more than 2.0 % of the space folded at every look" in capsys.readouterr().err
    assert bound.ended == 6 and bound.step == -1


@pytest.mark.parametrize("options", [{"limit_percent": -1.0}, {"limit_percent": 100.0}, {"every": 0}, {"points": 0}])
def test_mistakes(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="FoldingBound: expected"):
        FoldingBound(**options)
