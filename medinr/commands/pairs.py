"""Two images and all that may come with them, read and checked before the work begins."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medinr import io
from medinr.data.lungs import lung_mask
from medinr.data.pair import Pair
from medinr.data.report import check_pair
from medinr.data.sliding import breathing_regions, lung_regions
from medinr.errors import RegistrationWarning, UserError
from medinr.io import PointsSpace
from medinr.sampling import PointSampler, nearest
from medinr.space import transform_points
from medinr.start import MINIMAL_OVERLAP

MOST_REGIONS = 8
"""Each takes the steps of a fit of its own."""


def make_pair(
    fixed: Any,
    moving: Any,
    fixed_mask: Any = None,
    moving_mask: Any = None,
    fixed_points: Any = None,
    moving_points: Any = None,
    points_space: PointsSpace = "ras",
    fixed_labels: Any = None,
    moving_labels: Any = None,
    fixed_guides: Any = None,
    moving_guides: Any = None,
    fixed_exclude: Any = None,
    moving_exclude: Any = None,
    multichannel: bool = False,
) -> Pair:
    """A pair from paths, nibabel or SimpleITK images, or `Image`s; the mask ``"lungs"`` is computed from CT in HU."""
    images = [io.as_channels(source, multichannel) for source in (fixed, moving)]
    f, m = images

    def mask(source: Any, image: Any) -> Tensor | None:
        if source is None:
            return None
        return lung_mask(image) if isinstance(source, str) and source == "lungs" else io.read_mask(source, image.domain)

    def points(source: Any, image: Any, name: str) -> Tensor | None:
        if source is None:
            return None
        found = source if isinstance(source, Tensor) else io.read_points(source, points_space, image.domain)
        io.check_points_inside(found, image.domain, str(source) if isinstance(source, str | Path) else name)
        return found.double()

    pair = Pair(
        Path(f.source).name.split(".")[0] or "pair",
        f,
        m,
        mask(fixed_mask, f),
        mask(moving_mask, m),
        points(fixed_points, f, "fixed points"),
        points(moving_points, m, "moving points"),
        None if fixed_labels is None else io.read_labels(fixed_labels, f.domain),
        None if moving_labels is None else io.read_labels(moving_labels, m.domain),
        fixed_exclude=mask(fixed_exclude, f),
        moving_exclude=mask(moving_exclude, m),
        fixed_guides=points(fixed_guides, f, "fixed guides"),
        moving_guides=points(moving_guides, m, "moving guides"),
    )
    check_pair(pair)
    if fixed_labels is not None and moving_labels is None:
        warnings.warn(
            "--fixed-labels: not used; give --moving-labels to compare with", RegistrationWarning, stacklevel=3
        )
    return pair


def sliding_regions(pair: Pair, sliding: str | Path, possible: bool) -> Tensor | None:
    """Regions of the fixed image that slide along each other, numbered from 0 without gaps; None: there are none.

    Args:
        pair: with its start.
        sliding: auto, none, lungs, or a label volume on the fixed grid.
        possible: whether the fit can take them.

    Raises:
        UserError: regions were asked for, and there are none or the fit cannot take them.
    """
    if str(sliding) == "none" or (str(sliding) == "auto" and (not possible or pair.fixed_mask is not None)):
        return None
    if str(sliding) == "auto":
        return breathing_regions(pair)
    if not possible:
        raise UserError(
            f"--sliding {sliding}: expected local NCC, a linear start and no --uncertainty, found another; leave it out"
        )
    if str(sliding) == "lungs":
        return lung_regions(pair.fixed)
    labels = io.read_labels(sliding, pair.domain)
    values, numbers = labels.unique(return_inverse=True)
    if not 2 <= len(values) <= MOST_REGIONS:
        raise UserError(f"{sliding}: expected labels of 2 to {MOST_REGIONS} regions, found {len(values)}")
    regions: Tensor = numbers.to(torch.uint8)
    return regions


def check_overlap(pair: Pair) -> None:
    """Refuse images that share nothing, warn where they share little: no similarity can bring them together.

    Raises:
        UserError: the start maps none of the fixed points into the moving image, or none into its mask.
    """
    generator = torch.Generator().manual_seed(0)
    x = PointSampler(pair.domain, pair.fixed_mask)(10_000, "cpu", generator)
    target = transform_points(pair.moving.domain.world_to_voxel @ pair.start @ pair.domain.normalised_to_world, x)
    share = pair.moving.domain.contains_voxels(target).float().mean().item()
    advice = "look at the affines of both headers, or at --init"
    if share == 0:
        raise UserError(f"{pair.name}: expected images that overlap, found no common point after the start; {advice}")
    if pair.moving_mask is not None and not bool(nearest(pair.moving_mask, target).any()):
        raise UserError(
            f"{pair.name}: the start maps no fixed point into the moving mask; look at the mask, or {advice}"
        )
    if share < MINIMAL_OVERLAP:
        warnings.warn(
            f"{pair.name}: the start maps only {100 * share:.0f}% of the fixed points into the moving image; {advice}",
            RegistrationWarning,
            stacklevel=3,
        )
