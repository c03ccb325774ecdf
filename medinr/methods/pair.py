"""Pairwise registration by an implicit neural representation (IDIR and what followed)."""

from collections.abc import Sequence

from torch import Tensor

from medinr.methods.base import RegistrationMethod
from medinr.types import Points, Scalar


class PairRegistration(RegistrationMethod):
    """min over the field of similarity + sum_k weight_k R_k + overlap_weight * outside.

    Wolterink, Zwienenberg and Brune, Implicit Neural Representations for Deformable Image Registration (IDIR),
    MIDL 2022. The published profile is experiments/idir_dirlab.yaml; ours, with a zero start, a coarse-to-fine pyramid,
    local NCC on extrapolated patches, warm-up, cosine and a folding barrier, is experiments/idir_dirlab_best.yaml.
    """

    def loss_at(self, batch: Points, conditions: Sequence[Tensor | None]) -> dict[str, Scalar]:
        data, raw = self.terms(batch)
        return self.weigh(data, raw)
