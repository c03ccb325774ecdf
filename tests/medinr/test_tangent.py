"""Tangent coordinates of a tube, the field that lives in them, its jets, penalties and checkpoint."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medinr import jets
from medinr.errors import RegistrationWarning, UserError
from medinr.fields import SIREN, CubicLattice, Field, Sum, TangentField, as_map
from medinr.fields.centreline import Centreline
from medinr.fields.tangent import own_jets
from medinr.fields.tube import TubeCoordinates
from medinr.jets import Jet
from medinr.losses import NCC, Barrier, Bending, Jacobian, OwnCoordinates
from medinr.methods import PairRegistration, load_method
from medinr.space import Domain
from medinr.types import Points
from tests.medinr.references import along, derivatives
from tests.medinr.tolerances import assert_close
from tests.medinr.tubes import CUBE, bent, helix, straight


class Constant(Field):
    """The same displacement everywhere."""

    in_features = out_features = 3

    def __init__(self, value: list[float]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.value.expand(len(x), 3)

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        channels = torch.zeros_like(jet.channels)
        channels[0] = self.value.to(channels)
        return Jet(channels, jet.k, jet.pairs, jet.basis)


def network(seed: int = 0) -> SIREN:
    torch.manual_seed(seed)
    return SIREN(hidden=(12, 12), omega=3.0, zero_output=False)


def field(points: list[list[float]], net: Field | None = None, domain: Domain = CUBE, **options: float) -> TangentField:
    """In float64."""
    made = TangentField(network() if net is None else net, points, **options).double()  # type: ignore[arg-type]
    made.cover(domain)
    return made


def inside(coordinates: TubeCoordinates, n: int = 200, radius: float = 20.0, beyond: float = 0.0) -> Tensor:
    """Tangent coordinates (mm) in the tube, and ``beyond`` of its length past its ends."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = torch.rand(3, n, generator=generator).double()
    s = coordinates.length * ((1 + 2 * beyond) * a - beyond)
    r, angle = radius * b.sqrt(), 2 * math.pi * c
    return torch.stack((s, r * angle.cos(), r * angle.sin()), dim=1)


def normalised(made: TangentField, q: Tensor) -> Tensor:
    return made.tube.to_image(q) @ made.to_normalised.T


@pytest.mark.parametrize("points", [bent(), straight(), helix()], ids=["bent", "straight", "helix"])
def test_there_and_back(points: list[list[float]]) -> None:
    tube = TubeCoordinates(Centreline.of(points, degree=None)).double()
    q = inside(tube, beyond=0.2)
    assert (tube.to_tangent(tube.to_image(q)) - q).abs().max() < 1e-9


def test_straight_tube_has_cylinder_coordinates() -> None:
    tube = TubeCoordinates(Centreline.of(straight(), degree=8)).double()
    x = torch.tensor([[3.0, -2.0, -60.0], [3.0, 10.0, 0.0], [-4.0, -2.0, 55.0]]).double()
    q = tube.to_tangent(x)
    assert_close(q[:, 0], torch.tensor([-10.0, 50.0, 105.0]).double(), 1e-5)
    assert_close(q[:, 1:].norm(dim=1), torch.tensor([0.0, 12.0, 7.0]).double(), 1e-5)
    assert_close(jets.det(tube.linearised(q)[1]), torch.ones(3).double(), 1e-5)


def test_foot_is_the_nearest_point() -> None:
    line = Centreline.of(bent(), degree=None)
    tube = TubeCoordinates(line).double()
    q = inside(tube)
    x = tube.to_image(q).numpy()
    at = np.linspace(0, line.length, 20_001)
    nearest = at[np.linalg.norm(x[:, None] - line.curve(at), axis=-1).argmin(1)]
    assert np.abs(tube.to_tangent(torch.tensor(x))[:, 0].numpy() - nearest).max() < 0.02


def test_coordinates_are_scaled_to_one() -> None:
    made = field(bent())
    ends = torch.tensor([[0.0, 20.0, 0.0], [made.centreline.length, 0.0, -20.0]]).double()
    expected = torch.tensor([[-1.0, 1.0, 0.0], [1.0, 0.0, -1.0]]).double()
    assert_close(made.coordinates(normalised(made, ends)), expected, 1e-6)


