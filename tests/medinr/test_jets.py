"""Every jet rule against torch.func in float64, along the basis and along probes, for affine and for curved input."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medinr import jets
from medinr.fields.base import in_chunks
from medinr.jets import Jet
from tests.medinr.references import along
from tests.medinr.tolerances import assert_close

N = 7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


W, B = draw(5, 3, seed=1), draw(5, seed=2)
CURVE_W, CURVE_B = draw(3, 3, seed=3), draw(3, seed=4)


class Rule(NamedTuple):
    """A rule as it acts on jets, and the plain function that it stands for."""

    jet: Callable[[Jet], Jet]
    function: Callable[[Tensor], Tensor]


RULES = {
    "linear": Rule(lambda j: jets.linear(j, W, B), lambda x: F.linear(x, W, B)),
    "linear without bias": Rule(lambda j: jets.linear(j, W), lambda x: F.linear(x, W)),
    "sine": Rule(jets.sine, torch.sin),
    "relu": Rule(lambda j: jets.activate(j, jets.relu_rule), torch.relu),
    "tanh": Rule(lambda j: jets.activate(j, jets.tanh_rule), torch.tanh),
    "softplus": Rule(lambda j: jets.activate(j, jets.softplus_rule), F.softplus),
    "sum": Rule(lambda j: jets.add(jets.sine(j), j), lambda x: torch.sin(x) + x),
    "sum of two affine": Rule(lambda j: jets.add(j, j), lambda x: x + x),
    "concatenation": Rule(lambda j: jets.concatenate(jets.sine(j), j), lambda x: torch.cat((torch.sin(x), x), -1)),
    "scaling": Rule(lambda j: j.rescale(3.0, 1.0), lambda x: 3 * x),
    "materialise": Rule(jets.materialise, lambda x: x),
}
SEEDS = {"basis": lambda x: jets.seed(x, 2), "probes": lambda x: jets.probe(x)}


def curve(x: Tensor) -> Tensor:
    """A function whose jet is not affine, to feed into a rule."""
    return torch.sin(F.linear(x, CURVE_W, CURVE_B)) + x**2


def curve_jet(seed: Jet) -> Jet:
    """Its jet from torch.func: nothing of medinr's rules but the seed."""
    assert seed.first is not None
    value, first, second = along(curve, seed.value, seed.first, seed.pairs)
    return Jet.of(value, first, second, seed.pairs, seed.basis)


@pytest.mark.parametrize("directions", SEEDS)
@pytest.mark.parametrize("name", RULES)
class TestRule:
    def compare(self, out: Jet, function: Callable[[Tensor], Tensor], seed: Jet) -> None:
        assert seed.first is not None and out.first is not None and out.second is not None
        value, first, second = along(function, seed.value, seed.first, seed.pairs)
        assert_close(out.value, value)
        assert_close(out.first, first)
        assert_close(out.second, second)
        assert out.basis == seed.basis and out.pairs == seed.pairs

    def test_of_the_seed(self, name: str, directions: str) -> None:
        rule, seed = RULES[name], SEEDS[directions](draw(N, 3))
        self.compare(rule.jet(seed), rule.function, seed)

    def test_of_a_curved_jet(self, name: str, directions: str) -> None:
        rule, seed = RULES[name], SEEDS[directions](draw(N, 3))
        self.compare(rule.jet(curve_jet(seed)), lambda x: rule.function(curve(x)), seed)

    def test_orders_agree(self, name: str, directions: str) -> None:
        """A jet of order 0 or 1 is the beginning of that of order 2."""
        x, rule = draw(N, 3), RULES[name]
        whole = rule.jet(jets.seed(x, 2))
        for order in (0, 1):
            part = rule.jet(jets.seed(x, order))
            assert part.order == order
            assert_close(part.channels, whole.channels[: 1 + 3 * order])


def sine_of(jet: Jet) -> Callable[[Tensor], Tensor]:
    return lambda channels: jets.sine(Jet(channels, jet.k, jet.pairs, jet.basis)).channels


