"""Fields, maps and the whole transform: jets against torch.func, the harmonizer, the inverse."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medinr import jets
from medinr.fields import (
    MLP,
    SINR,
    SIREN,
    Composed,
    Composition,
    CubicLattice,
    DisplacementMap,
    Field,
    FourierMLP,
    HarmonizedSIREN,
    Map,
    Sum,
    Transform,
    as_map,
    base,
)
from medinr.jets import Jet
from medinr.space import Domain, transform_points
from tests.medinr.references import along
from tests.medinr.tolerances import assert_close

N = 9
CONDITION = torch.tensor([0.3], dtype=torch.float64)
SEEDS: dict[str, Callable[[Tensor], Jet]] = {"basis": lambda x: jets.seed(x, 2), "probes": lambda x: jets.probe(x)}


def points(n: int = N) -> Tensor:
    return torch.rand(n, 3, dtype=torch.float64) * 2 - 1


def harmonized() -> HarmonizedSIREN:
    field = HarmonizedSIREN(hidden=(16, 16, 16), omega=4.0, zero_output=False)
    torch.nn.init.normal_(field.harmonizer.out.weight, std=0.1)
    torch.nn.init.normal_(field.harmonizer.out.bias, std=0.2)
    return field


class NoRule(Field):
    """What a user writes without knowing of jets."""

    in_features = out_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.sin(x @ self.weight) * x.flip(-1)


def lattice(**options: object) -> CubicLattice:
    """Two levels, with random coefficients."""
    field = CubicLattice(**{"spacings": (12.0, 5.0), **options})  # type: ignore[arg-type]
    field.cover(BOX)
    for level in field.levels:
        torch.nn.init.normal_(level, std=0.1)
    return field


BOX = Domain.of((20, 15, 10), torch.diag(torch.tensor([2.0, -2.0, 2.0, 1.0])))
"""40 x 30 x 20 mm."""


def sinr(network: Field, spacing: float = 9.0, unit: Any = "mm") -> SINR:
    field = SINR(network, spacing, unit)
    field.cover(BOX)
    return field


def mlp(**options: object) -> MLP:
    return MLP(**{"hidden": (16, 16), "zero_output": False, **options})  # type: ignore[arg-type]


def siren(**options: object) -> SIREN:
    return SIREN(**{"hidden": (16, 16), "omega": 4.0, "zero_output": False, **options})  # type: ignore[arg-type]


FIELDS: dict[str, Callable[[], tuple[Field, Tensor | None]]] = {
    "siren": lambda: (siren(), None),
    "siren of one hidden layer": lambda: (siren(hidden=(8,), out_features=2), None),
    "siren of its own first omega": lambda: (siren(first_omega=9.0), None),
    "harmonized siren": lambda: (harmonized(), CONDITION),
    "relu perceptron": lambda: (mlp(), None),
    "tanh perceptron": lambda: (mlp(activation="tanh"), None),
    "softplus perceptron": lambda: (mlp(activation="softplus"), None),
    "fourier perceptron": lambda: (FourierMLP(8, 0.5, hidden=(16,), activation="tanh", zero_output=False), None),
    "cubic lattice": lambda: (lattice(), None),
    "cubic lattice with a gain": lambda: (lattice(gain=0.3, out_features=2), None),
    "spline driven by a siren": lambda: (sinr(siren()), None),
    "spline driven by a perceptron, in voxels": lambda: (sinr(mlp(out_features=2), 4.0, "voxel"), None),
    "spline driven by a harmonized siren": lambda: (sinr(harmonized()), CONDITION),
    "sum of a network and a driven spline": lambda: (Sum(siren(), sinr(harmonized())), CONDITION),
    "sum": lambda: (Sum(siren(), lattice()), None),
    "network, then lattice": lambda: (Composition(siren(), lattice()), None),
    "lattice before a lattice": lambda: (Composed(lattice(), lattice(gain=0.5)), None),
    "lattice before a network with a condition": lambda: (Composed(lattice(), harmonized()), CONDITION),
    "no rule": lambda: (NoRule(), None),
    "displacement map": lambda: (DisplacementMap(siren()), None),
    "composition": lambda: (Composition(as_map(siren()), as_map(siren())), None),
    "composition with a condition": lambda: (Composition(as_map(siren()), as_map(harmonized())), CONDITION),
}


@pytest.fixture(params=FIELDS)
def case(request: pytest.FixtureRequest) -> tuple[Field, Tensor | None]:
    base._told.add(NoRule)
    field, context = FIELDS[request.param]()
    return field.double(), context


@pytest.mark.parametrize("directions", SEEDS)
def test_jet_against_torch_func(case: tuple[Field, Tensor | None], directions: str) -> None:
    field, context = case
    seed = SEEDS[directions](points())
    out = field.jet(seed, context)
    assert seed.first is not None
    want = along(lambda x: field(x, context), seed.value, seed.first, seed.pairs)
    for found, expected in zip((out.value, out.first, out.second), want, strict=True):
        assert found is not None
        assert_close(found, expected)


def test_first_order_and_value_alone(case: tuple[Field, Tensor | None]) -> None:
    field, context = case
    x = points()
    whole = field.jet(jets.seed(x, 2), context).channels
    assert_close(field.jet(jets.seed(x, 1), context).channels, whole[:4])
    assert_close(field.jet(jets.seed(x, 0), context).channels, field(x, context)[None])


@pytest.mark.parametrize("directions", SEEDS)
def test_gradient_against_torch_func(case: tuple[Field, Tensor | None], directions: str) -> None:
    """Gradient of a loss of all channels with respect to every parameter."""
    field, context = case
    seed = SEEDS[directions](points(5))
    assert seed.first is not None
    mix = torch.randn(1 + seed.k + len(seed.pairs), 1, 1, dtype=torch.float64)

    def loss(channels: Tensor) -> Tensor:
        return (mix * channels).sum() + (channels**2).mean()

    parameters = list(field.parameters())
    got = torch.autograd.grad(loss(field.jet(seed, context).channels), parameters)
    value, first, second = along(lambda x: field(x, context), seed.value, seed.first, seed.pairs)
    want = torch.autograd.grad(loss(torch.cat((value[None], first, second))), parameters)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)


def test_gradient_of_a_map_fed_by_a_jet_that_needs_one() -> None:
    """In a composition the outer map hands a gradient to the inner one; float64, against torch.func."""
    inner, outer = as_map(siren()).double(), as_map(siren()).double()
    seed = jets.seed(points(5), 2)
    got = torch.autograd.grad(outer.jet(inner.jet(seed)).channels.pow(2).sum(), list(inner.parameters()))
    assert seed.first is not None
    value, first, second = along(lambda x: outer(inner(x)), seed.value, seed.first, seed.pairs)
    want = torch.autograd.grad(torch.cat((value[None], first, second)).pow(2).sum(), list(inner.parameters()))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)


@pytest.mark.parametrize("directions", SEEDS)
def test_chunked_map_is_the_whole(directions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels and gradients, when the points are evaluated in pieces that do not divide their number."""
    field = as_map(siren()).double()
    seed = SEEDS[directions](points(10))
    found = []
    for size in (10, 4):
        monkeypatch.setattr(base, "CPU_CHUNK", size)
        out = field.displacement_jet(seed).channels
        found.append([out, *torch.autograd.grad(out.pow(2).sum(), list(field.parameters()))])
    for whole, pieces in zip(*found, strict=True):
        assert_close(pieces, whole)


