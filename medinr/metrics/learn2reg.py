"""Figures as the Learn2Reg challenge computes them, for tables that stand beside its own; not comparable with ours.

Hering et al., Learn2Reg: Comprehensive Multi-Task Medical Image Registration Challenge, IEEE TMI 42(3), 2023; the
evaluation is at github.com/MDL-UzL/L2R. Everything there is in voxels: see `sdlogj` and `hd95` for the true figures.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medinr.metrics.jacobian import finite_difference_jacobian
from medinr.metrics.mean import CaseMean
from medinr.metrics.overlap import label_names
from medinr.space import Domain
from medinr.types import Mask, Points

_BORDER = 2  # voxels that the evaluation leaves out on every side


def sdlogj_learn2reg(written_det: Tensor, mask: Mask | None = None) -> float:
    """Learn2Reg's SDlogJ: std(log(clip(det J + 3, 1e-9, 1e9))), the outer two voxels left out.

    The 3 keeps the logarithm from folded voxels, and makes the figure about four times smaller than the standard
    deviation of log det J (`sdlogj`). The challenge takes no mask; one [X, Y, Z] restricts the figure to its voxels.

    Args:
        written_det: `finite_difference_jacobian` [X, Y, Z] of the written displacement: the challenge's scheme, in mm
            here and in voxels there, which gives the same where fixed and moving image share a grid.
        mask: voxels that count.

    Raises:
        ValueError: a grid of fewer than 5 voxels along an axis, of which nothing is left.
    """
    shape = tuple(written_det.shape)
    if min(shape) <= 2 * _BORDER:
        raise ValueError(f"sdlogj_learn2reg: expected at least {2 * _BORDER + 1} voxels a side, got {shape}")
    inner = (slice(_BORDER, -_BORDER),) * 3
    det = written_det[inner]
    values = det.flatten() if mask is None else det[mask[inner]]
    return (values.double() + 3).clamp(1e-9, 1e9).log().std(correction=0).item()


def hd95_learn2reg(warped: Tensor, fixed: Tensor, labels: Sequence[int] | None = None) -> dict[int, float]:
    """Learn2Reg's HD95 of each label of two label volumes [X, Y, Z], in voxels whatever their spacing.

    The larger of the two directed 95th percentiles of the distance between surface elements, each weighted by its area
    (Nikolov et al., arXiv:1809.04430); `hd95` counts boundary voxels instead, and is in mm. NaN where the fixed volume
    lacks the label, infinite where only the warped one does.
    """
    from monai.metrics.utils import get_edge_surface_distance  # seconds to import

    if warped.shape != fixed.shape:
        raise ValueError(f"hd95: expected volumes on one grid, got {tuple(warped.shape)} and {tuple(fixed.shape)}")
    found: dict[int, float] = {}
    for k in [n for n in label_names(warped, fixed) if n != 0] if labels is None else labels:
        a, b = warped == k, fixed == k
        if not a.any() or not b.any():
            found[k] = math.inf if b.any() else math.nan
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            edges, distances, areas = get_edge_surface_distance(
                a, b, spacing=(1, 1, 1), use_subvoxels=True, symmetric=True
            )
        directed = zip(edges, distances, areas, strict=True)
        found[k] = max(_percentile(d, area[edge], 0.95) for edge, d, area in directed)
    return found


def tre_learn2reg(
    fixed: Points, moving: Points, displacement: Tensor, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> Tensor:
    """Learn2Reg's TRE [n]: voxels times the *moving* image's spacing; the displacement is read by cubic splines.

    `tre` measures in the world instead, and takes a written displacement trilinearly, as ITK and our readers do.

    Args:
        fixed, moving: landmarks [n, 3] in voxels of their images, which share one grid in the challenge.
        displacement: in voxels [X, Y, Z, 3], as `medinr.io.write_learn2reg` writes it.
        spacing: of the moving image, mm.
    """
    from scipy.ndimage import map_coordinates

    at = fixed.double().numpy().T
    # The evaluation leaves SciPy's defaults: splines that mirror at the border, and 0 beyond it.
    u = np.stack([map_coordinates(c, at) for c in displacement.double().movedim(-1, 0).numpy()], axis=-1)
    gap = (fixed.double() + torch.from_numpy(u) - moving.double()) * torch.tensor(tuple(spacing), dtype=torch.float64)
    distance: Tensor = gap.norm(dim=-1)
    return distance


def common_labels(fixed: Tensor, moving: Tensor) -> list[int]:
    """The labels, without 0, that Learn2Reg's Dice and HD95 count: those that both images have *before* warping.

    A label that the transform loses then counts with Dice 0, and one that only one image has does not count.
    """
    return sorted((set(fixed.unique().tolist()) & set(moving.unique().tolist())) - {0})


class StdLogJacobianLearn2Reg(CaseMean):
    """Mean over cases of `sdlogj_learn2reg` of written displacements, RAS mm [X, Y, Z, 3]."""

    higher_is_better = False

    def update(self, displacement: Tensor, domain: Domain, mask: Mask | None = None) -> None:
        self.add(sdlogj_learn2reg(finite_difference_jacobian(displacement, domain), mask))


class HausdorffDistance95Learn2Reg(CaseMean):
    """Mean over cases of the mean `hd95_learn2reg` (voxels) over the labels that the fixed volume has."""

    higher_is_better = False

    def update(self, warped: Tensor, fixed: Tensor) -> None:
        """Label volumes [X, Y, Z] of one case."""
        values = [v for v in hd95_learn2reg(warped, fixed).values() if not math.isnan(v)]
        if values:
            self.add(sum(values) / len(values))


def _percentile(distances: Tensor, areas: Tensor, share: float) -> float:
    """The smallest distance within which a share of the area lies."""
    order = distances.argsort()
    cumulative = areas[order].double().cumsum(0)
    place = torch.searchsorted(cumulative / cumulative[-1], torch.tensor(share, dtype=torch.float64))
    return distances[order][min(int(place), len(distances) - 1)].item()
