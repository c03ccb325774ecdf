"""Landmarks of the thorax phantom: voxel centres next to vessel branchings, spread over both lungs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from medinr.data.layouts import DIRLAB_EXTREME_COUNT, DIRLAB_SAMPLED_COUNT
from medinr.errors import UserError

if TYPE_CHECKING:
    from medinr.phantoms.thorax_case import ThoraxCase

Voxels = NDArray[np.int64]

PHASES = tuple(range(0, 100, 10))


def choose_landmarks(phantom: ThoraxCase) -> tuple[Voxels, Voxels]:
    """Choose 300 + 75 different landmarks (0-based voxels of T00).

    Every landmark is an exact voxel centre, as in DIR-LAB, inside a lung and inside the image at all ten phases. Those
    that lie closest to a branching of a clearly visible vessel come first; grids too coarse to hold enough of them are
    filled up with other lung voxels.

    Raises:
        UserError: the grid is too coarse for 375 different voxels in the lungs.
    """
    needed = DIRLAB_EXTREME_COUNT + DIRLAB_SAMPLED_COUNT
    rng = np.random.default_rng([phantom.seed, phantom.facts.number, 16])
    for find in (_branchings, _lung_voxels):
        candidates = find(phantom, rng)
        for distance in (9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 0.0):
            chosen = _spread(phantom.voxel_to_world(candidates.astype(float)), distance, needed)
            if len(chosen) == needed:
                mixed = candidates[rng.permutation(chosen)]
                return mixed[:DIRLAB_EXTREME_COUNT], mixed[DIRLAB_EXTREME_COUNT:]
    raise UserError(
        f"size: {phantom.facts.shape[0]} voxels leave fewer than {needed} voxels in the lungs for the landmarks; "
        "give a larger size"
    )


def _usable(phantom: ThoraxCase, voxels: Voxels, margin: float) -> Voxels:
    voxels = voxels[phantom.inside_lung(phantom.voxel_to_world(voxels.astype(float)), margin)]
    limit = np.array(phantom.facts.shape) - 1
    for phase in PHASES:
        positions = phantom.landmark_positions(voxels, phase)
        voxels = voxels[((positions >= 0) & (positions <= limit)).all(-1)]
    return voxels


def _branchings(phantom: ThoraxCase, rng: np.random.Generator) -> Voxels:
    nodes = np.concatenate([tree.branchings(0.7)[0] for tree in phantom.trees.vessels])
    positions = phantom.world_to_voxel(phantom.body_to_world(nodes))
    voxels = np.rint(positions).astype(np.int64)
    error = np.linalg.norm((positions - voxels) * np.array(phantom.facts.spacing), axis=-1)
    order = np.argsort(error + 0.5 * rng.random(len(error)), kind="stable")
    return _usable(phantom, _unique(voxels[order]), margin=4.0)


def _lung_voxels(phantom: ThoraxCase, rng: np.random.Generator) -> Voxels:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in phantom.facts.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    inside = grid[phantom.inside_lung(phantom.voxel_to_world(grid.astype(float)), 1.0)]
    return _usable(phantom, _unique(np.concatenate([_branchings(phantom, rng), rng.permutation(inside)])), margin=1.0)


def _unique(voxels: Voxels) -> Voxels:
    _, first = np.unique(voxels, axis=0, return_index=True)
    return voxels[np.sort(first)]


def _spread(points: NDArray[np.floating[Any]], distance: float, needed: int) -> list[int]:
    """Indices, in order, of points that keep ``distance`` mm from all chosen before, until enough are found."""
    blocked = np.zeros(len(points), dtype=bool)
    tree = cKDTree(points) if len(points) else None
    chosen: list[int] = []
    for index in range(len(points)):
        if blocked[index]:
            continue
        chosen.append(index)
        if len(chosen) == needed:
            break
        if tree is not None and distance > 0:
            blocked[tree.query_ball_point(points[index], distance)] = True
    return chosen
