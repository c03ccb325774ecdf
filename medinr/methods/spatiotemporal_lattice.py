"""Registration of an image sequence on whole grids: the velocity is a lattice of splines with modes of time."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from medinr.data.pair import Pair
from medinr.data.sequence import Sequence as ImageSequence
from medinr.errors import UserError
from medinr.fields import TimedLattice, TimeEncoding
from medinr.fields.flow import Flow
from medinr.fields.squaring import scaling_and_squaring
from medinr.losses.volumes import differences
from medinr.methods.grids import axis_lines, bending_on_grid, box_of, voxel_mm
from medinr.methods.levels import windowed
from medinr.methods.method import Group
from medinr.methods.timed import SequenceRegistration
from medinr.ranks import world_size
from medinr.sampling import gaussian_smooth, informative, interpolate
from medinr.space import transform_points
from medinr.types import Scalar, Volume

SQUARINGS = 4
INNER = 2.0
"""Least distance of the velocity's grid in voxels; a smooth field is integrated there, and interpolated linearly."""


@dataclass(frozen=True)
class SequenceGrid:
    """The grid of one stage.

    Attributes:
        points: [X, Y, Z, 3], normalised.
        volumes: of each time, [C, x, y, z], windowed and smoothed, on their own grids; None where held out.
        still: of the images as they are, the mean squared difference of each pair that is compared.
        lines, steps: of the velocity's grid, along each axis.
        rise: from the velocity's grid to the points, linear interpolation along each axis.
    """

    points: Tensor
    volumes: list[Volume | None]
    still: float
    lines: list[Tensor]
    steps: Tensor
    rise: list[Tensor]


