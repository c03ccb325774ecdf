"""Agreement of labels: Dice's coefficient and the 95th percentile of the surface distance."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from medinr.metrics.mean import CaseMean
from medinr.space import Domain


def dice(one: Tensor, other: Tensor, labels: Sequence[int] | None = None) -> dict[int, float]:
    """Dice's coefficient 2 |A and B| / (|A| + |B|) of each label of two label volumes [X, Y, Z].

    Args:
        one: labels, whole numbers (bool masks count as label 1).
        other: labels on the same grid.
        labels: which to compare; None: all that occur in either, without 0. A label that is in neither is left out.
    """
    if one.shape != other.shape:
        raise ValueError(f"dice: expected label volumes on one grid, got {tuple(one.shape)} and {tuple(other.shape)}")
    a, b, names = _ranked(one, other)
    n = len(names)
    both = torch.bincount(a[a == b], minlength=n)
    total = torch.bincount(a, minlength=n) + torch.bincount(b, minlength=n)
    found = {k: 2 * both[i].item() / total[i].item() for i, k in enumerate(names) if total[i] > 0}
    wanted = [k for k in names if k != 0] if labels is None else labels
    return {k: found[k] for k in wanted if k in found}


def hd95(one: Tensor, other: Tensor, domain: Domain, labels: Sequence[int] | None = None) -> dict[int, float]:
    """95th percentile of the symmetric surface distance, in mm, of each label of two label volumes [X, Y, Z].

    Distances use the voxel spacing of ``domain`` (Learn2Reg's evaluation takes voxels instead). NaN where a label is
    missing in one volume; left out where it is missing in both.
    """
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance  # seconds to import

    wanted = [k for k in label_names(one, other) if k != 0] if labels is None else labels
    found: dict[int, float] = {}
    for k in wanted:
        a, b = one == k, other == k
        if not a.any() and not b.any():
            continue
        if not a.any() or not b.any():
            found[k] = math.nan
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            distance = compute_hausdorff_distance(
                a[None, None].float(), b[None, None].float(), include_background=True, percentile=95,
                spacing=list(domain.spacing),
            )  # fmt: skip
        found[k] = float(distance)
    return found


class Dice(Metric):
    """Mean Dice's coefficient over cases, per label (``dsc/label_k``) and over the labels (``dsc/mean``).

    Args:
        labels: the labels to compare. A case in which a label is in neither volume does not count for that label.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    score: Tensor
    cases: Tensor

    def __init__(self, labels: Sequence[int]) -> None:
        super().__init__()
        self.labels = list(labels)
        self.add_state("score", torch.zeros(len(self.labels), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("cases", torch.zeros(len(self.labels)), dist_reduce_fx="sum")

    def update(self, warped: Tensor, fixed: Tensor) -> None:
        """Label volumes [X, Y, Z] of one case."""
        for k, value in dice(warped, fixed, self.labels).items():
            i = self.labels.index(k)
            self.score[i] += value
            self.cases[i] += 1

    def compute(self) -> dict[str, Tensor]:
        seen = self.cases > 0
        mean = self.score / self.cases
        named = {f"dsc/label_{k}": mean[i] for i, k in enumerate(self.labels) if seen[i]}
        return {"dsc/mean": mean[seen].mean()} | named


class HausdorffDistance95(CaseMean):
    """Mean over cases of the mean HD95 (mm) over the labels that both volumes have."""

    higher_is_better = False

    def update(self, warped: Tensor, fixed: Tensor, domain: Domain) -> None:
        """Label volumes [X, Y, Z] of one case."""
        values = [v for v in hd95(warped, fixed, domain).values() if not math.isnan(v)]
        if values:
            self.add(sum(values) / len(values))


def label_names(one: Tensor, other: Tensor) -> list[int]:
    """All labels of two volumes, sorted."""
    a, b, names = _ranked(one, other)
    seen = torch.bincount(a, minlength=len(names)) + torch.bincount(b, minlength=len(names))
    return [k for k, n in zip(names, seen.tolist(), strict=True) if n]


def _ranked(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Sequence[int]]:
    """Both volumes, flat, with every label replaced by its place in a sorted list of labels, and that list."""
    a, b = one.long().flatten(), other.long().flatten()
    low, high = int(min(a.min(), b.min())), int(max(a.max(), b.max()))
    if high - low < 1_000_000:  # every whole number in between has a place: no sorting of voxels
        return a - low, b - low, range(low, high + 1)
    names = torch.unique(torch.cat((torch.unique(a), torch.unique(b))))
    return torch.searchsorted(names, a), torch.searchsorted(names, b), names.tolist()
