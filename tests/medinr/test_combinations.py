"""What can be put together, and what is refused in one line or told to do nothing."""

from typing import Any

import pytest

from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import (
    SINR,
    SIREN,
    Composed,
    DisplacementMap,
    Field,
    Flow,
    HarmonizedSIREN,
    Regional,
    Sum,
    TangentField,
)
from medinr.losses import NCC, NMI, Bending, Jacobian, LocalNCC, OwnCoordinates
from medinr.methods import (
    ConditionedRegistration,
    CycleConsistentRegistration,
    PairRegistration,
    RefinedRegistration,
    Refinement,
    VolumeRegistration,
)
from medinr.space import Domain, Image
from tests.medinr import pairs


def a_tube(network: Field) -> TangentField:
    return TangentField(network, [[0.0, 0, z] for z in range(-40, 41, 8)])


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda f: Sum(SIREN(), f), "other"),
        (lambda f: Sum(f, SIREN()), "one"),
        (lambda f: Composed(SIREN(), f), "outer"),
        (lambda f: Regional([SIREN(), f]), "parts.1"),
        (lambda f: Flow(f), "velocity"),
        (lambda f: SINR(f), "network"),
        (a_tube, "network"),
        (lambda f: RefinedRegistration(f, Refinement(), LocalNCC()), "field"),
    ],
)
@pytest.mark.parametrize("part", [Flow, DisplacementMap])
def test_a_map_is_no_part_of_a_field(build: Any, name: str, part: Any) -> None:
    """Its coordinates would count twice."""
    with pytest.raises(UserError, match=f"{name}: expected a field of displacements, got the map {part.__name__}"):
        build(part(SIREN()))


@pytest.mark.parametrize(
    "make",
    [
        lambda f: PairRegistration(f, NCC()),
        lambda f: VolumeRegistration(SINR(f), NCC()),
        lambda f: RefinedRegistration(Sum(SIREN(), f), Refinement(), LocalNCC()),
        lambda f: PairRegistration(Regional([f, SIREN()]), NCC()),
    ],
)
def test_a_field_that_takes_a_condition_needs_a_method_that_gives_one(make: Any) -> None:
    with pytest.raises(UserError, match=r"expected one without a condition, got \w+ of 1; give it to Conditioned"):
        make(HarmonizedSIREN())


@pytest.mark.parametrize("points", [4, 5, 6, 7, 9])
def test_few_points_are_shared_among_the_alphas(points: int) -> None:
    def method(n: int) -> ConditionedRegistration:
        field = HarmonizedSIREN(hidden=(8, 8))
        return ConditionedRegistration(field, NCC(), {"bend": Bending(1e-3)}, ["bend"], alphas=4, points=n)

    for one in (method(points), CycleConsistentRegistration(method(points), fraction=0.3)):
        one.attach(pairs.pair())
        assert all(bool(term.isfinite()) for term in one.objective(one.draw()).values())
    with pytest.raises(UserError, match="points: expected at least one for each of 4 alphas, got 3"):
        method(3)


def test_own_coordinates_are_those_of_volumes() -> None:
    pair = pairs.pair()
    slices = [Image(i.data[..., :1], Domain.of((32, 32, 1), i.domain.affine)) for i in (pair.fixed, pair.moving)]
    method = PairRegistration(a_tube(SIREN(hidden=(8, 8))), NCC(), {"own": OwnCoordinates(Jacobian(0.1))}, points=50)
    with pytest.raises(UserError, match="OwnCoordinates expects volumes, found the single slice flat"):
        method.attach(Pair("flat", *slices))
    method.attach(pair)


@pytest.mark.parametrize("unused", [{"similarity": NMI()}, {"regularizers": {"bend": Bending(1.0)}}])
def test_what_a_lattice_alone_does_not_use_is_told(unused: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="with field null they do nothing"):
        RefinedRegistration(None, Refinement(), **{"similarity": LocalNCC(), **unused})
