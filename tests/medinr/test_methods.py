"""What the methods do in a step, each part held against a number worked out by hand."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import beta
from torch import Tensor

from medinr.commands.register import fit
from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import SIREN, HarmonizedSIREN
from medinr.losses import MSE, NCC, Barrier, Bending, Diffusion, LocalNCC
from medinr.methods import ConditionedRegistration, PairRegistration, load_method
from medinr.methods.base import RegistrationMethod
from medinr.methods.levels import robust_window, windowed
from medinr.sampling import PointSampler
from medinr.space import Domain, Image, transform_points
from tests.medinr import pairs

STEPS = 400


def small_field(size: float = 0.0) -> SIREN:
    return pairs.gentle(SIREN(hidden=(8,), omega=4.0, zero_output=False), size)


def at_step(method: RegistrationMethod, step: int) -> RegistrationMethod:
    """The method as if it were in a run of 400 steps (steps that are logged need a real run)."""
    method._trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=step, estimated_stepping_batches=STEPS, log_every_n_steps=10**9
    )
    return method


def shifted_by(mm: Sequence[float], **arguments: object) -> PairRegistration:
    """A method whose displacement is the same everywhere, on a pair of equal grids."""
    method = PairRegistration(small_field(), NCC(), window=(-2000.0, 2000.0), **arguments)
    with torch.no_grad():
        method.map.field.head.bias.copy_(torch.tensor(mm) / pairs.CUBE.unit_mm)  # type: ignore[union-attr]
    method.attach(pairs.pair())
    return method


def everywhere(n: int = 4000) -> Tensor:
    return PointSampler(pairs.CUBE)(n, "cpu", torch.Generator().manual_seed(1))


# -- schedules --------------------------------------------------------------------------------------------------------


def test_each_level_has_an_equal_share_of_the_steps() -> None:
    method = PairRegistration(small_field(), NCC(), pyramid_mm=(8.0, 4.0, 2.0, 0.0))
    method.attach(pairs.pair())
    found = [at_step(method, step).level.smoothing_mm for step in range(STEPS + 1)]  # type: ignore[attr-defined]
    assert found[:STEPS] == [8.0] * 100 + [4.0] * 100 + [2.0] * 100 + [0.0] * 100
    assert found[STEPS] == 0.0, "after the last step"
    method._trainer = None
    assert method.level.smoothing_mm == 0.0, "without a run: the images as they are"
    roughness = [level.moving.diff(dim=1).square().mean() for level in method.levels]
    assert roughness == sorted(roughness)


@pytest.mark.parametrize("cosine", [False, True])
def test_warm_up_and_cosine(cosine: bool) -> None:
    method = at_step(PairRegistration(small_field(), NCC(), warmup=0.1, cosine=cosine, lr=0.02), 0)
    setup = method.configure_optimizers()
    schedule = setup["lr_scheduler"]["scheduler"]
    assert setup["lr_scheduler"]["interval"] == "step"
    (rate,) = schedule.lr_lambdas
    assert [rate(s) for s in (0, 19, 39)] == pytest.approx([0.02 / 40, 0.01, 0.02])
    after = [rate(s) for s in (40, 40 + 90, 40 + 180, 40 + 270, 400)]
    expected = [0.01 * (1 + math.cos(math.pi * k / 4)) for k in range(5)] if cosine else [0.02] * 5
    assert after == pytest.approx(expected)
    assert schedule.get_last_lr() == pytest.approx([0.02 / 40])


def test_constant_learning_rate() -> None:
    setup = at_step(PairRegistration(small_field(), NCC(), lr=0.02), 0).configure_optimizers()
    schedule = setup["lr_scheduler"]["scheduler"]
    assert [rate(s) for rate in schedule.lr_lambdas for s in (0, 200, 400)] == pytest.approx([0.02] * 3)
    assert setup["optimizer"].param_groups[0]["lr"] == pytest.approx(0.02)


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_every_weight_is_applied_once() -> None:
    pair, x = pairs.pair(), everywhere(500)

    def objective(bend: float, spread: float, outside: float) -> dict[str, float]:
        torch.manual_seed(0)
        method = PairRegistration(
            small_field(3.0), MSE(), {"bend": Bending(bend), "spread": Diffusion(spread)}, overlap_weight=outside
        )
        method.attach(pair)
        return {k: v.item() for k, v in method.objective(x).items()}

    plain, weighted = objective(1.0, 1.0, 1.0), objective(7.0, 0.25, 3.0)
    factors = {"similarity": 1.0, "outside": 3.0, "bend": 7.0, "spread": 0.25}
    assert plain.keys() == factors.keys() and min(plain.values()) > 0
    for name, factor in factors.items():
        assert weighted[name] == pytest.approx(factor * plain[name], rel=1e-5), name


def test_terms_are_raw_and_the_overlap_is_no_loss() -> None:
    method = PairRegistration(small_field(1.0), NCC(), {"bend": Bending(7.0)}, overlap_weight=3.0)
    method.attach(pairs.pair())
    data, raw = method.terms(everywhere(500))
    terms = method.weigh(data, raw)
    assert terms["bend"].item() == pytest.approx(7 * raw["bend"].item())
    assert terms["outside"].item() == pytest.approx(3 * data["outside"].item())
    assert "overlap" in data and "overlap" not in terms
    assert not data["overlap"].requires_grad


def broken_pair() -> Pair:
    pair = pairs.pair()
    values = pair.moving.data.clone()
    values[0, :, :, 10:20] = math.nan
    return Pair("broken", pair.fixed, Image(values, pair.moving.domain))


def test_a_loss_that_is_not_finite_is_the_users_to_know() -> None:
    method = PairRegistration(small_field(), MSE(), window=(-100.0, 100.0), points=200)
    with pytest.raises(UserError, match=r"the loss is nan at step 0: lower the learning rate"):
        fit(method, broken_pair(), 2, "cpu")


# -- overlap ----------------------------------------------------------------------------------------------------------


def test_points_outside_the_moving_grid_carry_no_weight() -> None:
    method, x = shifted_by((24.0, 0, 0)), everywhere()
    u = method.displacement_jet(x, 0)
    similarity, overlap, _ = method.compare(x, u, method.levels[-1])
    moved = transform_points(pairs.CUBE.normalised_to_world, x)[:, 0] + 24
    inside = moved <= 48
    assert overlap.item() == pytest.approx(inside.float().mean().item())
    assert 0.7 < overlap.item() < 0.8
    alone, _, _ = method.compare(x[inside], u[inside.nonzero()[:, 0]], method.levels[-1])  # type: ignore[index]
    assert similarity.item() == pytest.approx(alone.item(), abs=1e-6)


def test_the_outside_term_is_the_distance_and_pulls_back() -> None:
    x = everywhere()
    found = []
    for shift in (0.0, 12.0, 24.0, 48.0):
        method = shifted_by((shift, 0, 0))
        _, _, outside = method.compare(x, method.displacement_jet(x, 0), method.levels[-1])
        world = transform_points(pairs.CUBE.normalised_to_world, x)
        began_inside = world.abs().amax(1) <= 46.5  # outer voxel centres
        beyond = (world[:, 0] + shift - 46.5).clamp(min=0) * began_inside
        assert outside.item() == pytest.approx(beyond.mean().item() / 100, abs=1e-5)
        found.append(outside.item())
    assert found == sorted(found) and found[0] == 0 < found[1]
    method.zero_grad()
    outside.backward()
    gradient = method.map.field.head.bias.grad  # type: ignore[union-attr]
    assert gradient[0] > 0, "a smaller shift is better"


def test_the_outside_distance_is_in_mm_on_any_moving_grid() -> None:
    affine = torch.tensor([[0, -1.5, 0, 23.25], [6.0, 0, 0, -45], [0, 0, 3, -46.5], [0, 0, 0, 1]]).double()
    moving = pairs.sampled(Domain.of((16, 32, 32), affine), pairs.texture)  # 48 mm wide along x, 96 mm along y
    method = PairRegistration(small_field(), NCC())
    with torch.no_grad():
        method.map.field.head.bias.copy_(torch.tensor([30.0, 0, 0]) / pairs.CUBE.unit_mm)  # type: ignore[union-attr]
    method.attach(Pair("wide", pairs.pair().fixed, moving))
    x = transform_points(pairs.CUBE.world_to_normalised, torch.tensor([[0.0, 0, 0]]))
    _, _, outside = method.compare(x, method.displacement_jet(x, 0), method.levels[-1])
    assert outside.item() == pytest.approx((30 - 23.25) / 100, abs=1e-5)


def test_samples_outside_the_moving_mask_carry_no_weight() -> None:
    mask = torch.zeros(pairs.CUBE.shape, dtype=torch.bool)
    mask[:16] = True
    pair = pairs.pair()
    x = everywhere()
    shares = []
    for used in (False, True):
        method = PairRegistration(small_field(), LocalNCC(), use_moving_mask=used)
        method.attach(Pair("masked", pair.fixed, pair.moving, moving_mask=mask))
        _, overlap, _ = method.compare(x, method.displacement_jet(x, 1), method.levels[-1])
        shares.append(overlap.item())
    assert shares[0] > 0.9 and shares[1] == pytest.approx(shares[0] / 2, abs=0.03)


def test_window() -> None:
    values = torch.linspace(0, 1000, 1000).reshape(1, 10, 10, 10)
    image = Image(values, Domain.of((10, 10, 10), torch.eye(4)))
    assert robust_window(image) == pytest.approx((5, 995), abs=0.5)
    assert windowed(values, (100.0, 300.0)).flatten()[[0, 200, 999]].tolist() == pytest.approx([0, 0.501, 1], abs=1e-3)
    spike = torch.zeros(1, 10, 10, 10)
    spike[0, 0, 0, 0] = 5.0
    assert robust_window(Image(spike, image.domain)) == (0.0, 5.0), "percentiles that agree say nothing"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"points": 0}, "points"),
        ({"pyramid_mm": ()}, "pyramid_mm"),
        ({"scale": "mm"}, "scale: expected one of isotropic"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        PairRegistration(small_field(), NCC(), **arguments)  # type: ignore[arg-type]


# -- conditioned ------------------------------------------------------------------------------------------------------


def test_quantiles_of_the_priors() -> None:
    u = torch.linspace(0, 1, 21)
    quantile = {
        prior: pairs.conditioned_method(prior=prior).quantile(u) for prior in ("uniform", "beta", "log-uniform")
    }
    assert torch.equal(quantile["uniform"], u)
    assert quantile["beta"].numpy() == pytest.approx(beta(0.5, 0.5).ppf(u.numpy()), abs=1e-5)
    assert quantile["log-uniform"].log10().numpy() == pytest.approx((-4 + 4 * u).numpy(), abs=1e-5)
    assert pairs.conditioned_method().context().item() == pytest.approx(1e-2), "the median until a search"


def two_alphas(**arguments: object) -> ConditionedRegistration:
    return ConditionedRegistration(
        HarmonizedSIREN(2, hidden=(8,)),
        NCC(),
        {"bend": Bending(5.0), "spread": Diffusion(2.0), "fold": Barrier(3.0)},
        ["spread", "bend"],
        prior="uniform",
        **arguments,  # type: ignore[arg-type]
    )


def recorded(method: ConditionedRegistration, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The alphas of a step's pieces; every raw term is 1 and the overlap of no interest."""
    seen: list[Tensor] = []

    def terms(x: Tensor, alpha: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        seen.append(alpha)
        one = torch.ones(())
        return {"similarity": one, "outside": one, "overlap": one}, dict.fromkeys(method.penalties, one)

    monkeypatch.setattr(method, "terms", terms)
    return seen


def test_alphas_of_a_step_are_stratified(monkeypatch: pytest.MonkeyPatch) -> None:
    method = two_alphas(alphas=5)
    seen = recorded(method, monkeypatch)
    orders = set()
    for _ in range(20):
        seen.clear()
        method.objective(torch.zeros(50, 3))
        strata = (torch.stack(seen) * 5).floor().int()
        assert strata.sort(dim=0).values.T.tolist() == [[0, 1, 2, 3, 4]] * 2, "one alpha in each fifth, in both"
        orders.add(tuple(map(tuple, strata.tolist())))
    assert len(orders) > 15, "paired at random"


def test_alpha_weighs_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    method = two_alphas()
    seen = recorded(method, monkeypatch)
    terms = method.objective(torch.zeros(50, 3))
    alpha = torch.stack(seen).mean(0)
    expected = {"similarity": 1, "outside": 1, "spread": 2 * alpha[0], "bend": 5 * alpha[1], "fold": 3}
    assert {k: v.item() for k, v in terms.items()} == pytest.approx({k: float(v) for k, v in expected.items()})


def test_convex_form(monkeypatch: pytest.MonkeyPatch) -> None:
    method = pairs.conditioned_method(form="convex", prior="uniform")
    seen = recorded(method, monkeypatch)
    terms = method.objective(torch.zeros(50, 3))
    alpha = torch.stack(seen).mean().item()
    assert terms["similarity"].item() == pytest.approx(1 - alpha)
    assert terms["bend"].item() == pytest.approx(alpha)
    assert terms["outside"].item() == 1


@pytest.mark.parametrize(
    ("conditions", "names", "form", "text"),
    [
        (1, ["bnd"], "sum", r"conditioned: expected names among \['bend', 'spread'\], got \['bnd'\]"),
        (1, [], "sum", "conditioned: expected names among"),
        (1, ["bend", "spread"], "sum", "field.conditions: expected 2"),
        (2, ["bend"], "sum", "field.conditions: expected 1"),
        (2, ["bend", "spread"], "convex", "form: convex needs exactly one"),
    ],
)
def test_conditions_are_checked(conditions: int, names: list[str], form: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        ConditionedRegistration(
            HarmonizedSIREN(conditions, hidden=(8,)),
            NCC(),
            {"bend": Bending(1.0), "spread": Diffusion(1.0)},
            names,
            form=form,  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("alpha", [[], [0.1, 0.2], [-0.1], [1.5], [math.nan]])
def test_alpha_is_checked(alpha: list[float]) -> None:
    with pytest.raises(UserError, match=r"alpha: expected 1 value\(s\) in \[0, 1\]"):
        pairs.conditioned_method().at(alpha)


def test_the_search_is_kept_in_the_checkpoint(tmp_path: Path) -> None:
    method = pairs.conditioned_method()
    method.attach(pairs.pair())
    result = method.search("landmarks")
    tres = {row["alpha"]: row["tre"] for row in result.table}
    assert result.oracle and min(tres, key=lambda a: tres[a]) == result.alpha[0]
    assert len(set(tres.values())) == len(tres), "alpha must matter"
    method.save(tmp_path / "transform.ckpt")
    again = load_method(tmp_path / "transform.ckpt")
    assert isinstance(again, ConditionedRegistration)
    assert again.context().tolist() == pytest.approx(result.alpha)
    assert again.state["search"] == {"alpha": result.alpha, "criterion": "landmarks", "oracle": True}
    assert torch.equal(again.transform()(pairs.points()), method.transform()(pairs.points()))


def test_the_score_of_a_search_is_the_transforms_own(tmp_path: Path) -> None:
    method = pairs.conditioned_method()
    pair = pairs.pair()
    method.attach(pair)
    row = method.score(torch.tensor([0.3]), everywhere(800))
    method.at([0.3])
    assert pair.fixed_points is not None and pair.moving_points is not None
    error = (method.transform()(pair.fixed_points) - pair.moving_points).norm(dim=1).mean().item()
    assert row["tre"] == pytest.approx(error, rel=1e-5)
    assert row["folding"] == 0 and row["bending"] > 0 and 0 < row["overlap"] <= 1


@pytest.mark.parametrize("missing", ["method", "domain", "start", "windows", "weights"])
def test_an_incomplete_checkpoint_is_one_line(missing: str, tmp_path: Path) -> None:
    path = tmp_path / "transform.ckpt"
    method = PairRegistration(SIREN(hidden=(8,)), MSE())
    method.remember(Domain.of((8, 8, 8), torch.eye(4)), torch.eye(4), [[0.0, 1.0], [0.0, 1.0]])
    method.save(path)
    assert torch.equal(load_method(path).start, torch.eye(4).double())
    checkpoint = torch.load(path, weights_only=True)
    if missing == "weights":
        checkpoint["state_dict"].popitem()
    else:
        del checkpoint["medinr"][missing]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="incomplete or changed checkpoint"):
        load_method(path)
