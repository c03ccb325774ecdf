"""What a careful person checks before a registration, in words: sizes, masks, landmarks and their motion."""

import warnings

import torch
from torch import Tensor

from medinr.data.pair import Pair
from medinr.errors import RegistrationWarning, UserError
from medinr.space import Domain, Image, transform_points
from medinr.types import Mask, Points

PARALLEL_DEGREES = 5.0
"""Single slices whose planes differ by more than this show different cuts of the body."""
INSIDE_MASK_SHARE = 0.95
"""Fewer landmarks than this inside their lung mask mean a misplaced mask more often than a difficult patient."""


def describe_domain(domain: Domain) -> str:
    """``256x256x94 at 0.97x0.97x2.5 mm``."""
    size = "x".join(str(n) for n in domain.shape)
    return f"{size} at {'x'.join(f'{s:.4g}' for s in domain.spacing)} mm"


def landmark_motion(fixed_points: Points, moving_points: Points) -> Tensor:
    """Distances between corresponding points [n], mm: the TRE before any registration."""
    distances: Tensor = torch.linalg.vector_norm(moving_points.double() - fixed_points.double(), dim=1)
    return distances


def share_inside(points: Points, mask: Mask, domain: Domain) -> float:
    """Share of RAS mm points [n, 3] whose nearest voxel is in the mask; points outside the image count as outside."""
    voxels = transform_points(domain.world_to_voxel, points.double())
    inside = domain.contains_voxels(voxels)
    i, j, k = voxels[inside].round().long().clamp(min=0).minimum(torch.tensor(domain.shape) - 1).T
    return float(mask[i, j, k].sum() / max(len(points), 1))


def warn_outside(points: Points, mask: Mask, domain: Domain, name: str, side: str = "") -> None:
    """Warn when too few landmarks lie inside their mask; ``side``: ``fixed `` or ``moving `` where there are two."""
    share = share_inside(points, mask, domain)
    if share < INSIDE_MASK_SHARE:
        warnings.warn(
            f"{name}: {100 * share:.1f}% of the {side}landmarks lie inside the {side}mask (expected "
            f"{100 * INSIDE_MASK_SHARE:.0f}% or more); look whether the mask is shifted or flipped",
            RegistrationWarning,
            stacklevel=3,
        )


def check_pair(pair: Pair) -> None:
    """Raise or warn about what makes results wrong.

    Raises:
        UserError: landmarks of the two images differ in number, or only one image has some; an empty mask; nothing left
            by the excluded regions; images of different channels; one of them a slice, or slices that are not parallel.

    Warns:
        RegistrationWarning: less than 95% of the landmarks lie in their mask.
    """
    check_images(pair)
    for what, both in (
        ("landmarks", (pair.fixed_points, pair.moving_points)),
        ("guides", (pair.fixed_guides, pair.moving_guides)),
    ):
        counts = [0 if p is None else len(p) for p in both]
        if counts[0] != counts[1]:
            raise UserError(
                f"{pair.name}: expected as many fixed as moving {what}, row by row, found {counts[0]} and {counts[1]}; "
                "give both files, with the same points in the same order"
            )
    for side, image, mask, points in _sides(pair):
        if mask is None:
            continue
        if not bool(mask.any()):
            raise UserError(f"{pair.name}: {side} mask: expected some voxels, found an empty mask; give another")
        if points is None:
            continue
        warn_outside(points, mask, image.domain, pair.name, f"{side} ")


def check_images(pair: Pair) -> None:
    """Whether the two images can be compared at all: channels, dimensions, and what the excluded regions leave.

    Raises:
        UserError: they cannot.
    """
    channels = [len(image.data) for image in (pair.fixed, pair.moving)]
    if channels[0] != channels[1]:
        raise UserError(
            f"{pair.name}: expected as many channels in both images, found {channels[0]} in the fixed and "
            f"{channels[1]} in the moving one; give the same channels of both, in one order"
        )
    flat = [image.domain.flat_axis for image in (pair.fixed, pair.moving)]
    for side, image in (("fixed", pair.fixed), ("moving", pair.moving)):
        if sum(n == 1 for n in image.domain.shape) > 1:
            raise UserError(f"{pair.name}: {side} image: expected a volume or a slice, found {image.domain.shape}")
    if (flat[0] is None) != (flat[1] is None):
        shapes = f"{pair.fixed.domain.shape} and {pair.moving.domain.shape}"
        raise UserError(
            f"{pair.name}: expected two volumes or two single slices, found {shapes}; cut the slice out of the volume, "
            "or give the volumes"
        )
    if flat[0] is not None:
        normals = [_normal(image.domain) for image in (pair.fixed, pair.moving)]
        angle = torch.rad2deg(torch.arccos((normals[0] @ normals[1]).abs().clamp(max=1))).item()
        if angle > PARALLEL_DEGREES:
            raise UserError(
                f"{pair.name}: expected slices of parallel planes, found planes at {angle:.0f} degrees to each other; "
                "look at the affines of both headers"
            )
    for side, mask, excluded in (
        ("fixed", pair.fixed_mask, pair.fixed_exclude),
        ("moving", pair.moving_mask, pair.moving_exclude),
    ):
        if excluded is not None and not bool((~excluded if mask is None else mask & ~excluded).any()):
            whole = "image" if mask is None else "mask"
            raise UserError(
                f"{pair.name}: {side} exclude: expected some voxels of the {side} {whole} to be left, found none; "
                "give a smaller region"
            )


