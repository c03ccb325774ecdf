"""Volumes cut into axial, coronal and sagittal planes, turned as a radiologist expects."""

from dataclasses import dataclass

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray
from torch import Tensor

from medinr.space import Domain

Array = NDArray[np.floating]
Inside = NDArray[np.bool_]


@dataclass(frozen=True)
class Plane:
    """A cut through an RAS-ordered volume.

    Attributes:
        name: axial, coronal or sagittal.
        normal: array axis that is cut through.
        across, up: array axes drawn from left to right and from bottom to top.
        mirrored: the first voxel of ``across`` is drawn at the right.
        ends: letters at the left, right, bottom and top.
    """

    name: str
    normal: int
    across: int
    up: int
    mirrored: bool
    ends: tuple[str, str, str, str]


# Radiological convention: the patient's right is at the left; sagittal planes look to the left, nose first.
PLANES = (
    Plane("axial", 2, 0, 1, True, ("R", "L", "P", "A")),
    Plane("coronal", 1, 0, 2, True, ("R", "L", "I", "S")),
    Plane("sagittal", 0, 1, 2, True, ("A", "P", "I", "S")),
)


def planes_of(domain: Domain) -> tuple[Plane, ...]:
    """The planes to show of an RAS-ordered grid: all three of a volume, the one that a single slice is."""
    return tuple(p for p in PLANES if domain.flat_axis in (None, p.normal))


class Canonical:
    """The axes of a domain's arrays permuted and flipped so that they run, as nearly as they can, to R, A and S."""

    def __init__(self, domain: Domain) -> None:
        affine = domain.voxel_to_world.numpy()
        self.orientation = io_orientation(affine)
        turned = affine @ inv_ornt_aff(self.orientation, domain.shape)
        order = np.argsort(self.orientation[:, 0])
        self.domain = Domain.of([domain.shape[int(i)] for i in order], turned)

    def array(self, values: Tensor) -> Array:
        """Values [X, Y, Z, ...] in RAS order."""
        turned: Array = np.asarray(apply_orientation(values.detach().cpu().numpy(), self.orientation))
        return turned

    def along_axes(self, displacement: Tensor) -> Array:
        """Displacement, RAS mm [X, Y, Z, 3], in mm along the turned array axes (which an oblique scan tilts)."""
        spacing = np.array(self.domain.spacing)
        to_axes = self.domain.world_to_voxel[:3, :3].numpy() * spacing[:, None]
        along: Array = self.array(displacement) @ to_axes.T.astype(np.float32)
        return along


def centre_of(mask: Inside) -> tuple[int, int, int]:
    """Voxel at the centre of a mask; along an axis where the mask is thin there, the voxel of its largest cut.

    The plane midway between two lungs shows no lung.
    """
    inside = np.argwhere(mask)
    if len(inside) == 0:
        x, y, z = (n // 2 for n in mask.shape)
        return x, y, z
    found = []
    for axis in range(3):
        counts = np.bincount(inside[:, axis], minlength=mask.shape[axis])
        centre = int(np.rint(inside[:, axis].mean()))
        found.append(centre if counts[centre] >= 0.5 * counts.max() else int(counts.argmax()))
    return found[0], found[1], found[2]


def view_box(mask: Inside, spacing: tuple[float, float, float]) -> tuple[slice, slice, slice]:
    """The part of the grid to show: the mask and a margin of 12% of its longest side; all of it without a mask."""
    inside = np.argwhere(mask)
    if len(inside) == 0:
        a, b, c = (slice(0, n) for n in mask.shape)
        return a, b, c
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    margin = np.ceil(0.12 * ((high - low) * spacing).max() / np.array(spacing)).astype(int)
    first, last = np.maximum(low - margin, 0), np.minimum(high + margin, mask.shape)
    a, b, c = (slice(int(f), int(e)) for f, e in zip(first, last, strict=True))
    return a, b, c
