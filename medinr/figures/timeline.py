"""Pictures of a sequence: maps of its motion, and an animation with the contours of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from torch import Tensor

from medinr.figures.files import new_figure
from medinr.figures.panels import bar, cutter, extent_of, frame, outline, panels, show, window_of
from medinr.figures.planes import Canonical, Inside, centre_of, planes_of, view_box
from medinr.io import atomic_path
from medinr.space import Domain
from medinr.types import Mask

COLOURS = ("#ffd23f", "#35d0ff", "#ff5d73", "#7bd35b", "#c48bff", "#ff9f40")
HEIGHT, BELOW, LEFT = 3.2, 0.25, 0.5  # inches


def motion_figure(
    image: Tensor, amplitude: Tensor, ventilation: Tensor, domain: Domain, mask: Mask, title: str = ""
) -> Figure:
    """The reference, the amplitude of motion in mm and the relative change of volume, in three planes.

    Args:
        image, amplitude, ventilation: [X, Y, Z].
        domain: their grid.
        mask: the region that the view and the scales are for.
        title: one line above.
    """
    turn = Canonical(domain)
    f, a, v = (turn.array(x.float()) for x in (image, amplitude, ventilation))
    inside: Inside = turn.array(mask.float()) > 0.5
    spacing = turn.domain.spacing
    box, centre, planes = view_box(inside, spacing), centre_of(inside), planes_of(turn.domain)
    figure, axes = panels(("reference", "amplitude of motion", "ventilation"), planes, box, spacing, title, 10.0)
    window = window_of(f[box])
    top = max(float(np.quantile(a[inside], 0.995)), 1e-6)
    spread = float(np.clip(np.quantile(np.abs(v[inside]), 0.98), 0.02, 1.0))
    for row, plane in zip(axes, planes, strict=True):
        cut, extent = cutter(plane, centre, box), extent_of(plane, box, spacing)
        show(row[0], cut(f), extent, "gray", *window)
        motion = show(row[1], cut(a), extent, "viridis", 0, top)
        change = show(row[2], cut(v), extent, "PuOr_r", -spread, spread)
        for ax in row:
            outline(ax, cut(inside.astype(np.float32)), extent)
        frame(row, plane, extent, turn.domain, centre)
    bar(figure, motion, axes[-1][1], axes[-1][1], "mm")
    bar(figure, change, axes[-1][2], axes[-1][2], "change of volume, share of the first")
    return figure


def save_animation(
    path: str | Path,
    frames: Sequence[tuple[Tensor, Tensor | None]],
    times: Sequence[float],
    domain: Domain,
    mask: Mask | None = None,
    fps: float = 8.0,
) -> None:
    """Write an animated GIF: the planes through the first labelled (or masked) region, with the labels' contours.

    Args:
        path: ends in .gif; whole or not at all.
        frames: image [X, Y, Z] and labels [X, Y, Z] (or None) of each time.
        times: as many.
        domain: their grid.
        mask: region to show; None: that of the labels, or everything.
        fps: frames a second.
    """
    turn = Canonical(domain)
    spacing = turn.domain.spacing
    first = None if frames[0][1] is None else turn.array(frames[0][1])
    values = [] if first is None else [int(v) for v in np.unique(first) if v != 0]
    smallest = min(values, key=lambda v: int((first == v).sum())) if first is not None and values else None
    shape = turn.domain.shape
    seen: Inside = np.ones(shape, dtype=bool) if mask is None else turn.array(mask.float()) > 0.5
    box = view_box(seen, spacing)
    # The smallest structure is the one that a picture is about: a tumour, not the body.
    centre = centre_of(seen if smallest is None else np.asarray(first == smallest))
    window = window_of(np.stack([turn.array(f.float())[box] for f, _ in (frames[0], frames[len(frames) // 2])]))
    planes = tuple(reversed(planes_of(turn.domain)))
    sides = [(s.stop - s.start) * h for s, h in zip(box, spacing, strict=True)]
    widths = [HEIGHT * min(sides[p.across] / sides[p.up], 2.0) for p in planes]
    across, tall = LEFT * len(planes) + sum(widths) + 0.1, HEIGHT + BELOW + 0.35
    figure = new_figure(across, tall)
    axes, left = [], LEFT
    for width in widths:
        axes.append(figure.add_axes((left / across, BELOW / tall, width / across, HEIGHT / tall)))
        left += width + LEFT
    cuts = [(cutter(p, centre, box), extent_of(p, box, spacing)) for p in planes]
    shown: list[Any] = []
    for ax, plane, (cut, extent) in zip(axes, planes, cuts, strict=True):
        shown.append(show(ax, cut(turn.array(frames[0][0].float())), extent, "gray", *window))
        frame([ax], plane, extent, turn.domain, centre)
    with atomic_path(path) as temporary:
        writer = PillowWriter(fps=max(1, round(fps)))
        writer.setup(figure, str(temporary), dpi=80)
        for (image, labels), time in zip(frames, times, strict=True):
            array = turn.array(image.float())
            regions = None if labels is None else turn.array(labels)
            drawn = []
            for ax, artist, (cut, extent) in zip(axes, shown, cuts, strict=True):
                artist.set_data(cut(array).T)
                for number, value in enumerate(values):
                    inside = np.zeros((0, 0)) if regions is None else cut((regions == value).astype(np.float32))
                    if inside.size and inside.min() < 0.5 < inside.max():
                        colour = COLOURS[number % len(COLOURS)]
                        style: dict[str, Any] = {"origin": "lower", "extent": extent, "linewidths": 1.0}
                        drawn.append(ax.contour(inside.T, levels=[0.5], colors=colour, **style))
            figure.suptitle(f"time {time:g}", fontsize=12, x=LEFT / across, y=1 - 0.05 / tall, ha="left", va="top")
            writer.grab_frame()
            for contour in drawn:
                contour.remove()
        writer.finish()
