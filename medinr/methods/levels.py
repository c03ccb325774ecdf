"""The images as a method looks at them: intensity windows, the pyramid, and where its points are drawn."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from medinr.data.pair import Pair
from medinr.losses import Similarity
from medinr.sampling import PointSampler, gaussian_smooth, informative
from medinr.space import Domain, Image
from medinr.types import Mask, Volume

Window = tuple[float, float]
ENOUGH = 0.9
"""A foreground that fills more of the grid than this is not worth telling apart."""


class Level(NamedTuple):
    """One level of the image pyramid: windowed and smoothed volumes [C, X, Y, Z], and the smoothing in mm."""

    fixed: Volume
    moving: Volume
    smoothing_mm: float


def robust_window(image: Image, low: float = 0.5, high: float = 99.5, channel: int = 0) -> Window:
    """Intensities that are mapped to 0 and 1: two percentiles of a channel (of at most a million of its voxels)."""
    whole = image.data[channel]
    values = whole.flatten()
    values = values[:: max(1, len(values) // 1_000_000)].float().cpu()
    a, b = torch.quantile(values, torch.tensor([low / 100, high / 100])).tolist()
    if b <= a:
        a, b = float(whole.min()), float(whole.max())
    return a, b


def robust_windows(image: Image) -> list[Window]:
    """`robust_window` of every channel."""
    return [robust_window(image, channel=c) for c in range(len(image.data))]


def windowed(volume: Volume, window: Window | Sequence[Window]) -> Volume:
    """Clip to a window, or each channel to its own, and map to [0, 1]."""
    a, b = torch.tensor(window, device=volume.device, dtype=volume.dtype).reshape(-1, 2).T[..., None, None, None]
    scaled: Volume = ((volume - a) / (b - a)).clamp(0, 1)
    return scaled


def pyramid(pair: Pair, windows: Sequence[Sequence[Window]], smoothing_mm: Sequence[float]) -> list[Level]:
    """Both images, windowed (one list of windows an image, one window a channel), at each smoothing."""
    fixed, moving = (windowed(i.data, w) for i, w in zip((pair.fixed, pair.moving), windows, strict=True))
    return [
        Level(
            gaussian_smooth(fixed, s, pair.fixed.domain.spacing),
            gaussian_smooth(moving, s, pair.moving.domain.spacing),
            float(s),
        )
        for s in smoothing_mm
    ]


def foreground(level: Level, domain: Domain, similarity: Similarity) -> Mask | None:
    """Where patches of the fixed image are not constant at this level; None where that is nearly everywhere.

    None for a similarity of single points too: to it, a constant background says what the moving image must be there.
    """
    offsets = similarity.offsets(level.smoothing_mm)
    if offsets is None:
        return None
    mask = informative(level.fixed, domain, float(offsets.abs().max()))
    share = mask.float().mean().item()
    return mask if 0 < share < ENOUGH else None


def samplers(
    levels: Sequence[Level], domain: Domain, mask: Mask | None, similarity: Similarity, jitter: bool, background: float
) -> list[PointSampler]:
    """Of each level: the mask's points or, without a mask, those of the foreground and a share of all others."""
    if mask is not None or background >= 1:
        return [PointSampler(domain, mask, jitter)] * len(levels)
    found = []
    for level in levels:
        region = foreground(level, domain, similarity)
        found.append(PointSampler(domain, region, jitter, background if region is not None else 0.0))
    return found
