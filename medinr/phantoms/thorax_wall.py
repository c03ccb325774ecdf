"""The wall of the phantom's thorax: ribs, spine, sternum, muscles, fat, skin, and the table (body frame, mm)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medinr.phantoms.thorax_canvas import Canvas, Volume, cover, ellipsoid, over, smooth_max, texture
from medinr.phantoms.thorax_motion import cavity_axes, cavity_coordinates, cavity_level, smoothstep

Array = NDArray[np.floating[Any]]

RIB_PITCH = 23.0
"""Distance of neighbouring ribs and vertebrae, mm."""


def draw_wall(canvas: Canvas, fat: float, rng: np.random.Generator) -> Volume:
    """HU volume of the chest wall, the spine, the air around the body and the table.

    Args:
        canvas: the grid.
        fat: thickness of the subcutaneous fat, mm.
        rng: source of the textures.
    """
    fine = texture(canvas.shape, canvas.step, 1.0, rng)
    coarse = texture(canvas.shape, canvas.step, 5.0, rng)
    hu = np.empty(canvas.shape, dtype=np.float32)
    for first in range(0, canvas.shape[2], 16):
        last = min(first + 16, canvas.shape[2])
        part = np.s_[:, :, first:last]
        x, y, z = canvas.slab(first, last)
        values = _soft_tissue(x, y, z, fat, canvas.edge, fine[part], coarse[part])
        for bones in (_ribs, _shoulder, _spine, _sternum):
            values = bones(values, x, y, z, canvas.edge, fine[part], coarse[part])
        hu[part] = values
    return hu


def body_distance(x: Array, y: Array, z: Array) -> Array:
    """Approximate signed distance of the skin (negative inside the body); the shoulders widen it at the top."""
    shoulders = smoothstep((z - 60.0) / 60.0)
    width, depth = 121.0 + 16.0 * shoulders, 106.0 - 22.0 * shoulders
    centre = 12.0 + 12.0 * shoulders
    u, v = x / width, (y - centre) / depth
    level = (np.abs(u) ** 2.6 + np.abs(v) ** 2.6) ** (1.0 / 2.6)
    groove = 5.0 * np.exp(-((x / 12.0) ** 2)) * smoothstep(v)
    r = np.hypot(x, y - centre)
    return np.asarray(r * (1.0 - 1.0 / np.maximum(level, 1e-3)) + groove)


def _depth(x: Array, y: Array, z: Array) -> Array:
    """Distance outside the pleura along the ray from the cavity's axis, mm."""
    c = cavity_axes(z)[2]
    level = cavity_level(*cavity_coordinates(x, y, z))
    return np.asarray(np.hypot(x, y - c) * (1.0 - 1.0 / np.maximum(level, 0.05)))


def _angle(x: Array, y: Array, z: Array) -> Array:
    """Angle around the cavity's axis, 0 at the spine, pi at the sternum."""
    return np.arctan2(np.abs(x), y - cavity_axes(z)[2])


def _soft_tissue(x: Array, y: Array, z: Array, fat: float, edge: float, fine: Volume, coarse: Volume) -> Array:
    skin = body_distance(x, y, z)
    depth, angle = _depth(x, y, z), _angle(x, y, z)
    table = np.maximum(np.abs(y - (127.0 - 0.0007 * x * x)) - 1.2, np.abs(x) - 136.0)
    values: Array = np.full(np.broadcast(x, y, z).shape, -1000.0)
    foam = np.maximum(np.abs(y - (134.0 - 0.0005 * x * x)) - 6.0, np.abs(x) - 136.0)
    values = over(values, -930.0, cover(foam, edge))
    values = over(values, -420.0, cover(table, edge))
    values = over(values, 5.0, cover(skin, edge))
    values = over(values, -104.0 + 6.0 * coarse, cover(skin + 2.2, edge))
    # Fat is thicker at the front and the flanks; muscle shows thin planes of fat between its layers.
    thick = 2.2 + fat * (0.7 + 0.4 * np.sin(0.9 * angle) ** 2) + 1.5 * coarse
    muscle = 55.0 + 5.0 * fine - 55.0 * smoothstep((coarse - 1.1) / 1.2)
    flesh = cover(skin + thick, edge)
    values = over(values, muscle, flesh)
    for level, share in ((11.5, 0.75), (19.0, 0.55)):
        plane = np.abs(depth - level - 1.2 * coarse) - 0.8
        values = over(values, -85.0, share * cover(plane, edge) * flesh)
    back = np.abs(ellipsoid(np.abs(x) - 27.0, y, 0.0 * z, (0.0, 93.0, 0.0), (25.0, 19.0, 19.0))) - 0.9
    values = over(values, -80.0, 0.7 * cover(np.maximum(back, skin + thick), edge))
    # Between the ribs: muscle, with a film of fat on the pleura.
    values = over(values, 38.0 + 4.0 * fine, cover(np.abs(depth - 5.5) - 5.0, edge) * smoothstep((angle - 0.2) / 0.2))
    return over(values, -40.0, 0.6 * cover(np.abs(depth) - 0.9, edge))


def _bone(values: Array, d: Array, edge: float, cortex: float, marrow: Array | float, thickness: float) -> Array:
    values = over(values, cortex, cover(d, edge))
    return over(values, marrow, cover(d + thickness, edge))