@pytest.mark.parametrize("scale", ["isotropic", "per-axis"])
@pytest.mark.parametrize("points", [bent(), helix()], ids=["bent", "helix"])
def test_jets_are_exact(points: list[list[float]], scale: str) -> None:
    """In the tube, in the margin where the displacement falls to zero, beyond the ends and outside."""
    made = field(points, domain=CUBE.with_scale(scale), degree=8)  # type: ignore[arg-type]
    x = normalised(made, inside(made.tube, 60, radius=27.0, beyond=0.25))
    value, jacobian, hessian = derivatives(made, x)
    found = made.jet(jets.seed(x, 2))
    assert_close(found.value, value)
    assert_close(found.jacobian, jacobian)
    assert found.second is not None
    for (a, b), second in zip(found.pairs, found.second, strict=True):
        assert_close(second, hessian[..., a, b])
    probes = jets.probe(x)
    assert probes.first is not None
    _, first, second = along(made, x, probes.first, probes.pairs)
    found = made.jet(probes)
    assert_close(found.first, first)
    assert_close(found.second, second)


def test_jets_compose() -> None:
    """After another map, whose second derivatives come in."""
    inner = SIREN(hidden=(8,), omega=2.0, zero_output=False).double()
    made = field(bent())
    x = normalised(made, inside(made.tube, 20))

    def both(points: Points) -> Points:
        return made(points + 0.1 * inner(points))

    _, _, hessian = derivatives(both, x)
    seed = jets.seed(x, 2)
    bent_jet = inner.jet(seed)
    found = made.jet(jets.add(Jet(0.1 * bent_jet.channels, bent_jet.k, bent_jet.pairs), seed))
    assert found.second is not None
    assert_close(found.second[3], hessian[..., 0, 1])


def test_null_space() -> None:
    """A network that says 0 moves nothing at all, and its derivatives are 0."""
    made = TangentField(SIREN(hidden=(8,), zero_output=True), bent())
    made.cover(CUBE)
    found = made.jet(jets.seed(2 * torch.rand(500, 3) - 1, 2))
    assert found.channels.abs().max() == 0


def test_known_answer_along_and_across() -> None:
    """Straight tube: a shift along w moves points along the axis by half a length times it; u and v by radii."""
    w = field(straight(), Constant([0.1, 0.0, 0.0]))
    x = normalised(w, inside(w.tube, 50))
    assert_close(CUBE.unit_mm * w(x), torch.tensor([0.0, 0.0, 5.0]).double().expand(50, 3), 1e-5)
    v = field(straight(), Constant([0.0, 0.0, 0.5]))
    assert_close(CUBE.unit_mm * v(x).norm(dim=1), torch.full((50,), 10.0).double(), 1e-5)


def test_shift_along_follows_the_bend() -> None:
    made = field(bent(), Constant([0.2, 0.0, 0.0]))
    q = inside(made.tube, 50)
    q = q[q[:, 0] < 0.85 * made.centreline.length]
    moved = normalised(made, q) + made(normalised(made, q))
    shift = torch.tensor([0.1 * made.centreline.length, 0.0, 0.0]).double()
    assert_close(moved, normalised(made, q + shift), 1e-7)  # 0.2 was float32


def test_nothing_moves_outside_the_tube() -> None:
    made = field(bent(), Constant([0.05, 0.1, 0.0]))
    length = made.centreline.length
    whole = torch.tensor([[50.0, 19.9, 0.0], [1.0, 0.0, 0.0]]).double()
    none = torch.tensor([[50.0, 25.1, 0.0], [-0.21 * length, 0.0, 0.0], [1.21 * length, 3.0, 0.0]]).double()
    between = torch.tensor([[50.0, 22.0, 0.0], [-0.1 * length, 0.0, 0.0]]).double()
    share = [made.share(Jet(q[None], 0)).value for q in (whole, none, between)]
    assert (share[0] == 1).all() and (share[1] == 0).all() and ((share[2] > 0.05) & (share[2] < 0.95)).all()
    assert made(normalised(made, none)).abs().max() == 0


def test_own_penalty_is_that_of_the_network() -> None:
    """In tangent space |det - 1| is the network's; the displacement in image space has another determinant."""
    made = field(bent())
    x = normalised(made, inside(made.tube, 100))
    [own] = own_jets(as_map(made), jets.seed(x, 1))
    reference = made.network.jet(jets.seed(made.coordinates(x), 1))
    det = [jets.det(j.jacobian + torch.eye(3).double()) for j in (own, reference)]
    assert_close(det[0], det[1], 1e-9)
    in_image = jets.det(made.jet(jets.seed(x, 1)).jacobian + torch.eye(3).double())
    assert (in_image - det[0]).abs().mean() > 1e-3


def test_own_second_order_penalty_has_lengths_of_the_image() -> None:
    """The jet is that of the network as a displacement in mm, by its coordinates in mm."""
    made = field(bent())
    x = normalised(made, inside(made.tube, 20))
    size = made.size / made.unit_mm
    _, _, hessian = derivatives(lambda z: size * made.network(z / size), made.coordinates(x) * size)
    [own] = own_jets(made, jets.seed(x, 2))
    assert own.second is not None
    for (a, b), second in zip(own.pairs, own.second, strict=True):
        assert_close(second, hessian[..., a, b], 1e-8)


