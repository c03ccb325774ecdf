"""A body that breathes with hysteresis by a known map: small images of several phases, read through its inverse."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medinr.data.sequence import Sequence as ImageSequence
from medinr.space import Domain
from tests.medinr import pairs


def amplitudes(time: float) -> tuple[float, float]:
    """In mm, of a shear along x and one along y: the second leads, so that inhaling and exhaling differ."""
    angle = 2 * math.pi * time / 100
    return 3.0 * (1 - math.cos(angle)), 2.5 * math.sin(angle)


def motion(world: Tensor, time: float) -> Tensor:
    """phi_t: two shears, one after the other; the identity at time 0."""
    a, b = amplitudes(time)
    x, y, z = world.double().unbind(-1)
    x = x + a * torch.sin(y / 18 + 0.5)
    y = y + b * torch.cos((x + z) / 24)
    return torch.stack((x, y, z), dim=-1)


def unmoved(world: Tensor, time: float) -> Tensor:
    """phi_t^-1."""
    a, b = amplitudes(time)
    x, y, z = world.double().unbind(-1)
    y = y - b * torch.cos((x + z) / 24)
    x = x - a * torch.sin(y / 18 + 0.5)
    return torch.stack((x, y, z), dim=-1)


def sequence(
    times: Sequence[float] = (0, 20, 40, 60, 80),
    held_out: Sequence[int] = (),
    period: float | None = 100.0,
    domain: Domain = pairs.CUBE,
) -> ImageSequence:
    """Images of `pairs.texture` carried by `motion`, with 50 landmarks at each time; the first one is the reference."""
    images = [pairs.sampled(domain, pairs.texture, lambda q, t=t: unmoved(q, t)) for t in times]
    points = [motion(pairs.points(), t) for t in times]
    none = (None,) * len(images)
    return ImageSequence(
        "breathing", tuple(map(float, times)), tuple(images), 0, period, none, tuple(points), none, tuple(held_out)
    )
