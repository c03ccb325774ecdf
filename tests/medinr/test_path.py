"""Flows along time: against exponentials, themselves in pieces and backwards, and a motion that must close."""

import pytest
import torch
from torch import Tensor

from medinr import jets
from medinr.errors import UserError
from medinr.fields import SIREN, Field
from medinr.fields.path import PathFlow
from medinr.fields.times import LinearTime, PhaseTime, RunningVelocity
from medinr.jets import Jet
from medinr.results import landmarks_over_time
from medinr.space import Domain, transform_points
from tests.medinr import breathing, pairs
from tests.medinr.test_flow import MATRIX, SHIFT, points, wavy
from tests.medinr.test_spatiotemporal import fit, method
from tests.medinr.tolerances import assert_close


class Modes(Field):
    """w_0 = M x + b times one number, w_1 = the same times another."""

    in_features, out_features = 3, 6

    def __init__(self, constant: float, linear: float) -> None:
        super().__init__()
        self.factors = torch.nn.Parameter(torch.tensor([[constant], [linear]], dtype=torch.float64), False)

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        each = [jets.linear(jet, f * MATRIX.to(jet.channels), f * SHIFT.to(jet.channels)) for f in self.factors]
        return Jet(torch.cat([e.channels for e in each], dim=-1), jet.k, jet.pairs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.jet(Jet(x[None], 0)).value


def linear_path(constant: float, linear: float, steps: int = 12) -> PathFlow:
    time = LinearTime(1)
    time.set(10.0, 40.0, None)
    return PathFlow(RunningVelocity(Modes(constant, linear), time).double(), steps)


def exponential(scale: float) -> Tensor:
    generator = torch.zeros(4, 4, dtype=torch.float64)
    generator[:3, :3], generator[:3, 3] = MATRIX, SHIFT
    return torch.linalg.matrix_exp(scale * generator)


def at(*times: float) -> Tensor:
    return torch.tensor(times, dtype=torch.float64)


@pytest.mark.parametrize("time", [30.0, 50.0, -10.0])
def test_a_linear_velocity_gives_the_exponential_of_its_integral(time: float) -> None:
    """dy/ds = (a + c s)(M y + b), s in spans: exp of (a s + c s^2 / 2) times the generator; s may be negative."""
    s = (time - 10.0) / 40.0
    truth = exponential(0.8 * s + 0.6 * s**2 / 2)
    x = points()
    y = linear_path(0.8, 0.6).jet(jets.seed(x, 1), at(time))
    assert_close(y.value, transform_points(truth, x), 1e-6)
    assert_close(y.jacobian, truth[:3, :3].expand(len(x), 3, 3), 1e-6)


def test_from_one_time_to_another() -> None:
    path, x = linear_path(0.8, -0.9), points()
    middle = path(x, at(22.0))
    assert_close(path(middle, at(22.0, 45.0)), path(x, at(45.0)), 1e-6)
    assert_close(path.backward()(middle, at(22.0)), x, 1e-6)
    assert_close(path(x, at(10.0)), x, 1e-6)


def test_the_lipschitz_constant_is_that_of_the_path() -> None:
    path = linear_path(1.0, 0.0)
    assert float(path.lipschitz(at(30.0))) == pytest.approx(0.5 * float(torch.linalg.matrix_norm(MATRIX, 2)), rel=1e-6)


def periodic(size: float = 0.5) -> PathFlow:
    time = PhaseTime(1)
    time.set(20.0, 100.0, 100.0)
    return PathFlow(RunningVelocity(wavy(size, 9, 5), time).double(), 48)


def test_paths_go_forward_and_less_than_a_period() -> None:
    path, x = periodic(), points()
    assert path.way(at(10.0)) == (20.0, 90.0) and path.way(at(20.0)) == (20.0, 0.0)
    assert_close(path(path(x, at(80.0)), at(80.0, 110.0)), path(x, at(10.0)), 1e-6)


def test_closure_is_the_end_of_a_period() -> None:
    path, x = periodic(), points()
    gap = path.closure(x)
    assert_close(path(path(x, at(70.0)), at(70.0, 120.0)) - x, gap, 1e-6)
    assert float(gap.norm(dim=-1).mean()) > 1e-2
    with pytest.raises(ValueError, match="times that repeat"):
        linear_path(1.0, 0.0).closure(x)


def test_outputs_are_those_of_one_component_more() -> None:
    with pytest.raises(UserError, match="expected 9 outputs"):
        RunningVelocity(SIREN(5, 6, (8,)), PhaseTime(1))
    with pytest.raises(UserError, match="expected path true"):
        method(closure_weight=1.0)


def test_a_path_is_fitted_and_closes() -> None:
    """The closure error falls when it is asked to, and the times between the images are found as before."""
    found = []
    for weight in (0.0, 100.0):
        torch.manual_seed(0)
        some = method(
            field=SIREN(3, 15, (32, 32), omega=15.0, first_omega=6.0), path=True, closure_weight=weight, steps=4
        )
        fit(some, breathing.sequence((0, 15, 40, 60, 80), held_out=(2,)), 100)
        metrics = some._sequence_metrics()
        found.append(metrics["closure_mm/mean"])
        assert metrics["closure_mm/max"] >= found[-1]
        assert some.sequence is not None
        errors = landmarks_over_time(some.transform_at, some.sequence)
        assert all(errors[t][0] > 1.5 and errors[t][1] < 0.6 for t in (15.0, 60.0, 80.0)), errors
        x = pairs.points()
        there = some.transform_between(0.0, 60.0)(x)
        assert (some.transform_between(60.0, 0.0)(there) - x).norm(dim=1).max() < 0.05
    assert found[1] < 0.5 * found[0], found


def test_domain_is_needed_for_nothing_but_the_probes() -> None:
    path = periodic()
    path.cover(Domain.of((20, 20, 20), torch.eye(4, dtype=torch.float64)))
    assert float(path.double().lipschitz(at(70.0))) > 0
