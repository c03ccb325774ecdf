"""Splines whose control points ask a network: the law of the spline, sharing within a step, grids, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medinr import jets
from medinr.commands.register import fit
from medinr.fields import MLP, SINR, SIREN, CubicLattice, HarmonizedSIREN, Sum, as_map, base, computed_once
from medinr.losses import NCC, Barrier, Bending, LocalNCC
from medinr.methods import ConditionedRegistration, PairRegistration, load_method
from tests.medinr import grids, pairs
from tests.medinr.tolerances import assert_close


class Counted(SIREN):
    """Counts the points that it is asked for."""

    def __init__(self, zero_output: bool = False) -> None:
        super().__init__(hidden=(16, 16), omega=4.0, zero_output=zero_output)
        self.asked = 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.asked += len(x)
        return super().forward(x, context)


class Affine(MLP):
    """x -> Mx + t."""

    def __init__(self, matrix: Tensor, shift: Tensor) -> None:
        super().__init__(hidden=(4,))
        self.matrix, self.shift = nn.Parameter(matrix), nn.Parameter(shift)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x @ self.matrix.T + self.shift


def sinr(kind: str = "oblique", network: Any = None, spacing: float = 6.0, unit: Any = "mm") -> SINR:
    field = SINR(network or Counted(), spacing, unit)
    field.cover(grids.domain(kind))
    return field


def inside(n: int, field: SINR) -> Tensor:
    """Points of the image's box."""
    high = field.origin + field.spacing[0] * (torch.tensor(field.shapes[0]) - 3)
    return (field.origin + torch.rand(n, 3) * (high - field.origin)).double()


# -- the spline ----------------------------------------------------------------------------------------------------


def test_it_is_the_lattice_of_the_networks_values() -> None:
    field = sinr().double()
    twin = CubicLattice((6.0,))
    twin.cover(grids.domain("oblique"))
    twin.double()
    assert twin.shapes == field.shapes
    with torch.no_grad():
        twin.levels[0].copy_(field.network(field.control_points()))
    seed = jets.seed(inside(30, field), 2)
    assert_close(field.jet(seed).channels, twin.jet(seed).channels)


def test_a_spline_reproduces_affine_maps() -> None:
    """Cubic B-splines have linear precision: an affine network gives that map itself, without curvature."""
    matrix, shift = torch.randn(3, 3).double(), torch.randn(3).double()
    field = sinr(network=Affine(matrix, shift)).double()
    x = inside(40, field)
    u = field.jet(jets.seed(x, 2))
    assert_close(u.value, x @ matrix.T + shift, 1e-5)  # the control points' places are float32
    assert_close(u.jacobian, matrix.expand(40, 3, 3), 1e-5)
    assert u.second is not None and float(u.second.detach().abs().max()) < 1e-5


def test_the_spline_converges_to_the_network() -> None:
    """A spline quasi-interpolant errs with the second power of the spacing."""
    network = SIREN(hidden=(16,), omega=2.0, zero_output=False).double()
    errors = []
    for spacing in (8.0, 4.0, 2.0):
        field = sinr("flipped", network, spacing).double()
        x = inside(200, field) * 0.7
        errors.append(float((field(x) - network(x)).detach().abs().max()))
    assert 3 < errors[0] / errors[1] < 5 and 3 < errors[1] / errors[2] < 5, errors


def test_zero_networks_are_the_identity_and_values_scale() -> None:
    assert not sinr(network=SIREN(hidden=(8,)))(torch.rand(5, 3)).any()
    field = sinr().double()
    x = inside(9, field)
    before = field.jet(jets.seed(x, 2)).channels
    with torch.no_grad():
        field.network.head.weight.mul_(3)
        field.network.head.bias.mul_(3)
    assert_close(field.jet(jets.seed(x, 2)).channels, 3 * before)


def test_constant_beyond_the_box() -> None:
    field = sinr("flipped").double()
    edge = inside(6, field)
    edge[:, 0] = (field.origin[0] + field.spacing[0] * (field.shapes[0][0] - 3)).double()
    beyond = edge + torch.tensor([0.7, 0, 0]).double()
    assert_close(field(beyond), field(edge), 2e-3)
    u = field.jet(jets.seed(beyond, 1))
    assert not u.jacobian[:, :, 0].any() and u.jacobian[:, :, 1].any()


