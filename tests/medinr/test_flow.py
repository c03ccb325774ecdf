"""Flows of velocity fields on points: against exponentials, a lattice, and themselves backwards."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from medinr import jets
from medinr.errors import RegistrationWarning, UserError
from medinr.fields import SIREN, CubicLattice, Field, Transform
from medinr.fields.flow import At, Flow, FlowTransform, between, integrate
from medinr.fields.fourier import FourierSIREN
from medinr.fields.squaring import scaling_and_squaring
from medinr.fields.times import LinearTime, PhaseTime, SurrogateTime, TimedVelocity, TimeEncoding
from medinr.jets import Jet
from medinr.space import Domain, transform_points
from tests.medinr import pairs, references
from tests.medinr.tolerances import assert_close

MATRIX = torch.tensor([[-0.3, 0.5, 0.0], [-0.6, 0.2, 0.1], [0.05, 0.3, -0.4]], dtype=torch.float64)
SHIFT = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64)


class Linear(Field):
    """v(x) = M x + b."""

    in_features = out_features = 3

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.scale * (x @ MATRIX.T.to(x) + SHIFT.to(x))

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        return jets.linear(jet, self.scale * MATRIX.to(jet.channels), self.scale * SHIFT.to(jet.channels))


def exponential(scale: float = 1.0) -> Tensor:
    """exp of the homogeneous matrix [4, 4]."""
    generator = torch.zeros(4, 4, dtype=torch.float64)
    generator[:3, :3], generator[:3, 3] = MATRIX, SHIFT
    return torch.linalg.matrix_exp(scale * generator)


def wavy(size: float = 0.3, out: int = 3, inputs: int = 3) -> SIREN:
    field = SIREN(inputs, out, hidden=(16, 16), omega=3.0, zero_output=False)
    return pairs.gentle(field, size).double().requires_grad_(False)


def timed(time: TimeEncoding, network_sees_time: bool = True) -> TimedVelocity:
    return TimedVelocity(wavy(0.5, 3 * time.size, 3 + time.size * network_sees_time), time).double()


def points(n: int = 40) -> Tensor:
    return 2 * torch.rand(n, 3, dtype=torch.float64) - 1


# -- the integrator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "order", "bound"), [("euler", 1, 0.1), ("midpoint", 2, 6e-3), ("rk4", 4, 1e-5)])
def test_flow_of_a_linear_field_is_the_matrix_exponential(scheme: str, order: int, bound: float) -> None:
    x, truth = points(), exponential()
    gaps, slopes = [], []
    for steps in (4, 8, 16):
        y = Flow(Linear(), steps, scheme).jet(jets.seed(x, 2))  # type: ignore[arg-type]
        gaps.append(float((y.value - transform_points(truth, x)).abs().max()))
        slopes.append(float((y.jacobian - truth[:3, :3]).abs().max()))
        second = jets.materialise(y).second
        assert second is not None and float(second.abs().max()) < 1e-12
    assert gaps[1] < bound and slopes[1] < bound
    for errors in (gaps, slopes):
        for a, b in itertools.pairwise(errors):
            assert a / b == pytest.approx(2**order, rel=0.15)


def test_duration_and_direction() -> None:
    x = points()
    half = integrate(Linear().jet, jets.seed(x, 0), 20, duration=0.5).value
    assert_close(half, transform_points(exponential(0.5), x), 1e-8)
    back = Flow(Linear(), 20).backward()(x)
    assert_close(back, transform_points(exponential(-1.0), x), 1e-7)


@pytest.mark.parametrize("scheme", ["euler", "midpoint", "rk4"])
def test_derivatives_are_those_of_the_discrete_flow(scheme: str) -> None:
    flow, x = Flow(wavy(), 3, scheme), points(12)  # type: ignore[arg-type]
    value, jacobian, hessian = references.derivatives(lambda p: flow(p), x)
    y = flow.jet(jets.seed(x, 2))
    assert_close(y.value, value)
    assert_close(y.jacobian, jacobian)
    assert y.second is not None
    for (a, b), row in zip(y.pairs, y.second, strict=True):
        assert_close(row, hessian[:, :, a, b])


def test_probe_directions_go_through() -> None:
    flow, x = Flow(wavy(), 2), points(8)
    seed = jets.probe(x)
    assert seed.first is not None
    y = flow.jet(seed)
    _, first, second = references.along(lambda p: flow(p), x, seed.first, seed.pairs)
    assert_close(y.first, first)
    assert_close(y.second, second)


def test_gradients_reach_the_velocity() -> None:
    """d/ds of the flow of s v is v(phi): a check of the parameters' gradient against finite differences."""
    field, x = wavy().requires_grad_(), points(6)
    flow = Flow(field, 3)
    weight = field.head.weight

    def total() -> Tensor:
        y = flow.jet(jets.seed(x, 1))
        return y.value.sum() + jets.det(y.jacobian).sum()

    (gradient,) = torch.autograd.grad(total(), weight)
    h = 1e-6
    with torch.no_grad():
        weight[1, 2] += h
        more = total()
        weight[1, 2] -= 2 * h
        less = total()
    assert float((more - less).detach() / (2 * h)) == pytest.approx(float(gradient[1, 2]), rel=1e-6)


