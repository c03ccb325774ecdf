"""A fitted sequence at any times: maps between them, images there, curves of labels, motion, held-out images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from medinr import metrics
from medinr.data.sequence import Sequence as ImageSequence
from medinr.data.sequence import wrapped
from medinr.errors import UserError
from medinr.fields import Transform
from medinr.fields.chained import Chained, Inverted, PointsOnly
from medinr.fields.dense import evaluate_dense
from medinr.fields.warp import moved_chunks, resample
from medinr.space import Domain, Image, transform_points
from medinr.types import Mask, Points, Volume


class Moving(Protocol):
    """What knows phi_t, from the world at the reference time to that at time t (RAS mm)."""

    domain: Domain

    def transform_at(self, time: float) -> Transform:
        """phi_t."""
        ...


@dataclass(frozen=True)
class Subject:
    """What is carried along, all of the reference time.

    Args:
        domain: grid of the results.
        image: warped to each time (linearly; any grid).
        labels: [X, Y, Z] on ``domain``.
        points: [n, 3], RAS mm.
        mask: on ``domain``; where motion is summarised.
        sequence: all images; those of the timeline are then interpolated between the neighbours in time, at
            ``compensation`` (see `predicted`), in place of the warped ``image``.
    """

    domain: Domain
    image: Image | None = None
    labels: Tensor | None = None
    points: Points | None = None
    mask: Mask | None = None
    sequence: ImageSequence | None = None
    compensation: float = 0.5

    @classmethod
    def of(cls, sequence: ImageSequence) -> "Subject":
        """The reference of a sequence."""
        r, s = sequence.reference, sequence.to("cpu")
        return cls(s.domain, s.images[r], s.labels[r], s.points[r], s.masks[r], s)


@dataclass(frozen=True)
class Curve:
    """Of one label over the times: volumes in ml, and centres of mass [T, 3], RAS mm."""

    volumes: list[float]
    centres: list[list[float]]


def parse_times(text: str, name: str = "--times") -> list[float]:
    """``0:95:5`` (first, last, step) or ``0,12.5,50``, as numbers.

    Raises:
        UserError: anything else.
    """
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            count = math.floor((last - first) / step + 1e-9) + 1
            found = [first + i * step for i in range(count)] if step > 0 else []
        else:
            found = [float(part) for part in text.strip("[]").split(",")]
    except (ValueError, ZeroDivisionError):
        found = []
    if not found or not all(math.isfinite(t) for t in found):
        raise UserError(f"{name}: expected FIRST:LAST:STEP, as 0:95:5, or times with commas, found {text!r}")
    return found


def default_times(times: Sequence[float], period: float | None, count: int = 20) -> list[float]:
    """``count`` even times of one period, or from the first to the last."""
    if period is not None:
        return [period * i / count for i in range(count)]
    return [times[0] + (times[-1] - times[0]) * i / (count - 1) for i in range(count)]


def between(moving: Moving, source: float, target: float) -> Transform:
    """phi_t o phi_s^-1, from the world at time s to that at time t."""
    direct: Callable[[float, float], Transform] | None = getattr(moving, "transform_between", None)
    if direct is not None:
        return direct(source, target)
    return Chained(Inverted(moving.transform_at(source)), moving.transform_at(target))


def displacement_on(transform: Transform, grid: Domain, exact: bool = False) -> Tensor:
    """phi(p) - p at the voxel centres of a grid [X, Y, Z, 3], RAS mm, without derivatives (see `evaluate_dense`)."""
    return evaluate_dense(PointsOnly(transform), grid, exact).displacement


def image_at(moving: Moving, image: Image, time: float, grid: Domain, exact: bool = False) -> Volume:
    """The image of the reference time as it looks at a time, on a grid in that world: I(phi_t^-1(q)), cubic."""
    return resample(image, grid, displacement_on(Inverted(moving.transform_at(time)), grid, exact), order=3)


def predicted(
    moving: Moving,
    sequence: ImageSequence,
    time: float,
    grid: Domain,
    neighbours: bool = False,
    compensation: float = 1.0,
    exact: bool = False,
) -> Volume:
    """The image of a time from the training images, on a grid: the reference warped there, or both neighbours.

    With ``neighbours`` the training images before and after are warped to the time and averaged by their distances from
    it: motion-compensated interpolation, in which noise averages out as in that of intensities. ``compensation`` is the
    share of the displacement that is applied: 1 is right for the true motion, 0 is the interpolation of intensities;
    between them the errors of the motion and those of its neglect partly cancel (`best_compensation`).
    """
    if not neighbours:
        return image_at(moving, sequence.images[sequence.reference], time, grid, exact)
    parts = _carried(moving, sequence, time, grid, sequence.training, exact)
    return _average(sequence, parts, grid, compensation)


Part = tuple[int, float, Tensor]
"""Index of an image, its weight, and the displacement [X, Y, Z, 3] from the wanted time to its own."""


def _carried(
    moving: Moving, sequence: ImageSequence, time: float, grid: Domain, known: Sequence[int], exact: bool = False
) -> list[Part]:
    """The neighbours of a time among the ``known`` images."""
    before, after, w = metrics.bracket([sequence.times[i] for i in known], time, sequence.period)
    parts = []
    for k, weight in {before: 1 - w, after: w}.items() if before != after else [(before, 1.0)]:
        if weight:
            field = displacement_on(between(moving, time, sequence.times[known[k]]), grid, exact)
            parts.append((known[k], weight, field))
    return parts


def _average(sequence: ImageSequence, parts: Sequence[Part], grid: Domain, compensation: float) -> Volume:
    """The images of the parts, moved by their share and averaged; where one is not seen, at its border, the others."""
    total, weights = torch.zeros(()), torch.zeros(grid.shape)
    centre = torch.zeros(())
    for index, weight, field in parts:
        image = sequence.images[index]
        seen = torch.empty(grid.n_voxels, dtype=torch.bool)
        for rows, world in moved_chunks(grid, compensation * field):
            seen[rows] = image.domain.contains_voxels(transform_points(image.domain.world_to_voxel, world).float())
        share = weight * seen.view(grid.shape)
        total = total + share * resample(image, grid, compensation * field, order=3)
        weights = weights + share
        centre = centre + weight * resample(image, grid, order=3)
    return torch.where(weights > 0, total / weights.clamp(min=1e-6), centre)


def best_compensation(
    moving: Moving, sequence: ImageSequence, choices: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> float:
    """The share of the motion that predicts training images best, each from its neighbours alone.

    A training time other than the reference is left out of the interpolation in time (``moving.leaving_out``), and its
    image is predicted from the training images around it; held-out images are never looked at. The time farthest from
    the reference stays: without it the largest motion would have to be extrapolated, which no interpolation is asked
    to do. 0.5 where the method cannot leave a time out, or has no other to interpolate from.
    """
    leaving_out = getattr(moving, "leaving_out", None)
    others = [i for i in sequence.training if i != sequence.reference]
    if leaving_out is None or len(others) < 2:
        return 0.5
    others.remove(max(others, key=lambda i: abs(wrapped(sequence.times[i] - sequence.reference_time, sequence.period))))
    errors = dict.fromkeys(choices, 0.0)
    for i in others:
        image, known = sequence.images[i], [k for k in sequence.training if k != i]
        if sequence.period is None and not known[0] < i < known[-1]:
            continue
        with leaving_out(sequence.times[i]):
            parts = _carried(moving, sequence, sequence.times[i], image.domain, known)
        for share in choices:
            made = _average(sequence, parts, image.domain, share)
            errors[share] += float((made - image.data).square().mean())
    return min(errors, key=lambda share: errors[share]) if any(errors.values()) else 0.5


def interpolation_error(moving: Moving, grid: Domain) -> Tensor | None:
    """How far phi_t moves, in mm [X, Y, Z], where its own image is left out: the mean over the trained times.

    At a time without an image the motion is interpolated; this is how uncertain it is there, seen at times that have
    one. None where the method cannot leave a time out (``leaving_out``), or has no two to interpolate from.
    """
    leaving_out = getattr(moving, "leaving_out", None)
    times: list[float] = getattr(moving, "fitted_times", [])
    if leaving_out is None or len(times) < 2:
        return None
    total = torch.zeros(grid.shape)
    for time in times:
        fitted = displacement_on(moving.transform_at(time), grid)
        with leaving_out(time):
            total += (displacement_on(moving.transform_at(time), grid) - fitted).norm(dim=-1)
    return total / len(times)


def label_state(labels: Tensor, domain: Domain, displacement: Tensor, det: Tensor) -> dict[int, tuple[float, Tensor]]:
    """Volume in ml and centre of mass [3] (RAS mm) of each label after a deformation, by change of variables.

    V = sum of det J dV and c = sum of phi(p) det J dV / V over the label's voxels: no label is resampled.

    Args:
        labels: [X, Y, Z] before.
        domain: their grid.
        displacement: phi(p) - p [X, Y, Z, 3], RAS mm.
        det: det J_phi [X, Y, Z].
    """
    voxel = abs(float(torch.linalg.det(domain.voxel_to_world[:3, :3]))) / 1000
    found = {}
    for label in (int(v) for v in labels.unique() if int(v) != 0):
        inside = labels == label
        world = transform_points(domain.voxel_to_world, inside.nonzero().double())
        weight = det[inside].double()
        moved = world + displacement[inside].double()
        found[label] = (voxel * float(weight.sum()), (weight[:, None] * moved).sum(0) / weight.sum())
    return found


def motion_amplitude(displacements: Sequence[Tensor]) -> Tensor:
    """Largest distance in mm between any two places of each voxel over the times [X, Y, Z]."""
    shape = displacements[0].shape[:3]
    out = torch.zeros(shape)
    for i in range(shape[0]):  # a plane at once: all pairs of times of a volume do not fit
        places = torch.stack([d[i].float() for d in displacements]).movedim(0, -2)
        out[i] = torch.cdist(places, places).amax((-2, -1))
    return out


def extremes_of(times: Sequence[float], dets: Sequence[Tensor], inside: Mask) -> tuple[float, float]:
    """The two times between which a region's volume changes most: that of the smallest, and that of the largest."""
    sizes = [float(d[inside].float().mean()) for d in dets]
    return times[sizes.index(min(sizes))], times[sizes.index(max(sizes))]


