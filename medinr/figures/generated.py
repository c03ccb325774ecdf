"""Pictures of a generated atlas: what it came from, what it became, and how far apart its samples are."""

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from medinr.figures.panels import bar, cutter, draw_grid, extent_of, frame, panels, show, window_of
from medinr.figures.planes import Canonical, Inside, centre_of, planes_of, view_box
from medinr.space import Domain
from medinr.types import Mask


def generated_figure(
    general: Tensor,
    atlas: Tensor,
    displacement: Tensor,
    spread: Tensor | None,
    domain: Domain,
    mask: Mask,
    title: str = "",
) -> Figure:
    """The general atlas, the generated one, their difference, the deformation and the spread, in three planes.

    Args:
        general, atlas: [X, Y, Z].
        displacement: [X, Y, Z, 3], RAS mm.
        spread: mm [X, Y, Z], or None.
        domain: their grid.
        mask: the region that the view is for.
        title: one line above.
    """
    turn = Canonical(domain)
    one, two = (turn.array(x.float()) for x in (general, atlas))
    along = turn.along_axes(displacement.float())
    length = np.linalg.norm(along, axis=-1)
    wide = None if spread is None else turn.array(spread.float())
    inside: Inside = turn.array(mask.float()) > 0.5
    spacing = turn.domain.spacing
    box, centre, planes = view_box(inside, spacing), centre_of(inside), planes_of(turn.domain)
    columns = ["general atlas", "generated", "difference", "deformation"] + ([] if wide is None else ["spread"])
    figure, axes = panels(columns, planes, box, spacing, title, 3.0 * len(columns))
    window = window_of(one[box])
    apart = max(float(np.quantile(np.abs(two - one)[inside], 0.99)), 1e-6)
    top = max(float(np.quantile(length[inside], 0.995)), 1e-6)
    widest = 1e-6 if wide is None else max(float(np.quantile(wide[inside], 0.995)), 1e-6)
    for row, plane in zip(axes, planes, strict=True):
        cut, extent = cutter(plane, centre, box), extent_of(plane, box, spacing)
        show(row[0], cut(one), extent, "gray", *window)
        show(row[1], cut(two), extent, "gray", *window)
        gap = show(row[2], cut(two - one), extent, "PuOr_r", -apart, apart)
        motion = show(row[3], cut(length), extent, "viridis", 0, top)
        draw_grid(row[3], plane, cut, along, box, spacing)
        if wide is not None:
            doubt = show(row[4], cut(wide), extent, "magma", 0, widest)
        frame(row, plane, extent, turn.domain, centre)
    bar(figure, gap, axes[-1][2], axes[-1][2], "generated less general")
    bar(figure, motion, axes[-1][3], axes[-1][3], "mm")
    if wide is not None:
        bar(figure, doubt, axes[-1][4], axes[-1][4], "mm between samples")
    return figure
