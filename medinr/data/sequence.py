"""Images of one body at several times (breathing phases, or dates), with all that is known of each."""

import itertools
import math
from collections.abc import Sequence as Series
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medinr.data.pair import Pair
from medinr.data.report import describe_domain
from medinr.errors import UserError
from medinr.space import Domain, Image
from medinr.types import Mask, Points

SAME_TIME = 1e-6
"""Times closer than this share of the sequence's span are one time."""


@dataclass(frozen=True)
class Sequence:
    """An image sequence; entry i of every tuple belongs to ``times[i]``.

    Args:
        name: the case.
        times: in ascending order: phases, or any unit of time; they need not be regular.
        images: of equal channels. Their grids may differ (`require_one_grid` where that matters).
        reference: index of the image whose grid the results are on, and where the deformation is the identity.
        period: the time after which the body is back where it was (100 for phases in percent); None: linear time.
        masks: [X, Y, Z], bool, on the grid of their own image, or None.
        points: landmarks [n, 3], RAS mm, or None; row by row the same anatomy at all times.
        labels: [X, Y, Z], integers, on the grid of their own image, or None.
        held_out: indices that no method may train on; they measure its interpolation in time.

    Raises:
        UserError: fewer than two images; times that are not finite, not ascending, twice the same (also modulo the
            period); tuples of different lengths; an index that does not exist; a reference that is held out; nothing
            left to train on; values that are not finite; masks or labels off their grid; landmarks of different count.
    """

    name: str
    times: tuple[float, ...]
    images: tuple[Image, ...]
    reference: int
    period: float | None
    masks: tuple[Mask | None, ...]
    points: tuple[Points | None, ...]
    labels: tuple[Tensor | None, ...]
    held_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_times(self.name, self.times, self.period)
        counts = {name: len(getattr(self, name)) for name in ("images", "masks", "points", "labels")}
        if wrong := {name: n for name, n in counts.items() if n != len(self.times)}:
            found = ", ".join(f"{n} {name}" for name, n in wrong.items())
            raise UserError(f"{self.name}: expected one entry for each of {len(self.times)} times, found {found}")
        check_indices(self.name, self.times, self.reference, self.held_out)
        _check_images(self)
        _check_points(self)

    def __len__(self) -> int:
        return len(self.times)

    @property
    def domain(self) -> Domain:
        """The grid of the reference image."""
        return self.images[self.reference].domain

    @property
    def reference_time(self) -> float:
        return self.times[self.reference]

    @property
    def training(self) -> tuple[int, ...]:
        """Indices that may be trained on, the reference among them."""
        return tuple(i for i in range(len(self)) if i not in self.held_out)

    @property
    def one_grid(self) -> bool:
        """Whether all images share the reference's grid."""
        return all(image.domain.same_grid(self.domain) for image in self.images)

    def index(self, time: float) -> int:
        """The index of a time, modulo the period.

        Raises:
            UserError: no image of that time.
        """
        gaps = [abs(wrapped(time - t, self.period)) for t in self.times]
        best = min(range(len(self)), key=gaps.__getitem__)
        if gaps[best] > SAME_TIME * span(self.times, self.period):
            raise UserError(
                f"{self.name}: expected a time of {_listed(self.times)}, found {time:g}; choose one of these"
            )
        return best

    def pair(self, moving: int, fixed: int | None = None) -> Pair:
        """Two of the images as a pair, the reference fixed by default."""
        f = self.reference if fixed is None else fixed
        return Pair(
            f"{self.name}_{self.times[f]:g}_{self.times[moving]:g}",
            self.images[f],
            self.images[moving],
            self.masks[f],
            self.masks[moving],
            self.points[f] if self.points[moving] is not None else None,
            self.points[moving] if self.points[f] is not None else None,
            self.labels[f],
            self.labels[moving],
        )

    def to(self, device: torch.device | str) -> "Sequence":
        """The same sequence with all its tensors on ``device``."""
        return replace(
            self,
            images=tuple(image.to(device) for image in self.images),
            masks=tuple(None if m is None else m.to(device) for m in self.masks),
            points=tuple(None if p is None else p.to(device) for p in self.points),
            labels=tuple(None if v is None else v.to(device) for v in self.labels),
        )


def span(times: Series[float], period: float | None) -> float:
    """The length that times are measured against: the period, or last - first."""
    return period if period is not None else max(times) - min(times)


def wrapped(difference: float, period: float | None) -> float:
    """A difference of times as its nearest equivalent, in [-period / 2, period / 2]; unchanged in linear time."""
    return difference if period is None else math.remainder(difference, period)


