"""A velocity of lattices and modes of time: its interpolation in time, its table, and its fit on whole grids."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from medinr.errors import UserError
from medinr.fields import LinearTime, PhaseTime, TimedLattice
from medinr.fields.chained import Chained, Inverted, PointsOnly
from medinr.fields.dense import evaluate_dense
from medinr.fields.flow import Flow, FlowTransform
from medinr.fields.squaring import scaling_and_squaring
from medinr.fields.table import Table, even_lines, gradient_on_grid
from medinr.jets import det, seed
from medinr.methods import SpatioTemporalLattice, load_method
from medinr.results import landmarks_over_time
from medinr.space import Domain, Image, transform_points
from medinr.timeline import best_compensation, displacement_on, interpolation_error
from tests.medinr import breathing, pairs
from tests.medinr.test_spatiotemporal import fit
from tests.medinr.tolerances import assert_close


def lattice(spacings: tuple[float, ...] = (40.0, 20.0), size: float = 0.05, harmonics: int = 4) -> TimedLattice:
    torch.manual_seed(1)
    field = TimedLattice(spacings, PhaseTime(harmonics))
    field.cover(pairs.CUBE)
    field.set_times(0.0, 100.0, 100.0, (15.0, 40.0, 70.0))
    with torch.no_grad():
        for level in field.modes:
            level.normal_(0, size)
    return field


def at(time: float) -> torch.Tensor:
    return torch.tensor([time])


# -- the field ----------------------------------------------------------------------------------------------------


def test_zero_at_the_reference_and_any_value_at_the_trained_times() -> None:
    field = lattice()
    x = 0.5 * torch.randn(50, 3)
    assert field(x, at(0.0)).abs().max() < 1e-6 < 1e-3 < field(x, at(40.0)).abs().max()
    rows = torch.stack([field.factors(at(t)) for t in (15.0, 40.0, 70.0)])
    assert torch.linalg.matrix_rank(rows) == 3
    plain = torch.stack([field._change(at(t)) for t in (15.0, 40.0, 70.0)])
    assert_close(rows, plain, 1e-4)


def test_between_the_times_the_velocity_bends_least() -> None:
    """With many harmonics it is the periodic cubic spline through the trained times and zero at the reference."""
    from scipy.interpolate import CubicSpline

    field = lattice((60.0,), harmonics=40)
    x, times = torch.tensor([[0.1, -0.2, 0.3]]), (0.0, 15.0, 40.0, 70.0, 100.0)
    values = torch.cat([field(x, at(t)) for t in times]).detach()
    values[-1] = values[0]
    spline = CubicSpline(times, values.double().numpy(), bc_type="periodic")
    for t in (7.0, 30.0, 55.0, 90.0):
        truth = torch.tensor(spline(t))
        assert (field(x, at(t))[0].double() - truth).abs().max() < 0.02 * values.abs().max()


def test_linear_time_is_linear() -> None:
    field = TimedLattice((40.0,), LinearTime())
    field.cover(pairs.CUBE)
    field.set_times(3.0, 17.0, None, (7.0, 20.0))
    with torch.no_grad():
        field.modes[0].normal_(0, 0.1)
    x = 0.5 * torch.randn(9, 3)
    assert_close(field(x, at(11.5)), 0.5 * field(x, at(20.0)), 1e-5)


def test_table_has_the_splines_values_and_gradients() -> None:
    field, x, context = lattice(), 0.9 * (2 * torch.rand(300, 3) - 1), at(40.0)
    errors = []
    for step in (0.1, 0.05):
        table = Table(field, even_lines(field, step), context)
        truth, found = field.jet(seed(x, 1), context), table.jet(seed(x, 1))
        errors.append((float((found.value - truth.value).detach().abs().max()), found.jacobian, truth.jacobian))
    assert errors[1][0] < 0.35 * errors[0][0], "of second order"
    assert (errors[1][1] - errors[1][2]).abs().max() < 0.05 * errors[1][2].abs().max()
    line = [torch.linspace(-0.8, 0.8, 4)] * 3
    exact = field.jet(seed(torch.cartesian_prod(*line), 1), context).jacobian
    assert_close(gradient_on_grid(field, line, context).reshape(-1, 3, 3), exact, 1e-4)


def test_tabulated_transforms_stay_within_the_tolerance() -> None:
    flow = Flow(lattice((40.0,), 0.05))
    flow.cover(pairs.CUBE)
    one, other = (FlowTransform(flow, pairs.CUBE, at(t)) for t in (15.0, 40.0))
    for some in (one, Inverted(other), Chained(Inverted(one), other)):
        quick, exact = evaluate_dense(some, pairs.CUBE), evaluate_dense(some, pairs.CUBE, exact=True)
        gap = (quick.displacement - exact.displacement).norm(dim=-1).max()
        assert 0 < gap < 0.1 and quick.error_mm <= 0.05
        assert (quick.det - exact.det).abs().mean() < 0.01
        assert exact.displacement.norm(dim=-1).max() > 2
    assert PointsOnly(one).tabulated(0) is not None and PointsOnly(pairs_affine()).tabulated(0) is None


def pairs_affine() -> Any:
    from medinr.fields import SIREN, DisplacementMap, Transform

    return Transform(DisplacementMap(SIREN(3, 3, (8,))), pairs.CUBE, torch.eye(4))


def test_midpoint_is_of_second_order() -> None:
    """A rotation about the centre: exp of a linear field is a matrix exponential."""
    n, angle = 41, 0.6
    c = torch.arange(n, dtype=torch.float64) - n // 2
    x, y, _ = torch.meshgrid(c, c, c[:5], indexing="ij")
    v = angle * torch.stack((-y, x, torch.zeros_like(x)))[None]
    truth = torch.stack(
        (x * math.cos(angle) - y * math.sin(angle) - x, x * math.sin(angle) + y * math.cos(angle) - y, 0 * x)
    )
    inner = (slice(None), slice(14, 27), slice(14, 27))
    gaps = [float((scaling_and_squaring(v, 4, midpoint)[0] - truth)[inner].abs().max()) for midpoint in (False, True)]
    assert gaps[1] < 0.05 * gaps[0]


# -- the method ---------------------------------------------------------------------------------------------------


def method(**options: Any) -> SpatioTemporalLattice:
    arguments: dict[str, Any] = {
        "time": PhaseTime(4), "spacings": (8.0, 4.0), "shrinks": (4.0, 2.0), "steps": (30, 40), "lr": 0.03,
    }  # fmt: skip
    return SpatioTemporalLattice(**(arguments | options))


@pytest.fixture(scope="module")
def fitted() -> SpatioTemporalLattice:
    torch.manual_seed(0)
    return fit(method(), breathing.sequence((0, 15, 40, 60, 80), held_out=(2,)), 70)  # type: ignore[arg-type,return-value]


def test_a_known_periodic_motion_is_recovered(fitted: SpatioTemporalLattice) -> None:
    assert fitted.sequence is not None
    errors = landmarks_over_time(fitted.transform_at, fitted.sequence)
    for time in (15.0, 60.0, 80.0):
        before, after = errors[time]
        assert before > 1.5 and after < 0.5, time
    before, after = errors[40.0]
    assert before > 3.5 and after < 1.2, "a time that was never trained on"


def test_turning_the_world_turns_the_result(fitted: SpatioTemporalLattice) -> None:
    """Images with turned headers, as of the heart: the same fit on the same voxels."""
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, -0.5, 0.3], [0.5, 0, -0.4], [-0.3, 0.4, 0]]).double())
    assert fitted.sequence is not None
    images = [Image(i.data, Domain.of(i.domain.shape, turn @ i.domain.voxel_to_world)) for i in fitted.sequence.images]
    none = (None,) * len(images)
    torch.manual_seed(0)
    turned: Any = fit(method(), replace(fitted.sequence, images=tuple(images), points=none), 70)  # type: ignore[arg-type]
    points = 0.5 * pairs.points()
    want = transform_points(turn, fitted.transform(15.0)(points).double())
    assert_close(turned.transform(15.0)(transform_points(turn, points.double())), want, 2e-4)


def test_inverse_between_and_folding(fitted: SpatioTemporalLattice) -> None:
    p = pairs.points()
    for time in (15.0, 40.0, 60.0):
        phi = fitted.transform_at(time)
        assert (phi.inverse(phi(p))[0] - p).norm(dim=1).max() < 0.01
        assert evaluate_dense(phi, pairs.CUBE).det.min() > 0.2
    between = fitted.transform_between(60.0, 15.0)
    assert (between(fitted.transform_at(60.0)(p)) - fitted.transform_at(15.0)(p)).norm(dim=1).max() < 0.1
    moved = displacement_on(between, pairs.CUBE).flatten(0, 2).norm(dim=1).max()
    assert moved > 1


def test_a_time_is_left_out_and_comes_back(fitted: SpatioTemporalLattice) -> None:
    p = pairs.points()
    before = fitted.transform_at(60.0)(p)
    with fitted.leaving_out(60.0):
        other, kept = fitted.transform_at(60.0)(p), fitted.transform_at(15.0)(p)
    assert (other - before).norm(dim=1).mean() > 0.3
    assert_close(kept, fitted.transform_at(15.0)(p), 1e-4)
    assert_close(fitted.transform_at(60.0)(p), before)
    assert fitted.sequence is not None
    assert best_compensation(fitted, fitted.sequence) in (0.0, 0.25, 0.5, 0.75, 1.0)


def test_interpolation_error_is_that_of_a_time_left_out(fitted: SpatioTemporalLattice) -> None:
    assert fitted.fitted_times == [15.0, 60.0, 80.0]
    found = interpolation_error(fitted, pairs.CUBE)
    assert found is not None
    total = torch.zeros(pairs.CUBE.shape)
    for time in fitted.fitted_times:
        with fitted.leaving_out(time):
            other = evaluate_dense(fitted.transform_at(time), pairs.CUBE, exact=True).displacement
        own = evaluate_dense(fitted.transform_at(time), pairs.CUBE, exact=True).displacement
        total += (other - own).norm(dim=-1) / 3
    assert (found - total).abs().max() < 0.15 and total.mean() > 0.3


def test_checkpoint_rebuilds_every_time(fitted: SpatioTemporalLattice, tmp_path: Any) -> None:
    fitted.save(tmp_path / "transform.ckpt")
    again = load_method(tmp_path / "transform.ckpt")
    p = pairs.points()
    for time in (0.0, 33.0, 60.0):
        assert_close(again.transform_at(time)(p), fitted.transform_at(time)(p))  # type: ignore[attr-defined]


def test_held_out_times_are_never_looked_at() -> None:
    losses = []
    for other in (0.0, 1e6):
        sequence = breathing.sequence((0, 20, 40, 60), held_out=(2,))
        sequence.images[2].data[0, ::2] = other
        some = method()
        some.attach(sequence)
        assert sorted(some.pairs) == [(0, 1), (0, 3), (1, 3)] and sum(some.pairs.values()) == pytest.approx(1)
        losses.append(some.objective()["similarity"].detach())
    assert_close(losses[0], losses[1])


def test_the_loss_begins_at_one_and_has_gradients() -> None:
    some = method(similarity_weight=1.0)
    some.attach(breathing.sequence((0, 20, 60)))
    terms = some.objective()
    assert float(terms["similarity"].detach()) == pytest.approx(1, abs=1e-5)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(float(m.grad.abs().max()) > 0 for m in some.velocity.modes if m.grad is not None)


def test_wrong_stages_are_told() -> None:
    with pytest.raises(UserError, match="shrinks, steps: expected as many"):
        method(shrinks=(2.0,))


def test_folding_is_none_for_large_random_velocities() -> None:
    flow = Flow(lattice(size=0.1))
    flow.cover(pairs.CUBE)
    phi = FlowTransform(flow, pairs.CUBE, at(40.0))
    assert det(phi.jacobian(pairs.points())).min() > 0
