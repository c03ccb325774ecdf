"""ConditionalAtlas: what a fit of a small cohort knows, what it leaves alone, what it keeps; adaptation; statistics."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from medinr import adaptation
from medinr import latent_statistics as statistics
from medinr.adaptation import adapt_scan, scan_metrics
from medinr.atlas_volumes import atlas_domain, central_piece, render
from medinr.data.base import step_loader
from medinr.data.cohort import Condition
from medinr.data.encoded import decode, encode
from medinr.data.scan_points import brain, placement
from medinr.errors import UserError
from medinr.latents import Latent, between, condition_effects, kernel_weights, sampled_latent
from medinr.methods import ConditionalAtlas, load_method
from medinr.metrics.topology import euler_characteristic, topology
from medinr.space import Domain
from tests.medinr import atlas_worker, tiny_atlas
from tests.medinr.tiny_runs import ROOT, environment

AGE = Condition("age", "continuous", low=20, high=40)
SEX = Condition("sex", "categorical", ("F", "M"))
SITE = Condition("site", "categorical", ("a", "b", "c"))


class Data(lightning.LightningDataModule):
    """The tiny cohort, as a trainer wants it."""

    def __init__(self, cohort: Any) -> None:
        super().__init__()
        self.cohort = cohort

    def train_dataloader(self) -> Any:
        return step_loader(50)

    def val_dataloader(self) -> Any:
        return step_loader(1)

    def test_dataloader(self) -> Any:
        return [0]


def fit(method: ConditionalAtlas, cohort: Any, steps: int) -> ConditionalAtlas:
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(method, Data(cohort))
    return method.eval()


@pytest.fixture(scope="module")
def fitted() -> ConditionalAtlas:
    return fit(tiny_atlas.atlas(), tiny_atlas.cohort(), 150)


def ready(**options: Any) -> ConditionalAtlas:
    """Attached to a blemished cohort, without a trainer."""
    cohort = tiny_atlas.cohort(blemished=True)
    method = tiny_atlas.atlas(**options)
    method.size(cohort)
    method.attach(cohort)
    return method


def test_a_test_is_in_full_precision_whatever_the_trainer_says(fitted: ConditionalAtlas) -> None:
    """The first layer of a decoder that is only looked at had been rounded, and the next one did not take it."""
    found = []
    precisions: tuple[Any, ...] = ("32-true", "bf16-mixed")
    for precision in precisions:
        trainer = lightning.Trainer(
            accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        found += trainer.test(fitted, Data(tiny_atlas.cohort()), verbose=False)
    assert found[0]["dsc/mean"] > 0.5
    assert found[1] == found[0]


# -- conditions and kernels --------------------------------------------------------------------------------------------


def test_conditions_as_numbers_and_back() -> None:
    code = encode([AGE, SEX, SITE], {"age": 25.0, "sex": 1.0, "site": 2.0})
    assert code.tolist() == [-0.5, 1.0, -1.0, -1.0, 1.0]
    assert decode([AGE, SEX, SITE], code) == {"age": 25.0, "sex": 1.0, "site": 2.0}
    assert encode([AGE], {"age": 45.0}).item() == 1.5, "beyond the trained range it goes on"
    assert encode([AGE, SITE], {"site": 0.0})[0].isnan()


def test_kernel_weights() -> None:
    times = torch.tensor([30.0, 31.0, 33.0, float("nan")])
    found = kernel_weights(times, 31.0, 0.5)
    raw = torch.tensor([math.exp(-2.0), 1.0, math.exp(-8.0)])
    assert torch.allclose(found[:3], raw / raw.sum()) and found[3] == 0
    line = kernel_weights(times, 30.3, 1.0, degree=1)
    assert float(line.sum()) == pytest.approx(1.0) and float((line * times)[:3].sum()) == pytest.approx(30.3, abs=1e-4)
    plain = kernel_weights(times, 30.3, 1.0)
    assert abs(float((plain * times)[:3].sum()) - 30.3) > 0.1, "which is what the line is for"
    assert kernel_weights(times, 80.0, 0.5).isfinite().all(), "far from every scan"
    assert int((kernel_weights(times, 31.0, 5.0, most=1) > 0).sum()) == 1
    with pytest.raises(UserError, match="no scan"):
        kernel_weights(torch.tensor([float("nan")]), 30.0, 1.0)


# -- a fit -------------------------------------------------------------------------------------------------------------


def test_the_atlas_of_an_age_nobody_had(fitted: ConditionalAtlas) -> None:
    """Volumes grow with age, and at 29 weeks, which no scan has, they are right."""
    domain = atlas_domain(fitted.unit_mm, 3.0)
    volumes = [render(fitted, fitted.at(age), domain).volumes_ml() for age in (25.0, 29.0, 33.0)]
    heads = [sum(v.values()) for v in volumes]
    assert heads[0] < heads[1] < heads[2]
    true = 4 / 3 * math.pi * tiny_atlas.radius(29.0) ** 3 * 1.25 * 0.9 / 1000
    assert heads[1] == pytest.approx(true, rel=0.15)
    centre = render(fitted, fitted.at(29.0), domain).inside.nonzero().float().mean(0)
    assert torch.allclose(centre, (torch.tensor(domain.shape) - 1) / 2, atol=1.0), "upright, at the origin"


def test_only_the_central_piece_is_kept() -> None:
    mask = torch.zeros(9, 9, 9, dtype=torch.bool)
    mask[:3] = True
    mask[4:6, 4:6, 4:6] = True
    at = (torch.stack(torch.meshgrid(*(torch.arange(9.0),) * 3, indexing="ij"), -1) - 4).norm(dim=-1)
    assert int(central_piece(mask, torch.exp(-at.square())).sum()) == 8
    assert int(central_piece(mask, torch.ones(9, 9, 9)).sum()) == 3 * 81, "so the weight decides"


def test_a_grid_beside_the_brain_is_empty(fitted: ConditionalAtlas) -> None:
    affine = torch.eye(4).double()
    affine[:3, 3] = 0.8 * fitted.unit_mm
    found = render(fitted, fitted.at(29.0), Domain.of((3, 4, 5), affine))
    assert found.labels is not None and not bool(found.labels.any()) and not bool(found.images["T2w"].any())


def test_any_resolution(fitted: ConditionalAtlas) -> None:
    coarse, fine = (
        sum(render(fitted, fitted.at(29.0), atlas_domain(fitted.unit_mm, s)).volumes_ml().values()) for s in (4.0, 2.0)
    )
    assert fine == pytest.approx(coarse, rel=0.1)


def test_poses_have_no_mean(fitted: ConditionalAtlas) -> None:
    assert float(torch.stack([p.detach() for p in fitted.poses]).mean(0).abs().max()) < 1e-6
    assert float(torch.stack([p.detach() for p in fitted.poses]).abs().max()) > 1e-4


def test_a_checkpoint_is_all_that_is_needed(fitted: ConditionalAtlas, tmp_path: Path) -> None:
    fitted.save(tmp_path / "atlas.ckpt")
    again = load_method(tmp_path / "atlas.ckpt")
    assert isinstance(again, ConditionalAtlas)
    domain = atlas_domain(fitted.unit_mm, 6.0)
    one, other = render(fitted, fitted.at(27.0), domain), render(again, again.at(27.0), domain)
    assert torch.equal(one.images["T2w"], other.images["T2w"]) and torch.equal(one.labels, other.labels)  # type: ignore[arg-type]


def test_a_new_scan_by_its_intensities(fitted: ConditionalAtlas, tmp_path: Path) -> None:
    scan = tiny_atlas.scan(6, 29.0, shift=-2.0, finer=2)
    before = {k: v.clone() for k, v in fitted.state_dict().items()}
    found = adapt_scan(fitted, scan, steps=60, points=600, restarts=2)
    assert all(torch.equal(v, before[k]) for k, v in fitted.state_dict().items()), "the decoder is frozen"
    assert all(p.requires_grad for p in fitted.parameters())
    assert found.held_out < 0.95 * found.curve[0][1] and found.steps > 0
    assert found.conditions["age"] == pytest.approx(29.0, abs=2.0) and found.spread["age"] >= 0
    metrics = scan_metrics(fitted, scan, found, render(fitted, found.latent, scan.domain))
    assert metrics["dsc/mean"] > 0.75 and metrics["image/psnr"] > 15
    blind = adapt_scan(fitted, tiny_atlas.scan(6, 29.0), {"age": 25.0}, steps=10, points=100)
    assert blind.conditions["age"] == pytest.approx(25.0) and "age" not in blind.spread, "what is known stays"

    fitted.save(tmp_path / "atlas.ckpt")  # and it can become one of the atlas's own
    grown = load_method(tmp_path / "atlas.ckpt")
    assert isinstance(grown, ConditionalAtlas)
    grown.add("new", found.latent, {"age": 29.0})
    grown.save(tmp_path / "grown.ckpt")
    again = load_method(tmp_path / "grown.ckpt")
    assert isinstance(again, ConditionalAtlas) and again.names[-1] == "new" and again.times[-1] == 29.0
    assert torch.equal(again.member(6).code, found.latent.code)
    with pytest.raises(UserError, match="does not have"):
        again.add("new", found.latent)


def test_codes_weigh_in_adaptation_as_in_training(fitted: ConditionalAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = tiny_atlas.scan(6, 31.0, finer=2)

    def size(weight: float) -> float:
        monkeypatch.setattr(fitted, "code_weight", weight)
        found = adapt_scan(fitted, scan, fit=("code",), steps=30, points=300, patience=99)
        return float(found.latent.code.square().mean()) if found.steps else math.nan

    assert size(2.0) < 0.9 * size(0.0)


def test_a_small_and_turned_head_keeps_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its size alone it would be a younger one: affine poses take the size away, in training and here."""
    atlas = fit(tiny_atlas.atlas(pose="affine", explicit=["age"]), tiny_atlas.cohort(), 150)
    scan = tiny_atlas.scan(6, 28.0, shift=9.0, finer=2)
    found = adapt_scan(atlas, scan, steps=0, points=300)
    own = placement(brain(scan), scan.domain)[1].log()
    assert torch.allclose(found.latent.pose[6:9], torch.tensor(atlas.state["stretch"]) - own.float(), atol=1e-5)
    turned = found.held_out
    monkeypatch.setattr(adaptation, "TURNS", 0)
    assert turned < adapt_scan(atlas, scan, steps=0, points=300).held_out