def _ribs(values: Array, x: Array, y: Array, z: Array, edge: float, fine: Volume, coarse: Volume) -> Array:
    depth, angle = _depth(x, y, z), _angle(x, y, z)
    # A rib starts at its vertebra, descends to the front and turns up again as cartilage.
    descent = 88.0 * smoothstep(angle / 2.6) - 34.0 * smoothstep((angle - 2.35) / 0.7)
    height = (z + descent - 6.0) / RIB_PITCH
    offset = (height - np.round(height)) * RIB_PITCH
    d = (np.hypot((depth - 5.5) / 3.7, offset / 5.6) - 1.0) * 3.7
    d = np.maximum(d, 0.22 - angle)
    d = np.maximum(d, (np.round(height) - 4.6) * RIB_PITCH)
    cartilage = smoothstep((angle - 2.35) / 0.08)
    cortex = 720.0 * (1 - cartilage) + 120.0 * cartilage
    marrow = 170.0 * (1 - cartilage) + 110.0 * cartilage + 25.0 * coarse
    values = over(values, cortex, cover(d, edge))
    return over(values, marrow, cover(d + 1.3, edge))


def _shoulder(values: Array, x: Array, y: Array, z: Array, edge: float, fine: Volume, coarse: Volume) -> Array:
    depth, angle = _depth(x, y, z), _angle(x, y, z)
    # Shoulder blade: a thin plate on the back of the ribs that thickens to the side; arms up turns it outwards.
    span = np.maximum(np.abs(angle - 0.95 - 0.002 * (z - 60.0)) - 0.36, np.abs(z - 66.0) / 160.0 - 0.33) * 70.0
    plate = np.abs(depth - 16.5 - 3.0 * np.sin(4.0 * angle)) - 2.1 - 1.6 * smoothstep((angle - 1.1) / 0.3)
    blade = np.maximum(plate, span)
    values = _bone(values, blade, edge, 620.0, 260.0 + 30.0 * coarse, 1.2)
    # Collar bones.
    t = np.clip((np.abs(x) - 16.0) / 90.0, 0.0, 1.0)
    collar = np.hypot(y - (-34.0 + 44.0 * t + 10.0 * np.sin(2 * np.pi * t)), z - (86.0 + 34.0 * t)) - 5.0
    collar = np.maximum(collar, np.maximum(15.0 - np.abs(x), np.abs(x) - 102.0))
    return _bone(values, collar, edge, 680.0, 220.0 + 30.0 * coarse, 1.5)


def _spine(values: Array, x: Array, y: Array, z: Array, edge: float, fine: Volume, coarse: Volume) -> Array:
    _, b, c = cavity_axes(z)
    front = c + 0.725 * b
    offset = (z / RIB_PITCH - np.round(z / RIB_PITCH)) * RIB_PITCH
    waist = 1.6 * (1.0 - (2.0 * offset / RIB_PITCH) ** 2)
    body = (np.hypot(x / (17.0 - waist), (y - front - 14.0) / (13.5 - waist)) - 1.0) * 14.0
    disc = 9.3 - np.abs(offset)  # negative in the disc
    values = over(values, 85.0, cover(body, edge))
    vertebra = smooth_max(body, -disc, 2.0)
    values = _bone(values, vertebra, edge, 430.0, 185.0 + 28.0 * coarse + 20.0 * fine, 1.5)
    canal_y = front + 35.0
    arch = np.hypot(x / 15.0, (y - canal_y) / 13.0) - 1.0
    ring = np.maximum(np.abs(arch * 14.0 + 2.5) - 2.8, np.abs(offset) - 8.0)
    transverse = np.maximum(
        np.hypot(y - canal_y - 2.0 - 0.28 * np.abs(x), offset) - 4.5, np.abs(np.abs(x) - 25.0) - 13.0
    )
    slanted = ((z + 0.8 * (y - canal_y)) / RIB_PITCH) % 1.0 - 0.5
    process = smooth_max(np.abs(x) - 3.2, np.abs(y - canal_y - 14.0) - 7.5, 2.0)
    process = np.maximum(np.maximum(process, np.abs(slanted) * RIB_PITCH - 7.5), body_distance(x, y, z) + 5.0)
    for part in (transverse, process, ring):
        values = _bone(values, part, edge, 520.0, 250.0 + 30.0 * coarse, 1.4)
    canal = (np.hypot(x / 10.5, (y - canal_y) / 8.5) - 1.0) * 9.0
    values = over(values, -20.0, cover(canal, edge))
    cord = (np.hypot(x / 7.0, (y - canal_y) / 6.0) - 1.0) * 6.5
    return over(values, 38.0, cover(cord, edge))


def _sternum(values: Array, x: Array, y: Array, z: Array, edge: float, fine: Volume, coarse: Volume) -> Array:
    _, b, c = cavity_axes(z)
    half = 15.0 + 9.0 * smoothstep((z - 55.0) / 14.0) - 6.0 * smoothstep((-z - 20.0) / 20.0)
    centre = c - b - 7.0 + 0.006 * x * x
    plate = smooth_max(np.abs(y - centre) - 5.2, np.abs(x) - half, 4.0)
    plate = smooth_max(plate, np.abs(z - 20.0) - 66.0, 4.0)
    # The joint of manubrium and body.
    plate = np.maximum(plate, 2.0 - np.abs(z - 56.0))
    return _bone(values, plate, edge, 480.0, 150.0 + 30.0 * coarse, 1.4)
