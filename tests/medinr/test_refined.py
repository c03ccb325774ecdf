"""Control lattices refined on whole grids: the field on a grid, the stages, and known deformations found again."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

import medinr
from medinr.callbacks.checkpoints import RandomStates
from medinr.commands.presets import PRESETS, Preset
from medinr.commands.quiet import quiet
from medinr.commands.register import fit
from medinr.data.base import step_loader
from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import SIREN, CubicLattice, as_map
from medinr.fields.lattice import basis_matrix
from medinr.io import stack_channels
from medinr.losses import LocalNCC
from medinr.methods import RefinedRegistration, Refinement, load_method
from medinr.space import Domain, Image, transform_points
from tests.medinr import grids, pairs
from tests.medinr.tolerances import assert_close

FLAT = Domain.of((40, 36, 1), [[2, 0, 0, -39], [0, 2, 0, -35], [0, 0, 5, 10], [0, 0, 0, 1]])
SMALL = Domain.of((24, 24, 24), [[4, 0, 0, -46], [0, 4, 0, -46], [0, 0, 4, -46], [0, 0, 0, 1]])
BRIEF: dict[str, Any] = {
    "shrinks": (2.0, 1.0),
    "steps": (25, 10),
    "spacings": (4.0,),
    "radius": 2,
    "agreement": 0.0,
    "bending": 2.0,
}


def method(network: bool = False, refinement: dict[str, Any] | None = None, **options: Any) -> RefinedRegistration:
    field = SIREN(hidden=(24, 24), omega=8.0, first_omega=4.0) if network else None
    arguments: dict[str, Any] = {"points": 256, "lr": 2e-3, "pyramid_mm": (6.0,), **options}
    return RefinedRegistration(field, Refinement(**{**BRIEF, **(refinement or {})}), LocalNCC(), **arguments)


def mean_error(fitted: RefinedRegistration, through: pairs.Warp, at: Tensor | None = None) -> float:
    world = pairs.points() if at is None else at
    return (fitted.transform()(world) - through(world)).norm(dim=1).mean().item()


# -- the lattice on a grid -----------------------------------------------------------------------------------------


def lattice(kind: str = "oblique", unit: Any = "voxel") -> CubicLattice:
    field = CubicLattice((6.0, 3.0), gain=0.7, unit=unit)
    field.cover(grids.domain(kind))
    for level in field.levels:
        torch.nn.init.normal_(level)
    return field


@pytest.mark.parametrize("kind", ["oblique", "flipped"])
def test_the_field_on_a_grid_is_the_field_at_its_points(kind: str) -> None:
    field = lattice(kind).double()
    lines = [torch.linspace(a, b, n).double() for a, b, n in ((-1.4, 0.9, 7), (-0.5, 1.5, 6), (-1.0, 0.4, 5))]
    points = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)
    found = field.on_grid(lines, [0, 1])
    assert_close(found, field(points.reshape(-1, 3)).view_as(found), 1e-6)  # the box's edges are float32
    assert_close(field.on_grid(lines, [0]) + field.on_grid(lines, [1]), found)
    assert field.on_grid(lines, [0]).abs().max() > 0.1 < field.on_grid(lines, [1]).abs().max()
    assert not field.on_grid(lines, []).any()
    weight = torch.randn_like(found)
    a, b = (
        torch.autograd.grad((u * weight).sum(), list(field.levels))
        for u in (field.on_grid(lines, [0, 1]), field(points.reshape(-1, 3)).view_as(found))
    )
    for one, other in zip(a, b, strict=True):
        assert_close(one, other, 1e-6)


def test_rows_of_the_basis_sum_to_one() -> None:
    at = torch.tensor([-2.0, 0.0, 0.3, 1.0, 3.7, 4.0, 9.0]).double()
    basis = basis_matrix(at, 7)
    assert basis.shape == (7, 7) and bool((basis >= 0).all())
    assert_close(basis.sum(1), torch.ones(7).double())
    # A cubic B-spline reproduces positions: control point k stands at k - 1.
    assert_close(basis @ (torch.arange(7).double() - 1), at.clamp(0, 4), 2e-4)


def test_units_of_the_spacing_and_another_domain() -> None:
    domain = grids.domain("flipped")  # 27 x 26.4 x 37.5 mm, the voxel's mean side 1.651 mm
    for unit, side in (("mm", 1.0), ("voxel", 4.5 ** (1 / 3))):
        field = lattice("flipped", unit)
        assert_close(field.spacing * domain.unit_mm, torch.tensor([6.0, 3.0]) * side)
    coarse, fine = lattice("flipped", "mm").shapes
    assert coarse == (5 + 3, 5 + 3, 7 + 3) and fine == (9 + 3, 9 + 3, 13 + 3)
    field = lattice("flipped", "mm")
    field.cover(domain)
    assert bool(field.levels[0].any()), "the same domain keeps the coefficients"
    field.cover(FLAT)
    assert field.shapes[0] == (14 + 3, 12 + 3, 1 + 3) and not field.levels[0].any()
    assert len(field.levels[0]) == 17 * 15 * 4


# -- stages --------------------------------------------------------------------------------------------------------


def test_weights_multiply_their_terms() -> None:
    """Of a folded lattice, in the last stage: both weights tripled triple both terms, and leave the similarity."""
    found = []
    for factor in (1.0, 3.0):
        torch.manual_seed(0)
        one = method(refinement={"bending": 2.0 * factor, "barrier": 10.0 * factor, "composed": False})
        one.attach(pairs.pair())
        for level in one.lattices[0].levels:
            torch.nn.init.normal_(level, 0, 1.0)
        one._trainer = SimpleNamespace(  # type: ignore[assignment]
            global_step=30, estimated_stepping_batches=35, log_every_n_steps=10**9
        )
        found.append({k: v.item() for k, v in one.refine().items()})
    once, thrice = found
    assert once["barrier"] > 0.01 and once["bending"] > 0.01
    assert thrice == pytest.approx({k: v * (1 if k == "similarity" else 3) for k, v in once.items()})


@pytest.mark.parametrize(
    ("network", "total", "want"),
    [
        (True, 50, [15, 40, 50]),
        (True, 35, [0, 25, 35]),
        (True, 14, [0, 10, 14]),  # too short for all: each stage its share
        (False, 35, [0, 25, 35]),
        (False, 70, [0, 50, 70]),
        (False, 2, [0, 1, 2]),
    ],
)
def test_schedule(monkeypatch: pytest.MonkeyPatch, network: bool, total: int, want: list[int]) -> None:
    monkeypatch.setattr(RefinedRegistration, "total_steps", total)
    assert method(network).schedule() == want


class Watch(lightning.Callback):
    """Stage, copies of the parameters, and smoothing after each step."""

    def __init__(self) -> None:
        self.stages: list[int | None] = []
        self.network: list[Tensor] = []
        self.lattice: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.stages.append(pl_module.stage)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.network.append(torch.cat([p.detach().flatten() for n in pl_module.network for p in n.parameters()]))
        lattices = (*pl_module.lattices, *pl_module.lasts)
        self.lattice.append([p.detach().clone() for one in lattices for p in one.levels])


def train(found: RefinedRegistration, steps: int, callback: lightning.Callback, resume: Path | None = None) -> None:
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch")
        trainer = lightning.Trainer(
            max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False, callbacks=[RandomStates(), callback],
        )  # fmt: skip
        trainer.fit(found, train_dataloaders=step_loader(100), ckpt_path=resume)


def test_network_and_levels_move_in_their_own_steps_only() -> None:
    """8 steps of the network, 4 of each stage; the guides' gradients reach all parameters, and may not move them."""
    watch, found = Watch(), method(True, {"steps": (4, 4)}, landmark_weight=1.0)
    found.pair = replace(pairs.pair(), fixed_guides=pairs.points(8), moving_guides=pairs.warp(pairs.points(8)))
    train(found, 16, watch)
    assert watch.stages == [None] * 8 + [0] * 4 + [1] * 4
    for step, (before, after) in enumerate(itertools.pairwise(watch.network), start=1):
        assert bool((before != after).any()) == (step < 8), step
    for step, (before_, after_) in enumerate(itertools.pairwise(watch.lattice), start=1):
        moved = [bool((a != b).any()) for a, b in zip(before_, after_, strict=True)]
        assert moved == [8 <= step < 12, step >= 12], step
    assert not any(level.any() for level in watch.lattice[7])