def test_repeated_evaluation_leaves_earlier_results_alone() -> None:
    """No buffer of one call is written by the next: two jets, then both backward passes, equal each on its own."""
    field = as_map(siren()).double()
    seeds = [jets.seed(points(), 2), jets.seed(points(), 2)]
    alone = [
        torch.autograd.grad(field.displacement_jet(s).channels.pow(2).sum(), list(field.parameters())) for s in seeds
    ]
    outs = [field.displacement_jet(s).channels for s in seeds]
    kept = [o.detach().clone() for o in outs]
    together = [torch.autograd.grad(o.pow(2).sum(), list(field.parameters())) for o in reversed(outs)]
    for o, k in zip(outs, kept, strict=True):
        assert torch.equal(o, k)
    for one, other in zip(alone, reversed(together), strict=True):
        for a, b in zip(one, other, strict=True):
            assert_close(b, a)


def test_no_gradient_is_kept_where_none_is_wanted() -> None:
    field = as_map(siren())
    with torch.no_grad():
        out = field.displacement_jet(jets.seed(points().float(), 2))
    assert not out.channels.requires_grad
    frozen = as_map(siren()).requires_grad_(False)
    assert not frozen.displacement_jet(jets.seed(points().float(), 2)).channels.requires_grad


def test_single_precision_agrees_with_double() -> None:
    field = as_map(siren())
    x = points()
    single = field.displacement_jet(jets.seed(x.float(), 2)).channels
    assert_close(single, field.double().displacement_jet(jets.seed(x.float().double(), 2)).channels)


