"""One self-contained HTML page about a registration: pictures inline, no file beside it, no network."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from medinr.figures.html import (
    figure_png,
    fill,
    grey_png,
    inline,
    numbers,
    plain,
    text,
    value_table,
    warning_list,
)
from medinr.figures.maps import Scene, comparison_figure, deformation_figure
from medinr.figures.panels import cutter
from medinr.figures.planes import Plane

SLICES = 9
"""At most so many cuts of a plane can be leafed through."""
PIXELS = 320
"""A cut has at most about so many along a side: pages are sent by mail."""

Metrics = Mapping[str, float]
SUMMARY = (
    ("TRE, mean", "mm", "tre/initial_mean", "tre/mean"),
    ("TRE, 95th percentile", "mm", "", "tre/p95"),
    ("Dice, mean", "", "dsc/initial_mean", "dsc/mean"),
    ("RMS difference of intensities", "", "image/rms_before", "image/rms"),
    ("structural similarity", "", "", "image/ssim"),
    ("folded voxels", "%", "", "folding/percent"),
    ("det J, smallest", "", "", "folding/det_min"),
    ("det J, largest", "", "", "folding/det_max"),
    ("displacement, mean", "mm", "", "displacement/mean_mm"),
    ("displacement, largest", "mm", "", "displacement/max_mm"),
    ("uncertainty, mean", "mm", "", "uncertainty/mean_mm"),
    ("uncertainty, 95th percentile", "mm", "", "uncertainty/p95_mm"),
)
"""Name, unit, and the metrics before (after the rigid or affine start alone) and after registration."""
EXPLAINED = (
    "det J is the local change of volume of the whole transform: 1 none, above 1 expansion from the fixed to the "
    "moving image, 0 or less folding, which no tissue does. The displacement includes the start."
)


def report_page(
    scene: Scene,
    metrics: Metrics,
    start: Tensor,
    title: str,
    settings: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """The page as HTML 5.

    Args:
        scene: what is drawn (`scene_of`).
        metrics: names and numbers of an evaluation.
        start: rigid or affine start, fixed to moving world, RAS mm [4, 4].
        title: the case's name; names may come from anywhere: all text is escaped.
        settings: names and values of what was asked for.
        warnings: further lines to those that the metrics themselves call for.
    """
    lines = [*warnings, *doubts(metrics)]
    shown = {
        "title": text(f"Registration of {title}"),
        "subtitle": text(_subtitle(scene)),
        "warnings": warning_list(lines),
        "summary": summary_table(metrics),
        "views": "\n".join(_view(scene, plane) for plane in scene.planes),
        "comparison": inline(figure_png(comparison_figure(scene))),
        "deformation": inline(figure_png(deformation_figure(scene))),
        "deformation_note": text(EXPLAINED),
        "start_note": text(start_in_words(start)),
        "start": text("\n".join("  ".join(f"{v:11.5f}" for v in row) for row in start.tolist())),
        "settings": value_table([(k, plain(v)) for k, v in (settings or {}).items()]),
        "metrics": value_table([(k, plain(v)) for k, v in metrics.items()]),
    }
    return fill("report.html", **shown)


def doubts(metrics: Metrics) -> list[str]:
    """What a careful reader of the numbers would ask about."""
    found = []
    if metrics.get("folding/percent", 0) > 0:
        found.append(
            f"{metrics['folding/percent']:.3g} % of the voxels fold (det J ≤ 0): the map is not invertible there."
        )
    if metrics.get("tre/mean", 0) > metrics.get("tre/initial_mean", math.inf):
        found.append("The landmarks are farther from each other than before: do not use this registration.")
    if metrics.get("dsc/mean", 1) < metrics.get("dsc/initial_mean", 0):
        found.append("The labels overlap less than before: do not use this registration.")
    if metrics.get("uncertainty/trusted", 1) < 1:
        found.append("The uncertainty is above what a registration to be trusted has.")
    if not metrics.keys() & {"tre/mean", "dsc/mean"}:
        found.append(
            "No landmarks and no labels were given: nothing here measures the error. Like intensities do not prove "
            "that what lies together belongs together."
        )
    return found


def start_in_words(start: Tensor) -> str:
    """Rotation, translation and scale of an affine matrix [4, 4], by its polar decomposition."""
    left, scales, right = np.linalg.svd(start[:3, :3].double().numpy())
    turn = math.degrees(math.acos(float(np.clip((np.trace(left @ right) - 1) / 2, -1, 1))))
    mm = float(np.linalg.norm(start[:3, 3].double().numpy()))
    if np.allclose(start.double().numpy(), np.eye(4)):
        return "The identity: the images were taken to lie as their headers say."
    return (
        f"Fixed to moving world, RAS mm: a turn of {turn:.1f} degrees, scales from {scales.min():.3f} to "
        f"{scales.max():.3f}, and a shift of the world's origin by {mm:.1f} mm."
    )


def summary_table(metrics: Metrics) -> str:
    rows = []
    for name, unit, before, after in SUMMARY:
        if after in metrics:
            cells = [f"{metrics[k]:.4g}" if k in metrics else "" for k in (before, after)]
            rows.append(f"<tr><td>{text(name)}</td>{numbers(*cells)}<td>{text(unit)}</td></tr>")
    head = "<tr><th></th><th class=number>before</th><th class=number>registered</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def slices_of(scene: Scene, plane: Plane) -> list[int]:
    """Evenly spaced cuts inside the view; the middle one of them is its centre, where that is one of all cuts."""
    part = scene.box[plane.normal]
    n = part.stop - part.start
    if n <= SLICES:
        return list(range(part.start, part.stop))
    half, centre = SLICES // 2, scene.centre[plane.normal]
    step = max(1, min(centre - part.start, part.stop - 1 - centre) // half)
    return [k for k in range(centre - half * step, centre + half * step + 1, step) if part.start <= k < part.stop]


def _view(scene: Scene, plane: Plane) -> str:
    """One plane: all its cuts as images on top of each other, of which the page's script shows two."""
    at = slices_of(scene, plane)
    chosen = min(range(len(at)), key=lambda i: abs(at[i] - scene.centre[plane.normal]))
    images, places = [], []
    for i, k in enumerate(at):
        centre = [*scene.centre]
        centre[plane.normal] = k
        cut = cutter(plane, tuple(centre), scene.box)
        point = scene.domain.voxel_to_world[:3, :3] @ scene.domain.voxel_to_world.new_tensor(centre)
        world = point + scene.domain.voxel_to_world[:3, 3]
        places.append(f"{plane.name}, {'xyz'[plane.normal]} = {world[plane.normal]:.1f} mm")
        for name in ("fixed", "before", "after"):
            picture = cut(getattr(scene, name)).T[::-1]
            picture = picture[:, ::-1] if plane.mirrored else picture
            stride = math.ceil(max(picture.shape) / PIXELS)
            role = {"fixed": "under", "after": "over"}.get(name, "") if i == chosen else ""
            images.append(
                f'<img alt="" class="{role}" data-image="{name}" data-slice="{i}" '
                f'src="{inline(grey_png(picture[::stride, ::stride]))}">'
            )
    across, up = ((scene.box[a].stop - scene.box[a].start) * scene.domain.spacing[a] for a in (plane.across, plane.up))
    sides = ("left:4px;top:45%", "right:4px;top:45%", "left:48%;bottom:2px", "left:48%;top:2px")
    letters = "".join(f'<b style="{side}">{end}</b>' for end, side in zip(plane.ends, sides, strict=True))
    several = f'<input type="range" min="0" max="{len(at) - 1}" value="{chosen}" aria-label="slice">'
    return "".join(
        (
            f'<div class="view" style="flex: {across:.4g} 1 0">',
            f'<div class="stack" style="aspect-ratio: {across:.4g} / {up:.4g}">{"".join(images)}{letters}</div>',
            several if len(at) > 1 else "",
            f'<div class="where" data-at="{text(";".join(places))}">{text(places[chosen])}</div></div>',
        )
    )


def _subtitle(scene: Scene) -> str:
    shape = " × ".join(map(str, scene.domain.shape))
    return f"fixed grid {shape} voxels of {' × '.join(f'{s:.3g}' for s in scene.domain.spacing)} mm (axes R, A, S)"