def test_a_stage_begins_with_fresh_moments() -> None:
    """The first step of a level is lr * shrink voxels / 5 (the rise) for every control point that has a gradient."""
    watch, found = Watch(), method(True, {"steps": (2, 2)}, landmark_weight=1.0)
    found.pair = replace(pairs.pair(), fixed_guides=pairs.points(8), moving_guides=pairs.warp(pairs.points(8)))
    train(found, 8, watch)
    voxel = 3.0 / found.domain.unit_mm
    for step, level in ((4, 0), (6, 1)):
        moved = watch.lattice[step][level].abs()
        shrink = BRIEF["shrinks"][level]
        assert float(moved[moved > 0].median()) == pytest.approx(0.3 * shrink * voxel / 5, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"shrinks": (4.0, 2.0), "steps": (10,)},
        {"shrinks": (), "steps": ()},
        {"shrinks": (2.0, -1.0), "steps": (5, 5)},
        {"shrinks": (2.0,), "steps": (0,)},
        {"spacings": ()},
        {"spacings": (0.0,)},
        {"radius": 0},
        {"floor": 0.0},
        {"most": 10},
    ],
)
def test_mistakes_in_a_refinement(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="refinement: expected"):
        Refinement(**options)


def test_a_map_in_place_of_the_network_is_one_line() -> None:
    with pytest.raises(UserError, match="field: expected a field of displacements, got the map DisplacementMap"):
        RefinedRegistration(as_map(SIREN(hidden=(8,))), Refinement(), LocalNCC())


