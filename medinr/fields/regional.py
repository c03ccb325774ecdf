"""Regions that slide along each other: one smooth field in each, and the transform that they make together."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from medinr import jets
from medinr.fields.base import Field
from medinr.fields.maps import as_map, check_displacement
from medinr.fields.transform import Transform
from medinr.jets import Jet
from medinr.sampling import nearest
from medinr.space import Domain, transform_points
from medinr.types import Features, Matrix, Points


class Regional(Field):
    """u(x) = u_r(x), r the region of x: smooth inside each region, with a jump along the borders.

    A lung slides along the chest wall; a smooth field either holds the lung back or drags the wall along (sliding
    motion: Schmidt-Richberg et al., Medical Image Analysis 16(1), 2012; motion masks: Vandemeulebroucke et al., Medical
    Physics 39(2), 2012). Derivatives are those of the region's own field; the jump itself has none.

    Until `separate` is called, the field of region 0 holds everywhere.

    Args:
        parts: one field for each region, of equal dimensions; region r is where the labels are r.
    """

    labels: Tensor
    to_voxel: Tensor
    apart: Tensor

    def __init__(self, parts: Sequence[Field]) -> None:
        super().__init__()
        if len(parts) < 2:
            raise ValueError(f"parts: expected a field for each of two or more regions, got {len(parts)}")
        for i, part in enumerate(parts):
            check_displacement(f"parts.{i}", part)
        self.parts = nn.ModuleList(parts)
        self.conditions = max(part.conditions for part in parts)
        self.in_features, self.out_features = parts[0].in_features, parts[0].out_features
        self.register_buffer("labels", torch.zeros(1, 1, 1, dtype=torch.uint8))
        self.register_buffer("to_voxel", torch.eye(4))
        self.register_buffer("apart", torch.tensor(False))

    @property
    def fields(self) -> list[Field]:
        return [part for part in self.parts if isinstance(part, Field)]

    def cover(self, domain: Domain) -> None:
        for field in self.fields:
            field.cover(domain)
        if tuple(self.labels.shape) != domain.shape:
            self.labels = torch.zeros(domain.shape, dtype=torch.uint8, device=self.labels.device)
        self.to_voxel = domain.normalised_to_voxel.to(self.to_voxel)

    def divide(self, labels: Tensor) -> None:
        """Take the regions: labels [X, Y, Z] from 0 on the grid that the field covers."""
        if tuple(labels.shape) != tuple(self.labels.shape) or int(labels.max()) >= len(self.parts):
            raise ValueError(
                f"labels: expected {tuple(self.labels.shape)} values below {len(self.parts)}, got "
                f"{tuple(labels.shape)} up to {int(labels.max())}"
            )
        self.labels = labels.to(self.labels)

    @torch.no_grad()
    def separate(self) -> None:
        """Give the other regions the parameters of region 0; from here on each has its own. Nothing happens twice."""
        if not bool(self.apart):
            for part in self.parts[1:]:
                for mine, first in zip(part.parameters(), self.parts[0].parameters(), strict=True):
                    mine.copy_(first)
            self.apart.fill_(True)

    @torch.no_grad()
    def region(self, x: Features) -> Tensor:
        """The region of each point [N]: that of the nearest voxel, beyond the grid of the nearest one in it."""
        if not bool(self.apart):
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        upper = torch.tensor(self.labels.shape, device=x.device) - 1
        voxel = transform_points(self.to_voxel.to(x), x).clamp(min=torch.zeros_like(upper), max=upper)
        return nearest(self.labels, voxel).long()

    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        return self.jet(Jet(x[None], 0), context).value

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        x = jet.value
        region = self.region(x)
        found: Jet | None = None
        for r, field in enumerate(self.fields):
            rows = (region == r).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            some = replace(jet, channels=jet.channels[:, rows])
            part = jets.materialise(field.jet(some, context)) if jet.order else Jet(field(some.value, context)[None], 0)
            if len(rows) == len(x):
                return part
            if found is None:
                empty = part.channels.new_zeros(len(part.channels), len(x), self.out_features)
                found = replace(part, channels=empty)
            found = replace(found, channels=found.channels.index_copy(1, rows, part.channels))
        return found if found is not None else Jet(x.new_zeros(1, 0, self.out_features), 0)


class RegionalTransform(Transform):
    """phi of a `Regional` displacement: the transform of the region that a point lies in.

    Args:
        regional: the displacement.
        domain, start: as of `Transform`.
    """

    def __init__(self, regional: Regional, domain: Domain, start: Matrix) -> None:
        super().__init__(as_map(regional), domain, start)
        self.regional = regional
        self.parts = [Transform(as_map(field), domain, start) for field in regional.fields]

    def region(self, world: Points) -> Tensor:
        """The region of each point [n] of the fixed world."""
        x = transform_points(self.domain.world_to_normalised, world.double().cpu())
        return self.regional.region(x.float().to(self.device)).cpu()

    def inverse(
        self, world: Points, iterations: int = 30, tolerance_mm: float | None = None, guess: Points | None = None
    ) -> tuple[Points, Tensor]:
        """Points of the fixed world that phi maps to moving points [n, 3].

        Each region's own map is inverted, and a solution counts as far as phi itself maps it to the point. Where
        regions have moved over each other, the one of the highest number wins; where they have parted, nothing maps to
        the gap, and the residual tells.
        """
        target = world.double().cpu()
        p, residual = torch.empty_like(target), torch.full((len(target),), torch.inf, dtype=torch.float64)
        for part in self.parts:
            own, _ = part.inverse(target, iterations, tolerance_mm, guess)
            gap = (self(own) - target).norm(dim=1)
            better = gap <= residual.clamp(min=self.precision_mm if tolerance_mm is None else tolerance_mm)
            p[better], residual[better] = own[better], gap[better]
        return p, residual
