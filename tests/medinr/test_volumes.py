"""Whole grids: local NCC of all windows, the grid's points, and finite differences on it."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from medinr.data.pair import Pair
from medinr.losses.volumes import VolumeNCC, box_mean
from medinr.methods.grids import (
    LEAST,
    Grid,
    axis_lines,
    barrier_on_grid,
    bending_on_grid,
    box_of,
    compare_on_grid,
    make_grid,
    untouched,
    voxel_mm,
)
from medinr.space import Domain, transform_points
from tests.medinr import grids, pairs
from tests.medinr.tolerances import assert_close

SHAPE = (7, 8, 6)
ALIGNED = ("identity", "flipped", "permuted")


def volume(seed: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- local NCC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (7, 1, 6), (2, 8, 3)])
def test_box_mean_takes_the_voxels_that_exist(shape: tuple[int, int, int]) -> None:
    values = volume(0, shape).double()
    found = box_mean(values[None], 2)[0]
    assert found.shape == shape
    for at in ((0, 0, 0), (1, shape[1] - 1, 2), (shape[0] - 1, shape[1] // 2, shape[2] - 1)):
        window = values[tuple(slice(max(0, i - 2), i + 3) for i in at)]
        assert_close(found[at], window.mean())


@pytest.mark.parametrize("signed", [True, False])
def test_local_ncc_is_that_of_every_window(signed: bool) -> None:
    fixed, moved, floor = volume(1).double(), volume(2).double(), 1e-3
    weight = torch.zeros(SHAPE).double()
    total = torch.zeros(()).double()
    for at in ((2, 2, 2), (3, 4, 3), (4, 5, 2), (0, 3, 5)):  # the last one is cut off by the border
        weight[at] = 1 + at[0]
        part = tuple(slice(max(0, i - 1), i + 2) for i in at)
        f, m = fixed[part] - fixed[part].mean(), moved[part] - moved[part].mean()
        covariance = (f * m).mean()
        product = (f.square().mean() + floor) * (m.square().mean() + floor)
        total += weight[at] * (covariance / product.sqrt() if signed else covariance.square() / product)
    assert_close(VolumeNCC(fixed, 1, floor, signed)(moved, weight), 1 - total / weight.sum())


def test_local_ncc_of_equal_inverted_and_unrelated_images() -> None:
    fixed, ones = volume(1), torch.ones(SHAPE)
    signed, squared = (VolumeNCC(fixed, 2, 1e-6, signed) for signed in (True, False))
    for moved, a, b in ((fixed, 0.0, 0.0), (0.3 + 0.5 * fixed, 0.0, 0.0), (1 - fixed, 2.0, 0.0)):
        assert float(signed(moved, ones)) == pytest.approx(a, abs=1e-3)
        assert float(squared(moved, ones)) == pytest.approx(b, abs=1e-3)
    assert float(signed(volume(2), ones)) == pytest.approx(1, abs=0.2)
    assert float(squared(volume(2), ones)) > 0.9


def test_constant_windows_and_windows_without_weight_give_no_nan() -> None:
    moved = torch.full(SHAPE, 0.4, requires_grad=True)
    for weight in (torch.ones(SHAPE), torch.zeros(SHAPE)):
        loss = VolumeNCC(torch.full(SHAPE, 0.7), 2, 1e-5)(moved, weight)
        assert float(loss.detach()) == pytest.approx(1, abs=1e-2)
        [gradient] = torch.autograd.grad(loss, moved)
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("signed", [True, False])
def test_gradient_of_local_ncc(signed: bool) -> None:
    shape = (4, 3, 4)
    similarity = VolumeNCC(volume(1, shape).double(), 1, 1e-3, signed)
    moved = volume(2, shape).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: similarity(m, volume(3, shape).double()), (moved,))


# -- the grid's points ---------------------------------------------------------------------------------------------


def whole(domain: Domain) -> tuple[Tensor, Tensor]:
    return torch.zeros(3).long(), torch.tensor(domain.shape) - 1


def product(lines: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).double()


@pytest.mark.parametrize("kind", ALIGNED)
@pytest.mark.parametrize("shrink", [1.0, 2.0, 3.0])
def test_lines_go_through_voxel_centres(kind: str, shrink: float) -> None:
    domain = grids.domain(kind)
    lines = axis_lines(domain, shrink, *whole(domain))
    assert all(bool((line.diff() > 0).all()) for line in lines)
    voxels = transform_points(domain.normalised_to_voxel, product(lines))
    assert (voxels - voxels.round()).abs().max() < 1e-4
    assert bool(domain.contains_voxels(voxels, 1e-3).all())
    if kind == "identity":
        assert [len(line) for line in lines] == [math.ceil(n / shrink) for n in domain.shape]
    for axis, n in enumerate(domain.shape):  # what is left over is shared by both ends
        step = float(voxels[..., axis].unique().round().unique().diff().max())
        low, high = float(voxels[..., axis].min()), n - 1 - float(voxels[..., axis].max())
        assert abs(low - high) <= 1.01 and max(low, high) < step


def test_steps_are_alike_in_mm() -> None:
    """1.5 x 1.2 x 2.5 mm, geometric mean 1.65 mm: at 3 voxels, 4.95 mm, strides of 3, 4 and 2."""
    domain = grids.domain("flipped")
    lines = axis_lines(domain, 3.0, *whole(domain))
    steps = [float(line.diff()[0]) * domain.unit_mm for line in lines]
    assert steps == pytest.approx([4.5, 4.8, 5.0], abs=1e-3)


def test_lines_of_an_oblique_image_are_even() -> None:
    domain = grids.domain("oblique")
    lines = axis_lines(domain, 2.0, *whole(domain))
    corners = torch.cartesian_prod(*(torch.tensor([0.0, n - 1]) for n in domain.shape)).double()
    box = transform_points(domain.voxel_to_normalised, corners)
    for axis, line in enumerate(lines):
        assert bool((line.diff() > 0).all())
        assert_close(line.diff(), line.diff()[:1].expand(len(line) - 1), 1e-5)
        assert float(line.diff()[0]) * domain.unit_mm <= 2.0 * voxel_mm(domain) + 1e-4
        assert_close(line[[0, -1]].double(), torch.stack((box[:, axis].min(), box[:, axis].max())), 1e-5)


def test_thin_images_keep_their_planes() -> None:
    flat = Domain.of((18, 22, 1), grids.affine("flipped"))
    lines = axis_lines(flat, 4.0, *whole(flat))
    assert [len(line) for line in lines][2] == 1 and float(lines[2][0]) == pytest.approx(0, abs=1e-6)
    thin = Domain.of((40, 40, 6), grids.affine("identity"))
    assert len(axis_lines(thin, 4.0, *whole(thin))[2]) >= LEAST


def test_box_of_a_region_and_its_margin() -> None:
    region = torch.zeros(10, 11, 12, dtype=torch.bool)
    region[2, 4, 7] = region[5, 5, 7] = True
    low, high = box_of(region, (1, 5, 9))
    assert low.tolist() == [1, 0, 0] and high.tolist() == [6, 10, 11]


# -- one stage's grid ----------------------------------------------------------------------------------------------

CUBE = Domain.of((16, 16, 16), [[3, 0, 0, -22.5], [0, 3, 0, -22.5], [0, 0, 3, -22.5], [0, 0, 0, 1]])


def made(pair: Pair, shrink: float = 1.0, most: int = 10**6, radius: int = 1, masked: bool = False) -> Grid:
    windows = [[(-1800.0, 1800.0)], [(-1800.0, 1800.0)]]
    mask = pair.fixed_mask if masked else None
    compare = partial(VolumeNCC, radius=radius, floor=1e-8)
    return make_grid(pair, windows, pair.domain, shrink, radius, compare, mask, most)


def cube(**options: Tensor) -> Pair:
    image = pairs.sampled(CUBE, pairs.texture)
    return Pair("cube", image, image, **options)  # type: ignore[arg-type]


def compared(grid: Grid, pair: Pair, u: float = 0.0) -> tuple[float, float]:
    to_moving = pair.moving.domain.world_to_voxel @ pair.domain.normalised_to_world
    displacement = torch.full((*grid.points.shape[:3], 3), u)
    similarity, overlap = compare_on_grid(grid, displacement, to_moving, pair.moving_mask)
    return float(similarity), float(overlap)


def test_a_grid_of_voxels_holds_the_image() -> None:
    pair = cube()
    grid = made(pair)
    assert grid.points.shape == (16, 16, 16, 3) and bool((grid.weight == 1).all()) and grid.shrink == 1
    assert_close(grid.similarities[0].fixed, grid.level.fixed[0])
    assert grid.level.smoothing_mm == 0
    assert_close(torch.tensor(grid.steps), torch.full((3,), 2 / 16))
    assert compared(grid, pair) == pytest.approx((0, 1), abs=2e-3)
    similarity, overlap = compared(grid, pair, 2 * 2 / 16)  # two voxels along each axis: the last two leave the image
    assert similarity > 0.2 and overlap == pytest.approx((14 / 16) ** 3)


def test_a_large_image_gets_a_coarser_grid() -> None:
    fine, coarse = made(cube(), 2.0), made(cube(), 2.0, most=300)
    assert fine.weight.numel() == 512 and fine.shrink == 2 and fine.level.smoothing_mm == pytest.approx(3.0)
    assert coarse.weight.numel() <= 300 and coarse.shrink > 2
    assert coarse.level.smoothing_mm == pytest.approx(0.5 * coarse.shrink * 3)


def test_the_mask_bounds_the_grid_and_its_weight() -> None:
    mask = torch.zeros(CUBE.shape, dtype=torch.bool)
    mask[6:9, 7:9, 5:9] = True
    pair = cube(fixed_mask=mask)
    grid = made(pair, masked=True)
    assert grid.weight.shape == (3 + 4, 2 + 4, 4 + 4)  # two voxels more at every side: the reach of the windows
    assert float(grid.weight.sum()) == mask.sum()
    assert made(pair).weight.shape == (16, 16, 16)
    assert compared(grid, replace(pair, moving_mask=~mask))[1] == 0


def test_excluded_voxels_take_their_windows_out() -> None:
    excluded = torch.zeros(CUBE.shape, dtype=torch.bool)
    excluded[8, 8, 8] = True
    near = torch.ones(CUBE.shape)
    near[6:11, 6:11, 6:11] = 0
    assert_close(untouched(excluded, 2), near)
    assert_close(made(cube(fixed_exclude=excluded), radius=2).weight, near)
    pair = cube(moving_exclude=excluded)
    assert compared(made(pair, radius=2), pair)[1] == pytest.approx(1 - 125 / 16**3)
    assert float(untouched(torch.ones(1, 3, 2, dtype=torch.bool), 4).sum()) == 0


@pytest.mark.parametrize(("at", "seen"), [(4, 3), (5, 4)])
def test_an_excluded_plane_between_the_points_counts_too(at: int, seen: int) -> None:
    """A plane of one voxel: one of every second voxel's points, or between two of them, with their neighbours."""
    excluded = torch.zeros(CUBE.shape, dtype=torch.bool)
    excluded[at] = True
    grid = made(cube(fixed_exclude=excluded), 2.0)
    assert (grid.weight == 0).all(2).all(1).sum() == seen and float(grid.weight.mean()) == 1 - seen / 8
    moving = cube(moving_exclude=excluded)
    assert compared(made(moving, 2.0), moving)[1] == pytest.approx(1 - seen / 8)


