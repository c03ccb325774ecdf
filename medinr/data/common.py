"""Scans of a cohort on one common grid, as networks that learn from all of them see them."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medinr.data.cohort import Cohort, Scan
from medinr.data.working import labels_on_grid, on_grid, working_grid
from medinr.errors import UserError
from medinr.space import Domain, Image, transform_points
from medinr.types import Matrix, Volume

QUANTILES = (0.005, 0.995)
"""Intensities of a scan that become 0 and 1."""
IN_MEMORY = 400
"""Scans that are kept on the grid; others are made again."""


def window_of(values: Tensor) -> tuple[float, float]:
    """The intensities that become 0 and 1."""
    low, high = torch.quantile(values.flatten()[:: max(1, values.numel() // 1_000_000)], torch.tensor(QUANTILES))
    return float(low), max(float(high), float(low) + 1e-6)


def image_of(scan: Scan, modality: str) -> Image:
    """A modality of a scan in [0, 1], 0 outside its mask.

    Raises:
        UserError: the scan lacks it.
    """
    if modality not in scan.images:
        raise UserError(f"{scan.name}: expected {modality}, found {', '.join(scan.images)}; leave the scan out")
    values = scan.images[modality]
    low, high = window_of(values if scan.mask is None or not scan.mask.any() else values[scan.mask])
    data = ((values - low) / (high - low)).clamp(0, 1)
    return Image((data if scan.mask is None else data * scan.mask)[None], scan.domain, scan.name)


class CommonSpace:
    """Scans on one grid, each through its own start.

    Args:
        cohort: the scans.
        modality: which image of a scan.
        grid: where they are wanted.
        start: of a scan's image: rigid or affine, from the grid's world to the scan's; asked once a scan.
    """

    def __init__(self, cohort: Cohort, modality: str, grid: Domain, start: Callable[[Image], Matrix]) -> None:
        if modality not in cohort.modalities:
            raise UserError(
                f"modality: expected one of {', '.join(cohort.modalities)}, found {modality!r}; name one of them"
            )
        self.cohort, self.modality, self.grid, self.start = cohort, modality, grid, start
        self._kept: OrderedDict[str, tuple[Volume, Tensor | None]] = OrderedDict()

    def _seen(self, name: str) -> tuple[Volume, Tensor | None]:
        if name not in self._kept:
            scan = self.cohort.scan(name)
            image = image_of(scan, self.modality)
            start = self.start(image)
            volume = on_grid(image, self.grid, start)
            labels = None if scan.labels is None else labels_on_grid(scan.labels, scan.domain, self.grid, start)
            self._kept[name] = (volume, labels)
            if len(self._kept) > IN_MEMORY:
                self._kept.popitem(last=False)
        return self._kept[name]

    def image(self, name: str) -> Volume:
        """[1, X, Y, Z] in [0, 1]."""
        return self._seen(name)[0]

    def images(self, names: Sequence[str]) -> Tensor:
        """[n, 1, X, Y, Z] in [0, 1]."""
        return torch.stack([self.image(name) for name in names])

    def labels(self, name: str) -> Tensor | None:
        """[X, Y, Z] of the nearest voxels; -1 where nobody has looked; None without labels."""
        return self._seen(name)[1]

    def mean(self, names: Sequence[str]) -> Volume:
        """Mean image [1, X, Y, Z] of some scans."""
        total = torch.zeros(1, *self.grid.shape)
        for name in names:
            total += self.image(name)
        return total / len(names)


def common_grid(domain: Domain, content: Tensor | None, spacing: Sequence[float], margin_mm: float) -> Domain:
    """A grid along R, A and S over the box of ``content`` [X, Y, Z] in ``domain`` with a margin, not beyond the domain.

    Args:
        content: what must be inside; None or empty: the whole domain.
        spacing: mm along R, A and S.
    """
    whole = working_grid(domain, spacing)
    if content is None or not content.any():
        return whole
    voxels = content.nonzero().double()
    low, high = voxels.amin(0) - 0.5, voxels.amax(0) + 0.5
    corners = torch.cartesian_prod(*torch.stack((low, high), dim=1))
    inside = transform_points(whole.world_to_voxel @ domain.voxel_to_world, corners)
    more = margin_mm / torch.tensor(whole.spacing)
    size = torch.tensor(whole.shape)
    first = (inside.amin(0) - more).floor().long().clamp(min=0)
    last = (inside.amax(0) + more).ceil().long()
    last = torch.minimum(last, size - 1)
    affine = whole.voxel_to_world.clone()
    affine[:3, 3] = transform_points(whole.voxel_to_world, first.double())
    return Domain.of((last - first + 1).tolist(), affine)


def windowed_image(image: Image) -> Image:
    """An image in [0, 1]."""
    low, high = window_of(image.data)
    return Image(((image.data - low) / (high - low)).clamp(0, 1), image.domain, image.source)


def content_of(cohort: Cohort, names: Sequence[str], domain: Domain) -> Tensor | None:
    """Union of the masks, else labels, of those scans that lie on this very grid; None without any."""
    found: Tensor | None = None
    for name in names:
        scan = cohort.scan(name)
        part = scan.mask if scan.mask is not None else None if scan.labels is None else scan.labels > 0
        if part is not None and scan.domain.same_grid(domain):
            found = part if found is None else found | part
    return found