@pytest.mark.parametrize("make", [*SEEDS.values(), lambda x: jets.seed(x, 1), lambda x: jets.seed(x, 0)])
def test_gradient_of_sine(make: Callable[[Tensor], Jet]) -> None:
    """The hand-written backward, against finite differences; input affine and curved."""
    affine = make(draw(4, 3))
    inputs = [affine] if affine.order < 2 else [affine, curve_jet(affine)]
    for jet in inputs:
        channels = (jet.channels + 0.1 * draw(*jet.channels.shape, seed=9)).requires_grad_()
        assert torch.autograd.gradcheck(sine_of(jet), (channels,))


@pytest.mark.parametrize("make", [*SEEDS.values(), lambda x: jets.seed(x, 1), lambda x: jets.seed(x, 0)])
def test_gradient_of_linear(make: Callable[[Tensor], Jet]) -> None:
    jet = make(draw(4, 3))

    def layer(channels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return jets.linear(Jet(channels, jet.k, jet.pairs, jet.basis), weight, bias).channels

    inputs = (jet.channels.clone().requires_grad_(), W.clone().requires_grad_(), B.clone().requires_grad_())
    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("directions", SEEDS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 8])
def test_chunks_are_the_whole(directions: str, chunk: int) -> None:
    """Value and parameter gradient, for pieces that divide the points and pieces that do not."""
    jet = SEEDS[directions](draw(N, 3))
    found = []
    for size in (N, chunk):
        weight, bias = W.clone().requires_grad_(), B.clone().requires_grad_()
        out = in_chunks(lambda j, w=weight, b=bias: jets.sine(jets.linear(j, w, b)), jet, size)
        out.channels.pow(3).sum().backward()
        found.append((out.channels, weight.grad, bias.grad))
    for whole, pieces in zip(*found, strict=True):
        assert_close(pieces, whole)


def test_rescale_is_the_chain_rule() -> None:
    """u'(y) = value * u(y / length): derivatives by torch.func at y = length * x."""
    value, length, x = 2.5, 0.4, draw(N, 3)
    out = curve_jet(jets.seed(x, 2)).rescale(value, length)
    eye = torch.eye(3, dtype=torch.float64)[:, None].expand(-1, N, -1)
    want = along(lambda y: value * curve(y / length), x * length, eye, jets.BASIS_PAIRS)
    for found, expected in zip((out.value, out.first, out.second), want, strict=True):
        assert_close(found, expected)


def test_determinant_and_cofactor() -> None:
    j = draw(N, 3, 3)
    assert_close(jets.det(j), torch.linalg.det(j))
    assert_close(jets.cofactor(j), torch.linalg.det(j)[:, None, None] * torch.linalg.inv(j).mT)
    assert torch.autograd.gradcheck(jets.det, (j.clone().requires_grad_(),))


def test_probes_are_isotropic() -> None:
    """Length sqrt(3), second moments the identity within 4 standard errors, the two directions independent."""
    n = 20_000
    first = jets.probe(draw(n, 3)).first
    assert first is not None
    assert_close(first.norm(dim=-1), torch.full((2, n), 3**0.5, dtype=torch.float64))
    for a, b, want in ((0, 0, torch.eye(3)), (1, 1, torch.eye(3)), (0, 1, torch.zeros(3, 3))):
        products = torch.einsum("ni,nj->nij", first[a], first[b])
        error = products.std(0) / n**0.5
        assert ((products.mean(0) - want).abs() <= 4 * error + 1e-12).all()


def test_probes_follow_the_generator() -> None:
    x = draw(N, 3)
    one, same, other = (jets.probe(x, torch.Generator().manual_seed(s)).channels for s in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_probes_have_no_jacobian() -> None:
    with pytest.raises(ValueError, match="full basis"):
        _ = jets.probe(draw(N, 3)).jacobian


def test_parts_must_agree() -> None:
    value, first, second = draw(N, 2), draw(3, N, 2), draw(6, N, 2)
    with pytest.raises(ValueError, match="expected 6 pairs for 6 second derivatives, got 1"):
        Jet.of(value, first, second, ((0, 0),))
    with pytest.raises(ValueError, match="need first derivatives"):
        Jet.of(value, None, second, jets.BASIS_PAIRS)


def test_a_piece_of_a_jet() -> None:
    jet = curve_jet(jets.seed(draw(N, 3), 2))
    assert_close(jet[slice(2, 5)].channels, curve_jet(jets.seed(draw(N, 3)[2:5], 2)).channels)