class SpatioTemporalLattice(SequenceRegistration):
    """min over v of sum over pairs (s, t) |I_s o phi_s - I_t o phi_t|^2 + penalties, phi_t = exp(v(., t)).

    The model of ST-NeRP (Qiu et al., arXiv 2410.19283: one stationary velocity field for each time, all fitted
    together) with `TimedLattice` in place of the network. On a grid a spline's basis is a product, and scaling and
    squaring integrates it: a step sees all voxels of all times. Compared are the reference with every time, and every
    time with the next one: between two neighbours, where images are interpolated, the errors of two fits that know
    only the reference would add up. The total variation of the difference of neighbouring velocities keeps tissue still
    that does not move. In between, the transforms are read from the flow at points, as those of
    `SpatioTemporalRegistration`.

    All images share one world: there is no linear start. Intensities are compared as they are (CT in HU).

    Args:
        time: the encoding of time; more components than trained times do no harm (see `TimedLattice`).
        spacings: of the control points of each level, voxels (geometric mean of the sides).
        shrinks: distance of the grid's points in voxels, one for each stage; images are smoothed by half of it.
        steps: optimizer steps of each stage; with another total all are scaled.
        neighbours: weight of a pair of neighbours, that with the reference being 1.
        bending: weight of the bending energy of the velocities and of their differences, in voxels of their grid.
        variation: weight of the total variation of the differences.
        similarity_weight: of the squared differences relative to those without motion.
        lr: learning rate of Adam in voxels of the stage's grid.
        window: intensities mapped to 0 and 1 in all images (None: percentiles of the reference's channels).
        reach_mm: voxels with no contrast within this distance in the reference are left out.
    """

    def __init__(
        self,
        time: TimeEncoding,
        spacings: Sequence[float] = (8.0, 4.0, 2.4),
        shrinks: Sequence[float] = (4.0, 2.0, 1.0),
        steps: Sequence[int] = (40, 40, 15),
        neighbours: float = 1.0,
        bending: float = 0.05,
        variation: float = 0.02,
        similarity_weight: float = 0.05,
        lr: float = 0.015,
        window: tuple[float, float] | None = None,
        reach_mm: float = 20.0,
    ) -> None:
        super().__init__()
        if not shrinks or len(shrinks) != len(steps) or min(shrinks) <= 0 or min(steps) < 1:
            raise UserError(
                f"shrinks, steps: expected as many numbers above 0 of both, found {list(shrinks)} and {list(steps)}"
            )
        self.map = Flow(TimedLattice(spacings, time, unit="voxel"))
        self.shrinks, self.steps = tuple(shrinks), tuple(steps)
        self.neighbours, self.bending, self.variation = neighbours, bending, variation
        self.similarity_weight, self.lr, self.window, self.reach_mm = similarity_weight, lr, window, reach_mm
        self._grid: tuple[int, SequenceGrid] | None = None

    @property
    def velocity(self) -> TimedLattice:
        assert isinstance(self.flow.velocity, TimedLattice)
        return self.flow.velocity

    def attach(self, pair: Pair | ImageSequence) -> None:
        """Take a sequence; which pairs of times are compared, and their weights."""
        sequence = self.take(pair, self.window)
        self._grid = None
        times, reference = sequence.training, sequence.reference
        circle = [*times, times[0]] if sequence.period is not None and len(times) > 2 else list(times)
        weights: dict[tuple[int, int], float] = {(reference, i): 1.0 for i in self.trained}
        for a, b in itertools.pairwise(circle):
            key = (a, b) if (b, a) not in weights else (b, a)
            weights[key] = weights.get(key, 0.0) + self.neighbours
        total = sum(weights.values())
        self.pairs = {key: w / total for key, w in weights.items() if w}

    @property
    def fitted_times(self) -> list[float]:
        """The trained times without the reference."""
        state = self.state
        held = [state["times"][i] for i in state["held_out"]]
        return [t for t in state["times"] if t not in held and t != state["reference"]]

    @contextmanager
    def leaving_out(self, time: float) -> Iterator[None]:
        """Inside, transforms are interpolated between the trained times without this one."""
        before, state = self.velocity.determined, self.state
        seen = [t for t in self.fitted_times if t != time]
        self.velocity.set_times(state["reference"], state["span"], state["period"], seen)
        try:
            yield
        finally:
            self.velocity.determined = before

    # -- stages --------------------------------------------------------------------------------------------------

    def schedule(self) -> list[int]:
        """First step of each stage, and the end."""
        total, own = self.total_steps, sum(self.steps)
        return [round(total * done / own) for done in itertools.accumulate(self.steps, initial=0)]

    @property
    def stage(self) -> int:
        """That of the present step."""
        if self._trainer is None:
            return len(self.steps) - 1
        begun = [i for i, first in enumerate(self.schedule()[:-1]) if self.trainer.global_step >= first]
        return begun[-1]

    def groups(self) -> list[Group]:
        unit = voxel_mm(self.domain) / self.domain.unit_mm

        def rate(step: int) -> float:
            for shrink, (first, last) in zip(self.shrinks, itertools.pairwise(self.schedule()), strict=True):
                if first <= step < last:
                    wave = 0.55 + 0.45 * math.cos(math.pi * (step - first) / (last - first))
                    return self.lr * shrink * unit * min(1.0, (step - first + 1) / 3) * wave
            return 0.0

        return [(list(self.flow.parameters()), rate)]

    def grid(self) -> SequenceGrid:
        """Of the present stage; only one is in memory."""
        if self._grid is None or self._grid[0] != self.stage:
            self._grid = None
            self._grid = (self.stage, self._new_grid(self.shrinks[self.stage]))
        return self._grid[1]

    @torch.no_grad()
    def _new_grid(self, shrink: float) -> SequenceGrid:
        sequence = self.sequence
        assert sequence is not None
        volumes: list[Volume | None] = []
        for i, image in enumerate(sequence.images):
            seen = windowed(image.data, self.state["windows"])
            smoothing = 0.5 * shrink * voxel_mm(image.domain) if shrink > 1 else 0.0
            kept = i in sequence.training
            volumes.append(gaussian_smooth(seen, smoothing, image.domain.spacing) if kept else None)
        reference = windowed(sequence.images[sequence.reference].data, self.state["windows"])
        region = informative(reference, self.domain, self.reach_mm, 0.02)
        low, high = box_of(region if bool(region.any()) else torch.ones_like(region), (0, 0, 0))
        fine = [line.to(self.device) for line in axis_lines(self.domain, shrink, low, high)]
        lines = [_coarser(line, max(1.0, INNER / shrink)) for line in fine]
        steps = torch.tensor([float(line[1] - line[0]) if len(line) > 1 else 1.0 for line in lines])
        rise = [_linear(line, nodes) for line, nodes in zip(fine, lines, strict=True)]
        points = torch.stack(torch.meshgrid(*fine, indexing="ij"), dim=-1)
        made = SequenceGrid(points, volumes, 1.0, lines, steps.to(self.device), rise)
        zero = {i: torch.zeros((), device=self.device) for i in self.trained}
        still = max(float(self.difference(made, zero)[0]), 1e-12)
        return SequenceGrid(points, volumes, still, lines, made.steps, rise)

    # -- the loss ------------------------------------------------------------------------------------------------

    def draw(self) -> None:
        """Nothing is drawn: every step sees all voxels of the grid."""

    def objective(self, batch: None = None) -> dict[str, Scalar]:
        grid = self.grid()
        v = {i: self.velocity.on_grid(grid.lines, context=self.clock[i]) / grid.steps for i in self.trained}
        if self.domain.in_plane is not None:
            v = {i: one @ self.domain.in_plane.to(one) for i, one in v.items()}
        difference, overlap = self.difference(grid, self.integrated(grid, v))
        reference = self.sequence.reference if self.sequence is not None else -1
        v[reference] = torch.zeros_like(next(iter(v.values())))
        changes = [v[a] - v[b] for a, b in self.pairs]
        bending = torch.stack([bending_on_grid(one, (1.0, 1.0, 1.0)) for one in changes]).mean()
        variation = torch.stack([variation_on_grid(one) for one in changes]).mean()
        share = difference / grid.still
        raw = {"raw/difference": share, "raw/bending": bending, "raw/variation": variation, "overlap": overlap}
        self._log({k: value.detach() for k, value in raw.items()})
        if self._trainer is not None and self.global_step % self._log_every == 0:
            self._log({"flow/h_lipschitz": torch.tensor(max(self.flow.check(self.clock[i]) for i in self.trained))})
        terms = {
            "similarity": self.similarity_weight * share,
            "bending": self.bending * bending,
            "variation": self.variation * variation,
        }
        if world_size() > 1:  # each rank waits for the gradient of every parameter
            terms["all"] = 0 * torch.stack([p.sum() for p in self.parameters()]).sum()
        return terms

    def integrated(self, grid: SequenceGrid, velocities: dict[int, Tensor]) -> dict[int, Tensor]:
        """Displacements [X, Y, Z, 3], normalised, of velocities [x, y, z, 3] in steps of their grid."""
        v = torch.stack([one.movedim(-1, 0) for one in velocities.values()])
        u = scaling_and_squaring(v, SQUARINGS, midpoint=True).movedim(1, -1) * grid.steps
        for axis, matrix in enumerate(grid.rise):
            u = torch.tensordot(u, matrix, dims=([1 + axis], [1])).movedim(-1, 1 + axis)
        return dict(zip(velocities, u, strict=True))

    def difference(self, grid: SequenceGrid, displacements: dict[int, Tensor]) -> tuple[Scalar, Scalar]:
        """Weighted mean over the pairs of the mean squared difference, and the share of samples that count."""
        assert self.sequence is not None
        values, inside = {}, {}
        for i in (self.sequence.reference, *self.trained):
            volume = grid.volumes[i]
            assert volume is not None
            at = transform_points(self.matrices[i], grid.points + displacements.get(i, 0.0))
            upper = torch.tensor(volume.shape[1:], device=at.device) - 0.5
            inside[i] = ((at >= -0.5) & (at <= upper)).all(-1)
            values[i] = interpolate(volume, at)
        total, seen = grid.points.new_zeros(()), grid.points.new_zeros(())
        for (a, b), weight in self.pairs.items():
            both = (inside[a] & inside[b]).to(grid.points)
            square = (values[a] - values[b]).square().mean(0)
            total = total + weight * (both * square).sum() / both.sum().clamp(min=1)
            seen = seen + weight * both.mean()
        return total, seen


