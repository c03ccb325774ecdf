"""What a report shows beside the images: checkerboards and differences; deformed grid, det J and maps in mm."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from medinr.figures.panels import (
    bar,
    cutter,
    draw_grid,
    extent_of,
    frame,
    jacobian_spread,
    outline,
    panels,
    shared_window,
    show,
    show_folds,
    window_of,
)
from medinr.figures.planes import Array, Canonical, Inside, Plane, centre_of, planes_of, view_box
from medinr.space import Domain

SQUARES = 8
"""Squares of a checkerboard along the longer side of a plane."""


@dataclass(frozen=True)
class Scene:
    """A registration turned to RAS order, with the part of it that is to be seen.

    Attributes:
        fixed, before, after: in [0, 1] by their windows.
        difference: after - fixed and before - fixed in the fixed image's intensities, by those names.
        det: det J_phi.
        along: displacement in mm along the array axes [..., 3].
        uncertainty: in mm; None where the method knows of none.
        inside: the mask; nowhere true without one.
        box, centre: the view, and where its planes go through.
        domain: of the turned arrays.
    """

    fixed: Array
    before: Array
    after: Array
    difference: dict[str, Array]
    det: Array
    along: Array
    uncertainty: Array | None
    inside: Inside
    box: tuple[slice, slice, slice]
    centre: tuple[int, int, int]
    domain: Domain

    @property
    def planes(self) -> tuple[Plane, ...]:
        return planes_of(self.domain)


def scene_of(
    fixed: Tensor,
    before: Tensor,
    after: Tensor,
    det: Tensor,
    displacement: Tensor,
    domain: Domain,
    mask: Tensor | None = None,
    uncertainty: Tensor | None = None,
) -> Scene:
    """A `Scene`; arguments as for `registration_figure`, and the uncertainty in mm [X, Y, Z]."""
    turn = Canonical(domain)
    f, b, a, d = (turn.array(v.float()) for v in (fixed, before, after, det))
    inside: Inside = np.zeros(f.shape, dtype=bool) if mask is None else turn.array(mask.float()) > 0.5
    box = view_box(inside, turn.domain.spacing)
    window = window_of(f[box])
    moving_window = shared_window(window, window_of(b[box]))

    def scaled(values: Array, limits: tuple[float, float]) -> Array:
        out: Array = np.clip((values - limits[0]) / (limits[1] - limits[0]), 0, 1)
        return out

    return Scene(
        scaled(f, window),
        scaled(b, moving_window),
        scaled(a, moving_window),
        {k: np.clip(v, *window) - np.clip(f, *window) for k, v in (("before", b), ("after", a))},
        d,
        turn.along_axes(displacement.float()),
        None if uncertainty is None else turn.array(uncertainty.float()),
        inside,
        box,
        centre_of(inside),
        turn.domain,
    )


def checkerboard(one: Array, other: Array, spacing: tuple[float, float]) -> Array:
    """Squares of two planes [X, Y] in turn, `SQUARES` along the longer side in mm."""
    sides = [n * s for n, s in zip(one.shape, spacing, strict=True)]
    edge = max(sides) / SQUARES
    i, j = (np.floor((np.arange(n) + 0.5) * s / edge).astype(int) for n, s in zip(one.shape, spacing, strict=True))
    mixed: Array = np.where((i[:, None] + j) % 2 == 0, one, other)
    return mixed


def comparison_figure(scene: Scene, title: str = "") -> Figure:
    """Fixed and moving image as a checkerboard, and their difference, before and after registration."""
    names = ("checkerboard before", "checkerboard after", "difference before", "difference after")
    figure, axes = panels(names, scene.planes, scene.box, scene.domain.spacing, title, 12.0)
    differences = [scene.difference[k] for k in ("before", "after")]
    limit = max(*(float(np.quantile(np.abs(v[scene.box]), 0.99)) for v in differences), 1e-12)
    for row, plane in zip(axes, scene.planes, strict=True):
        cut, extent = cutter(plane, scene.centre, scene.box), extent_of(plane, scene.box, scene.domain.spacing)
        spacing = (scene.domain.spacing[plane.across], scene.domain.spacing[plane.up])
        for ax, moving in zip(row[:2], (scene.before, scene.after), strict=True):
            show(ax, checkerboard(cut(scene.fixed), cut(moving), spacing), extent, "gray", 0, 1)
            outline(ax, cut(scene.inside.astype(np.float32)), extent)
        shown = [show(ax, cut(v), extent, "RdBu_r", -limit, limit) for ax, v in zip(row[2:], differences, strict=True)]
        frame(row, plane, extent, scene.domain, scene.centre)
    bar(figure, shown[0], axes[-1][2], axes[-1][3], "moving − fixed, intensities")
    return figure


def deformation_figure(scene: Scene, title: str = "") -> Figure:
    """The deformed grid on the fixed image, det J, the displacement's length and, if known, the uncertainty."""
    names = ["deformed grid", "det J", "displacement", *([] if scene.uncertainty is None else ["uncertainty"])]
    figure, axes = panels(names, scene.planes, scene.box, scene.domain.spacing, title, 3.0 * len(names))
    counts = scene.inside if scene.inside.any() else np.ones_like(scene.inside)
    spread = jacobian_spread(scene.det[counts])
    length: Array = np.linalg.norm(scene.along, axis=-1)
    maps = [length] if scene.uncertainty is None else [length, scene.uncertainty]
    tops = [max(float(np.quantile(v[scene.box], 0.995)), 1e-6) for v in maps]
    for row, plane in zip(axes, scene.planes, strict=True):
        cut, extent = cutter(plane, scene.centre, scene.box), extent_of(plane, scene.box, scene.domain.spacing)
        show(row[0], cut(scene.fixed), extent, "gray", 0, 1)
        draw_grid(row[0], plane, cut, scene.along, scene.box, scene.domain.spacing)
        shown = [show(row[1], cut(scene.det), extent, "PuOr_r", 1 - spread, 1 + spread)]
        show_folds(row[1], cut(scene.det), extent)
        colours = zip(row[2:], maps, ("viridis", "inferno"), tops, strict=False)
        shown += [show(ax, cut(v), extent, name, 0, top) for ax, v, name, top in colours]
        frame(row, plane, extent, scene.domain, scene.centre)
    labels = ("det J  (≤ 0: magenta)", "|displacement|, mm", "uncertainty, mm")
    for image, ax, label in zip(shown, axes[-1][1:], labels, strict=False):
        bar(figure, image, ax, ax, label)
    return figure
