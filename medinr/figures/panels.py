"""Axes for planes of a volume, and what is drawn into them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from medinr.figures.files import new_figure
from medinr.figures.planes import Array, Plane
from medinr.space import Domain

_LEFT, _RIGHT, _GAP, _TOP, _BOTTOM = 0.55, 0.08, 0.05, 0.62, 0.62  # inches
_MASK = "#ffd23f"
_FOLDED = "#d400ff"


def window_of(values: Array) -> tuple[float, float]:
    low, high = (float(v) for v in np.quantile(values, [0.005, 0.995]))
    return (low, high) if high > low else (float(values.min()), float(values.max()) + 1e-6)


def shared_window(fixed: tuple[float, float], moving: tuple[float, float]) -> tuple[float, float]:
    """The fixed image's window for the moving one too, unless their intensities have little in common."""
    common = min(fixed[1], moving[1]) - max(fixed[0], moving[0])
    union = max(fixed[1], moving[1]) - min(fixed[0], moving[0])
    return fixed if common > 0.5 * union else moving


def jacobian_spread(det: Array) -> float:
    """Half width of the colour scale about 1; between 0.1 and 1, so that 0 is never out of sight for lack of need."""
    return float(np.clip(np.quantile(np.abs(det - 1), 0.99), 0.1, 1.0))


def panels(
    columns: Sequence[str],
    planes: tuple[Plane, ...],
    box: tuple[slice, slice, slice],
    spacing: tuple[float, ...],
    title: str,
    across: float = 15.0,
) -> tuple[Figure, list[list[Axes]]]:
    """Axes [plane][column] without gaps, ``across`` inches: each row as high as its plane at the columns' width."""
    sides = [(s.stop - s.start) * h for s, h in zip(box, spacing, strict=True)]
    width = (across - _LEFT - _RIGHT - (len(columns) - 1) * _GAP) / len(columns)
    scale = min(width / max(sides[p.across] for p in planes), 2.2 * width / max(sides[p.up] for p in planes))
    heights = [max(sides[p.up] * scale, 0.8) for p in planes]
    above = _TOP if title else _TOP / 2
    total = above + sum(heights) + 2 * _GAP + _BOTTOM
    figure = new_figure(across, total)
    top, axes = total - above, []
    for height in heights:
        row = []
        for column in range(len(columns)):
            left = _LEFT + column * (width + _GAP)
            row.append(figure.add_axes((left / across, (top - height) / total, width / across, height / total)))
        axes.append(row)
        top -= height + _GAP
    for ax, name in zip(axes[0], columns, strict=True):
        ax.set_title(name, fontsize=12, pad=4)
    figure.suptitle(title, fontsize=13, x=_LEFT / across, y=1 - 0.12 / total, ha="left", va="top")
    return figure, axes


def cutter(plane: Plane, centre: tuple[int, ...], box: tuple[slice, ...]) -> Callable[[Array], Array]:
    """volume -> its cut [across, up, ...] inside the view."""
    index: list[Any] = list(box)
    index[plane.normal] = centre[plane.normal]

    def cut(volume: Array) -> Array:
        flat: Array = volume[tuple(index)]  # the remaining axes keep their order: across comes before up in every plane
        return flat

    return cut


def extent_of(plane: Plane, box: tuple[slice, ...], spacing: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Outer voxel edges of the view, in mm from the first voxel centre of the volume."""
    a, u = plane.across, plane.up
    return (
        (box[a].start - 0.5) * spacing[a],
        (box[a].stop - 0.5) * spacing[a],
        (box[u].start - 0.5) * spacing[u],
        (box[u].stop - 0.5) * spacing[u],
    )


def show(ax: Axes, cut: Array, extent: Any, colours: str | Colormap, low: float, high: float) -> Any:
    return ax.imshow(
        cut.T, origin="lower", extent=extent, cmap=colours, norm=Normalize(low, high), interpolation="nearest"
    )


def show_folds(ax: Axes, det: Array, extent: Any) -> None:
    """Voxels with det J <= 0 in magenta, over what is there."""
    folded = np.ma.masked_where(det > 0, np.ones_like(det))
    ax.imshow(folded.T, origin="lower", extent=extent, cmap=ListedColormap([_FOLDED]), interpolation="nearest")


def outline(ax: Axes, cut: Array, extent: Any) -> None:
    if cut.min() < 0.5 < cut.max():
        ax.contour(cut.T, levels=[0.5], extent=extent, origin="lower", colors=_MASK, linewidths=0.7)


def draw_grid(
    ax: Axes, plane: Plane, cut: Any, along: Array, box: tuple[slice, ...], spacing: tuple[float, ...]
) -> None:
    """Lines of the fixed grid, about 18 over the longer side, at the places where phi takes them (in-plane part)."""
    moved = cut(along)
    a, u = plane.across, plane.up
    x = np.arange(box[a].start, box[a].stop)[:, None] * spacing[a] + moved[..., a]
    y = np.arange(box[u].start, box[u].stop)[None, :] * spacing[u] + moved[..., u]
    step = max(x.shape[0] * spacing[a], x.shape[1] * spacing[u]) / 18
    style: dict[str, Any] = {"color": "#35d0ff", "linewidth": 0.7, "alpha": 0.9}
    every_a, every_u = (max(1, round(step / spacing[i])) for i in (a, u))
    for i in range(0, x.shape[0], every_a):
        ax.plot(x[i], y[i], **style)
    for j in range(0, x.shape[1], every_u):
        ax.plot(x[:, j], y[:, j], **style)


def frame(row: list[Axes], plane: Plane, extent: Any, domain: Domain, centre: tuple[int, ...]) -> None:
    for ax in row:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlim(*(extent[1::-1] if plane.mirrored else extent[:2]))
        ax.set_ylim(extent[2], extent[3])
        ax.set_aspect("equal", adjustable="box")
        ax.set_facecolor("black")
    world = domain.voxel_to_world[:3, :3] @ domain.voxel_to_world.new_tensor(centre) + domain.voxel_to_world[:3, 3]
    where = f"{plane.name}\n{'xyz'[plane.normal]} = {world[plane.normal]:.0f} mm"
    row[0].set_ylabel(where, fontsize=11)
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.02, "center", "bottom"),
              (0.5, 0.98, "center", "top"))  # fmt: skip
    for letter, (x, y, ha, va) in zip(plane.ends, places, strict=True):
        row[0].text(
            x, y, letter, ha=ha, va=va, transform=row[0].transAxes, color="white", fontsize=11, fontweight="bold",
            path_effects=[withStroke(linewidth=2, foreground="black")],
        )  # fmt: skip


def bar(figure: Figure, image: Any, first: Axes, last: Axes, label: str) -> None:
    """A horizontal colour bar under the panels from ``first`` to ``last``."""
    left, right = first.get_position(), last.get_position()
    height = figure.get_figheight()
    ax = figure.add_axes((left.x0, (_BOTTOM - 0.18) / height, right.x1 - left.x0, 0.1 / height))
    bar = figure.colorbar(image, cax=ax, orientation="horizontal")
    bar.set_label(label, fontsize=10, labelpad=1)
    bar.ax.tick_params(labelsize=9, pad=1)