def test_levels_of_a_stage() -> None:
    found = Refinement((4.0, 2.0), (1, 1), (8.0, 4.0), bending=3.0, composed=False)
    assert found.lattice() == [32.0, 16.0, 8.0] and found.lattice(last=True) == []
    assert found.levels(0, 4.0) == [0, 1] and found.levels(1, 2.0) == [1, 2]
    assert found.levels(1, 5.0) == [1], "a grid that had to be coarser cannot see 8 voxels"
    assert found.levels(1, 50.0) == [1]
    other = found.changed(signed=False)
    assert not other.signed and found.signed and (other.bending, other.lattice()) == (3.0, found.lattice())


def test_the_last_of_several_stages_has_a_lattice_of_its_own() -> None:
    found = Refinement((4.0, 2.0), (1, 1), (8.0, 4.0), bending=1.0, unlike_bending=5.0, unlike_last=3.0)
    assert (found.lattice(), found.lattice(last=True)) == ([32.0, 16.0], [16.0, 8.0])
    assert found.levels(0, 4.0) == found.levels(1, 2.0) == [0, 1] and found.levels(1, 5.0) == [0]
    assert [found.stiffness(stage, unlike=True) for stage in (0, 1)] == [1.0, 3.0]
    assert found.changed(composed=False).stiffness(1, unlike=True) == 5.0
    one = found.changed(shrinks=(2.0,), steps=(1,))
    assert (one.lattice(), one.lattice(last=True)) == ([16.0, 8.0], [])


# -- known deformations --------------------------------------------------------------------------------------------

OBLIQUE = Domain.of((26, 28, 24), grids.affine("oblique") @ torch.diag(torch.tensor([2.6, 3.2, 1.6, 1])).numpy())


def centred(domain: Domain) -> Domain:
    affine = domain.voxel_to_world.clone()
    affine[:3, 3] = -affine[:3, :3] @ ((torch.tensor(domain.shape).double() - 1) / 2)
    return Domain.of(domain.shape, affine)