def test_flow_is_the_squaring_of_the_velocity_on_a_lattice() -> None:
    """Two ways to one flow: Runge-Kutta at points, and scaling and squaring on a grid that reads v trilinearly: its
    error falls with the square of the grid's spacing."""
    lattice = CubicLattice([24.0])
    gaps = []
    for n in (20, 40):
        side = 80 / n
        domain = Domain.of(
            (n, n, n),
            torch.tensor([[side, 0, 0, side / 2], [0, side, 0, side / 2], [0, 0, side, side / 2], [0, 0, 0, 1]]),
        )
        lattice.cover(domain)
        if n == 20:
            with torch.no_grad():
                lattice.levels[0].normal_(0, 0.25)
        flow = Flow(lattice)
        flow.cover(domain)
        voxels = domain.voxels()
        some = ((voxels > 0.15 * n) & (voxels < 0.85 * n)).all(1).nonzero()[:, 0]
        some = some[torch.randperm(len(some))[:800]]
        x = transform_points(domain.voxel_to_normalised, voxels.double()).float()
        with torch.no_grad():
            v = lattice(x) * domain.unit_mm / side
            u = (flow(x[some]) - x[some]) * domain.unit_mm
        squared = side * scaling_and_squaring(v.T.reshape(1, 3, n, n, n), 10)[0].reshape(3, -1).T[some]
        assert u.norm(dim=1).max() > 6, "mm"
        gaps.append(float((squared - u).norm(dim=1).mean()))
    assert gaps[1] < 0.05
    assert 2.5 < gaps[0] / gaps[1] < 5


# -- a diffeomorphism ---------------------------------------------------------------------------------------------


def test_flow_does_not_fold_where_the_displacement_does() -> None:
    field, x = wavy(4.0), points(500)
    flow = Flow(field)
    with torch.no_grad():
        direct = jets.det(field.jet(jets.seed(x, 1)).jacobian + torch.eye(3, dtype=torch.float64))
        det = jets.det(flow.jet(jets.seed(x, 1)).jacobian)
    assert float(direct.min()) < 0, "v as a displacement folds"
    assert float(det.min()) > 0.01
    assert flow.stepping() <= 0.5 and flow.count() > 2


def test_backward_flow_is_the_inverse() -> None:
    flow, x = Flow(wavy(0.6)), points(500)
    back = flow.backward()
    assert flow.count() == back.count()
    away = float((flow(x) - x).detach().norm(dim=1).max())
    assert away > 0.2
    for first, second in ((flow, back), (back, flow)):
        assert float((second(first(x)) - x).detach().norm(dim=1).max()) < 2e-4 * away
    j = flow.jet(jets.seed(x, 1)).jacobian @ back.jet(jets.seed(flow(x), 1)).jacobian
    assert_close(back.jet(flow.jet(jets.seed(x, 1))).jacobian, torch.eye(3).double().expand_as(j), 2e-3)


def test_auto_takes_as_many_steps_as_the_velocity_needs() -> None:
    norm = float(torch.linalg.matrix_norm(MATRIX, 2))
    for scale in (0.1, 1.0, 4.0):
        flow = Flow(Linear(scale))
        assert float(flow.lipschitz()) == pytest.approx(scale * norm, rel=1e-5)
        assert flow.count() == -(-scale * norm // 0.5)
        assert flow.check() <= 0.5


def test_too_few_steps_warn_once() -> None:
    flow = Flow(Linear(4.0), 2)
    with pytest.warns(RegistrationWarning, match=r"h Lip\(v\) < 1, found 1\.\d+ with 2 steps"):
        assert flow.check() > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.check()
        Flow(Linear(4.0), 8).check()


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match="steps: expected auto or a number of 1 or more, found 0"):
        Flow(Linear(), 0)
    with pytest.raises(UserError, match="scheme: expected one of"):
        Flow(Linear(), 1, "heun")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="from 3 to 3, found 4 to 3"):
        Flow(SIREN(4, 3, (8,)))


def test_flow_on_a_single_slice_stays_in_its_plane() -> None:
    domain = Domain.of((32, 1, 32), torch.diag(torch.tensor([2.0, 5, 2, 1])))
    flow = Flow(wavy(0.6).float())
    flow.cover(domain)
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    moved = Transform(flow, domain, torch.eye(4))(world)
    assert float((moved - world).norm(dim=1).max()) > 1
    assert float((moved - world)[:, 1].abs().max()) < 1e-4


# -- time ---------------------------------------------------------------------------------------------------------


def encoding(kind: str) -> TimeEncoding:
    time: TimeEncoding = {
        "phase": lambda: PhaseTime(2),
        "linear": lambda: LinearTime(2),
        "surrogate": lambda: SurrogateTime([0.0, 20, 40, 60, 80], [0.0, 2, 5, 4, 1]),
    }[kind]()
    time.set(10.0, 100.0, None if kind == "linear" else 100.0)
    return time


