"""What makes an atlas central: the neighbourhood of a condition, its mean displacement, its unbiased template.

Networks and images are on one grid; displacements are in voxels, as in `medinr.fields.squaring`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from medinr.fields.squaring import scaling_and_squaring, warp
from medinr.types import Scalar, Volume

Register = Callable[[Tensor, Tensor], Tensor]
"""(fixed, moving), [B, 1, X, Y, Z] each -> velocity or displacement [B, 3, X, Y, Z] that brings the latter there."""


def integrated(velocity: Tensor, squarings: int) -> Tensor:
    """Displacement of a stationary velocity [B, 3, X, Y, Z]; no squarings: it is one already."""
    return scaling_and_squaring(velocity, squarings) if squarings else velocity


def neighbourhood_weights(scaled: Tensor, wanted: Tensor, levels: Sequence[int], bandwidth: float) -> Tensor:
    """Gaussian weights [n] of persons around a wanted condition; they sum to 1.

    exp(-|c - c0|^2 / (2 bandwidth^2)) over the continuous conditions; a categorical one must agree (where nobody does,
    it is let go). A condition that is not asked for is of no account; a person who lacks one that is counts like one
    that is a bandwidth away. Should all weights vanish, the nearest person has all.

    Args:
        scaled: conditions [n, C], continuous ones in parts of their trained range (0 to 1), NaN missing.
        wanted: [C], NaN: not asked for.
        levels: 0 of a continuous condition.
        bandwidth: in parts of the trained range.
    """
    distance = torch.zeros(len(scaled), dtype=torch.float64)
    allowed = torch.ones(len(scaled), dtype=torch.bool)
    for column, target, n in zip(scaled.double().T, wanted.double(), levels, strict=True):
        if torch.isnan(target):
            continue
        if n:
            agree = allowed & ((column == target) | column.isnan())
            allowed = agree if agree.any() else allowed
        else:
            distance += torch.where(column.isnan(), 1.0, ((column - target) / bandwidth).square().nan_to_num(1.0))
    distance[~allowed] = torch.inf
    distance -= distance.min()
    weights = torch.exp(-distance / 2)
    return weights / weights.sum()


def draw_neighbours(weights: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Numbers [count] of persons drawn with their weights; the same one may be drawn again (few persons are near)."""
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def mean_displacement(register: Register, atlas: Tensor, images: Tensor, squarings: int) -> Tensor:
    """Mean displacement [3, X, Y, Z] from an atlas [1, 1, X, Y, Z] to images [n, 1, X, Y, Z], registered one by one."""
    total = torch.zeros(1)
    for image in images:
        total = total + integrated(register(atlas, image[None]), squarings)[0]
    return total / len(images)


def morphology_loss(mean: Tensor) -> Scalar:
    """mean over voxels of |mean displacement|^2, in voxels^2 (Starck et al., arXiv 2403.16776)."""
    return mean.square().sum(0).mean()


@torch.no_grad()
def unbiased_template(
    register: Register, images: Iterable[Tensor], start: Tensor, squarings: int, rounds: int = 1
) -> tuple[Volume, Tensor]:
    """A template with no mean displacement to the images: each is registered to it, the mean image is moved back.

    Guimond et al., CVIU 77(2), 2000; Joshi et al., NeuroImage 23, 2004: T' = mean_s(I_s o phi_s) o exp(-mean_s v_s),
    where phi_s = exp(v_s) leads from the template to image s. Without squarings -u stands for the inverse.

    Args:
        images: [1, X, Y, Z] each; looked at once a round.
        start: [1, X, Y, Z].

    Returns:
        the template [1, X, Y, Z], and the displacement [3, X, Y, Z] (voxels) from it to ``start``, where all rounds are
        one after the other.
    """
    template, back = start[None], torch.zeros(1, 3, *start.shape[1:])
    some = list(images)
    for _ in range(rounds):
        total, velocity = torch.zeros_like(template), torch.zeros_like(back)
        for image in some:
            v = register(template, image[None])
            total += warp(image[None], integrated(v, squarings))
            velocity += v
        centre = integrated(-velocity / len(some), squarings)
        template = warp(total / len(some), centre)
        back = centre + warp(back, centre)
    return template[0], back[0]