def curves_of(states: Sequence[dict[int, tuple[float, Tensor]]]) -> dict[int, Curve]:
    """The curve of each label from its state at each time."""
    labels = sorted(states[0]) if states else []
    return {
        label: Curve([s[label][0] for s in states], [[float(v) for v in s[label][1]] for s in states])
        for label in labels
    }


def held_out_scores(moving: Moving, sequence: ImageSequence, regions: Callable[[Image], dict[str, Mask]]) -> list[Any]:
    """How well the images of the held-out times are predicted: a row for each time and prediction.

    Predictions: ``reference``, ``neighbours`` and ``interpolated`` (the neighbours with the `best_compensation`, which
    stands beside it; see `predicted`), ``nearest`` and ``linear`` (of intensities, without registration). ``tre/mean``
    and ``tre/initial_mean`` in mm stand in the rows of ``reference`` where landmarks are.

    Args:
        moving: fitted to the training images.
        sequence: all images, on one grid.
        regions: of an image, by name.
    """
    training = sequence.training
    times = [sequence.times[i] for i in training]
    images = [sequence.images[i].data for i in training]
    start = sequence.points[sequence.reference]
    share = best_compensation(moving, sequence)
    rows = []
    for i in sequence.held_out:
        image, time = sequence.images[i], sequence.times[i]
        masks = regions(image)
        parts = _carried(moving, sequence, time, image.domain, training)
        made = {
            "reference": predicted(moving, sequence, time, image.domain),
            "neighbours": _average(sequence, parts, image.domain, 1.0),
            "interpolated": _average(sequence, parts, image.domain, share),
            "nearest": metrics.nearest_image(images, times, time, sequence.period),
            "linear": metrics.weighted_image(images, times, time, sequence.period),
        }
        for name, volume in made.items():
            row: dict[str, Any] = {"time": time, "prediction": name, **metrics.scores(volume, image.data, masks)}
            if name == "interpolated":
                row["compensation"] = share
            points = sequence.points[i]
            if name == "reference" and start is not None and points is not None:
                row["tre/initial_mean"] = metrics.tre(start, points).mean().item()
                row["tre/mean"] = metrics.tre(moving.transform_at(time)(start), points).mean().item()
            rows.append(row)
    return rows