def test_effects_are_the_slopes_of_codes_beside_the_time() -> None:
    """Codes that are a curve over time and a line over two conditions, one of which changes with the time."""
    generator = torch.Generator().manual_seed(0)
    times = torch.linspace(20, 40, 60)
    told = torch.stack((times / 10 - 3, torch.randn(60, generator=generator) + times / 20, (times * 7).sin().sign()), 1)
    slopes = torch.randn(2, 4, generator=generator)
    codes = (times / 8).sin()[:, None] + told[:, 1:] @ slopes
    latents = [Latent(c.view(4, 1, 1, 1), t, torch.zeros(6), torch.zeros(3)) for c, t in zip(codes, told, strict=True)]
    found, poses = condition_effects(latents, times, 1.0, 1, [1, 2])
    assert torch.allclose(found.view(2, 4), slopes, atol=0.01) and not poses.any()
    with_unknown = [replace(latents[0], code=torch.full((4, 1, 1, 1), 99.0)), *latents]
    times = torch.cat((torch.tensor([math.nan]), times))
    assert torch.equal(condition_effects(with_unknown, times, 1.0, 1, [1, 2])[0], found)


def test_the_mean_code_follows_what_is_asked_for(fitted: ConditionalAtlas) -> None:
    cohort, method = tiny_atlas.cohort(), tiny_atlas.atlas(explicit=["age", "sex"], effects=True, sigma=20.0)
    method.size(cohort)
    with torch.no_grad():
        for i, code in enumerate(method.codes):  # the code alone knows of the sex
            code.fill_(1.0 if i % 2 else -1.0)
    female, male, mean = (method.at(29.0, asked).code for asked in ({"sex": 0.0}, {"sex": 1.0}, {}))
    assert torch.allclose(female, torch.full_like(female, -1.0), atol=0.05)
    assert torch.allclose(male, torch.full_like(male, 1.0), atol=0.05)
    method.effects = False
    assert torch.equal(method.at(29.0, {"sex": 1.0}).code, mean)


