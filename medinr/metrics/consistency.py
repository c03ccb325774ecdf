"""How well two transforms undo each other: a measure of error without landmarks."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from medinr.sampling import interpolate
from medinr.space import Domain, transform_points
from medinr.types import Points

PointMap = Callable[[Points], Points]
"""World points [n, 3] of one image to world points of the other, RAS mm: a `Transform`, or `displaced`."""


def displaced(displacement: Tensor, domain: Domain) -> PointMap:
    """A written displacement, RAS mm [X, Y, Z, 3] on ``domain``, as a map of points: p + d(p), d trilinear.

    NaN for points outside the grid, where the field says nothing.
    """
    if tuple(displacement.shape) != (*domain.shape, 3):
        raise ValueError(f"displacement: expected {(*domain.shape, 3)}, got {tuple(displacement.shape)}")
    volume = displacement.movedim(-1, 0)

    def move(world: Points) -> Points:
        voxels = transform_points(domain.world_to_voxel, world.double())
        d = interpolate(volume.double(), voxels).T
        return torch.where(domain.contains_voxels(voxels)[:, None], world.double() + d, torch.nan)

    return move


def inverse_consistency(forward: PointMap, backward: PointMap, points: Points) -> Tensor:
    """Inverse-consistency error |psi(phi(p)) - p| [n] in mm of two transforms at points [n, 3], RAS mm.

    Christensen and Johnson, IEEE TMI 20(7), 2001. Zero says that the two agree, not that they are right: two identities
    agree. NaN where phi(p) lies outside what psi knows.
    """
    error: Tensor = torch.linalg.vector_norm(backward(forward(points)).double() - points.double(), dim=-1)
    return error


class InverseConsistencyError(Metric):
    """Mean and 95th percentile of the inverse-consistency error in mm, over all points of all cases.

    ``update(forward, backward, points)`` takes two maps and points [n, 3] in RAS mm of the fixed image. ``compute``
    gives ``consistency/mean``, ``consistency/p95`` and ``consistency/outside_percent``: the share of points that leave
    the second map's grid, which the other two do not count.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    errors: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("errors", [], dist_reduce_fx="cat")

    def update(self, forward: PointMap, backward: PointMap, points: Points) -> None:
        self.errors.append(inverse_consistency(forward, backward, points))

    def compute(self) -> dict[str, Tensor]:
        errors = dim_zero_cat(self.errors)
        inside = errors[~errors.isnan()]
        nothing = torch.full((), torch.nan, dtype=errors.dtype, device=errors.device)
        return {
            "consistency/mean": inside.mean() if len(inside) else nothing,
            "consistency/p95": torch.quantile(inside, 0.95) if len(inside) else nothing,
            "consistency/outside_percent": 100 * errors.isnan().double().mean(),
        }
