"""A spline whose control points ask a coordinate network (SINR)."""

from typing import Literal

import torch
from torch import Tensor

from medinr.fields.base import Field, values_at
from medinr.fields.lattice import SplineField
from medinr.fields.maps import check_displacement
from medinr.types import Points


class SINR(SplineField):
    """u(x) = sum over control points k of B3((x - x_k) / h) net(x_k): a free-form deformation that a network drives.

    Sideri-Lampretsa, McGinnis, Qiu, Paschali, Simson and Rueckert, SINR: Spline-enhanced implicit neural representation
    for multi-modal registration, MIDL 2024 (PMLR 250:1462-1474): 2 mm between the control points, a SIREN of 3 x 256
    units and omega 30. The network sets the smoothness of the whole, the spline that between the control points:
    derivatives are the spline's and exact, and the network is evaluated, and differentiated, only once for each control
    point, however many points of space are asked for.

    That is so within one call, and within one `medinr.fields.computed_once` block, which the training step of every
    method opens; without a block each call computes the coefficients anew. They are never kept beyond it: a field that
    remembered them by itself would have to guess when the weights have changed.

    Differs from the authors' code: control points cover the box of outer voxel edges in mm, with the voxels' size and
    the image's orientation taken into account (there: every second voxel of the padded, cubic array).

    Args:
        network: of points in normalised coordinates, a displacement; it may take a condition. ``zero_output`` of the
            network starts at the identity; the published code does not.
        spacing: distance of the control points.
        unit: of ``spacing``: ``mm``, or ``voxel``, the geometric mean of the image's voxel sides.
    """

    def __init__(self, network: Field, spacing: float = 2.0, unit: Literal["mm", "voxel"] = "mm") -> None:
        check_displacement("network", network)
        if network.in_features != 3:
            raise ValueError(f"network: expected a field of 3 coordinates, got {network.in_features}")
        super().__init__((spacing,), network.out_features, 1.0, unit)
        self.network = network
        self.conditions = network.conditions

    def control_points(self) -> Points:
        """x_k [n_x n_y n_z, 3] in normalised coordinates; the first lies one spacing before the image's box."""
        self._check_covers()
        h = self.spacing[0]
        lines = [
            self.origin[axis] + h * (torch.arange(n, device=h.device).to(h) - 1)
            for axis, n in enumerate(self.shapes[0])
        ]
        return torch.cartesian_prod(*lines)

    def coefficients(self, level: int, context: Tensor | None = None) -> Tensor:
        return self.once(lambda: values_at(self.network, self.control_points(), context), context)
