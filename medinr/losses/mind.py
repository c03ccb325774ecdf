"""Self-similarity descriptors on sparse patches, for images of different contrast."""

import itertools

import torch
from torch import Tensor

from medinr.losses.similarities import Similarity, weighted_mean
from medinr.types import Samples, Scalar

Step = tuple[int, int, int]


def _steps() -> list[Step]:
    """The six neighbours of a voxel."""
    return [(s, 0, 0) for s in (1, -1)] + [(0, s, 0) for s in (1, -1)] + [(0, 0, s) for s in (1, -1)]


def _add(a: Step, b: Step) -> Step:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


_INNER: list[Step] = [(0, 0, 0), *_steps()]
"""A patch around each neighbour: itself and its own six neighbours. All patches share one lattice of 25 samples."""
_LATTICE: list[Step] = sorted({_add(c, o) for c in _steps() for o in _INNER})
_PAIRS = [(a, b) for a, b in itertools.combinations(_steps(), 2) if _add(a, b) != (0, 0, 0)]
"""The twelve pairs of neighbours that are seen at 60 degrees from each other, edges of an octahedron."""


def _differences() -> Tensor:
    """[25, 12 * 7]: column (pair, o) is +1 at the first patch's sample o and -1 at the second's."""
    matrix = torch.zeros(len(_LATTICE), len(_PAIRS), len(_INNER))
    for k, (a, b) in enumerate(_PAIRS):
        for m, o in enumerate(_INNER):
            matrix[_LATTICE.index(_add(a, o)), k, m] = 1
            matrix[_LATTICE.index(_add(b, o)), k, m] = -1
    return matrix.flatten(1)


def mind_ssc(values: Tensor, differences: Tensor, weight: Tensor | None = None, floor: float = 1e-4) -> Tensor:
    """MIND-SSC [N, 12] from samples [N, 25] on the lattice: exp(-(D_k - min D) / (mean D + floor)).

    D_k is the mean squared difference of the two patches of pair k; ``weight`` [N, 12, 7] takes pairs of samples away.
    Differences are products with a matrix of +-1 (exact), which is faster than gathering, forward and backward.
    """
    square = (values @ differences).reshape(len(values), len(_PAIRS), len(_INNER)).square()
    if weight is None:
        d = square.mean(-1)
        return torch.exp((d.amin(-1, keepdim=True) - d) / (d.mean(-1, keepdim=True) + floor))
    total = weight.sum(-1)
    d = (weight * square).sum(-1) / total.clamp(min=1e-6)
    seen = total > 0
    least = torch.where(seen, d, torch.inf).amin(-1, keepdim=True)
    least = torch.where(torch.isfinite(least), least, 0)
    mean = (d * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp((least - d * seen) / (mean + floor))


class MINDSSC(Similarity):
    """Mean difference of the self-similarity context of both images, through extrapolated patches.

    Heinrich et al., Towards Realtime Multimodal Fusion for Image-Guided Interventions Using Self-similarities (MICCAI
    2013): twelve distances between patches at the six neighbours of a point, exp(-D / V). A descriptor sees which
    neighbours are alike, not how bright they are: gain, shift and inversion of either image change nothing.
    Here each point brings its own lattice of 25 samples (neighbours at one step, patches of seven samples), carried to
    the moving image by the field's Jacobian, so the descriptor turns and stretches with the field, where descriptors
    that are computed once on the moving grid do not. V is the mean of the twelve distances: noise, in which all patches
    are equally unlike, gives a flat descriptor. Point and patch, not voxels: lengths are in mm.

    Args:
        step_mm: distance of the six neighbours at the finest level; the lattice reaches twice as far.
        per_level: the step grows with the pyramid: step + per_level * smoothing of the level.
        floor: added to V (windowed intensities in [0, 1]): places with less contrast count less.
    """

    differences: Tensor

    def __init__(self, step_mm: float = 3.0, per_level: float = 0.5, floor: float = 1e-4) -> None:
        super().__init__()
        if step_mm <= 0:
            raise ValueError(f"step_mm: expected a distance above 0, got {step_mm}")
        self.step_mm, self.per_level, self.floor = step_mm, per_level, floor
        # Not in the checkpoint: it is the same for all.
        self.register_buffer("differences", _differences(), persistent=False)

    def offsets(self, level_mm: float) -> Tensor:
        return (self.step_mm + self.per_level * level_mm) * torch.tensor(_LATTICE, dtype=torch.float32)

    def forward(self, fixed: Samples, moved: Samples, mask: Samples | None = None) -> Scalar:
        matrix = self.differences.to(moved)
        if mask is None:
            a, b = (mind_ssc(v, matrix, None, self.floor) for v in (fixed, moved))
            return (a - b).abs().mean()
        # A difference counts where both of its samples do; a pair by the share of its differences that is left.
        inside = mask.to(moved.dtype)
        weight = (inside @ matrix.clamp(min=0)) * (inside @ (-matrix).clamp(min=0))
        weight = weight.reshape(len(moved), len(_PAIRS), len(_INNER))
        a, b = (mind_ssc(v, matrix, weight, self.floor) for v in (fixed, moved))
        return weighted_mean((a - b).abs(), weight.mean(-1))
