"""The files of a scan, and how they become one: read, checked, cropped, resampled, kept."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.dataset import CacheDataset, PersistentDataset
from monai.transforms.transform import Transform
from torch import Tensor

from medinr.data.archives import Source, ZipMember, open_source, source_domain
from medinr.data.base import fingerprint, users_mistake
from medinr.data.cohort import UNLABELLED, Scan
from medinr.data.transforms import mask_box
from medinr.data.working import labels_on_grid, on_grid, working_grid
from medinr.errors import UserError
from medinr.io import as_image, read_labels, read_mask
from medinr.space import Domain, Image, transform_points
from medinr.types import Matrix

MEMORY_BYTES = 4_000_000_000
"""What the scans that are kept in memory may take, where no folder for them is named; the others are read anew."""
IDENTITY = torch.eye(4, dtype=torch.float64)


@dataclass(frozen=True)
class Entry:
    """A scan as files, nothing read yet.

    Args:
        name: unique in the cohort.
        person: whose scan it is.
        images: where each modality lies; a missing one is absent.
        labels, mask: likewise, or None.
        conditions: NaN where missing.
        split: ``train``, ``val`` or ``test``, or None: by the rule of the data module.
        start: from a common space to the scan's world, RAS mm: the scan is given in the common space. None: its own.
    """

    name: str
    person: str
    images: Mapping[str, Source]
    labels: Source | None = None
    mask: Source | None = None
    conditions: Mapping[str, float] = field(default_factory=dict)
    split: str | None = None
    start: Matrix | None = None

    @property
    def sources(self) -> dict[str, Source]:
        """All files by what they are."""
        rest = {"labels": self.labels, "mask": self.mask}
        return {**self.images, **{what: source for what, source in rest.items() if source is not None}}


class ReadScan(Transform):
    """An `Entry` as plain tensors on one grid: read, checked, cropped, resampled.

    Args:
        values: the label values that may occur beside 0; empty: any.
        spacing: mm along R, A and S of the working grid, whose axes run along these; empty: the files' own grid.
        margin_mm: crop to the box of the mask (else of the labels) and this margin; None: the whole image.
        unlabelled_planes: planes across the shortest axis without any label above 0 have not been looked at:
            `UNLABELLED`, not background.

        masked: set the images to 0 outside the mask.

    Raises:
        UserError: a file that cannot be read, NaN, other grids, wrong label values, nothing to crop to or mask with.
    """

    def __init__(
        self,
        values: Sequence[int] = (),
        spacing: Sequence[float] = (),
        margin_mm: float | None = None,
        unlabelled_planes: bool = False,
        masked: bool = False,
    ) -> None:
        self.values, self.spacing, self.margin_mm = tuple(values), tuple(spacing), margin_mm
        self.unlabelled_planes, self.masked = unlabelled_planes, masked

    def __call__(self, entry: Entry) -> dict[str, Any]:
        if not entry.images:
            raise UserError("expected an image of some modality, found none")
        images: dict[str, Tensor] = {}
        domain: Domain | None = None
        for modality, source in entry.images.items():
            image = as_image(open_source(source))
            domain = domain or image.domain
            if not image.domain.same_grid(domain, tolerance_mm=0.01 * min(domain.spacing)):
                raise UserError(
                    f"{source}: expected the grid of {next(iter(entry.images))}, found another; resample it"
                )
            images[modality] = image.data
        assert domain is not None
        mask = None if entry.mask is None else read_mask(open_source(entry.mask), domain)
        labels = None if entry.labels is None else self.labels(entry.labels, domain)
        if self.masked:
            if mask is None:
                raise UserError("expected a mask, outside of which the images are set to 0, found none")
            images = {name: volume * mask for name, volume in images.items()}
        if entry.start is not None:
            domain = Domain.of(domain.shape, torch.linalg.inv(entry.start) @ domain.voxel_to_world)
        return self.on_working_grid(images, labels, mask, domain)

    def labels(self, source: Source, domain: Domain) -> Tensor:
        """The labels of a scan [X, Y, Z], checked."""
        labels = read_labels(open_source(source), domain).int()
        found = set(labels.unique().tolist()) - {0}
        if wrong := sorted(found - set(self.values) if self.values else {v for v in found if v < 0}):
            expected = f"label values {_span(self.values)}" if self.values else "label values from 0"
            raise UserError(f"{source}: expected {expected}, found {', '.join(map(str, wrong[:5]))}")
        if self.unlabelled_planes:
            axis = min(range(3), key=lambda a: domain.shape[a])
            empty = ~(labels > 0).transpose(0, axis).flatten(1).any(dim=1)
            labels.transpose(0, axis)[empty] = UNLABELLED
        return labels

    def on_working_grid(
        self, images: dict[str, Tensor], labels: Tensor | None, mask: Tensor | None, domain: Domain
    ) -> dict[str, Any]:
        """Crop to the mask, then resample; flat names, so that a cache on disk needs no code to load it."""
        if self.margin_mm is not None:
            inside = mask if mask is not None else None if labels is None else labels > 0
            if inside is None:
                raise UserError("margin_mm: expected a mask or labels to crop to, found neither")
            margin = [self.margin_mm / s for s in domain.spacing]
            start, stop = mask_box(inside[None].float(), 0.0)
            low = [max(0, int(np.floor(a - m))) for a, m in zip(start, margin, strict=True)]
            high = [min(n, int(np.ceil(b + m))) for b, m, n in zip(stop, margin, domain.shape, strict=True)]
            cut = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            affine = domain.voxel_to_world.clone()
            affine[:3, 3] = transform_points(affine, torch.tensor(low).double())
            images = {name: volume[:, *cut].clone() for name, volume in images.items()}
            labels = None if labels is None else labels[cut].clone()
            mask = None if mask is None else mask[cut].clone()
            domain = Domain.of([b - a for a, b in zip(low, high, strict=True)], affine)
        grid = domain
        if self.spacing:
            grid = working_grid(domain, self.spacing)
            images = {name: on_grid(Image(v, domain), grid, IDENTITY) for name, v in images.items()}
            labels = None if labels is None else labels_on_grid(labels, domain, grid, IDENTITY)
            mask = None if mask is None else labels_on_grid(mask.int(), domain, grid, IDENTITY) > 0
        found: dict[str, Any] = {f"image_{name}": volume[0].contiguous() for name, volume in images.items()}
        found["affine"] = grid.voxel_to_world
        if labels is not None:
            found["labels"] = labels.int()
        if mask is not None:
            found["mask"] = mask
        return found


def scan_of(entry: Entry, read: Mapping[str, Any]) -> Scan:
    """The scan of an entry and of what `ReadScan` made of it."""
    images = {name: read[f"image_{name}"] for name in entry.images}
    domain = Domain.of(next(iter(images.values())).shape, read["affine"])
    return Scan(entry.name, entry.person, domain, images, read.get("labels"), read.get("mask"), dict(entry.conditions))


def read_scan(entry: Entry, reader: ReadScan | None = None) -> Scan:
    """One scan from its files, without a cohort (a new subject, for example)."""
    return scan_of(entry, (reader or ReadScan())(entry))


class ScanStore:
    """Scans by name, each read once: kept in memory (as many as `MEMORY_BYTES` hold), or in a folder across runs."""

    def __init__(self, entries: Sequence[Entry], reader: ReadScan, cache_dir: str | None = None) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self._index = {entry.name: i for i, entry in enumerate(entries)}
        self._data: Any
        if cache_dir is None:
            count = _fitting(entries, reader)
            self._data = CacheDataset(
                list(entries), reader, cache_num=count, runtime_cache=True, num_workers=None, progress=False,
                copy_cache=False,
            )  # fmt: skip
        else:
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
            self._data = PersistentDataset(
                list(entries), reader, cache_dir=cache_dir, hash_func=partial(_entry_hash, reader=reader)
            )

    def __call__(self, name: str) -> Scan:
        try:
            read = self._data[self._index[name]]
        except RuntimeError as error:
            raise users_mistake(error) or error from None
        return scan_of(self.entries[name], read)


def _fitting(entries: Sequence[Entry], reader: ReadScan) -> int:
    """How many scans of the first readable one's size fit into memory; cropping is not counted."""
    for entry in entries:
        try:
            domain = source_domain(next(iter(entry.images.values())))
        except (UserError, StopIteration):
            continue
        voxels = math.prod(domain.sides_mm) / math.prod(reader.spacing or domain.spacing)
        return max(1, int(MEMORY_BYTES / (voxels * (4 * len(entry.images) + 5))))
    return 1


def _entry_hash(entry: Entry, reader: ReadScan) -> bytes:
    """Changes with the files, their names in archives, and the settings of the reader."""
    sources = {w: (s.archive if isinstance(s, ZipMember) else Path(s)) for w, s in entry.sources.items()}
    named = {w: (s.member if isinstance(s, ZipMember) else "") for w, s in entry.sources.items()}
    start = None if entry.start is None else entry.start.tolist()
    own = zlib.crc32(repr((sorted(named.items()), start)).encode())
    return f"{own:08x}{fingerprint(sources, [reader])}".encode()


def _span(values: Sequence[int]) -> str:
    ordered = sorted(values)
    whole = ordered == list(range(ordered[0], ordered[-1] + 1))
    return f"{ordered[0]} to {ordered[-1]}" if whole and len(ordered) > 2 else ", ".join(map(str, ordered[:12]))
