"""The settings that ``medinr register`` fits with, by name."""

from dataclasses import dataclass
from typing import Literal

from medinr.fields import SIREN
from medinr.losses import MINDSSC, MSE, NCC, NMI, Barrier, LocalNCC, Similarity
from medinr.methods import PairRegistration

SimilarityName = Literal["lncc", "ncc", "mse", "multimodal", "nmi"]
PresetName = Literal["fast", "accurate"]


@dataclass(frozen=True)
class Preset:
    """Sizes of a registration; chosen for 2 cores and images of a hundred to two hundred voxels a side."""

    hidden: tuple[int, ...]
    points: int
    steps: int


PRESETS: dict[str, Preset] = {
    "fast": Preset((128, 128, 128), 2048, 400),
    "accurate": Preset((128, 128, 128), 4096, 600),
}
SIMILARITIES: dict[str, type[Similarity]] = {
    "lncc": LocalNCC,
    "ncc": NCC,
    "mse": MSE,
    "multimodal": MINDSSC,
    "nmi": NMI,
}
ACROSS_CONTRASTS = ("multimodal", "nmi")
"""Similarities that do not ask for like intensities; the start then does not either."""


def recommended(
    preset: PresetName = "accurate", similarity: SimilarityName = "lncc", landmark_weight: float = 0.0
) -> PairRegistration:
    """The method that `register` fits: experiments/idir_dirlab_best.yaml has the same settings.

    A SIREN that starts at the identity, local NCC on extrapolated patches, a pyramid of 8, 4, 2 and 0 mm, warm-up and
    cosine, and a folding barrier.
    """
    sizes = PRESETS[preset]
    return PairRegistration(
        SIREN(hidden=sizes.hidden, omega=30.0, first_omega=15.0),
        SIMILARITIES[similarity](),
        {"barrier": Barrier(10.0)},
        points=sizes.points,
        pyramid_mm=(8.0, 4.0, 2.0, 0.0),
        lr=3e-4,
        warmup=0.05,
        cosine=True,
        use_moving_mask=True,
        landmark_weight=landmark_weight,
    )