def test_made_up_brains(fitted: ConditionalAtlas) -> None:
    weights = kernel_weights(fitted.times, 29.0, 2.0)
    drawn = [sampled_latent(fitted.members(), weights, torch.Generator().manual_seed(seed)).code for seed in range(400)]
    codes = torch.stack([m.code for m in fitted.members()])
    mean = (weights.view(-1, 1, 1, 1, 1) * codes).sum(0)
    covariance = (weights.view(-1, 1, 1, 1, 1) * (codes - mean).square()).sum(0)
    assert float(torch.stack(drawn).var(0).sum() / covariance.sum()) == pytest.approx(1.0, abs=0.2)
    half = between(fitted.member(0), fitted.member(5), 0.5)
    assert torch.allclose(half.code, (codes[0] + codes[5]) / 2)


def test_an_unknown_condition(fitted: ConditionalAtlas) -> None:
    with pytest.raises(UserError, match="explicit conditions"):
        fitted.at(29.0, {"sex": 1.0})
    with pytest.raises(UserError, match="expected some of age, sex"):
        ready(explicit=["weight"])


# -- what is missing -------------------------------------------------------------------------------------------------


def gradients(method: ConditionalAtlas, scans: list[int]) -> tuple[dict[str, float], Tensor]:
    """Sum of the absolute gradients of each code, and those of the output rows, of a step with some scans."""
    drawn = dict(method.draw())
    method.zero_grad()
    terms = method.objective([(i, drawn[i]) for i in scans])
    torch.stack(list(terms.values())).sum().backward()
    codes = {
        n: 0.0 if c.grad is None else float(c.grad.abs().sum()) for n, c in zip(method.names, method.codes, strict=True)
    }
    assert method.decoder.head.weight.grad is not None
    return codes, method.decoder.head.weight.grad.abs().sum(1)


