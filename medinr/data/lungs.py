"""Lung masks of a thorax CT without a network: threshold, body outline, largest components, closing.

The steps are the classical ones (Hu, Hoffman and Reinhardt 2001, "Automatic lung segmentation for accurate
quantitation of volumetric X-ray CT images"): air inside the body, without the trachea, keeping the two lungs, with the
vessels filled. All lengths are millimetres, so that 5 x 5 x 6 mm and 1 x 1 x 2.5 mm scans are treated alike.
"""

import warnings
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medinr.errors import RegistrationWarning, UserError
from medinr.space import Domain, Image
from medinr.types import Mask

Bools: TypeAlias = NDArray[np.bool_]

LUNG_THRESHOLD_HU = -400.0
PURE_GAS_HU = -960.0
"""Components whose median lies below are stomach or bowel gas, or air between the arms; lung tissue holds blood."""

SLICE_HOLE_MM2 = 800.0
"""Holes of a slice up to this size are hilar vessels; larger ones are the heart or the mediastinum."""


def lung_mask(image: Image, dilate_mm: float = 0.0, closing_mm: float = 8.0, remove_trachea: bool = True) -> Mask:
    """Both lungs with their vessels, bool [X, Y, Z], of a CT in HU.

    Where the values are not HU (nothing below -500), the threshold is Otsu's. The lungs may touch the upper and lower
    end of the scan, not its sides.

    Args:
        image: a thorax CT [1, X, Y, Z]; any orientation and spacing.
        dilate_mm: grow the result by this much.
        closing_mm: radius of the ball that fills vessels and fissures, on each lung by itself.
        remove_trachea: leave the trachea out, followed from the top of the scan to the carina.

    Raises:
        UserError: no lungs in the image.

    Warns:
        RegistrationWarning: the values are not HU.
    """
    values = image.data[0].cpu().numpy()
    axis, upward = _long_axis(image.domain)
    # Slices first, the most superior one at index 0; undone at the end. Views: nothing is copied.
    hu = np.moveaxis(values, axis, 0)
    hu = hu[::-1] if upward else hu
    spacing = _slices_first(image.domain.spacing, axis)

    threshold = LUNG_THRESHOLD_HU
    if np.percentile(hu, 0.5) > -500:
        threshold = otsu_threshold(hu)
        warnings.warn(
            f"{image.source or 'image'}: no air below -500 HU, so these are no HU values; lungs are taken as what lies "
            f"below {threshold:.4g} (Otsu): look at the mask",
            RegistrationWarning,
            stacklevel=2,
        )
    air = hu < threshold
    body = body_outline(~air, spacing)
    inside = air & body
    trachea = follow_trachea(inside, body, spacing) if remove_trachea else np.zeros_like(inside)
    lungs = _largest_lungs(inside & ~trachea, hu, minimum=0.01 * body.sum())
    if not lungs:
        raise UserError(
            f"{image.source or 'image'}: expected a thorax CT with lungs below {threshold:.0f} HU, found none; "
            "check the HU offset, give a mask file, or go without masks"
        )
    if len(lungs) == 1:
        lungs = _split(lungs[0], spacing)
    mask = np.zeros_like(inside)
    for lung in lungs:
        mask |= _filled(lung, spacing, closing_mm)
    mask &= body & ~trachea
    if dilate_mm > 0:
        mask = dilated(mask, spacing, dilate_mm) & ~trachea
    mask = mask[::-1] if upward else mask
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(mask, 0, axis)))


def lung_structures(image: Image, lungs: Mask, threshold: float = -500.0) -> Tensor:
    """Labels [X, Y, Z] inside a lung mask: 1 parenchyma, 2 vessels and bronchial walls (above ``threshold`` HU).

    The Dice of whole lungs hardly changes once their surfaces meet; that of the vessels follows the alignment inside.
    """
    dense = image.data[0] > threshold
    return (lungs.int() + (lungs & dense).int()).to(torch.int16)


def body_mask(image: Image, threshold: float = -500.0) -> Mask:
    """The body of a CT in HU without table and clothes, lungs and gas included, bool [X, Y, Z]."""
    axis, _ = _long_axis(image.domain)
    hu = np.moveaxis(image.data[0].cpu().numpy(), axis, 0)
    body = body_outline(hu > threshold, _slices_first(image.domain.spacing, axis))
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(body, 0, axis)))


