"""The mean latent as a plane over the conditions: recovered, with missing conditions, in a fit and its checkpoints."""

from pathlib import Path

import pytest
import torch

from medinr.fields.conditions import ConditionEmbedding
from medinr.methods import DiffusionDeformation, load_method
from medinr.methods.diffusion_trend import columns, expected, fit_trend
from tests.medinr import brains
from tests.medinr.test_diffusion import Heads, fitted, method

NAN = float("nan")


def embedding() -> ConditionEmbedding:
    """Of an age from 20 to 40 and a site of three."""
    made = ConditionEmbedding(8)
    made.size([0, 3], [20.0, 0.0], [40.0, 2.0])
    return made


def test_columns_are_scaled_values_and_levels() -> None:
    found = columns(embedding(), torch.tensor([[20.0, 0.0], [40.0, 2.0], [NAN, NAN]]))
    assert torch.equal(found[:2], torch.tensor([[-1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]]))
    assert bool(found[2].isnan().all())


def test_a_plane_is_recovered_and_what_is_left_has_no_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    told = torch.randn(50, 2, generator=generator)
    slopes = torch.randn(2, 3, 2, 2, 2, generator=generator)
    latents = 5 + torch.tensordot(told, slopes, 1) + 0.1 * torch.randn(50, 3, 2, 2, 2, generator=generator)
    trend = fit_trend(latents, told)
    assert torch.allclose(trend["slopes"], slopes, atol=0.06)
    left = latents - expected(trend, told)
    assert float(left.std()) == pytest.approx(0.1, abs=0.01)
    again = fit_trend(left, told)["slopes"]
    assert float(again.abs().max()) < 0.005


def test_a_missing_condition_is_what_the_other_lets_expect() -> None:
    """The second condition is twice the first and a little more: whoever says the first has said most of the second."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(4000, generator=generator)
    told = torch.stack((first, 2 * first + 0.1 * torch.randn(4000, generator=generator)), 1)
    trend = fit_trend((told[:, 1] + 7).view(-1, 1, 1, 1, 1), told)
    asked = torch.tensor([[1.0, NAN], [NAN, NAN], [NAN, 2.0], [1.0, 2.0]])
    assert torch.allclose(expected(trend, asked).flatten(), torch.tensor([9.0, 7.0, 9.0, 9.0]), atol=0.05)


def test_a_fit_generates_around_its_trend(tmp_path: Path) -> None:
    """Also after it was broken off in the last stage, and as the earlier stage of another fit."""
    first = fitted(method({"registration": 6, "autoencoder": 4, "diffusion": 4}, refine=2, trend=True), tmp_path / "a")
    made = load_method(first)
    assert isinstance(made, DiffusionDeformation)
    made.attach(brains.cohort())
    small, large, free = (made.expected(made.wanted({"size": v} if v else {})[None]) for v in (8.0, 12.0, 0.0))
    assert float((large - small).abs().max()) > 0
    assert float((free - small).norm()) < float((large - small).norm()) > float((free - large).norm())
    noise = torch.zeros(1, *made.autoencoder.latent_shape(brains.SHAPE))
    values = made.wanted({"size": 8.0})[None]
    with torch.no_grad():
        made.latent_spread.fill_(0.0)  # what the diffusion adds
        assert torch.allclose(made.sample(noise, values, 1.0, 2), small)
        assert torch.allclose(made.sample(noise, values, 2.0, 2), free + 2 * (small - free), atol=1e-6)
    second = fitted(method({"morphology": 3}, earlier=str(first), refine=2, trend=True), tmp_path / "b", Heads())
    kept = torch.load(second, weights_only=True)["medinr"]["trend"]
    assert torch.equal(kept["slopes"], made.state["trend"]["slopes"])
