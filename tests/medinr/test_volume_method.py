"""Registration on whole grids: what is compared, levels, penalties, and known deformations found again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medinr.commands.register import fit
from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import MLP, SINR, SIREN, CubicLattice, HarmonizedSIREN, Sum
from medinr.jets import seed
from medinr.losses import MINDSSC, MSE, NCC, NMI, Barrier, Bending, Diffusion, ForwardDiffusion, LocalNCC, Similarity
from medinr.losses.volumes import VolumeNCC, differences
from medinr.methods import ConditionedRegistration, VolumeRegistration, load_method
from medinr.methods.grids import voxel_mm
from medinr.sampling import interpolate
from medinr.space import Domain, transform_points
from tests.medinr import pairs
from tests.medinr.tolerances import assert_close

FLAT = Domain.of((40, 36, 1), [[2, 0, 0, -39], [0, 2, 0, -35], [0, 0, 5, 10], [0, 0, 0, 1]])


def driven(spacing: float = 12.0, zero_output: bool = True) -> SINR:
    return SINR(SIREN(hidden=(32, 32), omega=8.0, first_omega=4.0, zero_output=zero_output), spacing)


def method(similarity: Similarity | None = None, **options: Any) -> VolumeRegistration:
    arguments: dict[str, Any] = {"shrinks": (2.0,), "points": 128, "lr": 5e-3, **options}
    return VolumeRegistration(arguments.pop("field", None) or driven(), similarity or NCC(), **arguments)


def error(found: VolumeRegistration) -> float:
    world = pairs.points()
    return float((found.transform()(world) - pairs.warp(world)).norm(dim=1).mean())


# -- what is compared ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", [NCC(), MSE(), NMI(bins=16)], ids=lambda s: type(s).__name__)
def test_all_voxels_are_compared_as_points_would_be(similarity: Similarity) -> None:
    torch.manual_seed(0)
    found, pair = method(similarity, field=driven(zero_output=False), shrinks=(1.0,)), pairs.pair()
    found.attach(pair)
    data, _ = found.terms(found.draw())
    domain = found.domain
    x = transform_points(domain.voxel_to_normalised, domain.voxels().double()).float()
    u = found.map.displacement(x)
    target = transform_points(found.to_moving_voxels, x + u)
    inside = ((target >= -0.5) & (target <= 31.5)).all(1).float()
    assert 0.5 < inside.mean() < 1
    want = similarity(found.level.fixed.flatten(), interpolate(found.level.moving, target)[0], inside)
    assert_close(data["similarity"], want, 1e-4)
    assert_close(data["overlap"], inside.mean(), 1e-4)
    assert float(data["outside"].detach()) > 0


def test_windows_of_local_ncc_have_its_radius() -> None:
    found = method(LocalNCC(6.0, floor=0.01, signed=False), shrinks=(1.0, 4.0))
    found.attach(pairs.pair())
    assert found.comparison(1.0)[0] == 2, "6 mm in voxels of 3 mm"
    assert found.comparison(4.0)[0] == 1, "6 mm and half the smoothing of 6 mm, in points 12 mm apart"
    [similarity] = found.grid().similarities  # outside of a fit, that of the last level
    assert isinstance(similarity, VolumeNCC) and not similarity.signed
    assert (similarity.radius, similarity.floor, similarity.fixed.shape) == (1, 0.01, (8, 8, 8))


def test_the_mask_bounds_the_comparison() -> None:
    pair = pairs.pair()
    mask = torch.zeros(pair.domain.shape, dtype=torch.bool)
    mask[8:20, 10:24, 9:22] = True
    for use in (True, False):
        found = method(shrinks=(1.0,), use_mask=use)
        found.attach(replace(pair, fixed_mask=mask))
        assert float(found.grid().weight.sum()) == (mask.sum() if use else mask.numel())


def test_mistakes() -> None:
    for options in ({"shrinks": ()}, {"shrinks": (0.0,)}, {"most": 10}):
        with pytest.raises(UserError, match="shrinks: expected distances above 0 and most >= 1000"):
            method(**options)
    with pytest.raises(UserError, match="VolumeRegistration knows NCC, NMI, MSE and LocalNCC, got MINDSSC"):
        method(MINDSSC())


# -- penalties -----------------------------------------------------------------------------------------------------


def test_forward_diffusion_of_a_linear_displacement() -> None:
    """|Du|^2 voxel^2, on any grid; zero for translations; as Diffusion where lengths are the same."""
    matrix = torch.randn(3, 3).double()
    steps = (0.1, 0.2, 0.05)
    lines = [s * torch.arange(n).double() for s, n in zip(steps, (4, 5, 6), strict=True)]
    x = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)
    penalty = ForwardDiffusion(1.0)
    assert_close(penalty.on_grid(x @ matrix + 7, steps, 0.3), 0.09 * matrix.square().sum())
    assert float(penalty.on_grid(torch.ones_like(x), steps, 0.3)) == 0
    assert len(differences(x, steps)) == 3
    with pytest.raises(UserError, match="use it with VolumeRegistration"):
        penalty(seed(torch.zeros(1, 3), 1))


def test_penalties_are_those_of_the_field() -> None:
    """The forward differences of a fine grid approach the exact diffusion of the spline."""
    torch.manual_seed(1)
    found = method(
        field=driven(24.0, zero_output=False),
        regularizers={"published": ForwardDiffusion(1.0), "exact": Diffusion(1.0), "bend": Bending(0.1)},
        shrinks=(1.0,),
        points=20_000,
    )
    found.attach(pairs.pair())
    _, raw = found.terms(found.draw())
    voxel = voxel_mm(found.domain) / found.domain.unit_mm
    assert float(raw["published"].detach()) / voxel**2 == pytest.approx(float(raw["exact"].detach()), rel=0.03)
    assert float(raw["bend"].detach()) > 0


# -- levels and known deformations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        driven,
        lambda: CubicLattice((24.0, 12.0)),
        lambda: Sum(driven(), CubicLattice((12.0,))),
        lambda: MLP(hidden=(16, 16)),
    ],
    ids=["sinr", "lattice", "sum", "dense perceptron"],
)
def test_every_field_moves(field: Any) -> None:
    """5.2 mm to begin with."""
    torch.manual_seed(0)
    network = field()
    found = method(field=network, shrinks=(4.0, 2.0), lr=1e-2, regularizers={"barrier": Barrier(1.0)})
    fit(found, pairs.pair(), 40)
    assert error(found) < (4.5 if isinstance(network, MLP) else 1.5), error(found)


def test_a_known_deformation_is_found_and_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = method(shrinks=(4.0, 2.0, 1.0), lr=1e-2, warmup=0.1, cosine=True, regularizers={"bend": Bending(1e-4)})
    fit(found, pairs.pair(), 75)
    assert error(found) < 0.5, error(found)
    assert found.grid().shrink == 1.0
    found.save(tmp_path / "method.ckpt")
    again = load_method(tmp_path / "method.ckpt")
    assert isinstance(again, VolumeRegistration)
    world = pairs.points()
    assert_close(again.transform()(world), found.transform()(world), 1e-12)


def test_other_contrast_by_mutual_information() -> None:
    """The moving image inverted and bent: NMI finds the motion, NCC does not."""
    torch.manual_seed(0)
    pair = pairs.pair()
    scaled = (pair.moving.data / 1500).clamp(-1, 1)
    bent = replace(pair, moving=replace(pair.moving, data=(1 - scaled.square()) * 100 - 40 * scaled))
    errors = {}
    for similarity in (NMI(), NCC()):
        found = method(similarity, shrinks=(4.0, 2.0), lr=1e-2, warmup=0.1, cosine=True)
        fit(found, bent, 60)
        errors[type(similarity).__name__] = error(found)
    assert errors["NMI"] < 2.0 and errors["NMI"] < 0.5 * errors["NCC"], errors


def test_a_slice_moves_in_its_plane() -> None:
    def shifted(world: Tensor) -> Tensor:
        return world.double() + torch.tensor([3.0, -2.0, 0.0]).double()

    torch.manual_seed(0)
    images = [pairs.sampled(FLAT, pairs.texture, through) for through in (shifted, None)]
    found = method(field=driven(), shrinks=(2.0, 1.0), lr=1e-2)
    fit(found, Pair("flat", *images), 40)
    world = transform_points(FLAT.voxel_to_world, FLAT.voxels().double())[5::13]
    moved = found.transform()(world)
    assert float((moved - world)[:, 2].abs().max()) < 1e-4
    assert float((moved - shifted(world)).norm(dim=1).mean()) < 0.6


def test_a_large_image_gets_a_coarser_grid() -> None:
    found = method(shrinks=(1.0,), most=5000)
    found.attach(pairs.pair())
    assert found.grid().weight.numel() <= 5000 and found.grid().shrink > 1


def test_conditions_reach_the_spline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conditioned method of points and this one share the field; here the condition is passed on to the grid."""
    field = SINR(HarmonizedSIREN(1, hidden=(16, 16), omega=4.0, zero_output=False), 16.0)
    torch.nn.init.normal_(field.network.harmonizer.out.weight, std=0.3)
    assert ConditionedRegistration(field, NCC(), {"b": Bending(1.0)}, ["b"]).map.conditions == 1
    monkeypatch.setattr(VolumeRegistration, "takes_condition", True)
    found = method(field=field)
    found.attach(pairs.pair())
    x = found.draw()
    one, other = (float(found.terms(x, torch.tensor([a]))[0]["similarity"].detach()) for a in (0.1, 0.9))
    assert abs(one - other) > 1e-4