def otsu_threshold(values: NDArray[Any], bins: int = 256) -> float:
    """The threshold that maximises the variance between two classes (Otsu 1979)."""
    low, high = np.percentile(values, [0.1, 99.9])
    counts, edges = np.histogram(values, bins=bins, range=(float(low), float(max(high, low + 1e-6))))
    centres = (edges[1:] + edges[:-1]) / 2
    weight = np.cumsum(counts) / max(counts.sum(), 1)
    mean = np.cumsum(counts * centres) / max(counts.sum(), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean[-1] * weight - mean) ** 2 / (weight * (1 - weight))
    between = np.where(np.isfinite(between), between, -1)
    # Empty bins between the classes are all equally good: the middle of them.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float(edges[best + 1].mean())


def body_outline(tissue: Bools, spacing: tuple[float, float, float]) -> Bools:
    """The patient without table and clothes, filled slice by slice (slices along axis 0): lungs and gas belong to it.

    Args:
        tissue: voxels that are not air.
        spacing: mm, slices first.
    """
    # The table touches the back: an opening cuts thin sheets and the bridge between the two.
    opened = ndimage.binary_opening(tissue, structure=_disc(4.0, spacing))
    labels, count = ndimage.label(opened if opened.any() else tissue)
    if count == 0:
        return tissue
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    core = labels == int(sizes.argmax())
    # Give back what the opening took from the skin (2 voxels at most, and only tissue).
    body = ndimage.binary_dilation(core, structure=_disc(6.0, spacing)) & tissue
    # Columns through the border of the image would let air in: fill each slice on its own, holes closed in-plane.
    return np.stack([ndimage.binary_fill_holes(slice_) for slice_ in body])


def follow_trachea(inside: Bools, body: Bools, spacing: tuple[float, float, float]) -> Bools:
    """The trachea from the top of the scan to the carina: small, near the midline, and below itself slice by slice.

    Args:
        inside: air inside the body, slices along axis 0, the most superior one first.
        body: filled body outline.
        spacing: mm, slices first.

    Returns:
        Its voxels with a wall of one voxel; empty where none is found.
    """
    trachea = np.zeros_like(inside)
    pixel = spacing[1] * spacing[2]
    current: Bools | None = None
    area = 0.0
    for k in range(len(inside)):
        labels, count = ndimage.label(inside[k])
        if count == 0:
            if current is not None:
                break
            continue
        areas = np.bincount(labels.ravel(), minlength=count + 1) * pixel
        if current is None:
            found = _trachea_start(labels, areas, body[k], spacing)
        else:
            overlap = np.bincount(labels[current], minlength=count + 1)
            overlap[0] = 0
            found = int(overlap.argmax()) if overlap.any() else 0
            # At the carina the component widens, or joins a lung.
            if not found or areas[found] > max(1.8 * area, area + 150.0):
                break
        if not found:
            continue
        current = labels == found
        area = float(areas[found]) if area == 0 else 0.5 * area + 0.5 * float(areas[found])
        trachea[k] = current
    wall = np.zeros((3, 3, 3), dtype=bool)
    wall[1] = True
    return np.asarray(ndimage.binary_dilation(trachea, structure=wall))


def _trachea_start(labels: NDArray[Any], areas: NDArray[Any], body: Bools, spacing: tuple[float, float, float]) -> int:
    """Label of the component that looks like a trachea: 40 to 700 mm2, within 25 mm of the body's midline, or 0."""
    if not body.any():
        return 0
    mm = np.array(spacing[1:])
    centre = np.array(ndimage.center_of_mass(body)) * mm
    best, nearest = 0, 25.0
    for label in range(1, len(areas)):
        if not 40.0 <= areas[label] <= 700.0:
            continue
        rows, columns = np.nonzero(labels == label)
        sides = np.array([np.ptp(rows) + 1, np.ptp(columns) + 1]) * mm
        if sides.max() > 2.5 * sides.min() + mm.max():
            continue  # a slit is no trachea
        away = float(np.linalg.norm(np.array([rows.mean(), columns.mean()]) * mm - centre))
        if away < nearest:
            best, nearest = label, away
    return best


def dilated(mask: Bools, spacing: tuple[float, float, float], radius_mm: float) -> Bools:
    """``mask`` grown by a ball of ``radius_mm``."""
    if not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask, sampling=spacing) <= radius_mm)


def eroded(mask: Bools, spacing: tuple[float, float, float], radius_mm: float) -> Bools:
    """``mask`` shrunk by a ball of ``radius_mm``; the border of the array does not count as outside."""
    if mask.all():
        return mask
    return np.asarray(ndimage.distance_transform_edt(mask, sampling=spacing) > radius_mm)


