"""Anatomy of the thorax phantom at end-inspiration: Hounsfield values in the body frame (see thorax_motion).

Two volumes are drawn, because the chest's contents and its wall move separately: ``contents`` (lungs, mediastinum,
upper abdomen) continues beyond the pleura, ``wall`` continues inside it, and the phases join them at the pleura.
Distances are in body millimetres and only approximately Euclidean: they set how soft an edge is, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medinr.phantoms.thorax_canvas import Canvas, cover, drawn, ellipsoid, over, smooth_max, texture
from medinr.phantoms.thorax_motion import cavity_axes, cavity_coordinates, cavity_level, smoothstep
from medinr.phantoms.thorax_tree import Tree, grow_tree, polyline_tubes, tree_tubes

Array = NDArray[np.floating[Any]]
Volume = NDArray[np.float32]

LOBES = ("right upper", "right middle", "right lower", "left upper", "left lower")


@dataclass(frozen=True)
class Habitus:
    """What differs between cases: organ sizes and places, mm of the body frame."""

    heart: tuple[float, float, float]
    heart_size: float
    dome_right: float
    dome_left: float
    fat: float
    stomach: tuple[float, float, float]


def case_habitus(case: int, seed: int) -> Habitus:
    """The habitus of a case."""
    rng = np.random.default_rng([seed, case, 12])
    return Habitus(
        heart=(15.0 + rng.uniform(-4, 4), -28.0 + rng.uniform(-3, 3), -36.0 + rng.uniform(-5, 5)),
        heart_size=float(rng.uniform(0.92, 1.06)),
        dome_right=float(rng.uniform(-62, -54)),
        dome_left=float(rng.uniform(-74, -66)),
        fat=float(rng.uniform(6, 12)),
        stomach=(46.0 + rng.uniform(-4, 4), -14.0 + rng.uniform(-5, 5), -114.0 + rng.uniform(-4, 4)),
    )


# ------------------------------------------------------------------------------------------------- level functions


def diaphragm_height(x: Array, y: Array, z: Array, habitus: Habitus) -> Array:
    """Height of the diaphragm above (x, y), mm: two domes that fall off towards the costophrenic recess."""
    side = np.tanh(x / 16.0)
    dome = 0.5 * (1 - side) * habitus.dome_right + 0.5 * (1 + side) * habitus.dome_left
    flank = 0.0062 * (np.abs(x) - 42.0) ** 2 + np.where(y > -5, 0.0056, 0.0040) * (y + 5.0) ** 2
    X, Y = cavity_coordinates(x, y, z)
    recess = 26.0 * smoothstep((cavity_level(X, Y) - 0.62) / 0.48)
    return np.asarray(dome - flank - recess)


def mediastinum_distance(x: Array, y: Array, z: Array, habitus: Habitus) -> Array:
    """Signed distance of the mediastinum (heart, great vessels, spine's front, junction lines)."""
    size = 1.06 * habitus.heart_size
    heart = ellipsoid(x - 0.25 * (z + 36), y, z, habitus.heart, (50 * size, 40 * size, 47 * size))
    vessels = ellipsoid(x, y, z, (0.0, -6.0, 34.0), (33.0, 30.0, 62.0))
    column = ellipsoid(x, y, z, (2.0, 6.0, 70.0), (23.0, 34.0, 90.0))
    aorta = np.hypot(x - 19.0, y - 38.0) - 14.0
    back = np.maximum(np.abs(x) - 12.0, 8.0 - y)
    # Fat behind the sternum narrows to the line where the lungs touch.
    _, b, c = cavity_axes(z)
    fat = 11.0 * smoothstep((c - 0.62 * b - y) / 30.0) + 5.0 * smoothstep((z - 40.0) / 40.0)
    front = np.maximum(np.abs(x - 3.0 - 0.05 * (z - 20.0)) - 2.0 - fat, y + 10.0)
    hila = np.minimum(
        ellipsoid(x, y, z, (-30.0, 10.0, 14.0), (18.0, 17.0, 22.0)),
        ellipsoid(x, y, z, (31.0, 13.0, 18.0), (18.0, 17.0, 22.0)),
    )
    d = -smooth_max(-heart, -vessels, 10.0)
    for other in (column, aorta, back, hila):
        d = -smooth_max(-d, -other, 8.0)
    return np.asarray(-smooth_max(-d, -front, 3.0))


def lung_distance(x: Array, y: Array, z: Array, habitus: Habitus) -> Array:
    """Signed distance of the lungs (negative inside) before the cavity's wall cuts them off."""
    apex = 112.0 - 0.020 * (np.abs(x) - 38.0) ** 2 - 0.014 * (y - 20.0) ** 2
    base = 0.8 * (diaphragm_height(x, y, z, habitus) - z)
    d = smooth_max(base, 0.8 * (z - apex), 6.0)
    return smooth_max(d, -mediastinum_distance(x, y, z, habitus), 5.0)


def in_lung(points: Array, habitus: Habitus, margin: float = 0.0) -> NDArray[np.bool_]:
    """Whether points [..., 3] lie in a lung, at least ``margin`` mm from its surface."""
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    X, Y = cavity_coordinates(x, y, z)
    a, b, _ = cavity_axes(z)
    from_wall = (1.0 - cavity_level(X, Y)) * np.minimum(a, b)
    return np.asarray((lung_distance(x, y, z, habitus) < -margin) & (from_wall > margin))


def fissures(x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Signed distances of the oblique fissure (positive above: upper lobe) and the right horizontal fissure."""
    oblique = (z - (-6.0 + 0.95 * y - 0.0025 * y * y + 0.06 * np.abs(x))) / 1.38
    horizontal = z - (8.0 + 0.0022 * (np.abs(x) - 55.0) ** 2 + 0.12 * (y + 20.0))
    return oblique, horizontal


def lobe_of(points: Array) -> NDArray[np.int64]:
    """Index into LOBES of points [..., 3] inside the lungs."""
    oblique, horizontal = fissures(points[..., 0], points[..., 1], points[..., 2])
    right = np.where(oblique < 0, 2, np.where(horizontal < 0, 1, 0))
    return np.where(points[..., 0] < 0, right, np.where(oblique < 0, 4, 3))


# ------------------------------------------------------------------------------------------------- trees


@dataclass(frozen=True)
class Trees:
    """The vessels (arteries and veins of every lobe) and the bronchi of every lobe."""

    vessels: tuple[Tree, ...]
    airways: tuple[Tree, ...]


# Where the trees of a lobe begin, per lobe: artery, vein, bronchus.
_ROOTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "right upper": ((-32, 4, 26), (-30, -8, 12), (-30, 17, 26)),
    "right middle": ((-36, 4, 8), (-28, -6, 0), (-34, 12, 4)),
    "right lower": ((-37, 14, 4), (-26, 18, -8), (-33, 24, 0)),
    "left upper": ((34, 8, 30), (30, -6, 16), (33, 15, 20)),
    "left lower": ((37, 20, 14), (27, 16, -6), (33, 27, 4)),
}


def case_trees(case: int, seed: int, habitus: Habitus) -> Trees:
    """Grow the trees of a case: several thousand vessel terminals, 10 to 14 generations."""
    rng = np.random.default_rng([seed, case, 13])
    box = np.array([[-105.0, -85.0, -118.0], [105.0, 90.0, 112.0]])
    points = rng.uniform(box[0], box[1], size=(60_000, 3))
    points = points[in_lung(points, habitus, margin=2.5)]
    lobes = lobe_of(points)
    vessels, airways = [], []
    for index, name in enumerate(LOBES):
        seeds = points[lobes == index]
        count = round(0.15 * len(seeds))
        for start, root in enumerate(_ROOTS[name][:2]):
            part = seeds[start * count : (start + 1) * count]
            vessels.append(grow_tree(np.array(root, float), part.mean(0) - root, part, rng))
        bronchus = np.array(_ROOTS[name][2], float)
        few = seeds[2 * count : 2 * count + max(8, count // 20)]
        airways.append(grow_tree(bronchus, few.mean(0) - bronchus, few, rng, terminal_radius=1.0, exponent=2.6))
    return Trees(tuple(vessels), tuple(airways))


def _great_vessels() -> Array:
    parts = [
        polyline_tubes([(-22, -14, 105), (-23, -12, 60), (-22, -10, 10)], (7, 8.5, 9)),
        polyline_tubes([(-22, 6, -30), (-21, 9, -70), (-17, 16, -170)], (11, 11, 12)),
        polyline_tubes([(0, -20, -8), (-12, -24, 20), (-10, -20, 46)], (14, 14.5, 14)),
        polyline_tubes([(-10, -20, 46), (-2, -8, 60), (10, 14, 62), (19, 34, 50)], (14, 13, 12, 12)),
        polyline_tubes([(19, 34, 50), (19, 39, 20), (18, 39, -60), (10, 41, -170)], (12, 11.5, 11, 10)),
        polyline_tubes([(10, -34, -4), (12, -24, 16), (16, -6, 27)], (13, 13, 12)),
        polyline_tubes([(14, -8, 27), (-8, 2, 24), (-33, 6, 20)], (11, 10, 8)),
        polyline_tubes([(16, -6, 27), (28, 8, 27), (36, 15, 20)], (11, 9, 7.5)),
        polyline_tubes([(-8, -14, 60), (-14, -8, 84), (-20, -4, 130)], (6, 5.5, 5)),
        polyline_tubes([(2, -4, 62), (10, -2, 90), (16, -2, 130)], (4.5, 4.2, 4)),
        polyline_tubes([(10, 10, 64), (22, 12, 88), (34, 8, 130)], (5.5, 5.2, 5)),
        polyline_tubes([(-20, -18, 84), (6, -26, 80), (24, -16, 110)], (6, 6, 5.5)),
        polyline_tubes([(24, -8, 8), (4, 14, 0), (-24, 4, 2)], (8, 15, 8)),
        polyline_tubes([(28, 14, -6), (4, 17, -8), (-24, 16, -8)], (7, 14, 7)),
    ]
    return np.concatenate(parts)


def _central_airways() -> Array:
    parts = [
        polyline_tubes([(0, 8, 135), (0, 14, 80), (2, 22, 42)], (8.0, 8.2, 8.4)),
        polyline_tubes([(2, 22, 42), (-14, 22, 32), (-29, 19, 22)], (7.2, 6.8, 5.6)),
        polyline_tubes([(2, 22, 42), (18, 24, 30), (33, 23, 15)], (6.8, 6.2, 5.2)),
        polyline_tubes([(-25, 20, 24), (-30, 17, 26)], 4.6),
        polyline_tubes([(-29, 19, 22), (-32, 20, 10), (-33, 24, 0)], (5.4, 5.0, 4.4)),
        polyline_tubes([(-31, 20, 12), (-34, 12, 4)], 3.6),
        polyline_tubes([(31, 23, 17), (33, 15, 20)], 4.6),
        polyline_tubes([(33, 23, 15), (33, 27, 4)], 4.6),
    ]
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------- drawing


def draw_contents(canvas: Canvas, habitus: Habitus, trees: Trees, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """Draw the contents of the chest.

    Returns:
        HU volume, and the share of each voxel that is aerated lung (its density changes with its volume).
    """
    fine = texture(canvas.shape, canvas.step, 0.9, rng)
    coarse = texture(canvas.shape, canvas.step, 7.0, rng)
    vessels = drawn(canvas, [tree_tubes(t) for t in trees.vessels])
    great = drawn(canvas, [_great_vessels()])
    airway_groups = [tree_tubes(t) for t in trees.airways]
    wall = np.maximum(drawn(canvas, airway_groups, 0.7), drawn(canvas, [_central_airways()], 1.6))
    lumen = np.maximum(drawn(canvas, airway_groups, -0.15), drawn(canvas, [_central_airways()]))
    hu = np.empty(canvas.shape, dtype=np.float32)
    air = np.empty(canvas.shape, dtype=np.float32)
    for first in range(0, canvas.shape[2], 16):
        last = min(first + 16, canvas.shape[2])
        part = np.s_[:, :, first:last]
        x, y, z = canvas.slab(first, last)
        soft = _mediastinum(x, y, z, habitus, canvas.edge, coarse[part], great[part])
        below = _abdomen(x, y, z, habitus, canvas.edge, fine[part], coarse[part])
        muscle = diaphragm_height(x, y, z, habitus) - z
        # The heart rests on the diaphragm: what is below its height is abdomen, the great vessels pass through.
        values = over(soft, below, cover(-0.8 * muscle, canvas.edge) * (1.0 - great[part]))
        lung = cover(lung_distance(x, y, z, habitus), canvas.edge)
        values = over(values, _parenchyma(x, y, z, canvas.edge, fine[part], coarse[part]), lung)
        values = over(values, 42.0, vessels[part])
        values = over(values, 20.0, wall[part])
        values = over(values, -985.0, lumen[part])
        hu[part] = values
        air[part] = lung * (1.0 - vessels[part]) * (1.0 - wall[part])
    return hu, air


def _parenchyma(x: Array, y: Array, z: Array, edge: float, fine: Volume, coarse: Volume) -> Array:
    # Supine: the lung is denser towards the back.
    values = -868.0 + 0.42 * y + 22.0 * fine + 14.0 * coarse + 0.0 * x + 0.0 * z
    oblique, horizontal = fissures(x, y, z)
    right_upper = (x < 0) & (oblique > 0)
    line = np.maximum(
        cover(np.abs(oblique) - 0.45, edge), np.where(right_upper, cover(np.abs(horizontal) - 0.4, edge), 0)
    )
    return over(values, values + 420.0, line * min(1.0, 0.9 / edge))


def _mediastinum(x: Array, y: Array, z: Array, habitus: Habitus, edge: float, coarse: Volume, great: Volume) -> Array:
    values: Array = np.asarray(-70.0 + 45.0 * coarse) + 0.0 * (x + y + z)
    size = habitus.heart_size
    sac = ellipsoid(x - 0.25 * (z + 36), y, z, habitus.heart, (50 * size, 40 * size, 47 * size))
    values = over(values, 35.0, cover(sac - 2.5, edge))
    values = over(values, -80.0, cover(sac - 1.0, edge))
    groove = 2.5 + 2.0 * coarse
    values = over(values, 46.0 + 4.0 * coarse, cover(sac + groove, edge))
    # Neck and shoulders above the apices: muscle with fat planes.
    upper = smoothstep((z - 92.0) / 14.0)
    values = over(values, np.where(coarse > -0.5, 52.0, -60.0), upper * smoothstep((np.abs(x) - 14.0) / 10.0))
    _, b, c = cavity_axes(z)
    front_of_spine = c + 0.72 * b
    gullet = np.hypot(x - 5.0, y - (front_of_spine - 9.0)) - 6.5
    values = over(values, 35.0, cover(gullet, edge))
    values = over(values, 45.0, great)
    return over(values, -700.0, cover(gullet + 4.8, edge) * smoothstep((z - 20.0) / 10.0))


def _abdomen(x: Array, y: Array, z: Array, habitus: Habitus, edge: float, fine: Volume, coarse: Volume) -> Array:
    values: Array = np.asarray(-98.0 + 8.0 * coarse) + 0.0 * (x + y + z)
    liver = np.maximum(x - (26.0 - 0.25 * y + 0.25 * (z + 80.0)), y - 66.0)
    values = over(values, 60.0 + 3.0 * fine + 3.0 * coarse, cover(liver, edge))
    spleen = ellipsoid(x, y, z, (66.0, 40.0, -116.0), (27.0, 32.0, 36.0))
    values = over(values, 52.0 + 3.0 * fine, cover(spleen, edge))
    stomach = ellipsoid(x, y, z, habitus.stomach, (38.0, 36.0, 40.0))
    values = over(values, 45.0, cover(stomach, edge))
    # Supine: gas floats to the front, with a level.
    content = np.where(y < habitus.stomach[1] - 12.0, -940.0, 18.0 + 8.0 * coarse)
    values = over(values, content, cover(stomach + 3.5, edge))
    muscle = diaphragm_height(x, y, z, habitus) - z
    return over(values, 48.0, cover(muscle - 3.5, edge))
