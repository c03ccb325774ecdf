"""What makes an atlas central: the neighbourhood of a condition, its mean displacement, its unbiased template.

Networks and images are on one grid; displacements are in voxels, as in `medinr.fields.squaring`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from medinr.fields.squaring import scaling_and_squaring, warp
from medinr.losses.volumes import box_mean
from medinr.types import Scalar, Volume

SEEN = 0.02
"""Intensity from which on a voxel shows something."""
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


def morphology_loss(mean: Tensor, weight: Tensor | None = None) -> Scalar:
    """mean over voxels of |mean displacement|^2, in voxels^2 (Starck et al., arXiv 2403.16776).

    Args:
        mean: [3, X, Y, Z].
        weight: of each voxel [X, Y, Z] (ours: nothing is known where nothing is seen); None: all alike.
    """
    square = mean.square().sum(0)
    return square.mean() if weight is None else (weight * square).sum() / weight.sum().clamp(min=1)


def content(images: Tensor, radius: int = 3) -> Tensor:
    """Where any of the images [B, 1, X, Y, Z] in [0, 1] shows something, fading over some voxels: [X, Y, Z]."""
    seen = (images.amax((0, 1)) > SEEN).to(images)
    return box_mean(box_mean(seen[None], radius), radius)[0]


def recentred(images: Iterable[Tensor], velocities: Sequence[Tensor], squarings: int) -> tuple[Volume, list[Tensor]]:
    """A template with no mean displacement to its images, from registrations to another one.

    Guimond et al., CVIU 77(2), 2000; Joshi et al., NeuroImage 23, 2004. Image s shows at y what the other template
    shows at exp(v_s)(y), so the mean image is that of I_s o exp(-v_s), and it is moved by exp(mean_s v_s) to the middle
    of all. Without squarings -u stands for the inverse of u.

    Args:
        images: [1, X, Y, Z] each; looked at once.
        velocities: v_s [1, 3, X, Y, Z], in voxels.

    Returns:
        the template [1, X, Y, Z], and its velocities to the images, v_s - mean v, to first order.
    """
    total: Tensor | float = 0.0
    for image, v in zip(images, velocities, strict=True):
        total = total + warp(image[None], integrated(-v, squarings))
    mean = torch.stack(list(velocities)).mean(0)
    template = warp(torch.as_tensor(total) / len(velocities), integrated(mean, squarings))
    return template[0], [v - mean for v in velocities]
