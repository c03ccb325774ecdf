"""Points of one scan: where they are drawn, and what the scan says there."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medinr.data.cohort import UNLABELLED, Scan
from medinr.sampling import interpolate, near, nearest
from medinr.space import Domain, transform_points
from medinr.types import Mask, Points

PERCENTILE = 0.999
"""Of the intensities inside the mask: what becomes 1. 0 stays 0 where the image has no negative values."""


def brain(scan: Scan) -> Mask:
    """The scan's mask; without one what is labelled; without labels where any image is not zero."""
    if scan.mask is not None:
        return scan.mask
    if scan.labels is not None and bool((scan.labels > 0).any()):
        return scan.labels > 0
    return torch.stack([v != 0 for v in scan.images.values()]).any(0)


def window(volume: Tensor, mask: Mask) -> tuple[float, float]:
    """Intensities that become 0 and 1: 0 or the 0.1st percentile if that is negative, and the 99.9th, in the mask."""
    values = volume[mask].float().sort().values
    low, high = (float(values[round(share * (len(values) - 1))]) for share in (1 - PERCENTILE, PERCENTILE))
    low = min(low, 0.0)
    return low, max(high, low + 1e-6)


@dataclass(frozen=True)
class Drawn:
    """What a scan says at n points.

    Attributes:
        world: [n, 3], RAS mm.
        values: [n, M], windowed to [0, 1]; 0 outside the mask.
        classes: [n], the place of each label among the classes; -1 unlabelled.
    """

    world: Points
    values: Tensor
    classes: Tensor | None


class ScanPoints:
    """The voxels of a scan's mask, of the halo around it and of the rest, and their values.

    Outside the mask the label counts as background, and, with ``strip``, the image as 0: an atlas then ends where the
    brain does.

    Args:
        scan: the scan.
        modalities: in the order of the values.
        labels: label values in the order of the classes; the first is the background, 0.
        halo_mm: width of the halo.
        strip: False for images that show nothing but the brain already: a mask with holes would leave holes in them.
    """

    def __init__(
        self, scan: Scan, modalities: tuple[str, ...], labels: tuple[int, ...], halo_mm: float, strip: bool = True
    ) -> None:
        self.name, self.domain = scan.name, scan.domain
        mask = brain(scan)
        self.present = torch.tensor([m in scan.images for m in modalities])
        self.windows = [window(scan.images[m], mask) if m in scan.images else (0.0, 1.0) for m in modalities]
        volumes = []
        for name, (low, high) in zip(modalities, self.windows, strict=True):
            volume = scan.images.get(name, torch.zeros(scan.domain.shape))
            volumes.append(((volume - low) / (high - low)).clamp(0, 1))
        self.volume = torch.stack(volumes) * mask if strip else torch.stack(volumes)
        self.classes: Tensor | None = None
        if scan.labels is not None and len(labels) > 1:
            self.classes = torch.zeros(scan.domain.shape, dtype=torch.int16)
            for place, value in enumerate(labels):
                self.classes[scan.labels == value] = place
            self.classes[~mask] = 0
            self.classes[scan.labels == UNLABELLED] = -1
        self.inside = mask.flatten().nonzero()[:, 0].int()
        halo = near(mask, scan.domain, halo_mm) & ~mask
        self.halo = halo.flatten().nonzero()[:, 0].int()

    def to(self, device: torch.device | str) -> "ScanPoints":
        """Moved to a device, in place."""
        for name in ("volume", "classes", "inside", "halo", "present"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))
        return self

    def draw(self, n: int, generator: torch.Generator, halo: float, elsewhere: float, jitter: bool) -> Drawn:
        """n points: shares ``halo`` and ``elsewhere`` from the halo and the whole grid, the others from the mask."""
        device = self.volume.device
        counts = [0, round(halo * n) if len(self.halo) else 0, round(elsewhere * n)]
        counts[0] = n - sum(counts)
        everywhere = torch.randint(self.domain.n_voxels, (counts[2],), device=device, generator=generator)
        pieces = [
            voxels[torch.randint(len(voxels), (count,), device=device, generator=generator)]
            for voxels, count in ((self.inside, counts[0]), (self.halo, counts[1]))
            if count
        ]
        flat = torch.cat([*pieces, everywhere.int()]).long()
        return self.at(flat, torch.rand(n, 3, device=device, generator=generator) - 0.5 if jitter else None)

    def at(self, flat: Tensor, offset: Tensor | None = None) -> Drawn:
        """Voxels by their numbers in C order, or points at an ``offset`` [n, 3] from their centres."""
        voxels = voxels_of(flat, self.domain)
        if offset is None:
            values = self.volume.flatten(1)[:, flat].T
            classes = None if self.classes is None else self.classes.flatten()[flat].long()
        else:
            voxels = voxels + offset
            values = interpolate(self.volume, voxels).T
            classes = None if self.classes is None else nearest(self.classes, voxels).long()
        return Drawn(transform_points(self.domain.voxel_to_world, voxels), values, classes)


def voxels_of(flat: Tensor, domain: Domain) -> Tensor:
    """Voxel coordinates [n, 3] (float32) of voxels by their numbers in C order."""
    _, ny, nz = domain.shape
    return torch.stack((flat // (ny * nz), flat // nz % ny, flat % nz), dim=1).float()


def placement(mask: Mask, domain: Domain) -> tuple[Points, Tensor, float]:
    """Centre of mass [3] of a mask, standard deviations [3] along the world's axes, and largest distance, mm."""
    voxels = voxels_of(mask.flatten().nonzero()[:, 0], domain)
    world = transform_points(domain.voxel_to_world, voxels.double())
    centre = world.mean(0)
    return centre, world.std(0).clamp(min=1e-3), float((world - centre).abs().max())


def weighted_l1(predicted: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Mean over points [n, M] of the absolute differences, each modality by its weight [M]."""
    return ((predicted - values).abs() * weight).sum() / len(values)


def cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Sum over the labelled points [n] of the cross-entropy of logits [n, K], divided by the number of all points."""
    return F.cross_entropy(logits, classes, ignore_index=-1, reduction="sum") / len(classes)