def test_missing_modality_labels_and_age() -> None:
    method = ready()
    codes, rows = gradients(method, [tiny_atlas.NO_T1W])
    assert codes.pop("s1") > 0 and not any(codes.values()), "other scans are not touched"
    assert rows[0] > 0 and rows[1] == 0 and bool((rows[2:] > 0).all()), "T2w, no T1w, three classes"
    _, rows = gradients(method, [tiny_atlas.NO_LABELS])
    assert bool((rows[:2] > 0).all()) and not bool(rows[2:].any())
    gradients(method, [tiny_atlas.NO_AGE, 0])
    assert method.fitted[tiny_atlas.NO_AGE].grad is not None
    with torch.no_grad():
        method.fitted[tiny_atlas.NO_AGE].fill_(0.3)
        method.fitted[0].fill_(0.3)
    assert method.told_of(tiny_atlas.NO_AGE).item() == pytest.approx(0.3), "a missing condition is fitted"
    assert method.told_of(0).item() == -1.0, "a known one is not"
    assert method.times.isnan().sum() == 1


def test_what_is_rare_counts_as_if_all_had_it() -> None:
    weight, labels = ready().share
    assert weight.tolist() == pytest.approx([1.0, 6 / 5]) and labels == pytest.approx(6 / 5)


def test_terms_have_the_same_names_whatever_the_scans() -> None:
    """Several processes log each term together: one that lacked a name would leave the others waiting."""
    method = ready(smooth_weight=1.0, code_weight=1.0)
    drawn = dict(method.draw())
    ends = {tuple(method.objective([(i, drawn[i])])) for i in range(6)}
    assert ends == {("intensity", "labels", "codes", "smooth")}


def test_every_scan_has_its_turn() -> None:
    method = ready(scans=4)
    seen = [i for step in range(3) for i, _ in method.chosen(step)]
    assert sorted(seen) == sorted(2 * list(range(6))), "twelve places, six scans"


