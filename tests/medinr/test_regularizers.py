"""Penalties: null spaces, known answers, laws, probes, units; a new regularizer adds one row to two tables."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from medinr import jets
from medinr.fields import SIREN, Map, as_map
from medinr.jets import Jet
from medinr.losses import (
    Barrier,
    Bending,
    Diffusion,
    ForwardDiffusion,
    Hyperelastic,
    Jacobian,
    OwnCoordinates,
    Regularizer,
    SymmetricJacobian,
    TotalVariation,
    regularizers,
)
from medinr.methods.mixins import RegularizerMixin
from medinr.space import REFERENCE_LENGTH_MM, Domain, transform_points
from tests.medinr.references import Function, analytic_jet
from tests.medinr.tolerances import assert_close

MATRIX = torch.tensor([[1.4, 0.2, -0.3], [0.1, 1.1, 0.25], [-0.2, 0.05, 1.3]], dtype=torch.float64)
UNIT_DET = MATRIX / torch.linalg.det(MATRIX) ** (1 / 3)
ROTATION = torch.linalg.qr(MATRIX)[0]
ROTATION = ROTATION * torch.linalg.det(ROTATION)


def points(n: int = 40) -> Tensor:
    return torch.rand(n, 3, dtype=torch.float64) * 2 - 1


def column(x: Tensor, i: int) -> Tensor:
    return x[:, i : i + 1]


# Displacements u(x) of the maps x + u(x), by name.
MAPS: dict[str, Function] = {
    "identity": lambda x: 0 * x,
    "translation": lambda x: 0 * x + torch.tensor([0.3, -0.2, 0.1], dtype=x.dtype),
    "rotation": lambda x: x @ ROTATION.T - x,
    "affine": lambda x: x @ MATRIX.T - x + 0.1,
    "affine of det 1": lambda x: x @ UNIT_DET.T - x + 0.1,
    "nonlinear of det 1": lambda x: torch.cat((torch.sin(2 * column(x, 1)), 0 * x[:, :1], column(x, 0) ** 2), 1),
    "expansion": lambda x: 0.5 * x,
    "shrinking to det 0.1": lambda x: (0.1 ** (1 / 3) - 1) * x,
    "folding": lambda x: torch.cat((-1.5 * column(x, 0), 0 * x[:, 1:]), 1),
    "quadratic": lambda x: torch.cat((column(x, 0) ** 2, 0 * x[:, 1:]), 1) / 4,
}


class Row(NamedTuple):
    """A regularizer, the maps on which it is zero, and maps on which it must not be."""

    make: Callable[[], Regularizer]
    zero: tuple[str, ...]
    positive: tuple[str, ...]


DET_ONE = ("identity", "translation", "rotation", "affine of det 1", "nonlinear of det 1")
NULL_SPACES: dict[str, Row] = {
    "bending": Row(
        lambda: Bending(1.0),
        ("identity", "translation", "rotation", "affine", "affine of det 1", "expansion", "folding"),
        ("quadratic", "nonlinear of det 1"),
    ),
    "jacobian": Row(lambda: Jacobian(1.0), DET_ONE, ("expansion", "affine", "folding")),
    "symmetric jacobian": Row(lambda: SymmetricJacobian(1.0), DET_ONE, ("expansion", "affine", "folding")),
    "symmetric jacobian, published": Row(
        lambda: SymmetricJacobian(1.0, published=True), DET_ONE, ("expansion", "affine", "folding")
    ),
    "in own coordinates": Row(lambda: OwnCoordinates(Jacobian(1.0)), DET_ONE, ("expansion", "affine", "folding")),
    "diffusion": Row(
        lambda: Diffusion(1.0), ("identity", "translation"), ("rotation", "affine of det 1", "expansion", "quadratic")
    ),
    "total variation": Row(
        lambda: TotalVariation(1.0),
        ("identity", "translation"),
        ("rotation", "affine of det 1", "expansion", "quadratic"),
    ),
    "hyperelastic": Row(
        lambda: Hyperelastic(1.0), ("identity", "translation"), ("rotation", "affine of det 1", "expansion", "folding")
    ),
    "hyperelastic, areas alone": Row(
        lambda: Hyperelastic(1.0, length=0.0, volume=0.0),
        ("identity", "rotation", "shrinking to det 0.1"),
        ("expansion",),
    ),
    "hyperelastic, volume alone": Row(
        lambda: Hyperelastic(1.0, length=0.0, area=0.0), DET_ONE, ("expansion", "affine", "folding")
    ),
    "barrier": Row(
        lambda: Barrier(1.0, eps=0.0999), (*DET_ONE, "expansion", "affine", "shrinking to det 0.1"), ("folding",)
    ),
}


@pytest.mark.parametrize(("name", "of"), [(n, m) for n, row in NULL_SPACES.items() for m in row.zero])
def test_null_space(name: str, of: str) -> None:
    value = NULL_SPACES[name].make()(analytic_jet(MAPS[of], points()))
    assert abs(float(value)) < 1e-10


@pytest.mark.parametrize(("name", "of"), [(n, m) for n, row in NULL_SPACES.items() for m in row.positive])
def test_outside_the_null_space(name: str, of: str) -> None:
    assert NULL_SPACES[name].make()(analytic_jet(MAPS[of], points())) > 1e-2


def test_every_regularizer_has_its_rows() -> None:
    """A new one adds itself to both tables; ForwardDiffusion has no value at a point (test_volume_method.py)."""
    all_of_them = set(Regularizer.__subclasses__()) - {ForwardDiffusion}
    assert {type(row.make()) for row in NULL_SPACES.values()} == all_of_them
    assert {type(make()) for make, _, _ in KNOWN.values()} == all_of_them


# With J = diag(1.5, 1.5, 1.5): det = 3.375, each cofactor column has length 2.25.
D = 3.375
KNOWN: dict[str, tuple[Callable[[], Regularizer], str, float]] = {
    "bending of x^2/4": (lambda: Bending(1.0), "quadratic", 0.25),
    "bending of a shear": (lambda: Bending(1.0), "nonlinear of det 1", math.nan),
    "jacobian": (lambda: Jacobian(1.0), "expansion", D - 1),
    "in own coordinates": (lambda: OwnCoordinates(Jacobian(1.0)), "expansion", D - 1),
    "jacobian of a fold": (lambda: Jacobian(1.0), "folding", 1.5),
    "symmetric jacobian": (lambda: SymmetricJacobian(1.0), "expansion", (D - 1) + (1 / D - 1)),
    "symmetric jacobian of a fold": (
        lambda: SymmetricJacobian(1.0, eps=0.1),
        "folding",
        0.9**2 / 0.1 + (1 - 100) * (-0.5 - 0.1),
    ),
    "published: clipped": (lambda: SymmetricJacobian(1.0, published=True), "folding", 0.9**2 / 0.1),
    "diffusion": (lambda: Diffusion(1.0), "expansion", 0.75),
    "total variation": (lambda: TotalVariation(1.0, eps=0.5), "expansion", 0.5),  # sqrt(3/4 + 1/4) - 1/2
    "hyperelastic": (
        lambda: Hyperelastic(1.0, length=2.0, area=0.5, volume=3.0),
        "expansion",
        2 * 0.75 / 2 + 0.5 * 3 * (2.25**2 - 1) ** 2 + 3 * (D - 1) ** 4 / D**2,
    ),
    "barrier": (lambda: Barrier(1.0, eps=0.2), "folding", 0.7),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_answer(name: str) -> None:
    make, of, want = KNOWN[name]
    x = points()
    if math.isnan(want):  # u = (sin 2y, 0, x^2): |H|^2 = 16 sin^2 2y + 4
        want = float((16 * torch.sin(2 * x[:, 1]) ** 2 + 4).mean())
    assert_close(make()(analytic_jet(MAPS[of], x)), torch.tensor(want, dtype=torch.float64))


def test_bending_of_x_squared_is_4() -> None:
    square: Function = lambda x: torch.cat((column(x, 0) ** 2, 0 * x[:, 1:]), 1)  # noqa: E731
    assert_close(Bending(1.0)(analytic_jet(square, points())), torch.tensor(4.0, dtype=torch.float64))


def test_mixed_derivatives_count_twice() -> None:
    """u = xy: H = [[0, 1], [1, 0]], |H|_F^2 = 2; and the energy does not depend on the axes chosen."""
    mixed: Function = lambda x: torch.cat((column(x, 0) * column(x, 1), 0 * x[:, 1:]), 1)  # noqa: E731
    assert_close(Bending(1.0)(analytic_jet(mixed, points())), torch.tensor(2.0, dtype=torch.float64))
    x = points()
    turned: Function = lambda y: mixed(y @ ROTATION.T)  # noqa: E731
    assert_close(Bending(1.0)(analytic_jet(turned, x)), torch.tensor(2.0, dtype=torch.float64))


def test_jacobian_of_an_affine_map_is_exact() -> None:
    u = analytic_jet(MAPS["affine"], points())
    assert_close(regularizers.deformation_gradient(u), MATRIX.expand(40, 3, 3))
    assert_close(regularizers.volume_change(u), torch.linalg.det(MATRIX).expand(40))


def siren_jet(seed: Jet, factor: float = 1.0) -> Jet:
    torch.manual_seed(3)
    field = SIREN(hidden=(16, 16), omega=3.0, zero_output=False).double()
    jet = field.jet(seed)
    return Jet(factor * jet.channels, jet.k, jet.pairs, jet.basis)


@pytest.mark.parametrize("penalty", [regularizers.bending, regularizers.diffusion])
def test_quadratic_penalties_scale_with_the_square(penalty: Callable[[Jet], Tensor]) -> None:
    seed = jets.seed(points(), 2)
    assert_close(penalty(siren_jet(seed, 3.0)), 9 * penalty(siren_jet(seed)))


def test_symmetric_jacobian_is_the_same_for_map_and_inverse() -> None:
    """Mean over the moved points, weighted by the change of volume: here for one affine map and its inverse."""
    forward = SymmetricJacobian(1.0)(analytic_jet(MAPS["affine"], points()))
    backward: Function = lambda x: x @ torch.linalg.inv(MATRIX).T - x  # noqa: E731
    assert_close(SymmetricJacobian(1.0)(analytic_jet(backward, points())), forward)


@pytest.mark.parametrize("name", NULL_SPACES)
def test_gradient_of_every_penalty(name: str) -> None:
    """gradcheck on the channels of a curved jet; determinants on both sides of every threshold."""
    jet = siren_jet(jets.seed(points(12), 2), 5.0)
    assert regularizers.volume_change(jet).min() < 0 < regularizers.volume_change(jet).max()
    penalty = NULL_SPACES[name].make()
    channels = jet.channels.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: penalty(Jet(c, jet.k, jet.pairs)), (channels,))


def stretched(d: Tensor) -> Jet:
    """The jet of x -> diag(d, 1, 1) x for determinants d [N]."""
    first = torch.zeros(3, len(d), 3, dtype=d.dtype)
    first[0, :, 0] = 1
    value = torch.zeros(len(d), 3, dtype=d.dtype)
    return Jet.of(value, first * (d - 1)[:, None])


CONTINUED: Mapping[str, Callable[[float], Regularizer]] = {
    "symmetric jacobian": lambda eps: SymmetricJacobian(1.0, eps=eps),
    "hyperelastic volume": lambda eps: Hyperelastic(1.0, length=0.0, area=0.0, eps=eps),
}


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("name", CONTINUED)
class TestContinuation:
    """Where the determinant's pole begins, the penalty goes on with the same value and the same slope."""

    def at(self, name: str, eps: float, d: float) -> tuple[float, float]:
        determinant = torch.tensor([d], dtype=torch.float64, requires_grad=True)
        value = CONTINUED[name](eps)(stretched(determinant))
        return value.item(), torch.autograd.grad(value, determinant)[0].item()

    def test_value_and_slope_are_continuous(self, name: str, eps: float) -> None:
        h = 1e-7
        below, above = self.at(name, eps, eps - h)[0], self.at(name, eps, eps + h)[0]
        centre, slope = self.at(name, eps, eps + h)
        scale = abs(slope)
        assert abs(above - below) < 4 * h * scale
        differences = [
            (self.at(name, eps, eps + s + h)[0] - self.at(name, eps, eps + s - h)[0]) / (2 * h) for s in (-1e-4, 1e-4)
        ]
        assert abs(differences[0] - differences[1]) < 1e-4 / eps * 10 * scale
        assert centre > 0

    def test_gradient_always_unfolds(self, name: str, eps: float) -> None:
        for d in (-3.0, -1.0, -eps, 0.0, eps / 2, eps, 0.9):
            value, slope = self.at(name, eps, d)
            assert slope < 0, f"det {d}: the penalty must fall as the determinant rises"
            assert value > self.at(name, eps, 1.0)[0]


