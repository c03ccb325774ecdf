"""Forward and backward maps fitted against each other: the midpoint, its uncertainty, and every method inside."""

from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch
from torch import Tensor

import medinr
from medinr.commands.presets import PRESETS, Preset
from medinr.commands.register import fit
from medinr.errors import UserError
from medinr.fields import SIREN, CubicLattice, CycleTransform, HarmonizedSIREN, Transform, as_map
from medinr.fields.cycle import TabulatedCycle
from medinr.fields.dense import evaluate_dense
from medinr.losses import MSE, NCC, Barrier, Bending, LocalNCC
from medinr.methods import (
    ConditionedRegistration,
    CycleConsistentRegistration,
    PairRegistration,
    RefinedRegistration,
    Refinement,
    load_method,
)
from medinr.results import evaluate, uncertainty_metrics, write_results
from medinr.space import transform_points
from tests.medinr import pairs

EYE = torch.eye(4, dtype=torch.float64)


def shift(mm: list[float]) -> Transform:
    """u = const, through the field and not through the start."""
    field = pairs.gentle(SIREN(hidden=(8,), omega=4.0, zero_output=False), 0.0)
    with torch.no_grad():
        field.head.bias.copy_(torch.tensor(mm) / pairs.CUBE.unit_mm)
    return Transform(as_map(field), pairs.CUBE, EYE)


def wavy(size: float) -> Transform:
    """A smooth lattice, strongly curved: J is far from I, and H from 0."""
    field = CubicLattice([40.0])
    field.cover(pairs.CUBE)
    with torch.no_grad():
        for level in field.levels:
            level.normal_(0, size, generator=torch.Generator().manual_seed(2))
    start = EYE.clone()
    start[:3, :3] = torch.tensor([[1.1, 0.2, 0], [-0.1, 0.9, 0.1], [0, 0.1, 1.0]])
    return Transform(as_map(field), pairs.CUBE, start)


class Inverse(Transform):
    """The exact inverse of a transform, as a forward map."""

    def __init__(self, of: Transform, offset: Tensor) -> None:
        super().__init__(of.map, of.domain, of.start)
        self.of, self.offset = of, offset

    def __call__(self, world: Tensor) -> Tensor:
        found, residual = self.of.inverse(world, tolerance_mm=1e-5)
        assert residual.max() < 1e-4
        return found + self.offset

    def jacobian(self, world: Tensor) -> Tensor:
        return torch.linalg.inv(self.of.jacobian(self(world) - self.offset))


# -- the midpoint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inference", ["newton", "first-order", "second-order"])
def test_midpoint_and_uncertainty_of_two_shifts(inference: Any) -> None:
    both = CycleTransform(shift([3.0, 0, 0]), shift([-1.0, 2.0, 0]), inference)
    p = pairs.points()
    assert torch.allclose(both(p) - p, torch.tensor([2.0, -1.0, 0.0]).double(), atol=2e-2)
    assert torch.allclose(both.offset(p), torch.tensor([-2.0, -2.0, 0.0]).double(), atol=2e-2)
    assert torch.allclose(both.jacobian(p), torch.eye(3).double().expand(50, 3, 3), atol=1e-5)


def test_exact_inverses_are_certain() -> None:
    back = wavy(0.05)
    ahead = Inverse(back, torch.zeros(3))
    p = pairs.points(half_mm=20)
    both = CycleTransform(ahead, back)
    assert both.offset(p).norm(dim=1).max() < 0.02
    assert torch.allclose(both(p), ahead(p), atol=0.02)
    assert torch.allclose(both.jacobian(p), ahead.jacobian(p), atol=1e-3)


def test_order_of_the_inverse() -> None:
    """At a gap of d mm the first-order inverse errs by O(d^2), the second-order one by O(d^3), Newton's by nothing."""
    back = wavy(0.06)
    p = pairs.points(half_mm=20)
    truth = Inverse(back, torch.zeros(3))(p)
    direction = torch.tensor([1.0, -0.7, 0.4]).double()
    errors: dict[str, list[float]] = {}
    for size in (4.0, 2.0):
        ahead = Inverse(back, size * direction)
        for inference in ("first-order", "second-order", "newton"):
            both = CycleTransform(ahead, back, inference)  # type: ignore[arg-type]
            found = ahead(p) + both.offset(p)
            errors.setdefault(inference, []).append((found - truth).norm(dim=1).mean().item())
    assert 3.2 < errors["first-order"][0] / errors["first-order"][1] < 4.8
    assert 7.4 < errors["second-order"][0] / errors["second-order"][1] < 9, "6.6 with d in place of v in H[v, v]"
    assert errors["second-order"][1] < 0.25 * errors["first-order"][1]
    assert max(errors["newton"]) < 0.01