def test_large_brains_have_more_turns_with_other_points() -> None:
    method = ready(scans=6, balance="voxels")
    sizes = [len(s.inside) for s in method.samplers]
    turns = [round(n / min(sizes)) for n in sizes]
    assert turns[0] == 1 and turns[-1] > 1, turns
    steps = math.lcm(6, sum(turns)) // 6  # whole rounds
    seen = [i for step in range(steps) for i, _ in method.chosen(step)]
    assert [seen.count(i) for i in range(6)] == [n * 6 * steps // sum(turns) for n in turns]
    again = next(i for i, before in method.chosen(0) if before)
    one, two, *_ = (drawn.world for i, drawn in method.draw() if i == again)
    assert not torch.equal(one, two)


def test_one_code_for_the_whole_brain() -> None:
    method = ready(decoder=tiny_atlas.decoder(nodes=1))
    assert method.codes[0].shape == (8, 1, 1, 1)
    codes, _ = gradients(method, [0])
    assert codes["s0"] > 0


@pytest.mark.parametrize("pose", ["affine", "spline"])
def test_poses_start_with_the_sizes(pose: str) -> None:
    method = ready(pose=pose, pose_weight=1.0, smooth_weight=1.0)
    stretch = torch.stack([p.detach()[6:9].mean() for p in method.poses])
    assert bool((stretch.diff() < 0).all()), "the smallest is stretched most"
    growth = math.log(tiny_atlas.radius(34.0) / tiny_atlas.radius(24.0))
    assert float(stretch[0] - stretch[-1]) == pytest.approx(growth, abs=0.1)
    gradients(method, [2])
    assert method.poses[2].grad is not None and bool(method.poses[2].grad[12:].any()) == (pose == "spline")


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "medinr" / "atlas_worker.py")]
    running = [
        subprocess.Popen([*command, str(r), "2", str(tmp_path)], env=environment(), stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    one = atlas_worker.step()
    scale = max(float(g.abs().max()) for g in one.values() if g is not None)
    untouched = [k for k, g in one.items() if g is None]
    assert any(k.startswith("poses") for k in untouched), "one scan is left out of the step"
    for r in range(2):
        found = torch.load(tmp_path / f"{r}.pt", weights_only=True)
        for name, gradient in one.items():
            if gradient is None:
                assert found[name] is None
            else:
                assert float((found[name] - gradient).abs().max()) < 1e-5 * scale, name


# -- statistics ------------------------------------------------------------------------------------------------------


def test_ridge_finds_a_line_and_chooses_to_shrink() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 200, generator=generator).double()
    true = torch.randn(200, generator=generator).double()
    y = x[:, :5] @ true[:5] + 30
    assert torch.allclose(statistics.ridge_predict(x[:, :5], y, x[:3, :5]), y[:3], atol=1e-2)
    noise = torch.randn(40, generator=generator).double() + 30
    flat = statistics.ridge_predict(x, noise, torch.randn(50, 200, generator=generator).double())
    assert float(flat.std()) < 0.6, "nothing to learn: near the mean"
    found = statistics.cross_validated(x[:, :5], y)
    assert statistics.mean_absolute_errors(found, y)[0] < 0.1
    exact, rounded = statistics.mean_absolute_errors(torch.tensor([30.4, 31.6]), torch.tensor([30.0, 31.0]))
    assert exact == pytest.approx(0.5) and rounded == pytest.approx(0.5)


def test_auc_and_neighbours() -> None:
    scores, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    assert statistics.auc(scores, positive) == pytest.approx(0.75)
    assert statistics.auc(torch.ones(4), positive) == pytest.approx(0.5)
    assert math.isnan(statistics.auc(scores, torch.ones(4)))
    order, distance = statistics.nearest(torch.tensor([[0.0], [5.0], [1.0]]), torch.tensor([[0.9]]), 2)
    assert order.tolist() == [[2, 0]] and distance[0].tolist() == pytest.approx([0.1, 0.9])


def test_topology() -> None:
    grid = torch.stack(torch.meshgrid(*(torch.arange(15.0),) * 3, indexing="ij"), -1) - 7
    radius = grid.norm(dim=-1)
    ball, hollow = radius < 5, (radius < 6) & (radius > 3)
    ring = ((grid[..., :2].norm(dim=-1) - 4.5).abs() < 1.2) & (grid[..., 2].abs() < 1.5)
    assert [euler_characteristic(m) for m in (ball, hollow, ring, torch.zeros(3, 3, 3))] == [1, 2, 0, 0]
    two = ball.clone()
    two[0, 0, 0] = True
    assert topology(two) == {"euler": 2, "pieces": 2, "tunnels": 0, "cavities": 0}
    assert topology(hollow) == {"euler": 2, "pieces": 1, "tunnels": 0, "cavities": 1}
    assert topology(ring) == {"euler": 0, "pieces": 1, "tunnels": 1, "cavities": 0}