def test_the_published_symmetric_jacobian_has_no_gradient_at_folds() -> None:
    d = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    SymmetricJacobian(1.0, published=True)(stretched(d)).backward()
    assert d.grad is not None and float(d.grad) == 0


def test_total_variation_does_not_mind_how_steep_a_step_is() -> None:
    """tanh(x / w), w = 1/5 and 1/20: the diffusion quadruples, the total variation stays the height of the step."""
    x = torch.zeros(4001, 3, dtype=torch.float64)
    x[:, 0] = torch.linspace(-1, 1, 4001)
    found = {}
    for width in (0.2, 0.05):
        jet = analytic_jet(lambda p, w=width: torch.tanh(p[:, :1] / w).expand(-1, 3) / 3**0.5, x, 1)
        found[width] = [float(Diffusion(1.0)(jet)), float(TotalVariation(1.0, eps=1e-4)(jet))]
    assert found[0.05][0] / found[0.2][0] == pytest.approx(4, rel=0.02)
    assert found[0.05][1] == pytest.approx(1, rel=0.01)  # the mean over a length of 2
    assert found[0.2][1] == pytest.approx(1, rel=0.01)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("cls", [Bending, Diffusion])
def test_probes_are_unbiased(cls: type[Bending] | type[Diffusion]) -> None:
    """The mean over draws within 3 standard errors of the exact value, and the error small enough to mean something."""
    x = points(50)
    exact = cls(1.0)(siren_jet(jets.seed(x, 2))).item()
    penalty = cls(1.0, directions="probes")
    draws = torch.stack([penalty(siren_jet(jets.probe(x, generator(s)))).detach() for s in range(400)])
    error = float(draws.std()) / len(draws) ** 0.5
    assert error < 0.02 * exact
    assert abs(float(draws.mean()) - exact) < 3 * error


