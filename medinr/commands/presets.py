"""The settings that ``medinr register`` fits with, by name."""

from dataclasses import dataclass
from typing import Literal

from medinr.fields import SIREN
from medinr.losses import MINDSSC, MSE, NCC, NMI, Barrier, LocalNCC, Similarity
from medinr.methods import PairRegistration, RefinedRegistration, Refinement, RegistrationMethod
from medinr.space import Domain

SimilarityName = Literal["lncc", "ncc", "mse", "multimodal", "nmi", "mind"]
PresetName = Literal["fast", "accurate", "multimodal"]


@dataclass(frozen=True)
class Preset:
    """Sizes of a registration; chosen for 2 cores and images of a hundred to two hundred voxels a side.

    Attributes:
        hidden, points, steps: of the network on random points.
        refinement: of a control lattice on whole grids, which takes the network's place where the similarity allows.
        similarity: what is compared where nothing else is asked for.
        both_ways: fit the lattice in both directions and take the midpoint (`CycleConsistentRegistration`), where the
            images show different bodies and nothing slides. Of three mouse brains it gave a mean Dice of 0.884 against
            0.882 in two to four times the time; more steps in one direction gave nothing. Of images that agree it is
            not worth its time: 0.771 against 0.779 for two human brains, 0.831 against 0.830 for two fetal templates in
            four times the seconds. Where lungs slide, the two images' regions differ at their borders, and so do the
            directions: 0.79 against 0.27 mm for a known warp of a chest.
    """

    hidden: tuple[int, ...]
    points: int
    steps: int
    refinement: Refinement | None = None
    similarity: SimilarityName = "lncc"
    both_ways: bool = False

    def refines(self, similarity: str) -> bool:
        """Whether the lattice registers: its whole grids are compared by local NCC alone."""
        return self.refinement is not None and similarity in ON_GRIDS


SLIDING_BENDING = 4.0
"""Weight of the bending energy where regions slide: windows that see one region know less, and need it stiffer.

For the same reason the last stage is added there, not composed: the error falls from 1.38 to 1.35 mm on a sliding warp
and from 0.266 to 0.261 mm on a smooth one with it, but rises from 0.298 to 0.311 mm on the phantom."""
BOTH_WAYS_VOXELS = 2_000_000
"""Larger images are fitted one way: two pairs of fetal templates of 4 million voxels took four times as long both ways,
and had a Dice of 0.785 and 0.825; one way 0.787 and 0.825."""
ON_GRIDS = ("lncc", "multimodal")
PRESETS: dict[str, Preset] = {
    "fast": Preset((128, 128, 128), 2048, 400, Refinement(steps=(30, 30, 30))),
    "accurate": Preset((128, 128, 128), 4096, 600, Refinement(steps=(40, 40, 60)), both_ways=True),
    "multimodal": Preset((128, 128, 128), 4096, 600, Refinement(steps=(40, 40, 60)), "multimodal", both_ways=True),
}
SIMILARITIES: dict[str, type[Similarity]] = {
    "lncc": LocalNCC,
    "ncc": NCC,
    "mse": MSE,
    "multimodal": MINDSSC,
    "nmi": NMI,
    "mind": MINDSSC,
}
ACROSS_CONTRASTS = ("multimodal", "nmi", "mind")
"""Similarities that do not ask for like intensities; the start then does not either."""


def recommended(
    preset: PresetName = "accurate",
    similarity: SimilarityName | None = None,
    landmark_weight: float = 0.0,
    domain: Domain | None = None,
    regions: int = 1,
) -> RegistrationMethod:
    """The method that `register` fits; ``similarity``: None takes the preset's.

    With local NCC: control lattices refined on whole grids, as in experiments/lattice_dirlab.yaml; squared, so that
    inverted contrast is as good, for ``multimodal``. Else a SIREN that starts at the identity, on random points with
    a pyramid of 8, 4, 2 and 0 mm, warm-up and cosine, and a folding barrier; experiments/idir_dirlab_best.yaml is the
    same with local NCC on extrapolated patches, without the moving mask. The lattices' lengths are in voxels; those of
    the network shrink with the ``domain`` where that is smaller than a trunk (`scale_of`). ``regions`` that slide along
    each other are for the lattices alone.
    """
    sizes = PRESETS[preset]
    similarity = similarity or sizes.similarity
    if sizes.refinement is not None and sizes.refines(similarity):
        refinement = sizes.refinement
        if similarity == "multimodal":
            refinement = refinement.changed(signed=False)
        if regions > 1:
            refinement = refinement.changed(bending=SLIDING_BENDING, composed=False)
        return RefinedRegistration(None, refinement, LocalNCC(), landmark_weight=landmark_weight, regions=regions)
    scale = scale_of(domain)
    found = MINDSSC(step_mm=3.0 * scale) if SIMILARITIES[similarity] is MINDSSC else SIMILARITIES[similarity]()
    return network(sizes, found, landmark_weight, scale)


def scale_of(domain: Domain | None) -> float:
    """The longest side in units of 256 mm, at most 1: a mouse's brain has no structure of 8 mm to begin with."""
    return 1.0 if domain is None else min(1.0, domain.unit_mm / 128)


def network(
    sizes: Preset, similarity: Similarity, landmark_weight: float = 0.0, scale: float = 1.0
) -> PairRegistration:
    """A SIREN on random points; ``scale`` multiplies the lengths of its pyramid."""
    return PairRegistration(
        SIREN(hidden=sizes.hidden, omega=30.0, first_omega=15.0),
        similarity,
        {"barrier": Barrier(10.0)},
        points=sizes.points,
        pyramid_mm=(8.0 * scale, 4.0 * scale, 2.0 * scale, 0.0),
        lr=3e-4,
        warmup=0.05,
        cosine=True,
        use_moving_mask=True,
        landmark_weight=landmark_weight,
    )