def _filled(mask: Bools, spacing: tuple[float, float, float], radius_mm: float) -> Bools:
    """Closing with a ball and filled holes, worked on in the mask's own box."""
    box = _box(mask, [int(np.ceil(radius_mm / s)) + 2 for s in spacing])
    part = mask[box]
    closed = eroded(dilated(part, spacing, radius_mm), spacing, radius_mm) | part
    out = np.zeros_like(mask)
    # Slice by slice as well: vessels that leave the scan at its lower end are no holes in 3-D.
    pixel = spacing[1] * spacing[2]
    out[box] = np.stack([_fill_small(s, SLICE_HOLE_MM2 / pixel) for s in ndimage.binary_fill_holes(closed)])
    return out


def _fill_small(plane: Bools, largest: float) -> Bools:
    """Fill the holes of a slice that are no larger than ``largest`` pixels: joined lungs may run around the heart."""
    labels, count = ndimage.label(ndimage.binary_fill_holes(plane) & ~plane)
    if count == 0:
        return plane
    small = np.bincount(labels.ravel()) <= largest
    small[0] = False
    return np.asarray(plane | small[labels])


def _split(lungs: Bools, spacing: tuple[float, float, float]) -> list[Bools]:
    """Left and right lung where they are one component, joined by a thin septum; the component itself if they are not.

    The distance to the border is thresholded higher and higher until two parts of similar size are left; each voxel
    then goes to the nearer one.
    """
    box = _box(lungs, [1, 1, 1])
    part = lungs[box]
    depth = ndimage.distance_transform_edt(part, sampling=spacing)
    for radius in range(2, 16):
        labels, count = ndimage.label(depth > radius)
        if count < 2:
            continue
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        first, second = np.argsort(sizes)[::-1][:2]
        if sizes[second] < sizes[first] / 3:
            continue
        cores = np.where(labels == first, 1, np.where(labels == second, 2, 0))
        nearest = ndimage.distance_transform_edt(
            cores == 0, sampling=spacing, return_distances=False, return_indices=True
        )
        side = cores[tuple(nearest)]
        halves = []
        for label in (1, 2):
            half = np.zeros_like(lungs)
            half[box] = part & (side == label)
            halves.append(half)
        return halves
    return [lungs]


def _box(mask: Bools, margin: list[int]) -> tuple[slice, ...]:
    """The box of a mask that is not empty, with a margin in voxels, inside the array."""
    found = ndimage.find_objects(mask.astype(np.uint8))[0]
    return tuple(
        slice(max(s.start - m, 0), min(s.stop + m, n)) for s, m, n in zip(found, margin, mask.shape, strict=True)
    )


def _largest_lungs(air: Bools, hu: NDArray[Any], minimum: float) -> list[Bools]:
    """The largest component, and the second when it is at least a seventh of it; gas and specks are left out."""
    labels, count = ndimage.label(air)
    if count == 0:
        return []
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    lungs: list[Bools] = []
    largest = 0
    for label in np.argsort(sizes)[::-1][:4]:
        size = int(sizes[label])
        if size < max(minimum, largest / 7, 1) or len(lungs) == 2:
            break
        lung = labels == label
        if np.median(hu[lung]) < PURE_GAS_HU:
            continue
        largest = max(largest, size)
        lungs.append(lung)
    return lungs


def _long_axis(domain: Domain) -> tuple[int, bool]:
    """The array axis that runs along the patient (inferior-superior), and whether it points up."""
    along_z = domain.voxel_to_world[2, :3] / domain.voxel_to_world[:3, :3].norm(dim=0)
    axis = int(along_z.abs().argmax())
    return axis, bool(along_z[axis] > 0)


def _slices_first(spacing: tuple[float, float, float], axis: int) -> tuple[float, float, float]:
    rest = [s for i, s in enumerate(spacing) if i != axis]
    return spacing[axis], rest[0], rest[1]


def _disc(radius_mm: float, spacing: tuple[float, float, float]) -> Bools:
    """A disc in the plane of the slices, at least one voxel wide in each direction."""
    reach = [max(int(radius_mm // s), 1) for s in spacing[1:]]
    u, v = np.mgrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    disc = (u / reach[0]) ** 2 + (v / reach[1]) ** 2 <= 1.0
    return np.asarray(disc[None])
