"""Whether an atlas lies in the middle of those it stands for, and how smoothly it was made."""

import torch
from torch import Tensor

from medinr.types import Mask


def centrality_mm(displacements: Tensor, mask: Mask | None = None) -> float:
    """Mean over voxels of the length of the mean displacement from an atlas to n persons, in mm; 0 is central.

    Args:
        displacements: [n, X, Y, Z, 3], mm.
        mask: voxels that count [X, Y, Z].
    """
    length = displacements.mean(0).norm(dim=-1)
    return float((length if mask is None else length[mask]).mean())


def jacobian_gradient(det: Tensor, spacing: tuple[float, float, float], mask: Mask | None = None) -> float:
    """Mean length of the gradient of the Jacobian determinant [X, Y, Z] per mm: small where a map is smooth."""
    slopes = torch.gradient(det.float(), spacing=tuple(spacing))
    length = torch.stack(slopes).norm(dim=0)
    return float((length if mask is None else length[mask]).mean())
