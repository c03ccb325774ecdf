"""The base of the data modules of sequences: frames -> the pipeline of pairs, image by image -> one `Sequence`."""

from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, replace
from typing import Any

import torch

from medinr.data.base import MedINRDataModule
from medinr.data.pair import Pair
from medinr.data.report import describe_domain, litres, warn_outside
from medinr.data.sequence import Sequence, check_indices, check_times, require_one_grid, wrapped
from medinr.data.transforms import PlainTensorsd, Resampled
from medinr.errors import UserError
from medinr.space import Domain, Image, transform_points
from medinr.types import Mask


@dataclass(frozen=True)
class Frame:
    """The files of one time: names under ``image``, and ``mask``, ``points``, ``labels`` where there are any."""

    time: float
    files: Mapping[str, str]


class SequenceDataModule(MedINRDataModule):
    """Images of one body at several times, each read, and cached, on its own.

    A data set is a subclass that gives `frames` (names of files, nothing read) and, where these are not plain images,
    `readers`: a frame goes through the transforms of pairs as their fixed side.

    Args:
        reference: time of the image whose grid the results are on; None: the first.
        held_out: times that no method may train on.
        period: see `Sequence`.
        one_grid: refuse images on different grids.
        steps_per_epoch, spacing, cache_dir: see `MedINRDataModule`.
        margin_mm: crop to the box of all masks together and this margin (each image to its own where grids differ).
    """

    def __init__(
        self,
        name: str,
        reference: float | str | None,
        held_out: Series[float | str],
        period: float | None,
        one_grid: bool,
        steps_per_epoch: int = 100,
        spacing: float | None = None,
        margin_mm: float | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(steps_per_epoch, spacing, margin_mm, cache_dir)
        self.reference, self.held_out = reference, list(held_out)
        self.period, self.one_grid = period, one_grid
        self.cases = [name]
        self._sequence: Sequence | None = None

    # ------------------------------------------------------------------------------------- what a data set must give

    def frames(self) -> list[Frame]:
        """The files of each time, in the order of the data set.

        Raises:
            UserError: names what is missing.
        """
        raise NotImplementedError

    def time_of(self, given: float | str) -> float:
        """The time that an option means; data sets with dates take these too.

        Raises:
            UserError: it is no time.
        """
        try:
            return float(given)
        except ValueError:
            raise UserError(f"data: expected times as numbers, found {given!r}; correct it") from None

    # -------------------------------------------------------------------------------------------- what all share

    @property
    def sequence(self) -> Sequence:
        """The loaded sequence; loads it on the first use."""
        if self._sequence is None:
            self._sequence = self._read()
        return self._sequence

    @property
    def domain(self) -> Domain:
        return self.sequence.domain

    def item(self) -> dict[str, Any]:
        """All files, after times and indices have been checked."""
        frames = self._checked()[0]
        return {"name": self.cases[0], **{f"{f.time:g} {k}": v for f in frames for k, v in f.files.items()}}

    def setup(self, stage: str | None = None) -> None:
        """Load the sequence, whatever the stage."""
        _ = self.sequence

    def pipeline(self) -> list[Any]:
        """All transforms of a frame; cropping comes last, when all masks are known."""
        steps = list(self.readers())
        if self.spacing is not None:
            steps.append(Resampled(self.spacing))
        return [*steps, PlainTensorsd()]

    def check(self) -> list[str]:
        """What was found, one line per thing."""
        return sequence_report(self.sequence)

    def _checked(self) -> tuple[list[Frame], int, tuple[int, ...]]:
        """Frames, reference and held-out indices; nothing is read yet."""
        name = self.cases[0]
        frames = self.frames()
        times = [frame.time for frame in frames]
        check_times(name, times, self.period)
        reference = 0 if self.reference is None else self._index(times, self.reference, "reference")
        held_out = tuple(self._index(times, given, "held_out") for given in self.held_out)
        check_indices(name, times, reference, held_out)
        return frames, reference, held_out

    def _index(self, times: list[float], given: float | str, what: str) -> int:
        time = self.time_of(given)
        gaps = [abs(wrapped(time - t, self.period)) for t in times]
        best = gaps.index(min(gaps))
        if gaps[best] > 1e-6 * (max(times) - min(times)):
            found = ", ".join(f"{t:g}" for t in times)
            raise UserError(f"data.{what}: expected one of the times {found}, found {given}; choose one of these")
        return best

    def _read(self) -> Sequence:
        frames, reference, held_out = self._checked()
        sides = {"image": "fixed", "mask": "fixed_mask", "points": "fixed_points", "labels": "fixed_labels"}
        samples = []
        for frame in frames:
            item = {sides[k]: v for k, v in frame.files.items()}
            samples.append(self.prepared({"name": f"{self.cases[0]}_{frame.time:g}", "time": frame.time, **item}))
        images = [
            Image(s["fixed"], Domain.of(s["fixed"].shape[1:], s["fixed_affine"]), str(s.get("fixed_source", "")))
            for s in samples
        ]
        rest = [tuple(s.get(sides[kind]) for s in samples) for kind in ("mask", "points", "labels")]
        times = tuple(frame.time for frame in frames)
        sequence = Sequence(
            self.cases[0], times, tuple(images), reference, self.period, rest[0], rest[1], rest[2], held_out
        )
        if self.one_grid:
            require_one_grid(sequence)
        if self.margin_mm is not None:
            sequence = cropped(sequence, self.margin_mm)
        return self.finished(sequence)

    def finished(self, sequence: Sequence) -> Sequence:
        """A last look at the loaded sequence; raises or warns about what makes results wrong."""
        for time, image, mask, points in zip(
            sequence.times, sequence.images, sequence.masks, sequence.points, strict=True
        ):
            if mask is None or points is None:
                continue
            warn_outside(points, mask, image.domain, f"{sequence.name}, time {time:g}")
        return sequence

    def _load(self) -> Pair:
        return extremes(self.sequence)


def extremes(sequence: Sequence) -> Pair:
    """The reference with the training image of the time farthest from it, as a pair."""
    others = [i for i in sequence.training if i != sequence.reference]
    gaps = [abs(wrapped(sequence.times[i] - sequence.reference_time, sequence.period)) for i in others]
    return sequence.pair(others[gaps.index(max(gaps))])


def cropped(sequence: Sequence, margin_mm: float) -> Sequence:
    """Images and what lies on their grids cut to the box of the masks and a margin, all to one box on one grid.

    Raises:
        UserError: an image has no mask.
    """
    masks = [mask for mask in sequence.masks if mask is not None]
    if len(masks) < len(sequence):
        raise UserError(
            "data.margin_mm: expected masks of all times to crop to, found some missing; give them, or null"
        )
    if sequence.one_grid:
        masks = [torch.stack(masks).any(0)] * len(sequence)
    boxes = [_box(mask, image.domain, margin_mm) for mask, image in zip(masks, sequence.images, strict=True)]
    return replace(
        sequence,
        images=tuple(_cut_image(image, box) for image, box in zip(sequence.images, boxes, strict=True)),
        masks=tuple(None if m is None else m[box] for m, box in zip(sequence.masks, boxes, strict=True)),
        labels=tuple(None if v is None else v[box] for v, box in zip(sequence.labels, boxes, strict=True)),
    )


def _box(mask: Mask, domain: Domain, margin_mm: float) -> tuple[slice, ...]:
    inside = mask.nonzero()
    margin = torch.tensor([round(margin_mm / s) for s in domain.spacing])
    low = (inside.amin(0) - margin).clamp(min=0)
    high = torch.minimum(inside.amax(0) + 1 + margin, torch.tensor(domain.shape))
    return tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))