def test_jacobian_is_that_of_the_midpoint() -> None:
    both = CycleTransform(shift([1.0, 0, 0]), wavy(0.05))
    p, h = pairs.points(half_mm=20), 0.5
    steps = h * torch.eye(3, dtype=torch.float64)
    numeric = torch.stack([(both(p + s) - both(p - s)) / (2 * h) for s in steps], dim=-1)
    assert torch.allclose(both.jacobian(p), numeric, atol=0.03)


@pytest.mark.parametrize("inference", ["newton", "first-order", "second-order"])
def test_a_folded_backward_map_is_uncertain_but_never_absurd(inference: Any) -> None:
    both = CycleTransform(shift([0.0, 0, 0]), wavy(1.0), inference)
    p = pairs.points(400)
    gap = p - both.back(p)
    wild = both._expanded(p, gap, second=inference == "second-order")
    assert (wild - p).norm(dim=1).max() > 500, "near a singular Jacobian an expansion goes anywhere"
    offset = both.offset(p)
    assert offset.norm(dim=1).median() > 5 and both.jacobian(p).isfinite().all()
    left = (both.back(p + offset) - p).norm(dim=1)
    fallen_back = torch.isclose(offset, gap @ torch.linalg.inv(both.back.start[:3, :3]).T).all(dim=1)
    assert ((left <= gap.norm(dim=1) + 1e-3) | fallen_back).all()
    assert fallen_back.any() or inference == "newton"


def test_tables_are_judged_where_the_backward_map_is_determined() -> None:
    """F moves by 30 mm: what lands beyond the moving image is not asked."""
    both = CycleTransform(shift([30.0, 0, 0]), shift([-30.0, 0, 0]))
    x = torch.linspace(-45, 45, 7).double()
    p = torch.stack((x, torch.zeros(7), torch.zeros(7)), dim=1)
    assert both.judged(p).tolist() == (x + 30 <= 46.5).tolist()
    assert 0 < int(both.judged(p).sum()) < 7


def test_the_inverse_by_tables_is_that_of_the_map_itself() -> None:
    back = wavy(0.05)
    both = CycleTransform(shift([2.0, 0, 0]), back)
    rough = shift([0.0, 3.0, 0])  # stands for a table that is far from exact
    p = pairs.points(half_mm=20)
    found, _ = TabulatedCycle(both, both.ahead, rough)._inverted(p, both.ahead(p))
    assert (back(found) - p).norm(dim=1).max() < 0.011


class Flattening(Transform):
    """Its points are those of a shift, its Jacobian is singular beyond x = 0."""

    def jacobian(self, world: Tensor) -> Tensor:
        found = super().jacobian(world)
        found[world[:, 0] > 0, 0] = 0
        return found


def test_where_the_backward_map_is_flat_the_forward_one_tells_alone() -> None:
    one = shift([1.0, 0, 0])
    p = pairs.points()
    flat = CycleTransform(wavy(0.05), Flattening(one.map, one.domain, one.start))
    slope, ahead = flat.jacobian(p), flat.ahead.jacobian(p)
    beyond = flat.ahead(p)[:, 0] + flat.offset(p)[:, 0] > 0
    assert 5 < int(beyond.sum()) < 45
    assert torch.equal(slope[beyond], ahead[beyond])
    assert torch.allclose(slope[~beyond], (ahead[~beyond] + torch.eye(3).double()) / 2, atol=1e-5)


def test_uncertainty_on_the_whole_grid() -> None:
    both = CycleTransform(shift([3.0, 0, 0]), wavy(0.02))
    domain = pairs.CUBE
    dense, exact = evaluate_dense(both, domain), evaluate_dense(both, domain, exact=True)
    for found in (dense, exact):
        assert found.uncertainty is not None and found.uncertainty.shape == domain.shape
    some = torch.tensor([[3, 4, 5], [16, 16, 16], [30, 20, 10]])
    truth = both.offset(transform_points(domain.voxel_to_world, some.double())).norm(dim=1).float()
    assert torch.allclose(exact.uncertainty[tuple(some.T)], truth, atol=0.02)  # type: ignore[index]
    assert torch.allclose(dense.uncertainty, exact.uncertainty, atol=0.15)  # type: ignore[arg-type]


# -- the method ---------------------------------------------------------------------------------------------------


def plain(**arguments: Any) -> PairRegistration:
    options: dict[str, Any] = {"points": 400, "lr": 3e-3, "cosine": True, **arguments}
    return PairRegistration(SIREN(hidden=(32, 32), omega=6.0), MSE(), {"fold": Barrier(1.0)}, **options)