def check_times(name: str, times: Series[float], period: float | None) -> None:
    """Raise where times are no sequence: see `Sequence`."""
    if len(times) < 2:
        raise UserError(f"{name}: expected images of two or more times, found {len(times)}; add another phase or date")
    if wrong := [t for t in times if not math.isfinite(t)]:
        raise UserError(f"{name}: expected finite times, found {wrong[0]}; correct it")
    if period is not None and not (math.isfinite(period) and period > 0):
        raise UserError(f"{name}: expected a period above 0, found {period}; give 100 for phases in percent")
    near = SAME_TIME * (period or (max(times) - min(times)) or 1.0)
    for before, after in itertools.pairwise(times):
        if abs(after - before) <= near:
            raise UserError(f"{name}: expected every time once, found {after:g} twice; remove one of its images")
        if after < before:
            raise UserError(f"{name}: expected times in ascending order, found {after:g} after {before:g}; sort them")
    if period is not None and times[-1] - times[0] > period - near:
        raise UserError(
            f"{name}: expected times within one period of {period:g}, found {times[0]:g} to {times[-1]:g} (the end of "
            "a period is the beginning of the next); remove one, or correct the period"
        )


def check_indices(name: str, times: Series[float], reference: int, held_out: Series[int]) -> None:
    """Raise where the reference or the held-out times are not of the sequence: see `Sequence`."""
    for what, index in (("reference", reference), *(("held-out", i) for i in held_out)):
        if not 0 <= index < len(times):
            raise UserError(f"{name}: expected a {what} index from 0 to {len(times) - 1}, found {index}; correct it")
    if len(set(held_out)) < len(held_out):
        raise UserError(f"{name}: expected every held-out time once, found {_listed([times[i] for i in held_out])}")
    if reference in held_out:
        raise UserError(
            f"{name}: expected a reference that is trained on, found time {times[reference]:g} held out; choose "
            "another reference, or do not hold it out"
        )
    if len(held_out) > len(times) - 2:
        raise UserError(
            f"{name}: expected two or more times to train on, found {len(times) - len(held_out)} of {len(times)} not "
            "held out; hold out fewer"
        )


def require_one_grid(sequence: Sequence) -> None:
    """Raise a UserError where an image is not on the reference's grid."""
    for time, image in zip(sequence.times, sequence.images, strict=True):
        if not image.domain.same_grid(sequence.domain):
            raise UserError(
                f"{sequence.name}: expected all images on the grid of time {sequence.reference_time:g} "
                f"({describe_domain(sequence.domain)}), found time {time:g} on another "
                f"({describe_domain(image.domain)}, {image.source}); resample it, or leave that time out"
            )


def _check_images(sequence: Sequence) -> None:
    first = sequence.images[sequence.reference]
    for i, image in enumerate(sequence.images):
        at = f"{sequence.name}, time {sequence.times[i]:g}"
        where = f" ({image.source})" if image.source else ""
        if not bool(torch.isfinite(image.data).all()):
            raise UserError(f"{at}: expected finite values, found NaN or infinity{where}; replace them")
        if len(image.data) != len(first.data):
            raise UserError(
                f"{at}: expected {len(first.data)} channels as the reference, found {len(image.data)}{where}; "
                "give the same channels of all"
            )
        for what, volume in (("mask", sequence.masks[i]), ("labels", sequence.labels[i])):
            if volume is not None and tuple(volume.shape) != image.domain.shape:
                raise UserError(
                    f"{at}: expected {what} of shape {image.domain.shape} as the image, found {tuple(volume.shape)}"
                )
        mask = sequence.masks[i]
        if mask is not None and not bool(mask.any()):
            raise UserError(f"{at}: expected a mask with voxels inside, found an empty one; give another")


def _check_points(sequence: Sequence) -> None:
    counts = {}
    for time, points in zip(sequence.times, sequence.points, strict=True):
        if points is None:
            continue
        if points.ndim != 2 or points.shape[1] != 3 or not bool(torch.isfinite(points).all()):
            raise UserError(
                f"{sequence.name}, time {time:g}: expected finite landmarks [n, 3], found others; correct them"
            )
        counts[time] = len(points)
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{n} at {time:g}" for time, n in counts.items())
        raise UserError(f"{sequence.name}: expected as many landmarks at all times, row by row, found {found}")


def _listed(times: Series[float]) -> str:
    return ", ".join(f"{t:g}" for t in times)
