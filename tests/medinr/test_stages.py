"""Stages of a fit end when their loss has stopped falling, and not before."""

import pytest
import torch

from medinr.callbacks import EndStages
from medinr.commands.register import fit
from medinr.losses import LocalNCC
from medinr.methods import RefinedRegistration, Refinement
from tests.medinr import pairs

STEPS = (60, 80)


def test_converged() -> None:
    end = EndStages(window=5, tolerance=0.01)
    falling = [1 - 0.01 * i for i in range(40)]
    assert not any(end.converged(falling[:n]) for n in range(1, 41))
    still = [1 / (1 + i) for i in range(5)] + [0.1] * 20
    stops = [n for n in range(1, 26) if end.converged(still[:n])]
    assert stops[0] == 11, "ten at the same loss, of which the last five took nothing off"
    assert end.converged([10 * x + 3 for x in still[:11]]), "whatever the loss's scale"
    assert end.converged([1.0] * 10) and not end.converged([1.0] * 9), "where there is nothing to gain"
    # A few worse steps in between are no end, and a loss that rises has not converged.
    assert not end.converged([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.55, 0.55, 0.5, 0.4])
    assert not end.converged([*still[:20], 0.2])


def fitted(steps: tuple[int, int] = STEPS) -> tuple[RefinedRegistration, int, float]:
    torch.manual_seed(0)
    method = RefinedRegistration(None, Refinement((4.0, 2.0), steps, spacings=(4.0,), bending=2.0), LocalNCC())
    pair = pairs.pair()
    step, interrupted = fit(method, pair, sum(steps), "cpu")
    assert not interrupted
    assert pair.fixed_points is not None and pair.moving_points is not None
    error = (method.transform()(pair.fixed_points) - pair.moving_points).norm(dim=1).mean()
    return method, step, error.item()


def test_a_fit_ends_early_at_the_same_error_and_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    method, step, error = fitted()
    assert sorted(method.ended) == [0, 1] and step == method.ended[1] < sum(STEPS)
    assert method.schedule() == [0, method.ended[0], step]
    again, other_step, other_error = fitted()
    assert (again.ended, other_step, other_error) == (method.ended, step, error)
    monkeypatch.setattr(EndStages, "converged", lambda self, losses: False)
    whole, last, full_error = fitted()
    assert not whole.ended and last == sum(STEPS)
    assert error < 1.02 * full_error + 0.01


def test_the_next_stage_begins_with_its_own_rate() -> None:
    """Of the learning rates no step is lost where a stage ends before its time."""
    method = RefinedRegistration(None, Refinement((4.0, 2.0), (30, 30), spacings=(4.0,)), LocalNCC())
    seen: list[tuple[int | None, list[float]]] = []
    step = method.on_before_optimizer_step

    def noted(optimizer: torch.optim.Optimizer) -> None:
        seen.append((method.stage, [g["lr"] for g in optimizer.param_groups]))
        step(optimizer)

    method.on_before_optimizer_step = noted  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EndStages, "converged", lambda self, losses: len(losses) == 7)
        assert fit(method, pairs.pair(), 60, "cpu") == (14, False)
    assert [s for s, _ in seen] == [0] * 7 + [1] * 7
    coarse, fine = ([lr[level] > 0 for _, lr in seen] for level in (0, 1))
    assert coarse == [True] * 7 + [False] * 7 and fine == [False] * 7 + [True] * 7