def variation_on_grid(v: Tensor, floor: float = 0.01) -> Scalar:
    """Sum over the axes of the mean of |v(x + e) - v(x)| of [x, y, z, c], rounded off below ``floor``."""
    parts = [(d.square().sum(-1) + floor**2).sqrt().mean() for d in differences(v, (1.0, 1.0, 1.0)) if d.numel()]
    return torch.stack(parts).sum()


def _coarser(line: Tensor, factor: float) -> Tensor:
    """A line with about ``factor`` times the distance of its points, from the first to the last."""
    n = len(line)
    if n < 4 or factor <= 1:
        return line
    return torch.linspace(float(line[0]), float(line[-1]), max(4, math.ceil((n - 1) / factor) + 1), device=line.device)


def _linear(at: Tensor, nodes: Tensor) -> Tensor:
    """[n, nodes]: linear interpolation at coordinates of values at evenly spaced nodes."""
    if len(nodes) == 1:
        return torch.ones(len(at), 1, device=at.device)
    place = (at - nodes[0]) / (nodes[1] - nodes[0])
    cell = place.floor().clamp(0, len(nodes) - 2)
    weight = (place - cell).clamp(0, 1)[:, None]
    matrix = at.new_zeros(len(at), len(nodes))
    columns = cell.long()[:, None]
    return matrix.scatter_(1, columns, 1 - weight).scatter_(1, columns + 1, weight)
