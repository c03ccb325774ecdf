"""Registration by a network for the large motion and a control lattice, refined on whole grids, for the detail."""

import itertools
import math
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import Composed, CubicLattice, Field, Map, Regional, RegionalTransform, Sum, Transform, as_map
from medinr.fields.maps import check_displacement
from medinr.fields.planar import within
from medinr.fields.table import Table, even_lines
from medinr.losses import LocalNCC, Regularizer, Similarity
from medinr.losses.volumes import VolumeNCC
from medinr.methods.base import RegistrationMethod
from medinr.methods.grids import Grid, barrier_on_grid, bending_on_grid, carried, compare_on_grid, make_grid, voxel_mm
from medinr.methods.levels import Level, Window
from medinr.methods.method import Group, Rate
from medinr.methods.refinement import Refinement
from medinr.ranks import world_size
from medinr.sampling import interpolate
from medinr.space import Domain, transform_points
from medinr.types import Points, Scalar


class RefinedRegistration(RegistrationMethod):
    """u = network + control lattice: first the network on random points, then the lattice on whole grids.

    With ``refinement.composed`` the last stage has a lattice v of its own: x -> y + u(y), y = x + v(x) (`Composed`).

    A global network finds large motions, a lattice of cubic B-splines fine structure, at a small part of the cost: on a
    grid its basis is a product, and the local NCC of all windows is a few box filters. (Free-form deformation: Rueckert
    et al., IEEE TMI 18(8), 1999; a network that drives it: Sideri-Lampretsa et al., SINR, MIDL 2024.) In the second
    part the network is frozen; the result is a field like any other, with exact jets, at any point.

    Regions that slide along each other (a pair's ``fixed_regions``) get a lattice each: the first stage moves one for
    all of them, every later one is done for each region by itself, in windows that see nothing beyond its border. The
    displacement then jumps there (`Regional`).

    Args:
        field: the network, a displacement (None: the lattice alone, from the start of the registration).
        refinement: stages of the lattice. The last sum(steps) steps of the training are theirs, those before belong to
            the network; a shorter training shortens all stages alike.
        regions: how many regions slide along each other; 1: the map is smooth everywhere. Later stages take their steps
            once for each. With ``use_mask`` false, a pair that names no regions has its mask and the rest.

    Other arguments as for `RegistrationMethod`; ``similarity``, ``points``, ``pyramid_mm``, ``regularizers`` and ``lr``
    are the network's.
    """

    def __init__(
        self,
        field: Field | None,
        refinement: Refinement,
        similarity: Similarity,
        regularizers: dict[str, Regularizer] | None = None,
        points: int = 2048,
        pyramid_mm: Sequence[float] = (8.0, 4.0),
        lr: float = 3e-4,
        warmup: float = 0.05,
        cosine: bool = True,
        overlap_weight: float = 1.0,
        window: tuple[float, float] | None = None,
        jitter: bool = True,
        use_mask: bool = True,
        use_moving_mask: bool = True,
        landmark_weight: float = 0.0,
        background: float = 0.1,
        regions: int = 1,
    ) -> None:
        if field is not None:
            check_displacement("field", field)
        elif regularizers or not isinstance(similarity, LocalNCC):
            told = "similarity and regularizers are the network's: with field null they do nothing"
            warnings.warn(told, stacklevel=2)
        if regions < 1 or (regions > 1 and (field is not None or len(refinement.shrinks) < 2)):
            raise UserError(
                f"regions: expected 1, or more with field null and two or more stages, got {regions} with "
                f"{type(field).__name__} and {len(refinement.shrinks)} stages"
            )
        lattices = [CubicLattice(refinement.lattice(), unit="voxel") for _ in range(regions)]
        lasts = [CubicLattice(refinement.lattice(True), unit="voxel") for _ in lattices if refinement.composes]
        if field is None:  # no step draws points: prepare nothing for them
            pyramid_mm, background = (0.0,), 1.0
        outer: list[Field] = [one if field is None else Sum(field, one) for one in lattices]
        parts = [Composed(last, other) for last, other in zip(lasts, outer, strict=True)] if lasts else outer
        whole: Field = Regional(parts) if regions > 1 else parts[0]
        super().__init__(
            whole,
            similarity, regularizers, points, pyramid_mm, lr, warmup, cosine, overlap_weight, window, jitter, use_mask,
            use_moving_mask, "oriented", landmark_weight, background,
        )  # fmt: skip
        self.refinement, self.regions = refinement, regions
        self.network: list[Field] = [] if field is None else [field]
        self.lattices, self.lasts, self.outer = lattices, lasts, outer
        self.regional: list[Regional] = [whole] if isinstance(whole, Regional) else []
        later = range(1, len(refinement.shrinks))
        self.parts = [(0, 0), *((stage, region) for stage in later for region in range(regions))]
        self._grid: tuple[int, Grid, Tensor] | None = None
        self._others: list[Table] = []  # what the last stage's own lattice is applied before
        self.ended: dict[int, int] = {}
        self.register_buffer("unlike", torch.full((regions,), -1))
        self.unlike: Tensor  # of each region; 1: the images show different bodies; 0: one; -1: not known yet

    def attach(self, pair: Pair) -> None:
        super().attach(pair)
        self._grid = None
        labels = pair.fixed_mask if pair.fixed_regions is None and not self.use_mask else pair.fixed_regions
        for regional in self.regional:
            if labels is None or int(labels.max()) >= len(self.lattices):
                found = "none" if labels is None else f"labels up to {int(labels.max())}"
                raise UserError(
                    f"{pair.name}: expected sliding regions, labels from 0 to {len(self.lattices) - 1}, found {found}"
                )
            regional.divide(labels)

    def begin_at(self, displacement: Tensor, domain: Domain) -> None:
        """Start from a displacement (RAS mm [X, Y, Z, 3] on the fixed grid) instead of the identity.

        The finest level of the lattice takes it over, as far as its spacing allows (one that is composed is not part of
        it); all that follows refines it.
        """
        self.domain = self.cover(domain)
        into = self.domain.world_to_normalised[:3, :3].float()
        volume = (displacement.float() @ into.T).movedim(-1, 0)

        def values(x: Points) -> Tensor:
            return interpolate(volume, transform_points(self.domain.normalised_to_voxel, x)).T

        self.lattices[0].approximate(values)

    def transform(self, context: Tensor | None = None) -> Transform:
        for regional in self.regional:
            return RegionalTransform(regional, self.domain, self.start)
        return super().transform(context)

    # -- stages --------------------------------------------------------------------------------------------------
    # What a step belongs to is counted through `parts`: the stages one after the other, each for one region after the
    # other. With one region the two are the same.

    @property
    def steps(self) -> list[int]:
        """Steps of each of `parts`."""
        return [self.refinement.steps[stage] for stage, _ in self.parts]

    def schedule(self) -> list[int]:
        """First step of each of `parts`, and the end; steps before the first are the network's."""
        total, own = self.total_steps, self.steps
        scale = 1.0 if self.network and total >= sum(own) else total / sum(own)
        ends = [total - round(scale * sum(own[i:])) for i in range(len(own))]
        starts = [*ends, total]
        for stage, step in self.ended.items():
            spared = starts[stage + 1] - step
            starts = [s - spared if i > stage else s for i, s in enumerate(starts)]
        return starts

    def end_stage(self) -> None:
        """Make the present step the last of its stage: those after it come so much earlier, and so does the end."""
        if self.stage is not None:
            self.ended[self.stage] = self.trainer.global_step + 1

    @property
    def stage(self) -> int | None:
        """The index into `parts` of the present step; None: the network's part."""
        if self._trainer is None:
            return None
        begun = [i for i, first in enumerate(self.schedule()[:-1]) if self.trainer.global_step >= first]
        return begun[-1] if begun else None

    @property
    def _level_index(self) -> int:
        if self._trainer is None:
            return len(self.levels) - 1
        share = self.trainer.global_step / max(self.schedule()[0], 1)
        return min(int(share * len(self.levels)), len(self.levels) - 1)

    @property
    def level(self) -> Level:
        return self.levels[self._level_index] if self.stage is None else self.grid()[1].level

    @property
    def motion(self) -> Map:
        """The network alone while the lattice is still zero."""
        return within(as_map(self.network[0]) if self.stage is None and self.network else self.map, self.domain)

    @property
    def lattice(self) -> CubicLattice:
        """The lattice that the present stage moves."""
        stage, region = (0, 0) if self.stage is None else self.parts[self.stage]
        return (self.lasts if self.refinement.own(stage) else self.lattices)[region]

    def grid(self) -> tuple[list[int], Grid, Tensor]:
        """Of the present stage: the levels that it moves, its grid, and what is added to them there [X, Y, Z, 3]."""
        index = self.stage
        assert index is not None and self.pair is not None
        stage, region = self.parts[index]
        if self._grid is None or self._grid[0] != index:
            self._grid, self._others = None, []  # the memory of the last one, before the next is made
            for regional in self.regional if stage else []:
                regional.separate()
            grid, still = self._new_grid(stage, region)
            if stage and int(self.unlike[region]) < 0:
                self.unlike[region] = int(0 < self._least_agreement > self._agreement(grid, still, stage))
                if int(self.unlike[region]):
                    grid, still = self._new_grid(stage, region)
            self._grid = (index, grid, still)
        _, grid, still = self._grid
        return self.refinement.levels(stage, grid.shrink), grid, still

    def _new_grid(self, stage: int, region: int) -> tuple[Grid, Tensor]:
        pair, r = self.pair, self.refinement
        assert pair is not None
        flat = [(float(w[0]), float(w[1])) for w in self.state["windows"]]
        n = len(pair.fixed.data)
        windows: list[list[Window]] = [flat[:n], flat[n:]]
        mask = pair.fixed_mask if self.use_mask else None
        radius = r.unlike_radius if stage and int(self.unlike[region]) > 0 else r.radius
        compare = partial(VolumeNCC, radius=radius, floor=r.floor, signed=r.signed)
        part = self.regional[0].labels == region if stage and self.regional else None
        grid = make_grid(pair, windows, self.domain, r.shrinks[stage], radius, compare, mask, r.most, part)
        if r.own(stage):
            step = grid.shrink * voxel_mm(self.domain) / self.domain.unit_mm
            self._others = [Table(self.outer[region], even_lines(self.lattices[region], step), None)]
        return grid, self.still(grid, r.levels(stage, grid.shrink))

    def whole(self, grid: Grid, u: Tensor) -> Tensor:
        """The displacement [X, Y, Z, 3] of the whole map on the grid, by that of what the present stage moves."""
        if self.domain.in_plane is not None:
            u = u @ self.domain.in_plane.to(u)
        for others in self._others:
            after = others.values((grid.points + u).flatten(0, 2)).view_as(u)
            u = u + (after if self.domain.in_plane is None else after @ self.domain.in_plane.to(u))
        return u

    @property
    def _least_agreement(self) -> float:
        r = self.refinement
        return r.agreement if r.signed else r.agreement**2

    @torch.no_grad()
    def _agreement(self, grid: Grid, still: Tensor, stage: int) -> float:
        """Mean local NCC (or its square) on a grid, as the map is now; the best of the channels."""
        u = still + self.lattice.on_grid(grid.lines, self.refinement.levels(stage, grid.shrink))
        moved, weight, _ = carried(grid, self.whole(grid, u), self.to_moving_voxels, self.moving_mask)
        pairs = zip(grid.similarities, moved, strict=True)
        return max(one.agreement(m, weight) for one, m in pairs if isinstance(one, VolumeNCC))

    @torch.no_grad()
    def still(self, grid: Grid, moving: Sequence[int]) -> Tensor:
        """What a stage adds to and does not move: the network, and the other levels of its lattice."""
        lattice = self.lattice
        others = [i for i in range(len(lattice.spacings)) if i not in moving]
        u = lattice.on_grid(grid.lines, others)
        for network in [] if self._others else self.network:
            flat = grid.points.reshape(-1, 3)
            u += torch.cat([as_map(network).displacement(x) for x in flat.split(65_536)]).view_as(u)
        return u

    # -- the loss ------------------------------------------------------------------------------------------------

    def loss_at(self, batch: Points, conditions: Sequence[Tensor | None]) -> dict[str, Scalar]:
        if self.stage is None:
            data, raw = self.terms(batch)
            terms = self.weigh(data, raw)
        else:
            terms = self.refine()
        if world_size() > 1:  # each rank waits for the gradient of every parameter
            terms["all"] = 0 * torch.stack([p.sum() for p in self.parameters()]).sum()
        return terms

    def refine(self) -> dict[str, Scalar]:
        """The loss of a stage, on its whole grid."""
        r, (levels, grid, still) = self.refinement, self.grid()
        stage, region = self.parts[self.stage or 0]
        u = still + self.lattice.on_grid(grid.lines, levels)
        similarity, overlap = compare_on_grid(grid, self.whole(grid, u), self.to_moving_voxels, self.moving_mask)
        voxel = voxel_mm(self.domain) / self.domain.unit_mm
        bending = voxel**2 * bending_on_grid(u, grid.steps)
        barrier = barrier_on_grid(u, grid.steps)
        self._log({"overlap": overlap.detach(), "raw/bending": bending.detach(), "raw/barrier": barrier.detach()})
        stiffness = r.stiffness(stage, int(self.unlike[region]) > 0)
        terms = {"similarity": similarity, "bending": stiffness * bending, "barrier": r.barrier * barrier}
        for name, distance in self.guides().items():
            terms[name] = self.landmark_weight * distance
        return terms

    # -- optimization --------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients of what rests: Adam would count its steps, and begin the next stage with other moments."""
        stage = self.stage
        moved = [] if stage is None else self.grid()[0]
        rests: list[Tensor] = [
            p
            for one in (*self.lattices, *self.lasts)
            for i, p in enumerate(one.levels)
            if one is not self.lattice or i not in moved
        ]
        if stage is not None:
            rests += [p for network in self.network for p in network.parameters()]
        for parameter in rests:
            parameter.grad = None

    def groups(self) -> list[Group]:
        """The network follows the usual schedule in its part, each level of the lattice that of its stages."""
        r, starts = self.refinement, self.schedule()
        unit = voxel_mm(self.domain) / self.domain.unit_mm

        def of_level(region: int, level: int, last_stage: bool) -> Rate:
            def rate(step: int) -> float:
                for (stage, own), (first, last) in zip(self.parts, itertools.pairwise(self.schedule()), strict=True):
                    mine = own == region and r.own(stage) == last_stage
                    if first <= step < last and mine and level in r.levels(stage, 0):
                        rise, share = min(1.0, (step - first + 1) / 5), (step - first) / (last - first)
                        wave = 0.55 + 0.45 * math.cos(math.pi * share)
                        return r.lr * r.shrinks[stage] * unit * rise * wave
                return 0.0

            return rate

        found: list[Group] = [
            ([p], of_level(k, i, lattices is self.lasts))
            for lattices in (self.lattices, self.lasts)
            for k, one in enumerate(lattices)
            for i, p in enumerate(one.levels)
        ]
        if self.network:
            parameters: list[Tensor] = list(self.network[0].parameters())
            found.append((parameters, lambda s: self.lr * self.rate(s, starts[0]) if s < starts[0] else 0.0))
        return found