def test_own_penalty_of_a_sum_is_that_of_its_parts() -> None:
    both = Sum(network(2), TangentField(network(3), bent()))
    method = PairRegistration(both, NCC(), {"own": OwnCoordinates(Jacobian(0.05)), "image": Jacobian(0.1)})
    method.remember(CUBE, torch.eye(4), [[0.0, 1.0], [0.0, 1.0]])
    assert isinstance(both.other, TangentField)
    q = inside(both.other.tube, 64).float()
    x = both.other.tube.to_image(q) @ both.other.to_normalised.T
    u = method.displacement_jet(x, 1)
    own, image = (method.penalty(method.penalties[k], x, u) for k in ("own", "image"))
    image_part = (jets.det(both.one.jet(jets.seed(x, 1)).jacobian + torch.eye(3)) - 1).abs().mean()
    tangent_part = (jets.det(both.other.own_jet(jets.seed(x, 1)).jacobian + torch.eye(3)) - 1).abs().mean()
    assert_close(own, image_part + tangent_part)
    assert (own - image).abs() > 1e-4
    assert method.penalties["own"].weight == 0.05 and method.penalties["own"].order == 1
    assert OwnCoordinates(Bending(1.0, 0.5, "probes")).directions == "probes"


def test_outside_the_tube_the_own_penalty_is_zero() -> None:
    made = field(bent())
    far = normalised(made, torch.tensor([[60.0, 40.0, 0.0], [60.0, 0.0, -45.0]]).double())
    assert made.own_jet(jets.seed(far, 2)).channels.abs().max() == 0


def test_gradients_reach_the_network_and_the_points() -> None:
    made = field(bent())
    x = normalised(made, inside(made.tube, 10)).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: made(p).sum(0), x, atol=1e-6)
    assert torch.autograd.gradcheck(lambda p: made.jet(jets.seed(p, 1)).jacobian.sum(0), x, atol=1e-5)
    made.jet(jets.seed(x, 1)).jacobian.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.network.layers.parameters())


def test_lattice_in_tangent_space() -> None:
    made = TangentField(CubicLattice((30.0,)), bent())
    made.cover(CUBE)
    assert isinstance(made.network, CubicLattice)
    nn.init.normal_(made.network.levels[0], std=0.05)
    x = normalised(made.double(), inside(made.tube, 10))
    assert_close(made.jet(jets.seed(x, 1)).jacobian, derivatives(made, x)[1])


def test_checkpoint_needs_no_file(tmp_path: Path) -> None:
    file = tmp_path / "centreline.csv"
    file.write_text("".join(f"{x},{y},{z}\n" for x, y, z in bent()), encoding="utf-8")
    method = PairRegistration(
        Sum(network(4), TangentField(network(5), str(file), diameter_mm=36.0, degree=7)),
        NCC(),
        {"jacobian": OwnCoordinates(Jacobian(0.05)), "fold": Barrier(1.0)},
    )
    method.remember(CUBE, torch.eye(4), [[0.0, 1.0], [0.0, 1.0]])
    method.save(tmp_path / "transform.ckpt")
    file.unlink()
    again = load_method(tmp_path / "transform.ckpt")
    points = torch.tensor(bent()).double() + 4.0
    assert torch.equal(method.transform()(points), again.transform()(points))
    assert (method.transform()(points) - points).norm(dim=1).max() > 1.0
    assert isinstance(again.penalties["jacobian"], OwnCoordinates)
    again.save(tmp_path / "again.ckpt")
    assert torch.equal(load_method(tmp_path / "again.ckpt").transform()(points), again.transform()(points))


def test_strong_curvature_warns_in_one_line() -> None:
    angle = np.linspace(0, np.pi, 40)
    tight = np.stack([15 * np.cos(angle), 15 * np.sin(angle), 0 * angle], axis=1).tolist()
    with pytest.warns(RegistrationWarning, match=r"smallest radius of curvature 15 mm") as caught:
        made = TangentField(network(), tight)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    made.cover(CUBE)
    assert torch.isfinite(made.jet(jets.seed(2 * torch.rand(500, 3) - 1, 2)).channels).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TangentField(network(), bent())


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv"):
        TangentField(network(), str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match="diameter_mm: expected a number above 0"):
        TangentField(network(), bent(), diameter_mm=0.0)
    away = [[x + 900, y, z] for x, y, z in bent()]
    with pytest.raises(UserError, match="expected a centreline inside the image, found 0%"):
        TangentField(network(), away).cover(CUBE)
    with pytest.raises(ValueError, match="cover"):
        TangentField(network(), bent())(torch.zeros(1, 3))
