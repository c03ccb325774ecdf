"""What the presets of `register` choose."""

import numpy as np
import pytest
import torch

import medinr
from medinr.commands.presets import PRESETS, Preset, recommended
from medinr.losses import MINDSSC
from medinr.methods import CycleConsistentRegistration, PairRegistration, RefinedRegistration, Refinement
from medinr.space import Domain, Image
from tests.medinr import pairs

BODY = Domain.of((256, 256, 100), np.diag([1.5, 1.5, 2.5, 1]))
MOUSE = Domain.of((112, 128, 80), np.diag([0.15, 0.15, 0.15, 1]))


def test_multimodal_compares_squares_at_the_length_of_accurate() -> None:
    method = recommended("multimodal")
    assert isinstance(method, RefinedRegistration) and not method.refinement.signed
    plain = recommended("accurate")
    assert isinstance(plain, RefinedRegistration) and plain.refinement.signed
    assert method.refinement.steps == plain.refinement.steps
    assert isinstance(recommended("multimodal", "nmi"), PairRegistration), "a similarity that is named goes first"


def test_lengths_of_the_network_follow_the_domain() -> None:
    lengths = [recommended("fast", "mind", 0.0, domain) for domain in (None, BODY, MOUSE)]
    assert all(isinstance(m, PairRegistration) and isinstance(m.similarity, MINDSSC) for m in lengths)
    assert lengths[0].pyramid_mm == lengths[1].pyramid_mm == (8.0, 4.0, 2.0, 0.0)
    assert lengths[2].pyramid_mm == pytest.approx((0.6, 0.3, 0.15, 0.0))
    assert lengths[2].similarity.step_mm == pytest.approx(0.225)  # type: ignore[union-attr]


def test_inverted_and_bent_contrast_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "multimodal", Preset((8,), 64, 2, Refinement((6.0, 3.0), (25, 15)), "multimodal"))
    monkeypatch.setitem(PRESETS, "accurate", Preset((8,), 64, 2, Refinement((6.0, 3.0), (25, 15))))
    pair = pairs.pair()
    fixed = pair.fixed.data
    share = (fixed - fixed.min()) / (fixed.max() - fixed.min())
    inverted = Image(1 - share.sqrt(), pair.domain, "inverted")
    given = {"fixed_points": pair.fixed_points, "moving_points": pair.moving_points}
    found = medinr.register(inverted, pair.moving, preset="multimodal", init="none", **given)
    wrong = medinr.register(inverted, pair.moving, preset="accurate", init="none", **given)
    assert found.metrics["tre/mean"] < 0.4 * found.metrics["tre/initial_mean"] < wrong.metrics["tre/mean"]
    assert torch.isfinite(found.evaluation.displacement).all()


def test_accurate_fits_both_ways_where_the_images_show_different_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PRESETS["accurate"].both_ways and PRESETS["multimodal"].both_ways and not PRESETS["fast"].both_ways
    pair = pairs.pair()

    def preset(agreement: float) -> Preset:
        return Preset((8,), 64, 2, Refinement((6.0, 3.0), (25, 15), agreement=agreement), both_ways=True)

    monkeypatch.setitem(PRESETS, "accurate", preset(0.5))
    alike = medinr.register(pair.fixed, pair.moving, init="none")
    assert isinstance(alike.method, RefinedRegistration), "they agree better than that"
    monkeypatch.setitem(PRESETS, "accurate", preset(1.0))
    given = {"init": "none", "fixed_points": pair.fixed_points, "moving_points": pair.moving_points}
    found = medinr.register(pair.fixed, pair.moving, **given)
    assert isinstance(found.method, CycleConsistentRegistration)
    assert (
        found.metrics["uncertainty/p95_mm"] > 0 and found.metrics["tre/mean"] < 0.4 * found.metrics["tre/initial_mean"]
    )
    one = medinr.register(pair.fixed, pair.moving, similarity="ncc", **given)
    assert isinstance(one.method, PairRegistration), "a network is fitted in one direction"
    monkeypatch.setattr("medinr.commands.register.BOTH_WAYS_VOXELS", pair.domain.n_voxels - 1)
    assert isinstance(medinr.register(pair.fixed, pair.moving, **given).method, RefinedRegistration), "too large"