def _cut_image(image: Image, box: tuple[slice, ...]) -> Image:
    data = image.data[(slice(None), *box)].contiguous()
    affine = image.domain.voxel_to_world.clone()
    corner = torch.tensor([[float(s.start) for s in box]], dtype=torch.float64)
    affine[:3, 3] = transform_points(image.domain.voxel_to_world, corner)[0]
    return Image(data, Domain.of(data.shape[1:], affine), image.source)


def sequence_report(sequence: Sequence) -> list[str]:
    """One line for the whole and one per image, in plain words."""
    kind = "linear time" if sequence.period is None else f"period {sequence.period:g}"
    lines = [
        f"{sequence.name}: {len(sequence)} images, {kind}, reference {sequence.reference_time:g}, "
        f"{describe_domain(sequence.domain)}"
    ]
    start = sequence.points[sequence.reference]
    for i, (time, image) in enumerate(zip(sequence.times, sequence.images, strict=True)):
        told = [f"values {image.data.min():.0f} to {image.data.max():.0f}"]
        mask, points, labels = sequence.masks[i], sequence.points[i], sequence.labels[i]
        if not image.domain.same_grid(sequence.domain):
            told.append(describe_domain(image.domain))
        if mask is not None:
            told.append(f"mask {litres(mask, image.domain):.3g} litres")
        if points is not None:
            moved = "" if start is None else f" {(points - start).norm(dim=1).mean():.2f} mm from the reference's"
            told.append(f"{len(points)} landmarks{moved}")
        if labels is not None:
            told.append(f"{len(labels.unique()) - int(bool((labels == 0).any()))} structures")
        if i in sequence.held_out:
            told.append("held out")
        lines.append(f"time {time:g}: {', '.join(told)} ({image.source})")
    return lines
