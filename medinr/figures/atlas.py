"""Pictures of an atlas: one column for each age, and volumes of tissues over age."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from medinr.figures.files import new_figure
from medinr.figures.panels import cutter, extent_of, frame, panels, show, window_of
from medinr.figures.planes import Canonical, centre_of, planes_of, view_box
from medinr.space import Domain
from medinr.types import Mask

MOST = 9
"""Columns of a montage; of more ages it shows an even choice."""


def montage(
    volumes: Sequence[Tensor], names: Sequence[str], domain: Domain, inside: Mask, labels: bool = False, title: str = ""
) -> Figure:
    """Volumes [X, Y, Z] on one grid beside each other, in three planes.

    Args:
        volumes: intensities, or labels.
        names: as many, above the columns.
        domain: their grid.
        inside: the region that the view is for.
        labels: colour each label in place of grey values.
        title: one line above.
    """
    some = np.unique(np.linspace(0, len(volumes) - 1, min(MOST, len(volumes))).round().astype(int))
    turn = Canonical(domain)
    arrays = [turn.array(volumes[i].float()) for i in some]
    seen = turn.array(inside.float()) > 0.5
    spacing = turn.domain.spacing
    box, centre, planes = view_box(seen, spacing), centre_of(seen), planes_of(turn.domain)
    across = max(5.0, min(16.0, 2.2 * len(arrays)))
    figure, axes = panels([names[i] for i in some], planes, box, spacing, title, across)
    if labels:
        values = np.unique(np.concatenate([np.unique(a) for a in arrays]))
        arrays = [np.searchsorted(values, a).astype(np.float32) for a in arrays]
        colours, low, high = "nipy_spectral", 0.0, float(max(len(values) - 1, 1))
    else:
        colours, (low, high) = "gray", window_of(np.stack([a[box] for a in arrays]))
    for row, plane in zip(axes, planes, strict=True):
        cut, extent = cutter(plane, centre, box), extent_of(plane, box, spacing)
        for ax, array in zip(row, arrays, strict=True):
            show(ax, cut(array), extent, colours, low, high)
        frame(row, plane, extent, turn.domain, centre)
    return figure


def volume_figure(
    times: Sequence[float], volumes: Mapping[str, Sequence[float]], xlabel: str, most: int = 12
) -> Figure:
    """Volume of each tissue in ml over age; of many tissues the largest."""
    figure = new_figure(9, 5.5)
    ax = figure.add_axes((0.09, 0.12, 0.6, 0.83))
    largest = sorted(volumes, key=lambda name: -max(volumes[name]))[:most]
    styles = ("-", "--", ":")
    for i, name in enumerate(largest):
        ax.plot(times, volumes[name], styles[i // 10 % 3], marker="o", markersize=3.5, color=f"C{i % 10}", label=name)
    ax.set_xlabel(xlabel, fontsize=12)
    ax.set_ylabel("volume [ml]", fontsize=12)
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=10)
    return figure