@pytest.mark.parametrize("unit", ["mm", "voxel"])
def test_lengths_and_another_domain(unit: Any) -> None:
    field = sinr("flipped", spacing=3.0, unit=unit)
    domain = grids.domain("flipped")
    side = 1.0 if unit == "mm" else 4.5 ** (1 / 3)
    assert_close(field.spacing * domain.unit_mm, torch.tensor([3.0 * side]))
    points = field.control_points()
    assert len(points) == torch.tensor(field.shapes[0]).prod()
    assert_close(points[0], field.origin - field.spacing[0])
    weights = {name: value.clone() for name, value in field.network.state_dict().items()}
    small = grids.domain("flipped", (9, 9, 5))
    field.cover(small)
    assert len(field.control_points()) < len(points)
    for name, value in field.network.state_dict().items():
        assert torch.equal(value, weights[name]), "the network knows nothing of the grid"
    assert field(torch.zeros(2, 3)).shape == (2, 3)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="SINR: call cover"):
        SINR(SIREN(hidden=(8,)))(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="network: expected a field of displacements, got the map DisplacementMap"):
        SINR(as_map(SIREN(hidden=(8,))))
    with pytest.raises(ValueError, match="network: expected a field of 3 coordinates, got 4"):
        SINR(SIREN(in_features=4, hidden=(8,)))
    with pytest.raises(ValueError, match="spacings: expected lengths above 0"):
        SINR(SIREN(hidden=(8,)), 0.0)


# -- on grids ------------------------------------------------------------------------------------------------------

LINES = [torch.linspace(a, b, n).double() for a, b, n in ((-1.4, 0.9, 7), (-0.5, 1.5, 6), (-1.0, 0.4, 5))]
POINTS = torch.cartesian_prod(*LINES)


def conditioned() -> HarmonizedSIREN:
    network = HarmonizedSIREN(hidden=(16, 16), omega=4.0, zero_output=False)
    nn.init.normal_(network.harmonizer.out.weight, std=0.3)
    return network


@pytest.mark.parametrize("kind", ["oblique", "flipped"])
def test_the_field_on_a_grid_is_the_field_at_its_points(kind: str) -> None:
    """Values and gradients; splines, sums, and fields that are asked at every point."""
    alpha = torch.tensor([0.3]).double()
    driven = sinr(kind, conditioned()).double()
    for field in (driven, SIREN(hidden=(8,), zero_output=False).double(), Sum(Counted(), driven).double()):
        found = as_map(field).displacement_on_grid(LINES, alpha)
        assert found.shape == (7, 6, 5, 3)
        want = field(POINTS, alpha).view_as(found)
        assert_close(found, want, 1e-6)
        weight = torch.randn_like(found)
        a, b = (torch.autograd.grad((u * weight).sum(), list(field.parameters())) for u in (found, want))
        for one, other in zip(a, b, strict=True):
            assert_close(one, other, 1e-6)
    other = driven.on_grid(LINES, context=torch.tensor([0.9]).double())
    assert float((other - driven.on_grid(LINES, context=alpha)).detach().abs().max()) > 1e-3


# -- computed once -------------------------------------------------------------------------------------------------


