"""Regions that slide along each other: windows, fields, transforms, the fit, and when `register` looks for lungs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import medinr
from medinr import io, jets
from medinr.commands.presets import PRESETS, Preset
from medinr.commands.register import fit
from medinr.data.pair import Pair
from medinr.data.sliding import breathing_regions, lung_regions
from medinr.errors import UserError
from medinr.fields import CubicLattice, Regional, RegionalTransform, as_map
from medinr.fields.dense import evaluate_dense, folded
from medinr.losses import LocalNCC
from medinr.losses.volumes import VolumeNCC
from medinr.methods import RefinedRegistration, Refinement, load_method
from medinr.space import Domain, transform_points
from tests.medinr import pairs
from tests.medinr.tolerances import assert_close

SHIFT_MM = 7.0
"""Of the half x > 0, along y; the other half rests."""
STAGES: dict[str, Any] = {
    "composed": False,
    "shrinks": (2.0, 1.0), "steps": (20, 20), "spacings": (4.0,), "radius": 2, "agreement": 0.0, "bending": 2.0,
}  # fmt: skip


def halves(world: Tensor) -> Tensor:
    """The half x > 0 slides along the plane x = 0."""
    move = torch.zeros_like(world.double())
    move[:, 1] = SHIFT_MM * (world[:, 0] > 0)
    return world.double() + move


def regions(domain: Domain = pairs.CUBE) -> Tensor:
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    return (world[:, 0] > 0).reshape(domain.shape).to(torch.uint8)


@pytest.fixture(scope="module")
def sliding() -> Pair:
    moving = pairs.sampled(pairs.CUBE, pairs.texture, name="moving")
    return Pair("halves", pairs.sampled(pairs.CUBE, pairs.texture, halves), moving, fixed_regions=regions())


@pytest.fixture(scope="module")
def fitted(sliding: Pair) -> RefinedRegistration:
    method = RefinedRegistration(None, Refinement(**STAGES), LocalNCC(), regions=2)
    fit(method, sliding, sum(method.steps))
    return method


# -- windows that see one region -----------------------------------------------------------------------------------


def test_windows_see_nothing_beyond_the_region() -> None:
    generator = torch.Generator().manual_seed(0)
    fixed, moved, other = (torch.rand(9, 8, 7, generator=generator).double() for _ in range(3))
    inside = torch.rand(9, 8, 7, generator=generator) < 0.6
    found = VolumeNCC(fixed, 1, 1e-9, inside=inside).local(moved)
    elsewhere = VolumeNCC(torch.where(inside, fixed, other), 1, 1e-9, inside=inside).local(
        torch.where(inside, moved, other)
    )
    assert_close(found, elsewhere)
    around = inside[3:6, 2:5, 4:7]
    a, b = fixed[3:6, 2:5, 4:7][around], moved[3:6, 2:5, 4:7][around]
    assert abs(found[4, 3, 5] - torch.corrcoef(torch.stack((a, b)))[0, 1]) < 1e-6


# -- the field and the transform -----------------------------------------------------------------------------------


def regional(seed: int = 0) -> Regional:
    torch.manual_seed(seed)
    field = Regional([CubicLattice((24.0,)), CubicLattice((24.0,))])
    field.cover(pairs.CUBE)
    field.divide(regions())
    field.separate()
    for part in field.fields:
        for p in part.parameters():
            torch.nn.init.normal_(p, std=0.03)
    return field


def test_each_region_has_its_own_field_and_derivatives() -> None:
    field, x = regional(), 2 * torch.rand(200, 3) - 1
    right = x[:, 0] > 0
    jet = field.jet(jets.seed(x, 2))
    for part, rows in zip(field.fields, (~right, right), strict=True):
        assert_close(field(x[rows]), part(x[rows]))
        expected = part.jet(jets.seed(x[rows], 2))
        assert_close(jet.channels[:, rows], expected.channels)
    assert 60 < int(right.sum()) < 140
    x.requires_grad_(True)
    (slope,) = torch.autograd.grad(field(x).sum(), x)
    assert bool(slope.isfinite().all()) and float(slope.abs().max()) > 0


def test_until_they_part_one_field_holds_everywhere() -> None:
    field = Regional([CubicLattice((24.0,)), CubicLattice((24.0,))])
    field.cover(pairs.CUBE)
    field.divide(regions())
    first, second = field.fields
    torch.nn.init.normal_(next(iter(first.parameters())))
    x = 2 * torch.rand(50, 3) - 1
    assert_close(field(x), first(x))
    assert float(second(x).detach().abs().max()) == 0
    field.separate()
    assert_close(second(x), first(x))
    torch.nn.init.zeros_(next(iter(first.parameters())))
    field.separate()  # a second time does nothing
    assert float(second(x).detach().abs().max()) > 0


@pytest.mark.parametrize(
    "labels", [torch.zeros(3, 3, 3, dtype=torch.uint8), torch.full(pairs.CUBE.shape, 2, dtype=torch.uint8)]
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor) -> None:
    field = Regional([CubicLattice((24.0,)), CubicLattice((24.0,))])
    field.cover(pairs.CUBE)
    with pytest.raises(ValueError, match="labels: expected"):
        field.divide(labels)


def test_transform_of_two_regions_on_a_grid_and_back(fitted: RefinedRegistration) -> None:
    transform = fitted.transform()
    assert isinstance(transform, RegionalTransform)
    domain = pairs.CUBE
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    dense = evaluate_dense(transform, domain)
    assert dense.error_mm > 0  # by splines, not voxel by voxel, although the displacement jumps
    gap = dense.displacement.reshape(-1, 3).double() - (transform(world) - world)
    assert float(gap.norm(dim=1).max()) < 0.05
    assert folded(transform, domain, dense.det, None, dense.error_det) == 0
    points = pairs.points()
    back, residual = transform.inverse(transform(points))
    assert float(residual.max()) < 1e-3
    assert float((back - points).norm(dim=1).max()) < 0.02


# -- the fit -------------------------------------------------------------------------------------------------------


def test_each_region_has_its_own_last_lattice(sliding: Pair) -> None:
    """Composed last stages, one after the other: the second does not touch what the first has found."""
    method = RefinedRegistration(None, Refinement(**{**STAGES, "composed": True}), LocalNCC(), regions=2)
    fit(method, sliding, sum(method.steps))
    points = pairs.points(400, 33.0)
    error = (method.transform()(points) - halves(points)).norm(dim=1)
    assert float(error.mean()) < 0.5
    first, second = (torch.cat([level.detach().flatten() for level in last.levels]) for last in method.lasts)
    assert first.any() and second.any() and not torch.equal(first, second)


def test_sliding_halves_are_found_up_to_their_border(sliding: Pair, fitted: RefinedRegistration) -> None:
    points = pairs.points(400, 33.0)
    smooth = RefinedRegistration(None, Refinement(**STAGES), LocalNCC())
    fit(smooth, replace(sliding, fixed_regions=None), sum(smooth.steps))
    errors = [(method.transform()(points) - halves(points)).norm(dim=1) for method in (fitted, smooth)]
    near = (points[:, 0].abs() < 9) & (points[:, 0].abs() > 1.5)
    assert float(errors[0].mean()) < 0.25 and float(errors[0][near].mean()) < 0.35
    assert float(errors[1][near].mean()) > 4 * float(errors[0][near].mean())


def test_stages_of_each_region(fitted: RefinedRegistration) -> None:
    assert fitted.parts == [(0, 0), (1, 0), (1, 1)] and fitted.steps == [20, 20, 20]
    one = RefinedRegistration(None, Refinement(**STAGES), LocalNCC())
    assert one.parts == [(0, 0), (1, 0)] and one.steps == [20, 20]


def test_checkpoint_keeps_the_regions(fitted: RefinedRegistration, tmp_path: Path) -> None:
    fitted.save(tmp_path / "sliding.ckpt")
    again = load_method(tmp_path / "sliding.ckpt")
    points = pairs.points()
    assert_close(again.transform()(points), fitted.transform()(points))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"fixed_regions": None}, "found none"), ({"fixed_regions": 3 * regions()}, "found labels up to 3")],
)
def test_a_pair_without_the_regions_is_refused(sliding: Pair, changes: dict[str, Any], said: str) -> None:
    method = RefinedRegistration(None, Refinement(**STAGES), LocalNCC(), regions=2)
    with pytest.raises(UserError, match=said):
        method.attach(replace(sliding, **changes))


def test_a_mask_that_is_not_used_as_one_makes_two_regions(sliding: Pair) -> None:
    mask = regions() > 0
    masked = replace(sliding, fixed_regions=None, fixed_mask=mask)
    method = RefinedRegistration(None, Refinement(**STAGES), LocalNCC(), use_mask=False, regions=2)
    method.attach(masked)
    assert torch.equal(method.regional[0].labels > 0, mask)
    with pytest.raises(UserError, match="found none"):
        RefinedRegistration(None, Refinement(**STAGES), LocalNCC(), regions=2).attach(masked)


def test_one_stage_cannot_part_the_regions() -> None:
    with pytest.raises(UserError, match="two or more stages"):
        RefinedRegistration(None, Refinement((1.0,), (10,), agreement=0.0), LocalNCC(), regions=2)


# -- register ------------------------------------------------------------------------------------------------------


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", Preset((16, 16), 64, 10, Refinement(**STAGES)))


def test_register_takes_a_label_file(sliding: Pair, brief: None, tmp_path: Path) -> None:
    file = tmp_path / "regions.nii.gz"
    io.write_image(file, 5 + 2 * sliding.fixed_regions.short(), sliding.domain)  # type: ignore[union-attr]
    found = medinr.register(sliding.fixed, sliding.moving, tmp_path / "out", sliding=file, preset="fast", init="none")
    points = pairs.points()
    assert float((found.transform(points) - halves(points)).norm(dim=1).mean()) < 0.3
    again = load_method(tmp_path / "out" / "transform.ckpt").transform()
    assert_close(again(points), found.transform(points))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sliding": "lungs", "uncertainty": True}, "--sliding lungs: expected local NCC"),
        ({"sliding": "lungs", "similarity": "mse"}, "--sliding lungs: expected local NCC"),
        ({"sliding": "lungs"}, "expected a thorax CT with lungs"),
        ({"sliding": "there_is_none.nii.gz"}, "there_is_none.nii.gz"),
    ],
)
def test_a_mistake_is_said(sliding: Pair, brief: None, options: dict[str, Any], said: str) -> None:
    with pytest.raises((UserError, FileNotFoundError), match=said):
        medinr.register(sliding.fixed, sliding.moving, preset="fast", init="none", **options)


def test_a_label_file_is_not_overwritten(sliding: Pair, brief: None, tmp_path: Path) -> None:
    file = tmp_path / "warped.nii.gz"
    io.write_image(file, sliding.fixed_regions.short(), sliding.domain)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="expected to overwrite no input"):
        medinr.register(sliding.fixed, sliding.moving, tmp_path, sliding=file, preset="fast", init="none")


def test_one_region_is_no_sliding(sliding: Pair, brief: None, tmp_path: Path) -> None:
    file = tmp_path / "regions.nii.gz"
    io.write_image(file, torch.ones(sliding.domain.shape, dtype=torch.int16), sliding.domain)
    with pytest.raises(UserError, match="expected labels of 2 to 8 regions, found 1"):
        medinr.register(sliding.fixed, sliding.moving, sliding=file, preset="fast", init="none")


# -- where `auto` finds lungs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chest(shared: Path) -> Pair:
    images = [io.read_image(shared / "data" / "popi_4dct" / f"popi_T{phase}.nii.gz") for phase in (10, 60)]
    return Pair("popi", *images)


@pytest.mark.parametrize("offset", [0.0, 1024.0])
def test_chest_ct_is_recognised_with_either_offset(chest: Pair, offset: float) -> None:
    fixed, moving = (replace(i, data=i.data + offset) for i in (chest.fixed, chest.moving))
    found = breathing_regions(replace(chest, fixed=fixed, moving=moving))
    assert found is not None
    expected = lung_regions(chest.fixed)
    assert 2 * float((found * expected).sum()) / float((found.int() + expected.int()).sum()) > 0.98


def test_other_images_are_not_taken_for_a_chest(chest: Pair, sliding: Pair, shared: Path) -> None:
    assert breathing_regions(sliding) is None
    assert breathing_regions(replace(chest, moving=replace(chest.moving, data=chest.moving.data.abs()))) is None
    away = torch.eye(4, dtype=torch.float64)
    away[0, 3] = 250.0
    assert breathing_regions(replace(chest, start=away)) is None
    files = sorted((shared / "data" / "mouse_fvb" / "template").glob("*.nii.gz"))[:2]
    assert breathing_regions(Pair("mouse", *(io.read_image(file) for file in files))) is None
    slabs = sorted((shared / "data" / "adult_t1_slabs").glob("*_T1w.nii.gz"))[:2]
    assert breathing_regions(Pair("slabs", *(io.read_image(file) for file in slabs))) is None


def test_regions_of_a_large_image_are_those_of_the_image(chest: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = lung_regions(chest.fixed)
    monkeypatch.setattr("medinr.data.sliding.FINE_VOXELS", 1000)
    monkeypatch.setattr("medinr.data.sliding.FINE_MM", 10.0)
    coarse = lung_regions(chest.fixed)
    assert coarse.shape == fine.shape
    assert 2 * float((coarse * fine).sum()) / float((coarse.int() + fine.int()).sum()) > 0.9


def test_regional_map_is_a_displacement_map() -> None:
    field = regional()
    x = 2 * torch.rand(20, 3) - 1
    assert_close(as_map(field)(x), x + field(x))