@pytest.mark.parametrize("network", [False, True])
def test_a_known_deformation_is_found(network: bool, tmp_path: Path) -> None:
    """5.2 mm to begin with; the checkpoint holds the same transform."""
    found = method(network)
    assert fit(found, pairs.pair(), 95 if network else 35) == (95 if network else 35, False)
    error = mean_error(found, pairs.warp)
    assert error < 0.5, error
    found.save(tmp_path / "method.ckpt")
    again = load_method(tmp_path / "method.ckpt")
    assert isinstance(again, RefinedRegistration)
    points = pairs.points()
    assert_close(again.transform()(points), found.transform()(points), 1e-12)
    assert_close(again.transform().jacobian(points), found.transform().jacobian(points), 1e-12)


def test_images_on_oblique_grids() -> None:
    domain = centred(OBLIQUE)
    moving = method()
    fit(moving, pairs.pair(moving_domain=domain), 35)
    fixed = method()
    pair = Pair("oblique", pairs.sampled(domain, pairs.texture, pairs.warp), pairs.sampled(pairs.CUBE, pairs.texture))
    fit(fixed, pair, 35)
    assert mean_error(moving, pairs.warp, 0.7 * pairs.points()) < 0.4
    assert mean_error(fixed, pairs.warp, 0.7 * pairs.points()) < 0.5