def test_field_without_rule_says_so_once() -> None:
    base._told.discard(NoRule)
    field = NoRule()
    with pytest.warns(UserWarning, match="NoRule has no jet rule"):
        field.jet(jets.seed(points().float(), 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        field.jet(jets.seed(points().float(), 1))


def largest(layer: torch.nn.Module) -> float:
    return max(float(w.detach().abs().max()) for name, w in layer.named_parameters() if name == "weight")


def test_siren_is_its_equation() -> None:
    """h = sin(omega (W h + b)), with the weights' bounds of Sitzmann et al."""
    field = siren(hidden=(32, 32), omega=7.0, first_omega=3.0).double()
    x = points()
    h = x
    for omega, layer in zip((3.0, 7.0), field.layers, strict=True):
        assert isinstance(layer, torch.nn.Linear)
        h = torch.sin(omega * F.linear(h, layer.weight, layer.bias))
    assert_close(field(x), h @ field.head.weight.T + field.head.bias)
    assert 0.8 / 3 < largest(field.layers[0]) <= 1 / 3
    bound = math.sqrt(6 / 32) / 7
    assert 0.9 * bound < largest(field.layers[1]) <= bound


def test_zero_output_is_the_identity() -> None:
    field = as_map(SIREN(hidden=(16, 16)))
    x = points().float()
    assert torch.equal(field(x), x)
    assert not torch.equal(as_map(siren())(x), x)


def test_harmonized_siren_starts_as_a_siren() -> None:
    plain = siren(hidden=(16, 16, 16))
    field = HarmonizedSIREN(hidden=(16, 16, 16), omega=4.0, zero_output=False)
    field.load_state_dict(plain.state_dict(), strict=False)
    x = points().float()
    for alpha in (0.0, 0.5, 1.0):
        assert_close(field(x, torch.tensor([alpha])), plain(x))


@pytest.mark.parametrize("shared", [True, False])
def test_folded_modulation_is_the_direct_formula(shared: bool) -> None:
    """a sin(b omega z + c) + d, layer by layer."""
    field = HarmonizedSIREN(hidden=(16, 16, 16), omega=4.0, zero_output=False, shared=shared)
    torch.nn.init.normal_(field.harmonizer.out.weight, std=0.2)
    field = field.double()
    x = points()
    h = x
    coefficients = field.coefficients(CONDITION)
    for layer, (a, b, c, d) in zip(field.layers, coefficients, strict=True):
        h = a * torch.sin(b * 4.0 * F.linear(h, layer.weight, layer.bias) + c) + d
    assert coefficients.sub(torch.tensor([1.0, 1.0, 0.0, 0.0])).abs().min() > 1e-4
    assert_close(field(x, CONDITION), F.linear(h, field.head.weight, field.head.bias))


def test_condition_changes_the_field_and_must_fit() -> None:
    field, x = harmonized().double(), points()
    assert (field(x, CONDITION) - field(x, CONDITION + 0.5)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"expected a condition of 1 value\(s\), got None"):
        field(x)
    with pytest.raises(ValueError, match=r"got \(2,\)"):
        field(x, torch.zeros(2, dtype=torch.float64))


def test_displacement_and_map_differ_by_the_identity() -> None:
    composed = Composition(as_map(siren()), as_map(siren())).double()
    x = points()
    assert_close(composed.displacement(x), composed(x) - x)
    u, phi = composed.displacement_jet(jets.seed(x, 2)), composed.jet(jets.seed(x, 2))
    assert_close(u.jacobian, phi.jacobian - torch.eye(3, dtype=torch.float64).expand(N, 3, 3))
    assert u.second is not None and phi.second is not None
    assert_close(u.second, phi.second)


def test_a_composed_displacement_is_that_of_the_composition() -> None:
    inner, outer, x = lattice(), lattice(gain=0.5), points().float()
    field = Composed(inner, outer)
    assert_close(field(x), Composition(inner, outer).displacement(x), 1e-6)
    lines = [torch.linspace(-0.8, 0.9, n) for n in (4, 3, 5)]
    grid = torch.cartesian_prod(*lines)
    assert_close(field.on_grid(lines).flatten(0, 2), field(grid), 1e-5)
    with pytest.raises(ValueError, match="expected a field of displacements, got the map DisplacementMap"):
        Composed(as_map(inner), outer)


def test_determinants_multiply() -> None:
    """det D(phi o psi) = det D phi(psi) det D psi."""
    psi, phi = as_map(siren()).double(), as_map(siren()).double()
    inner = psi.jet(jets.seed(points(), 1))
    whole = jets.det(phi.jet(inner).jacobian)
    outer = jets.det(phi.jet(jets.seed(inner.value, 1)).jacobian)
    assert_close(whole, outer * jets.det(inner.jacobian))


def test_a_displacement_has_three_components() -> None:
    with pytest.raises(ValueError, match="from 3 to 3, got 3 to 2"):
        DisplacementMap(SIREN(out_features=2))
    field = as_map(siren())
    assert as_map(field) is field


# ------------------------------------------------------------------------------------------------- the whole transform

OBLIQUE = torch.tensor(
    [[-0.9, 0.1, 0.05, 40.0], [0.08, 0.7, -0.2, -55.0], [0.1, 0.15, 2.4, 10.0], [0, 0, 0, 1]], dtype=torch.float64
)
START = torch.tensor(
    [[0.98, 0.17, 0.0, 4.0], [-0.17, 0.98, 0.05, -7.0], [0.01, -0.05, 1.02, 3.0], [0, 0, 0, 1]], dtype=torch.float64
)


@pytest.fixture
def transform() -> Transform:
    """A smooth deformation of a few mm after an affine start, on an oblique and flipped grid."""
    field = SIREN(hidden=(16, 16), omega=2.0, zero_output=False)
    with torch.no_grad():
        field.head.weight.mul_(0.1)
    return Transform(as_map(field), Domain.of((40, 50, 20), OBLIQUE), START)


def world_points(domain: Domain, n: int = 50) -> Tensor:
    voxels = torch.rand(n, 3, dtype=torch.float64) * torch.tensor(domain.shape)
    return voxels @ domain.voxel_to_world[:3, :3].T + domain.voxel_to_world[:3, 3]


def test_inverse_of_a_transform(transform: Transform) -> None:
    """phi^-1 o phi = id and phi o phi^-1 = id, within a hundredth of a millimetre."""
    p = world_points(transform.domain)
    moved = transform(p)
    assert (moved - (p @ START[:3, :3].T + START[:3, 3])).norm(dim=1).max() > 0.5
    back, residual = transform.inverse(moved)
    assert residual.max() < 1e-3
    assert (back - p).norm(dim=1).max() < 1e-2
    assert (transform(back) - moved).norm(dim=1).max() < 1e-3


def test_jacobian_of_a_transform(transform: Transform) -> None:
    """World axes, start included: against central differences of the points."""
    p, h = world_points(transform.domain), 0.05
    steps = h * torch.eye(3, dtype=torch.float64)
    columns = [(transform(p + s) - transform(p - s)) / (2 * h) for s in steps]
    assert_close(transform.jacobian(p), torch.stack(columns, dim=-1), 1e-3)


def test_per_axis_transform_is_the_same_map_of_its_field(transform: Transform) -> None:
    """On a per-axis domain the Jacobian also carries the anisotropic scale."""
    other = Transform(transform.map, transform.domain.with_scale("per-axis"), START)
    p, h = world_points(transform.domain), 0.05
    steps = h * torch.eye(3, dtype=torch.float64)
    columns = [(other(p + s) - other(p - s)) / (2 * h) for s in steps]
    assert_close(other.jacobian(p), torch.stack(columns, dim=-1), 1e-3)


def test_inverse_says_where_there_is_none() -> None:
    """A map whose third coordinate stays in +-5 mm of the centre: 4 mm beyond it the residual is 4 mm."""

    class Bounded(Map):
        def __init__(self) -> None:
            super().__init__()
            self.keep = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.cat((x[:, :2], self.keep * torch.sin(x[:, 2:])), dim=1)

        def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
            third = jets.sine(Jet(jet.channels[..., 2:], jet.k, jet.pairs, jet.basis))
            rest = Jet(jet.channels[..., :2], jet.k, jet.pairs, jet.basis)
            return jets.concatenate(rest, third.rescale(float(self.keep), 1.0))

    domain = Domain.of((20, 20, 20), torch.eye(4))
    phi = Transform(Bounded(), domain, torch.eye(4))
    centre = domain.normalised_to_world[:3, 3]
    reachable, beyond = centre + torch.tensor([1.0, 2.0, 2.0]), centre + torch.tensor([1.0, 2.0, 9.0])
    _, residual = phi.inverse(torch.stack((reachable, beyond)))
    assert residual[0] < 1e-3
    assert_close(residual[1], torch.tensor(4.0, dtype=torch.float64), 0.05)


def test_inverse_of_a_map_with_a_singular_jacobian_keeps_its_residual() -> None:
    """A map that flattens space has no inverse: the residual says so, and nothing is raised."""

    class Flat(Map):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x * torch.tensor([1.0, 1.0, 0.0])

        def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
            return Jet(jet.channels * torch.tensor([1.0, 1.0, 0.0]), jet.k, jet.pairs)

    domain = Domain.of((8, 8, 8), torch.eye(4))
    transform = Transform(Flat(), domain, torch.eye(4))
    middle = transform_points(domain.normalised_to_world, torch.zeros(1, 3).double())
    _, residual = transform.inverse(middle + torch.tensor([[0.0, 0.0, 2.0]]))
    assert residual.item() == pytest.approx(2.0)