def conditioned() -> ConditionedRegistration:
    field = HarmonizedSIREN(1, hidden=(32, 32), omega=6.0)
    return ConditionedRegistration(field, MSE(), {"bend": Bending(1e-3)}, ["bend"], points=400, lr=3e-3, grid=3)


def refined() -> RefinedRegistration:
    return RefinedRegistration(None, Refinement(shrinks=(2.0, 1.0), steps=(10, 10)), LocalNCC(), points=200)


def lattice() -> PairRegistration:
    return PairRegistration(CubicLattice([24.0, 12.0]), NCC(), {"bend": Bending(1e-4)}, points=400, lr=2e-2)


def test_the_gap_of_two_shifts() -> None:
    method = CycleConsistentRegistration(plain(), weight=0.5)
    method.attach(pairs.pair())
    for part, mm in ((method.ahead, [3.0, 0, 0]), (method.back, [-1.0, 2.0, 0])):
        pairs.gentle(part.map.field, 0.0)  # type: ignore[arg-type]
        with torch.no_grad():
            part.map.field.head.bias.copy_(torch.tensor(mm) / pairs.CUBE.unit_mm)  # type: ignore[union-attr]
    terms = method.objective(method.draw())
    assert terms["cycle"].item() == pytest.approx(0.5 * 2 * 8.0, rel=1e-4), "|(2, 2, 0)|^2, both ways"
    voxels = CycleConsistentRegistration(plain(), weight=0.5, unit="voxel")
    voxels.attach(pairs.pair())
    voxels.load_state_dict(method.state_dict())
    assert voxels.objective(voxels.draw())["cycle"].item() == pytest.approx(8.0 / 9, rel=1e-4), "voxels of 3 mm"


def test_the_start_takes_no_part_in_the_gap() -> None:
    pair = pairs.pair()
    start = EYE.clone()
    start[:3, :3] = torch.tensor([[0.9, -0.3, 0], [0.3, 0.9, 0], [0, 0, 1.2]])
    start[:3, 3] = torch.tensor([5.0, -3, 2])
    method = CycleConsistentRegistration(plain())
    method.attach(type(pair)(**{**vars(pair), "start": start}))
    assert method.objective(method.draw())["cycle"].item() < 1e-8
    p = pairs.points()
    assert torch.allclose(method.transform()(p), transform_points(start, p), atol=1e-3)


def test_the_gap_of_two_shifts_beyond_a_start() -> None:
    """B(F(p)) = p + u + A^-1 w and F(B(q)) = q + w + A u, A the linear part of the start."""
    pair, start = pairs.pair(), EYE.clone()
    start[:3, :3] = torch.tensor([[0.9, -0.3, 0], [0.3, 0.9, 0], [0, 0, 1.2]])
    start[:3, 3] = torch.tensor([5.0, -3, 2])
    method = CycleConsistentRegistration(plain(), weight=1.0)
    method.attach(type(pair)(**{**vars(pair), "start": start}))
    u, w = torch.tensor([3.0, 0, 1]), torch.tensor([-1.0, 2, 0])
    for part, mm in ((method.ahead, u), (method.back, w)):
        pairs.gentle(part.map.field, 0.0)  # type: ignore[arg-type]
        with torch.no_grad():
            part.map.field.head.bias.copy_(mm / pairs.CUBE.unit_mm)  # type: ignore[union-attr]
    linear = start[:3, :3].float()
    there, back = u + torch.linalg.inv(linear) @ w, w + linear @ u
    assert abs(float(there.square().sum() - back.square().sum())) > 0.5, "each direction counts"
    expected = float(there.square().sum() + back.square().sum())
    assert method.objective(method.draw())["cycle"].item() == pytest.approx(expected, rel=1e-4)


def test_each_direction_draws_from_its_own_mask() -> None:
    pair = pairs.pair()
    masks = [torch.zeros(pairs.CUBE.shape, dtype=torch.bool) for _ in range(2)]
    masks[0][:10], masks[1][-10:] = True, True
    method = CycleConsistentRegistration(plain(jitter=False))
    method.attach(type(pair)(**{**vars(pair), "fixed_mask": masks[0], "moving_mask": masks[1]}))
    x, y = (transform_points(pairs.CUBE.normalised_to_voxel, v)[:, 0] for v in method.draw())
    assert x.max() < 9.6 and y.min() > 21.4