def test_a_step_asks_the_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data term, a penalty of second order and all pieces of both share one evaluation; gradients are the same."""
    monkeypatch.setattr(base, "CPU_CHUNK", 7)
    field = sinr().double()
    network, n = field.network, len(field.control_points())
    assert isinstance(network, Counted)
    whole, x = as_map(field), inside(20, field)

    def loss() -> Tensor:
        value = whole.displacement_jet(jets.seed(x, 1)).channels.square().sum()
        return value + whole.displacement_jet(jets.seed(x[:9], 2)).channels.square().sum() + field(x).sum()

    network.asked = 0
    apart = torch.autograd.grad(loss(), list(field.parameters()))
    assert network.asked == 3 * n, "once for each call, not for each piece"
    network.asked = 0
    with computed_once(whole):
        together = torch.autograd.grad(loss(), list(field.parameters()))
        with computed_once(field):
            field(x)
    assert network.asked == n
    for one, other in zip(apart, together, strict=True):
        assert_close(one, other)


def test_nothing_outlives_the_block() -> None:
    field = sinr().double()
    x = inside(5, field)
    for fails in (False, True):
        with torch.no_grad():
            field.network.head.bias.add_(1.0)
        try:
            with computed_once(field):
                before = field(x)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        with torch.no_grad():
            field.network.head.bias.add_(1.0)
        assert_close(field(x), before + 1)
        assert field._shared is None


def test_conditions_and_gradients_are_told_apart() -> None:
    field = sinr(network=conditioned()).double()
    x, one, other = inside(5, field), torch.tensor([0.1]).double(), torch.tensor([0.8]).double()
    want = [field(x, one), field(x, other)]
    with computed_once(field):
        with torch.no_grad():
            assert not field(x, one).requires_grad
        assert_close(field(x, one), want[0])
        assert field(x, one).requires_grad
        assert_close(field(x, other), want[1])
        for value in (0.1, 0.8):  # tensors that live no longer: their places in memory are used again
            assert_close(field(x, torch.tensor([value]).double()), want[value == 0.8])


# -- in the methods ------------------------------------------------------------------------------------------------


def test_a_known_deformation_is_found_and_kept(tmp_path: Path) -> None:
    """5.2 mm to begin with, by random points; the checkpoint holds the same transform, with its domain."""
    torch.manual_seed(0)
    network = Counted(zero_output=True)
    options: dict[str, Any] = {"pyramid_mm": (8.0, 4.0), "lr": 1e-2, "points": 256, "warmup": 0.05, "cosine": True}
    penalties = {"bending": Bending(1e-3, fraction=0.1), "barrier": Barrier(1.0)}
    method = PairRegistration(SINR(network, 12.0), LocalNCC(), penalties, **options)
    network.asked = 0
    fit(method, pairs.pair(), 60)
    field = method.map.field
    assert network.asked == 60 * len(field.control_points()), "each step asks the network once"
    error = (method.transform()(pairs.points()) - pairs.warp(pairs.points())).norm(dim=1).mean()
    assert error < 1.5, error
    method.save(tmp_path / "method.ckpt")
    again = load_method(tmp_path / "method.ckpt")
    points = pairs.points()
    assert_close(again.transform()(points), method.transform()(points), 1e-12)
    assert_close(again.transform().jacobian(points), method.transform().jacobian(points), 1e-12)


def test_conditioned_registration() -> None:
    torch.manual_seed(0)
    field = SINR(HarmonizedSIREN(1, hidden=(16, 16), omega=4.0), 16.0)
    method = ConditionedRegistration(
        field, NCC(), {"bending": Bending(1.0)}, ["bending"], points=128, search_points=64, grid=3, lr=1e-2
    )
    fit(method, pairs.pair(), 12)
    smooth, free = (method.at([a]).transform()(pairs.points()) for a in (1.0, 0.0))
    assert float((smooth - free).norm(dim=1).mean()) > 1e-3
    with pytest.raises(ValueError, match=r"field.conditions: expected 1.*found 0 \(SIREN\)"):
        ConditionedRegistration(SIREN(hidden=(8,)), NCC(), {"bending": Bending(1.0)}, ["bending"])


def test_a_transform_asks_the_network_once_for_all_newton_steps() -> None:
    network = Counted()
    with torch.no_grad():
        network.head.weight.mul_(0.1)
    method = PairRegistration(SINR(network, 16.0), NCC())
    method.remember(pairs.CUBE, torch.eye(4), [[0.0, 1.0], [0.0, 1.0]])
    phi, n = method.transform(), len(method.map.field.control_points())
    for ask in (phi, phi.jacobian, phi.inverse):
        network.asked = 0
        ask(pairs.points())
        assert network.asked == n
    again, residual = phi.inverse(phi(pairs.points()))
    assert float(residual.max()) < 1e-3
    assert_close(again, pairs.points(), 1e-4)
