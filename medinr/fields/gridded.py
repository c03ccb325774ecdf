"""A transform whose displacement is known at the voxels of a grid."""

import torch
from torch import Tensor

from medinr.fields.transform import Transform
from medinr.sampling import interpolate
from medinr.space import Domain, transform_points
from medinr.types import Matrix, Points, Volume


class GridTransform(Transform):
    """phi(p) = A(p + d(p)), d interpolated trilinearly; the border value continues outside the grid.

    Args:
        displacement: d [3, X, Y, Z] at the voxel centres of ``grid``, RAS mm.
        grid: where it is known; the image may have another one.
        start: A, the rigid or affine start [4, 4], fixed world to moving world.
    """

    def __init__(self, displacement: Volume, grid: Domain, start: Matrix) -> None:
        self.field, self.domain, self.start = displacement.detach().float().cpu(), grid, start.double().cpu()

    def _moved(self, world: Points) -> Points:
        d = interpolate(self.field, transform_points(self.domain.world_to_voxel, world).float())
        return world + d.T.double()

    @torch.no_grad()
    def __call__(self, world: Points) -> Points:
        """Map points [n, 3]."""
        return transform_points(self.start, self._moved(world.double().cpu()))

    @torch.no_grad()
    def jacobian(self, world: Points) -> Tensor:
        """D phi at points [n, 3] -> [n, 3, 3]: central differences over one voxel of the grid along each of its axes.

        Half a voxel to either side they are, at a voxel centre, the mean of the slopes on both sides.
        """
        world = world.double().cpu()
        axes = self.domain.voxel_to_world[:3, :3]
        half = axes.T / 2
        slopes = torch.stack([self._moved(world + step) - self._moved(world - step) for step in half], dim=-1)
        jacobian: Tensor = self.start[:3, :3] @ slopes @ torch.linalg.inv(axes)
        return jacobian
