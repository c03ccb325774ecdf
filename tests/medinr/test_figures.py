"""Figures: what is drawn where, on every kind of grid, and nothing global touched."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor

from medinr import figures
from medinr.errors import UserError
from medinr.figures.planes import Canonical, centre_of, view_box
from medinr.metrics import finite_difference_jacobian
from medinr.space import Domain, transform_points
from tests.medinr import grids


def world_grid(domain: Domain) -> Tensor:
    return transform_points(domain.voxel_to_world, domain.voxels().double()).reshape(*domain.shape, 3)


def scene(kind: str) -> tuple[Domain, Tensor, Tensor, Tensor]:
    """Domain, image, displacement, mask."""
    domain = grids.domain(kind)
    grid = world_grid(domain)
    middle = grid.reshape(-1, 3).mean(dim=0)
    image = ((grid - middle) @ torch.tensor([-1.0, 10.0, 100.0]).double()).float()
    u = torch.zeros(*domain.shape, 3)
    u[..., 2] = 3 * torch.sin(grid[..., 0] / 5).float()
    return domain, image, u, (grid - middle).norm(dim=-1) < 9


def draw(kind: str, masked: bool = True) -> Figure:
    domain, image, u, mask = scene(kind)
    det = finite_difference_jacobian(u, domain)
    return figures.registration_figure(image, image * 1.1, image, det, u, domain, mask if masked else None, "case 1")


def shown(figure: Figure, row: int, column: int) -> np.ndarray:
    """The picture in a panel as one sees it: rows from top to bottom, columns from left to right."""
    ax = figure.axes[7 * row + column]
    picture = np.asarray(ax.images[0].get_array()).astype(float)
    picture = picture[::-1] if ax.get_ylim()[0] < ax.get_ylim()[1] else picture
    return picture[:, ::-1] if ax.get_xlim()[0] > ax.get_xlim()[1] else picture


@pytest.mark.parametrize("kind", grids.ALL)
def test_the_patient_is_the_right_way_round(kind: str) -> None:
    """Axial: left at the right, front at the top. Coronal: the same with the head up. Sagittal: nose to the left."""
    domain, _, u, mask = scene(kind)
    right, front, top = world_grid(domain).float().unbind(-1)
    figure = figures.registration_figure(-right, front, top, torch.ones(domain.shape), u, domain, mask)
    left_column, front_column, top_column = 0, 1, 2
    for row, column in ((0, left_column), (1, left_column)):
        seen = shown(figure, row, column)
        assert seen[:, -1].mean() > seen[:, 0].mean()
    seen = shown(figure, 2, front_column)
    assert seen[:, 0].mean() > seen[:, -1].mean()
    for row, column in ((0, front_column), (1, top_column), (2, top_column)):
        seen = shown(figure, row, column)
        assert seen[0].mean() > seen[-1].mean()
    letters = [t.get_text() for row in range(3) for t in figure.axes[7 * row].texts]
    assert letters == list("RLPA") + list("RLIS") + list("APIS")


@pytest.mark.parametrize("kind", grids.RIGID)
def test_proportions_are_those_of_the_patient(kind: str) -> None:
    figure = draw(kind, masked=False)
    sides = Canonical(grids.domain(kind)).domain.sides_mm
    for row, (across, up) in enumerate(((0, 1), (0, 2), (1, 2))):
        ax = figure.axes[7 * row]
        width, height = abs(np.diff(ax.get_xlim())[0]), abs(np.diff(ax.get_ylim())[0])
        assert (width, height) == pytest.approx((sides[across], sides[up]), rel=1e-6)
        assert ax.get_aspect() == 1


@pytest.mark.parametrize("kind", grids.ALL)
def test_the_deformed_grid_is_where_phi_takes_it(kind: str) -> None:
    """The displacement along the turned axes gives world positions again."""
    domain, _, _, _ = scene(kind)
    u = torch.randn(*domain.shape, 3)
    turn = Canonical(domain)
    voxels = np.argwhere(np.ones(turn.domain.shape)).reshape(*turn.domain.shape, 3)
    moved = voxels + turn.along_axes(u) / np.array(turn.domain.spacing)
    found = transform_points(turn.domain.voxel_to_world, torch.from_numpy(moved))
    expected = turn.array(world_grid(domain) + u.double())
    assert np.abs(found.numpy() - expected).max() < 1e-4


def test_differences_share_one_symmetric_scale_and_det_is_centred_at_one() -> None:
    figure = draw("oblique")
    scales = [figure.axes[7 * row + column].images[0].get_clim() for row in range(3) for column in (3, 4)]
    assert len(set(scales)) == 1 and scales[0][0] == -scales[0][1] < 0
    low, high = figure.axes[6].images[0].get_clim()
    assert (low + high) / 2 == pytest.approx(1)
    assert np.abs(shown(figure, 0, 4)).max() == 0 < np.abs(shown(figure, 0, 3)).max()


def test_folds_are_painted(tmp_path: Path) -> None:
    domain, image, u, _ = scene("flipped")
    det = torch.ones(domain.shape)
    magenta = np.array(to_rgb("#d400ff"))

    def painted() -> int:
        figures.save_figure(figures.registration_figure(image, image, image, det, u, domain), tmp_path / "f.png")
        return int((np.abs(imread(tmp_path / "f.png")[..., :3] - magenta).max(axis=-1) < 0.02).sum())

    assert painted() == 0
    det[5:12, 5:12, 4:10] = -0.5
    assert painted() > 500


def test_centre_and_view_follow_the_mask() -> None:
    two = np.zeros((40, 30, 20), dtype=bool)
    two[5:15, 10:20, 5:15] = two[25:33, 10:20, 5:15] = True
    x, y, z = centre_of(two)
    assert two[x].sum() == 100 and (y, z) in ((14, 10), (14, 9), (15, 10))  # not between the two, where nothing is
    box = view_box(two, (1.0, 1.0, 2.0))
    assert box == (slice(1, 37), slice(6, 24), slice(3, 17))
    assert centre_of(np.zeros((4, 6, 8), dtype=bool)) == (2, 3, 4)


@pytest.mark.parametrize("masked", [True, False])
def test_size_and_ink(tmp_path: Path, masked: bool) -> None:
    figures.save_figure(draw("oblique", masked), tmp_path / "new" / "f.png")
    picture = imread(tmp_path / "new" / "f.png")
    assert picture.shape[1] == 1650 and 300 < picture.shape[0] < 2500
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["f.png"]
    assert (picture[..., :3] < 0.9).any(axis=-1).mean() > 0.2


def test_constant_and_flat_input_is_drawn_without_a_warning() -> None:
    domain = Domain.of((6, 5, 1), np.eye(4))
    flat = torch.zeros(domain.shape)
    u = torch.zeros(*domain.shape, 3)
    figures.registration_figure(flat, flat, flat, flat + 1, u, domain)


ALPHA = [0.1, 0.0, 1.0, 0.01]
SERIES = {"tre": [1.0, 3.0, 2.0, 1.5], "dice": [0.96, 0.9, 0.92, float("nan")], "folding": [0, 4, 0, 1.0],
          "bending": [0.1, 9, 0.01, 2]}  # fmt: skip


@pytest.mark.parametrize("log_x", [True, False])
def test_curves(tmp_path: Path, log_x: bool) -> None:
    figure = figures.curve_figure(ALPHA, SERIES, {"dice": 0.1, "oracle": 0.05}, log_x=log_x, title="search")
    assert [ax.get_ylabel() for ax in figure.axes] == ["TRE [mm]", "Dice", "folded points [%]", "bending energy"]
    for ax, values in zip(figure.axes, SERIES.values(), strict=True):
        x, y = ax.lines[0].get_data()
        assert list(x) == sorted(ALPHA)
        assert np.array_equal(y, np.array(values)[np.argsort(ALPHA)], equal_nan=True)
        assert [line.get_xdata()[0] for line in ax.lines[1:]] == [0.1, 0.05]
        assert ax.get_xlim()[0] < 0 < 1 < ax.get_xlim()[1]
        assert ax.get_xscale() == ("symlog" if log_x else "linear")
    assert figure.axes[3].get_yscale() == "log" and figure.axes[2].get_yscale() == "linear"
    figures.save_figure(figure, tmp_path / "c.png")
    with pytest.raises(ValueError, match="tre: expected 4 values"):
        figures.curve_figure(ALPHA, {"tre": [1.0]})


def test_losses(tmp_path: Path) -> None:
    history = {"loss": list(np.linspace(1, -1, 300)), "bending": [float("nan"), 2.0, 1.0]}
    figure = figures.loss_figure(history)
    assert [ax.get_title() for ax in figure.axes] == ["loss", "bending"]
    raw, smooth = figure.axes[0].lines
    assert np.array_equal(raw.get_ydata(), history["loss"])
    assert np.abs(np.asarray(smooth.get_ydata()) - history["loss"]).max() < 0.03  # a straight line stays one
    figures.save_figure(figure, tmp_path / "l.pdf")
    assert (tmp_path / "l.pdf").read_bytes().startswith(b"%PDF")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="writable"):
        figures.save_figure(figures.new_figure(1, 1), tmp_path / "file" / "f.png")


def test_pyplot_is_left_alone() -> None:
    code = "import sys, medinr.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