@pytest.mark.parametrize("cls", [Jacobian, Hyperelastic, SymmetricJacobian, Barrier, TotalVariation])
def test_probes_on_a_determinant_are_an_error(cls: type[Regularizer]) -> None:
    with pytest.raises((ValueError, TypeError)):
        cls(1.0, directions="probes")
    with pytest.raises(ValueError, match="full basis"):
        cls(1.0)(siren_jet(jets.probe(points())))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="unbiased only for quadratic"):
        Jacobian(1.0, directions="probes")
    for fraction in (0.0, -0.1, 1.01):
        with pytest.raises(ValueError, match="share of the points"):
            Bending(1.0, fraction=fraction)
    with pytest.raises(ValueError, match="eps: expected a strain above 0"):
        TotalVariation(1.0, eps=0.0)
    with pytest.raises(ValueError, match="no second derivatives"):
        Bending(1.0)(siren_jet(jets.seed(points(), 1)))
    with pytest.raises(ValueError, match="no first derivatives"):
        Diffusion(1.0)(siren_jet(jets.seed(points(), 0)))


# --------------------------------------------------------------------------------------- units and the share of points


class Host(RegularizerMixin):
    """What the mixin needs of a method, and nothing else."""

    def __init__(self, field: Map, domain: Domain) -> None:
        self.map, self.domain, self.penalties = field, domain, {}

    @property
    def motion(self) -> Map:
        return self.map


