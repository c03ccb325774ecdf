"""Branching trees that fill a volume (vessels, airways), and the drawing of tapering tubes into a voxel grid.

The trees follow the volume-filling idea of Tawhai et al., "CT-based geometry analysis and finite element models of the
human and ovine bronchial tree", J Appl Physiol 2004: a branch grows part of the way to the centre of the seed points it
has to supply, the seeds are divided by a plane through the branch, and each half is supplied by a daughter.
Radii follow Murray's law, r^m = sum of the daughters' r^m.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Volume = NDArray[np.float32]


@dataclass(frozen=True)
class Tree:
    """A binary tree of tubes.

    Args:
        nodes: [N, 3] end points in mm; node 0 is the root.
        parent: [N] index of the parent node (-1 for the root).
        leaves: [N] number of terminals behind a node.
        radius: [N] radius of the branch that ends in the node, mm.
    """

    nodes: Array
    parent: NDArray[np.int64]
    leaves: NDArray[np.int64]
    radius: Array

    def branchings(self, smallest: float) -> tuple[Array, Array]:
        """Places [M, 3] where a branch at least as thick as ``smallest`` mm divides, and the radii there."""
        children = np.bincount(self.parent[1:], minlength=len(self.parent))
        chosen = (children >= 2) & (self.radius >= smallest)
        return self.nodes[chosen], self.radius[chosen]


def grow_tree(
    root: Array,
    direction: Array,
    seeds: Array,
    rng: np.random.Generator,
    terminal_radius: float = 0.46,
    exponent: float = 2.7,
    step: float = 0.42,
) -> Tree:
    """Grow a tree from ``root`` [3] (leaving along ``direction``) that supplies the ``seeds`` [S, 3]."""
    nodes, parent = [root], [-1]
    stack: list[tuple[int, Array, Array]] = [(0, direction / np.linalg.norm(direction), seeds)]
    while stack:
        start, heading, supplied = stack.pop()
        offset = supplied.mean(0) - nodes[start]
        distance = float(np.linalg.norm(offset))
        last = len(supplied) == 1
        length = distance if last else np.clip(step * distance, 1.5, 34.0)
        # Branches bend away from their parent's direction only so far; terminals go where they must.
        aim = offset / max(distance, 1e-9)
        aim = aim + (0.12 if last else 0.35) * heading + 0.06 * rng.normal(size=3)
        aim /= np.linalg.norm(aim)
        nodes.append(nodes[start] + min(length, 12.0 if last else 34.0) * aim)
        parent.append(start)
        if last:
            continue
        end = len(nodes) - 1
        for half in _divide(supplied, nodes[end], aim, rng):
            stack.append((end, aim, half))
    return _with_radii(np.asarray(nodes), np.asarray(parent), terminal_radius, exponent)


def _divide(seeds: Array, origin: Array, axis: Array, rng: np.random.Generator) -> list[Array]:
    """Split seeds by a plane that contains the branch, across their longest extent perpendicular to it."""
    relative = seeds - origin
    across = relative - (relative @ axis)[:, None] * axis
    covariance = across.T @ across + 1e-9 * np.eye(3)
    normal = np.linalg.eigh(covariance)[1][:, -1] + 0.15 * rng.normal(size=3)
    score = across @ normal
    order = np.argsort(score, kind="stable")
    cut = int(np.clip(round(len(seeds) * rng.uniform(0.33, 0.67)), 1, len(seeds) - 1))
    return [seeds[order[:cut]], seeds[order[cut:]]]


def _with_radii(nodes: Array, parent: NDArray[np.int64], terminal_radius: float, exponent: float) -> Tree:
    leaves = np.zeros(len(nodes), dtype=np.int64)
    has_child = np.zeros(len(nodes), dtype=bool)
    has_child[parent[1:]] = True
    leaves[~has_child] = 1
    for index in range(len(nodes) - 1, 0, -1):  # a parent always precedes its children
        leaves[parent[index]] += leaves[index]
    return Tree(nodes, parent, leaves, terminal_radius * leaves ** (1.0 / exponent))


def tree_tubes(tree: Tree, piece: float = 5.0) -> Array:
    """Pieces of tapering, slightly curved tubes: rows (x0, y0, z0, x1, y1, z1, r0, r1)."""
    rows: list[Array] = []
    for index in range(1, len(tree.nodes)):
        above = int(tree.parent[index])
        start, end = tree.nodes[above], tree.nodes[index]
        length = float(np.linalg.norm(end - start))
        control = 0.5 * (start + end)
        if above > 0:
            heading = start - tree.nodes[tree.parent[above]]
            size = float(np.linalg.norm(heading))
            if size > 0:
                # A quarter of the branch continues along the parent: no kinks at branchings.
                control = 0.5 * control + 0.5 * (start + 0.45 * length * heading / size)
        first = min(float(tree.radius[above]), 1.25 * float(tree.radius[index]))
        count = max(1, int(np.ceil(length / piece)))
        s = np.linspace(0.0, 1.0, count + 1)[:, None]
        path = (1 - s) ** 2 * start + 2 * s * (1 - s) * control + s**2 * end
        radii = first + (float(tree.radius[index]) - first) * s
        rows.append(np.hstack([path[:-1], path[1:], radii[:-1], radii[1:]]))
    return np.concatenate(rows) if rows else np.zeros((0, 8))


def polyline_tubes(points: Iterable[Iterable[float]], radius: float | Iterable[float], samples: int = 8) -> Array:
    """Tube pieces along a smooth (Catmull-Rom) curve through the points; radii are interpolated between them."""
    nodes = np.asarray([list(p) for p in points], dtype=np.float64)
    radii = np.broadcast_to(np.asarray(radius, dtype=np.float64), (len(nodes),))
    padded = np.vstack([2 * nodes[0] - nodes[1], nodes, 2 * nodes[-1] - nodes[-2]])
    s = np.linspace(0.0, 1.0, samples + 1)[:, None]
    curve: list[Array] = []
    widths: list[Array] = []
    for k in range(len(nodes) - 1):
        p0, p1, p2, p3 = padded[k : k + 4]
        spline = 0.5 * (
            2 * p1 + (p2 - p0) * s + (2 * p0 - 5 * p1 + 4 * p2 - p3) * s**2 + (3 * p1 - p0 - 3 * p2 + p3) * s**3
        )
        curve.append(spline)
        widths.append(radii[k] + (radii[k + 1] - radii[k]) * s)
    rows = [np.hstack([c[:-1], c[1:], w[:-1], w[1:]]) for c, w in zip(curve, widths, strict=True)]
    return np.concatenate(rows)


def draw_tubes(volume: Volume, origin: Array, step: Array, tubes: Array, margin: float = 0.0) -> None:
    """Draw tubes into a coverage volume [nx, ny, nz] in place (the largest coverage wins).

    Args:
        volume: coverage in [0, 1]; voxel (i, j, k) is at ``origin + step * (i, j, k)`` mm.
        tubes: rows (x0, y0, z0, x1, y1, z1, r0, r1).
        margin: added to every radius, mm (the wall of an airway).

    A tube thinner than a voxel is drawn with the share of the voxel that it fills.
    """
    shape = np.asarray(volume.shape)
    edge = float(np.cbrt(np.prod(step)))
    for row in tubes:
        start, end = row[:3], row[3:6]
        r0, r1 = row[6] + margin, row[7] + margin
        reach = max(r0, r1) + edge
        low = np.maximum(np.floor((np.minimum(start, end) - reach - origin) / step).astype(int), 0)
        high = np.minimum(np.ceil((np.maximum(start, end) + reach - origin) / step).astype(int) + 1, shape)
        if (high <= low).any():
            continue
        x, y, z = (origin[a] + step[a] * np.arange(low[a], high[a]) - start[a] for a in range(3))
        axis = end - start
        squared = max(float(axis @ axis), 1e-12)
        along = x[:, None, None] * axis[0] + y[:, None] * axis[1] + z * axis[2]
        s = np.clip(along / squared, 0.0, 1.0)
        d2 = (x * x)[:, None, None] + (y * y)[:, None] + z * z - s * (2 * along - s * squared)
        radius = r0 + (r1 - r0) * s
        share = np.clip(0.5 + (radius - np.sqrt(np.maximum(d2, 0.0))) / edge, 0.0, 1.0)
        share *= np.minimum(1.0, (2.0 * radius / edge)) ** 1.5
        box = volume[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
        np.maximum(box, share, out=box, casting="same_kind")