@pytest.mark.parametrize("kind", ["phase", "linear", "surrogate"])
@pytest.mark.parametrize("sees_time", [True, False])
def test_velocity_vanishes_at_the_reference_time_only(kind: str, sees_time: bool) -> None:
    velocity, x = timed(encoding(kind), sees_time), points()
    at = [velocity(x, torch.tensor([t], dtype=torch.float64)) for t in (10.0, 10.5, 35.0)]
    assert float(at[0].abs().max()) == 0
    assert 0 < float(at[1].abs().max()) < float(at[2].abs().max())
    # The body moves as it passes the reference: the velocity has a slope there.
    before, after = (velocity(x, torch.tensor([10.0 + s], dtype=torch.float64)) for s in (-0.01, 0.01))
    assert float(((after - before) / 0.02).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["phase", "surrogate"])
def test_time_on_a_circle_closes(kind: str) -> None:
    time = encoding(kind)
    velocity, x = timed(time), points()
    near, far = (velocity(x, torch.tensor([t], dtype=torch.float64)) for t in (99.999, 0.001))
    assert_close(near, far, 1e-3)
    assert_close(velocity(x, torch.tensor([30.0]).double()), velocity(x, torch.tensor([130.0]).double()), 1e-9)


def test_phase_and_rate_tell_inhaling_from_exhaling() -> None:
    def gap(time: TimeEncoding) -> float:
        time.set(0.0, 100.0, 100.0)
        inhale, exhale = (time(torch.tensor([t])) for t in (25.0, 75.0))
        return float((inhale - exhale).norm())

    times = [float(t) for t in range(0, 100, 10)]
    signal = (1 - torch.cos(torch.tensor(times) * 2 * torch.pi / 100)).tolist()
    assert gap(SurrogateTime(times, signal, rate=False)) < 1e-5
    assert gap(SurrogateTime(times, signal)) > 1
    assert gap(PhaseTime()) > 1


@pytest.mark.parametrize("sees_time", [True, False])
def test_jet_of_a_timed_velocity(sees_time: bool) -> None:
    velocity, x, t = timed(encoding("phase"), sees_time), points(10), torch.tensor([42.0], dtype=torch.float64)
    value, jacobian, hessian = references.derivatives(lambda p: velocity(p, t), x)
    found = velocity.jet(jets.seed(x, 2), t)
    assert_close(found.value, value)
    assert_close(found.jacobian, jacobian)
    assert found.second is not None
    assert_close(found.second[3], hessian[:, :, 0, 1])


def test_between_two_times() -> None:
    flow, x = Flow(timed(encoding("phase"))), points(200)
    s, t = torch.tensor([30.0]).double(), torch.tensor([70.0]).double()
    assert_close(between(flow, s, t)(flow(x, s)), flow(x, t), 1e-4)
    assert_close(At(flow, t)(x), flow(x, t))
    assert float((flow(x, torch.tensor([10.0]).double()) - x).abs().max()) == 0


def test_value_and_jacobian_of_a_transform_at_once() -> None:
    flow = Flow(timed(encoding("phase")).float())
    phi = FlowTransform(flow, pairs.CUBE, torch.tensor([60.0]))
    p = pairs.points()
    moved, jacobian, _ = phi.expand(p)
    assert_close(moved, phi(p), 1e-6)
    assert_close(jacobian, phi.jacobian(p), 1e-6)
    assert_close(phi.inverse(moved)[0], p, 1e-4)


def test_wrong_times() -> None:
    with pytest.raises(UserError, match=r"expected 12 outputs .* 3 or 7 inputs, found 3 and 4"):
        TimedVelocity(SIREN(4, 3, (8,)), PhaseTime(2))
    with pytest.raises(UserError, match="found no period; give LinearTime"):
        PhaseTime().set(0.0, 1.0, None)
    with pytest.raises(UserError, match="found a period of 100; give PhaseTime"):
        LinearTime().set(0.0, 1.0, 100.0)
    with pytest.raises(UserError, match="ascending times and values that change"):
        SurrogateTime([0.0, 1, 2], [1.0, 1, 1])
    with pytest.raises(UserError, match="within one period of 2"):
        SurrogateTime([0.0, 1, 2], [1.0, 0, 1]).set(0.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="expected one time as context, got None"):
        timed(encoding("phase"))(points(2))


# -- an image as a field ------------------------------------------------------------------------------------------


def test_jet_of_the_image_network() -> None:
    field = FourierSIREN(6, 0.5, hidden=(8, 8), omega=3.0, out_features=2).double()
    x = points(7)
    value, jacobian, hessian = references.derivatives(lambda p: field(p), x)
    found = field.jet(jets.seed(x, 2))
    assert_close(found.value, value)
    assert_close(found.jacobian, jacobian)
    assert found.second is not None
    assert_close(found.second[4], hessian[:, :, 0, 2])