# -- finite differences --------------------------------------------------------------------------------------------

STEPS = (0.1, 0.2, 0.25)


def field(shape: tuple[int, int, int] = (6, 5, 4)) -> Tensor:
    lines = [step * torch.arange(n).double() for n, step in zip(shape, STEPS, strict=True)]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)


def test_bending_of_known_fields() -> None:
    x = field()
    matrix = torch.tensor([[0.1, 0.4, 0], [-0.2, 0, 0.3], [0, 0.5, -0.1]]).double()
    assert float(bending_on_grid(x @ matrix + 3, STEPS)) < 1e-20
    assert_close(bending_on_grid(x.square() * torch.tensor([1.0, 0, 0]).double(), STEPS), torch.tensor(4.0).double())
    mixed = torch.stack((x[..., 0] * x[..., 1], 0 * x[..., 0], 0 * x[..., 0]), dim=-1)
    assert_close(bending_on_grid(mixed, STEPS), torch.tensor(2.0).double())
    assert_close(bending_on_grid(3 * mixed, STEPS), 9 * bending_on_grid(mixed, STEPS))
    flat = field((6, 5, 1)).square()
    assert_close(bending_on_grid(flat, (*STEPS[:2], 0.0)), torch.tensor(8.0).double())


def test_barrier_is_zero_until_the_determinant_is_small() -> None:
    x = field()
    for stretch, want in ((0.0, 0.0), (-0.85, 0.0), (-0.95, 0.05), (-1.3, 0.4)):
        u = x * torch.tensor([stretch, 0, 0]).double()
        assert_close(barrier_on_grid(u, STEPS), torch.tensor(want).double(), 1e-7)
    flat = field((6, 5, 1)) * torch.tensor([-1.3, 0, 0]).double()
    assert_close(barrier_on_grid(flat, (*STEPS[:2], 0.0)), torch.tensor(0.4).double(), 1e-7)
