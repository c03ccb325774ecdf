"""A registration at a glance: three planes, seven columns."""

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
from medinr.figures.planes import Canonical, Inside, centre_of, planes_of, view_box
from medinr.space import Domain

COLUMNS = ("fixed", "moving", "warped", "moving − fixed", "warped − fixed", "deformed grid", "det J")


def registration_figure(
    fixed: Tensor,
    moving_resampled: Tensor,
    warped: Tensor,
    det: Tensor,
    displacement: Tensor,
    domain: Domain,
    mask: Tensor | None = None,
    title: str = "",
) -> Figure:
    """Axial, coronal and sagittal planes of a registration, in radiological orientation and true proportions.

    Of a single slice there is but its own plane.

    Columns: fixed, moving, warped (the mask outlined), the differences before and after on one scale, the fixed image
    with the deformed grid phi, and det J about 1 (folded voxels in magenta). Planes go through the centre of the mask.

    Args:
        fixed: fixed image [X, Y, Z].
        moving_resampled: moving image on the fixed grid before registration (or after its rigid or affine start).
        warped: moving image on the fixed grid after registration.
        det: det J_phi [X, Y, Z].
        displacement: phi(p) - p, RAS mm [X, Y, Z, 3].
        domain: the fixed grid.
        mask: region of interest, bool [X, Y, Z]; the view is cut to it.
        title: one line above the figure.
    """
    turn = Canonical(domain)
    f, m, w, d = (turn.array(v.float()) for v in (fixed, moving_resampled, warped, det))
    inside: Inside = np.zeros(f.shape, dtype=bool) if mask is None else turn.array(mask.float()) > 0.5
    along, spacing = turn.along_axes(displacement.float()), turn.domain.spacing
    box, centre = view_box(inside, spacing), centre_of(inside)
    window = window_of(f[box])
    moving_window = shared_window(window, window_of(m[box]))
    before, after = (np.clip(v, *window) - np.clip(f, *window) for v in (m, w))
    limit = float(max(np.quantile(np.abs(before[box]), 0.99), np.quantile(np.abs(after[box]), 0.99), 1e-12))
    spread = jacobian_spread(d[inside] if inside.any() else d[box])

    planes = planes_of(turn.domain)
    figure, axes = panels(COLUMNS, planes, box, spacing, title)
    for row, plane in zip(axes, planes, strict=True):
        cut = cutter(plane, centre, box)
        extent = extent_of(plane, box, spacing)
        for ax, volume, limits in zip(row, (f, m, w), (window, moving_window, moving_window), strict=False):
            show(ax, cut(volume), extent, "gray", *limits)
            outline(ax, cut(inside.astype(np.float32)), extent)
        differences = [
            show(ax, cut(v), extent, "RdBu_r", -limit, limit) for ax, v in ((row[3], before), (row[4], after))
        ]
        show(row[5], cut(f), extent, "gray", *window)
        draw_grid(row[5], plane, cut, along, box, spacing)
        volume_change = show(row[6], cut(d), extent, "PuOr_r", 1 - spread, 1 + spread)
        show_folds(row[6], cut(d), extent)
        frame(row, plane, extent, turn.domain, centre)
    bar(figure, differences[0], axes[-1][3], axes[-1][4], "difference of intensities")
    bar(figure, volume_change, axes[-1][6], axes[-1][6], "det J  (≤ 0: magenta)")
    return figure