@pytest.mark.parametrize("make", [plain, conditioned, refined, lattice])
def test_every_method_fits_in_both_directions(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = pairs.pair()
    method = CycleConsistentRegistration(make(), weight=1e-3)
    ahead, back = ([p.detach().clone() for p in part.parameters()] for part in (method.ahead, method.back))
    fit(method, pair, 20 if make is refined else 60)
    for part, before in ((method.ahead, ahead), (method.back, back)):
        after = list(part.parameters())
        if before:
            assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=False))
        assert max(p.abs().max() for p in after) > 0
    method.attach(pair)
    method.settle()
    p = pairs.points()
    found = method.transform()
    assert (found(p) - pairs.warp(p)).norm(dim=1).mean() < 0.75 * (p - pairs.warp(p)).norm(dim=1).mean()
    method.save(tmp_path / "m.ckpt")
    again = load_method(tmp_path / "m.ckpt")
    assert isinstance(again, CycleConsistentRegistration)
    assert torch.equal(again.transform()(p), found(p)) and torch.equal(again.transform().offset(p), found.offset(p))


def test_cycle_term_lowers_the_gap() -> None:
    gaps = {}
    for weight in (0.0, 1e-2):
        torch.manual_seed(1)
        method = CycleConsistentRegistration(plain(), weight=weight)
        fit(method, pairs.pair(), 60)
        gaps[weight] = method.transform().offset(pairs.points()).norm(dim=1).mean().item()
    assert gaps[1e-2] < 0.6 * gaps[0.0]


@pytest.mark.parametrize(("trust", "trusted"), [(94.0, 0.0), (96.0, 1.0)])
def test_the_flag_looks_at_the_95th_percentile_of_the_region(trust: float, trusted: float) -> None:
    one = shift([1.0, 0, 0])
    volume = torch.stack((torch.arange(101.0), torch.full((101,), 1e3)))
    found = uncertainty_metrics(volume, volume < 1e3, CycleTransform(one, one, trust_mm=trust))
    expected = {"uncertainty/mean_mm": 50.0, "uncertainty/p95_mm": 95.0, "uncertainty/trusted": trusted}
    assert found == pytest.approx(expected)


def test_results_carry_the_uncertainty(tmp_path: Path) -> None:
    pair = pairs.pair()
    method = CycleConsistentRegistration(plain(), trust=1.0)
    method.attach(pair)
    evaluation = evaluate(method.transform(), pair)
    assert evaluation.metrics["uncertainty/p95_mm"] < 1e-3 and evaluation.metrics["uncertainty/trusted"] == 1
    files = write_results(tmp_path / "out", method, pair, evaluation)
    assert tmp_path / "out" / "uncertainty.nii.gz" in files
    pairs.gentle(method.back.map.field, 0.0)  # type: ignore[arg-type]
    with torch.no_grad():
        method.back.map.field.head.bias.fill_(5 / pairs.CUBE.unit_mm)  # type: ignore[union-attr]
    found = evaluate(method.transform(), pair).metrics
    assert found["uncertainty/mean_mm"] == pytest.approx(5 * 3**0.5, rel=1e-2)
    assert found["uncertainty/trusted"] == 0
    method.trust = 2.95  # voxels of 3 mm
    assert evaluate(method.transform(), pair).metrics["uncertainty/trusted"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"), [({"weight": -1.0}, "weight"), ({"fraction": 0.0}, "fraction"), ({"trust": 0.0}, "trust")]
)
def test_wrong_arguments(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CycleConsistentRegistration(plain(), **arguments)


def test_register_writes_the_uncertainty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", Preset((16, 16), 64, 40, Refinement((4.0, 2.0), (10, 5))))
    pair = pairs.pair()
    found = medinr.register(
        pair.fixed, pair.moving, tmp_path / "out", preset="fast", init="none", uncertainty=True, report=True
    )
    assert isinstance(found.method, CycleConsistentRegistration)
    assert {"uncertainty.nii.gz", "figures/uncertainty.png", "report.html"} <= {
        str(f.relative_to(tmp_path / "out")) for f in found.files
    }
    written = nib.load(tmp_path / "out" / "uncertainty.nii.gz")
    assert written.shape == pairs.CUBE.shape
    assert written.get_fdata().mean() == pytest.approx(found.metrics["uncertainty/mean_mm"], rel=1e-3)
    again = load_method(tmp_path / "out" / "transform.ckpt").transform()
    assert torch.allclose(again(pairs.points()), found.transform(pairs.points()), atol=1e-4)
    displaced = tmp_path / "out" / "displacement.nii.gz"
    with pytest.raises(UserError, match="--uncertainty"):
        medinr.register(pair.fixed, pair.moving, preset="fast", init=str(displaced), uncertainty=True)