class WorldField(Map):
    """A displacement given in world millimetres, as a map of a domain's normalised coordinates."""

    def __init__(self, domain: Domain) -> None:
        super().__init__()
        self.domain = domain

    def displacement(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """u = M p-dependent waves of 5 mm, 60 to 90 mm long, and a stretch."""
        p = transform_points(self.domain.normalised_to_world, x)
        moved = 5 * torch.sin(p.flip(-1) / torch.tensor([9.0, 12.0, 14.0], dtype=x.dtype)) + 0.1 * p
        back: Tensor = moved @ self.domain.world_to_normalised[:3, :3].to(x).T
        return back

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x + self.displacement(x)


AFFINE = torch.diag(torch.tensor([-0.8, 0.8, 2.5, 1.0], dtype=torch.float64))
GRIDS = {
    "scan": Domain.of((128, 128, 48), AFFINE),
    "half resolution": Domain.of((64, 64, 24), AFFINE @ torch.diag(torch.tensor([2.0, 2, 2, 1]).double())),
    "crop": Domain.of((50, 60, 20), AFFINE),
    "another crop": Domain.of((40, 128, 30), AFFINE),
}


def shifted(domain: Domain, to: tuple[float, float, float]) -> Domain:
    matrix = domain.voxel_to_world.clone()
    matrix[:3, 3] = torch.tensor(to, dtype=torch.float64)
    return Domain.of(domain.shape, matrix)


@pytest.mark.filterwarnings("ignore:WorldField has no jet rule")
@pytest.mark.parametrize("name", NULL_SPACES)
def test_penalties_do_not_depend_on_resolution_or_crop(name: str) -> None:
    """The same points of the same field in mm: the same raw penalty, whatever grid normalises them."""
    penalty = NULL_SPACES[name].make()
    world = torch.rand(30, 3, dtype=torch.float64) * 30
    found = []
    for grid in GRIDS.values():
        domain = shifted(grid, (45.0, -3.0, -5.0))
        x = transform_points(domain.world_to_normalised, world)
        host = Host(WorldField(domain), domain)
        u = host.map.displacement_jet(jets.seed(x, penalty.order))
        found.append(host.penalty(penalty, x, u))
    assert len({round(shifted(g, (0, 0, 0)).unit_mm, 6) for g in GRIDS.values()}) >= 3
    for value in found[1:]:
        assert_close(value, found[0], 1e-9)
    if name == "bending":  # and in mm^-2 the value is that of the field itself
        s = torch.tensor([9.0, 12.0, 14.0], dtype=torch.float64)
        in_mm = (25 / s**4 * torch.sin(world.flip(-1) / s) ** 2).sum(-1).mean()
        assert_close(found[0], in_mm * REFERENCE_LENGTH_MM**2, 1e-9)


def test_a_share_of_the_points() -> None:
    """``fraction`` looks at the first points of the batch, which are random; probes draw at that share alone."""
    field = as_map(SIREN(hidden=(16,), omega=3.0, zero_output=False)).double()
    host = Host(field, GRIDS["scan"])
    x = points(40)
    part = host.penalty(Bending(1.0, fraction=0.25), x, field.displacement_jet(jets.seed(x, 1)))
    whole = host.penalty(Bending(1.0), x[:10], field.displacement_jet(jets.seed(x[:10], 2)))
    assert_close(part, whole)
    shared = host.penalty(Jacobian(1.0, fraction=0.25), x, field.displacement_jet(jets.seed(x, 2)))
    assert_close(shared, host.penalty(Jacobian(1.0), x[:10], field.displacement_jet(jets.seed(x[:10], 1))))
    probes = torch.stack(
        [
            host.penalty(Bending(1.0, fraction=0.25, directions="probes"), x, field.displacement_jet(jets.seed(x, 0)))
            for _ in range(300)
        ]
    ).detach()
    assert abs(float(probes.mean() - whole.detach())) < 3 * float(probes.std()) / 300**0.5