def _normal(domain: Domain) -> Tensor:
    """Unit normal [3] of a single slice, in world axes."""
    a, b = (domain.voxel_to_world[:3, axis] for axis in range(3) if axis != domain.flat_axis)
    normal: Tensor = torch.nn.functional.normalize(torch.linalg.cross(a, b), dim=0)
    return normal


def pair_report(pair: Pair) -> list[str]:
    """One line per thing known of a pair, in plain words."""
    lines = []
    for side, image, mask, points in _sides(pair):
        low, high = image.data.min().item(), image.data.max().item()
        channels = f", {len(image.data)} channels" if len(image.data) > 1 else ""
        values = f"values {low:.0f} to {high:.0f}"
        lines.append(f"{side} image: {describe_domain(image.domain)}{channels}, {values} ({image.source})")
        if mask is None:
            lines.append(f"{side} mask: none")
        else:
            share = None if points is None else share_inside(points, mask, image.domain)
            inside = "" if share is None else f", {100 * share:.1f}% of the landmarks inside"
            mean = image.data[0][mask].mean().item()
            lines.append(f"{side} mask: {litres(mask, image.domain):.3g} litres, mean value {mean:.0f}{inside}")
        excluded = pair.fixed_exclude if side == "fixed" else pair.moving_exclude
        if excluded is not None:
            lines.append(f"{side} exclude: {litres(excluded, image.domain):.3g} litres are not compared")
        labels = pair.fixed_labels if side == "fixed" else pair.moving_labels
        if labels is not None:
            lines.append(f"{side} labels: {len(labels.unique()) - int(bool((labels == 0).any()))} structures")
    if pair.fixed_points is None or pair.moving_points is None:
        lines.append("landmarks: none")
    else:
        motion = landmark_motion(pair.fixed_points, pair.moving_points)
        spread = f"sd {motion.std(correction=0):.2f}, max {motion.max():.2f}"
        lines.append(f"landmarks: {len(motion)}, motion mean {motion.mean():.2f} mm, {spread}")
    if pair.fixed_guides is not None:
        lines.append(f"guides: {len(pair.fixed_guides)} landmarks that the registration follows")
    return lines


def pair_summary(pair: Pair) -> str:
    """`pair_report` in half a line, for tables of cases."""
    parts = [describe_domain(pair.domain)]
    if not pair.moving.domain.same_grid(pair.domain):
        parts.append(f"moving {describe_domain(pair.moving.domain)}")
    volumes = [f"{litres(m, i.domain):.3g}" for _, i, m, _ in _sides(pair) if m is not None]
    parts.append(f"masks {' and '.join(volumes)} litres" if volumes else "no masks")
    if pair.fixed_points is None or pair.moving_points is None:
        return ", ".join([*parts, "no landmarks"])
    motion = landmark_motion(pair.fixed_points, pair.moving_points)
    parts.append(f"{len(motion)} landmarks, mean motion {motion.mean():.2f} mm")
    shares = [share_inside(p, m, i.domain) for _, i, m, p in _sides(pair) if m is not None and p is not None]
    return ", ".join([*parts, *([f"{100 * min(shares):.1f}% of them in the masks"] if shares else [])])


def litres(mask: Mask, domain: Domain) -> float:
    """Volume of a mask."""
    a, b, c = domain.spacing
    return float(mask.sum()) * a * b * c / 1e6


def _sides(pair: Pair) -> list[tuple[str, Image, Mask | None, Points | None]]:
    return [
        ("fixed", pair.fixed, pair.fixed_mask, pair.fixed_points),
        ("moving", pair.moving, pair.moving_mask, pair.moving_points),
    ]