@pytest.mark.parametrize("sliding", [False, True])
def test_turning_the_world_turns_the_result(sliding: bool) -> None:
    """Images with turned headers: the same fit on the same voxels, in time and error."""
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, -0.5, 0.3], [0.5, 0, -0.4], [-0.3, 0.4, 0]]).double())

    def turned(image: Image) -> Image:
        return Image(image.data, Domain.of(image.domain.shape, turn @ image.domain.voxel_to_world))

    pair = pairs.pair()
    if sliding:
        labels = torch.zeros(pair.domain.shape, dtype=torch.long)
        labels[labels.shape[0] // 2 :] = 1
        pair = replace(pair, fixed_regions=labels)
    found = []
    for one in (pair, replace(pair, fixed=turned(pair.fixed), moving=turned(pair.moving))):
        torch.manual_seed(0)
        found.append(method(regions=2 if sliding else 1))
        fit(found[-1], one, 35)
    points = 0.7 * pairs.points()
    want = transform_points(turn, found[0].transform()(points))
    assert mean_error(found[0], pairs.warp, points) < 0.5
    assert_close(found[1].transform()(transform_points(turn, points.double())), want, 2e-4)
    assert found[1].lattices[0].shapes == found[0].lattices[0].shapes


def test_a_fit_of_before_lattices_were_turned_keeps_its_axes() -> None:
    domain, old, new = centred(OBLIQUE), method(), method()
    old.scale = "isotropic"
    old.attach(Pair("oblique", *(pairs.sampled(domain, pairs.texture) for _ in range(2))))
    new.restore(old.state)
    assert new.domain == old.domain != domain.with_scale("oriented")
    assert new.lattices[0].shapes == old.lattices[0].shapes


def test_a_displacement_to_begin_at_is_in_world_axes() -> None:
    domain = centred(OBLIQUE)
    pair = Pair("oblique", *(pairs.sampled(domain, pairs.texture) for _ in range(2)))
    begun = method()
    begun.attach(pair)
    shift = torch.tensor([3.0, -2.0, 1.0])
    begun.begin_at(shift.expand(*domain.shape, 3), domain)
    points = transform_points(domain.voxel_to_world, domain.voxels().double())[::101]
    assert_close(begun.transform()(points) - points, shift.double().expand_as(points), 1e-3)


def test_where_the_moving_image_ends_its_edge_pulls_nothing() -> None:
    """Cut by a third along x: points near the cut are nearly as good (0.7 mm; 1.1 if all windows count)."""
    pair = pairs.pair()
    kept = Image(pair.moving.data[:, :21], Domain.of((21, 32, 32), pair.moving.domain.affine))
    found = method(refinement={"steps": (40, 20)})
    fit(found, Pair("cut", pair.fixed, kept), 60)
    world = pairs.points(3000, 40.0)
    ahead = 16.5 - pairs.warp(world)[:, 0]  # the cut is at x = 15, the outer edge of the last voxel at 16.5
    error = (found.transform()(world) - pairs.warp(world)).norm(dim=1)
    near, far = error[(ahead > 0) & (ahead < 12)].mean(), error[ahead > 24].mean()
    assert near < 4 * far, f"{near:.2f} mm near the cut, {far:.2f} mm far from it"


@pytest.mark.parametrize("slices", [2, 4])
def test_thin_volumes(slices: int) -> None:
    """Fewer slices than a window is wide."""
    domain = Domain.of((40, 36, slices), FLAT.affine)
    images = [pairs.sampled(domain, pairs.texture, through) for through in (shifted_in_plane, None)]
    found = method(refinement={"steps": (15, 5)})
    fit(found, Pair("thin", *images), 20)
    world = transform_points(domain.voxel_to_world, domain.voxels().double())[5::13]
    assert mean_error(found, shifted_in_plane, world) < 0.6


def shifted_in_plane(world: Tensor) -> Tensor:
    return world.double() + torch.tensor([3.0, -2.0, 0.0]).double()


def planar_warp(normal: Tensor, one: Tensor, other: Tensor) -> Callable[[Tensor], Tensor]:
    def warp(world: Tensor) -> Tensor:
        a, b = world.double() @ one, world.double() @ other
        return world.double() + 4 * torch.sin(b / 18 + 0.5)[:, None] * one + 3 * torch.cos(a / 16)[:, None] * other

    return warp


@pytest.mark.parametrize("turned", [False, True])
def test_a_slice_moves_in_its_plane(monkeypatch: pytest.MonkeyPatch, turned: bool) -> None:
    monkeypatch.setitem(PRESETS, "fast", Preset((16, 16), 64, 5, Refinement(**BRIEF)))
    affine = torch.tensor(FLAT.affine).double()
    if turned:
        affine[:3] = (
            torch.from_numpy(grids.affine("oblique"))[:3, :3]
            @ torch.diag(torch.tensor([1 / 1.5, 1 / 1.2, 1 / 2.5]).double())
            @ affine[:3]
        )
    domain = centred(Domain.of(FLAT.shape, affine))
    one, other, normal = torch.nn.functional.normalize(domain.voxel_to_world[:3, :3], dim=0).T
    warp = planar_warp(normal, one, other)
    fixed, moving = (pairs.sampled(domain, pairs.texture, through) for through in (warp, None))
    points = transform_points(
        domain.voxel_to_world, domain.voxels().double().reshape(40, 36, 3)[5:-5:4, 5:-5:4].flatten(0, 1)
    )
    result = medinr.register(
        fixed, moving, preset="fast", init="none", device="cpu", fixed_points=points, moving_points=warp(points)
    )
    assert result.metrics["tre/initial_mean"] > 3
    assert result.metrics["tre/mean"] < 0.8, result.metrics["tre/mean"]
    across = result.evaluation.displacement.double() @ normal
    assert float(across.abs().max()) < 1e-4


def test_inverted_contrast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", Preset((16, 16), 64, 5, Refinement(**BRIEF)))
    pair = pairs.pair()
    inverted = replace(pair.moving, data=700 - pair.moving.data)
    result = medinr.register(pair.fixed, inverted, similarity="multimodal", preset="fast", init="none", device="cpu")
    assert isinstance(result.method, RefinedRegistration)
    world = pairs.points()
    assert (result.transform(world) - pairs.warp(world)).norm(dim=1).mean() < 0.4


def ball(radius: float) -> Tensor:
    world = transform_points(SMALL.voxel_to_world, SMALL.voxels().double())
    return (world.norm(dim=1) < radius).reshape(SMALL.shape)


@pytest.mark.parametrize("side", ["fixed", "moving"])
def test_a_lesion_distorts_the_map_unless_it_is_excluded(side: str) -> None:
    images = {s: pairs.sampled(SMALL, pairs.texture) for s in ("fixed", "moving")}
    images[side].data[0][ball(10)] += 1500
    pair = Pair("lesion", images["fixed"], images["moving"])
    world = transform_points(SMALL.voxel_to_world, ball(24).nonzero().double())
    largest = {}
    for excluded in (False, True):
        found = method(refinement={"shrinks": (1.0,), "steps": (15,), "radius": 1})
        fit(found, replace(pair, **({f"{side}_exclude": ball(14)} if excluded else {})), 15)
        largest[excluded] = mean_error(found, lambda x: x, world)
    assert largest[True] < 0.25 * largest[False] > 0.05, largest


def test_each_channel_counts() -> None:
    """The first channel is constant in one half, the second in the other."""
    images = []
    for through in (pairs.warp, None):
        channels = []
        for sign in (1.0, -1.0):
            channels.append(pairs.sampled(SMALL, half(sign), through, "image"))
        images.append(stack_channels(channels))
    found = method()
    fit(found, Pair("channels", *images), 35)
    world = 0.9 * pairs.points()
    for sign in (1.0, -1.0):
        assert mean_error(found, pairs.warp, world[sign * world[:, 0] > 5]) < 0.8


def test_unlike_images_get_wider_windows_and_a_stiffer_field() -> None:
    """One texture seen twice; and with half of another one added to the moving image, which no warp explains."""
    found = []
    for share in (0.0, 1.0):
        pair = pairs.pair(moving_domain=pairs.CUBE)
        other = torch.rand(pair.moving.data.shape, generator=torch.Generator().manual_seed(1)) * 600
        moving = Image(pair.moving.data + share * other, pair.moving.domain, "image")
        fitted = RefinedRegistration(None, Refinement((2.0, 1.0), (15, 2)), LocalNCC(), points=50)
        fit(fitted, replace(pair, moving=moving), 17)
        found.append(int(fitted.unlike))
    assert found == [0, 1]
    fitted._trainer = SimpleNamespace(global_step=16, estimated_stepping_batches=17, log_every_n_steps=10**9)  # type: ignore[assignment]
    fitted.attach(replace(pair, moving=moving))
    wide = fitted.grid()[1].similarities[0].radius
    fitted.unlike.fill_(0)
    fitted._grid = None
    assert (wide, fitted.grid()[1].similarities[0].radius) == (4, 2)
    never = RefinedRegistration(None, Refinement((2.0, 1.0), (15, 2), agreement=0.0), LocalNCC(), points=50)
    fit(never, replace(pair, moving=moving), 17)
    assert int(never.unlike) == 0


def half(sign: float) -> pairs.Warp:
    return lambda world: pairs.texture(world) * torch.sigmoid(sign * world.double()[:, 0])


def test_guides_pull_where_images_say_nothing() -> None:
    noise = [
        Image(torch.rand(1, *SMALL.shape, generator=torch.Generator().manual_seed(s)), SMALL, "noise") for s in (1, 2)
    ]
    points = pairs.points()
    shift = torch.tensor([6.0, -4.0, 2.0]).double()
    gaps = []
    for weight in (0.0, 30.0):
        found = method(refinement={"steps": (20, 5)}, landmark_weight=weight)
        guides = {"fixed_guides": points, "moving_guides": points + shift} if weight else {}
        fit(found, Pair("noise", *noise, **guides), 25)
        gaps.append(mean_error(found, lambda x: x + shift))
    assert gaps[1] < 1 and gaps[0] > 4, gaps


# -- fits that go on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [5, 9, 14])
def test_a_fit_goes_on_within_a_part_and_between_two(tmp_path: Path, cut: int) -> None:
    """The network has 6 steps, the stages 8 and 4: broken off in the network's part, in a stage, and between two."""

    def fitted(stop: int | None, resume: Path | None) -> RefinedRegistration:
        torch.manual_seed(3)
        found = method(True, {"steps": (8, 4)})
        found.pair = pairs.pair(moving_domain=SMALL)

        class Keep(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
                if trainer.global_step == stop:
                    trainer.save_checkpoint(tmp_path / "cut.ckpt")
                    trainer.should_stop = True

        train(found, 18, Keep(), resume)
        return found

    whole = fitted(None, None).state_dict()
    fitted(cut, None)
    again = fitted(None, tmp_path / "cut.ckpt").state_dict()
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert float((again[name] - value).abs().max()) <= 1e-6, name
