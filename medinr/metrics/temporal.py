"""How well an image of a held-out time is predicted, and the two predictions that need no registration.

All functions take times and a period (None: linear time) as `medinr.data.sequence.Sequence` has them.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medinr.metrics.intensity import psnr, ssim
from medinr.types import Mask, Volume

HU_RANGE = 2000.0
"""Data range of PSNR and SSIM of a CT, as published figures of 4D-CT interpolation have it."""


def bracket(times: Sequence[float], time: float, period: float | None) -> tuple[int, int, float]:
    """Indices of the times before and after a time, and the weight of the later: time = (1 - w) before + w after.

    On a circle the last time is followed by the first. Beyond the ends of linear time both are the nearest, w = 0.

    Args:
        times: ascending, one or more.
        time: any.
        period: or None.
    """
    n = len(times)
    if period is None:
        if time <= times[0] or time >= times[-1]:
            i = 0 if time <= times[0] else n - 1
            return i, i, 0.0
        after = next(i for i, t in enumerate(times) if t >= time)
        before = after - 1
        return before, after, (time - times[before]) / (times[after] - times[before])
    at = times[0] + (time - times[0]) % period
    before = max(i for i, t in enumerate(times) if t <= at)
    after = (before + 1) % n
    length = times[after] - times[before] + (period if after == 0 else 0)
    return before, after, (at - times[before]) / length


def nearest_image(images: Sequence[Tensor], times: Sequence[float], time: float, period: float | None) -> Tensor:
    """The image whose time is nearest; of two that are equally near, the earlier."""
    before, after, w = bracket(times, time, period)
    return images[before if w <= 0.5 else after]


def weighted_image(images: Sequence[Tensor], times: Sequence[float], time: float, period: float | None) -> Tensor:
    """Linear interpolation of intensities between the images before and after; all on one grid."""
    before, after, w = bracket(times, time, period)
    return images[before] if w == 0 else torch.lerp(images[before].float(), images[after].float(), w)


def scores(image: Volume, truth: Volume, regions: Mapping[str, Mask], data_range: float = HU_RANGE) -> dict[str, float]:
    """``psnr/REGION`` in dB and ``ssim/REGION`` (3-D, the mean of the map over the region) of [1, X, Y, Z].

    Intensities are taken as they are, without a window.
    """
    found = {}
    for name, mask in regions.items():
        found[f"psnr/{name}"] = psnr(image, truth, data_range, mask)
        found[f"ssim/{name}"] = ssim(image, truth, data_range, mask)
    return {k: v for k, v in found.items() if not math.isnan(v)}
