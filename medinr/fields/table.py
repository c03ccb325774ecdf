"""A spline's values and gradients at the nodes of a fine grid, read linearly: its flow at many points costs little."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medinr.fields.base import Field
from medinr.fields.lattice import SplineField, cubic_weights
from medinr.fields.maps import Composed
from medinr.jets import Jet
from medinr.sampling import interpolate
from medinr.space import Domain
from medinr.types import Features

MOST_NODES = 12_000_000
"""A larger table is not made: three numbers a node, twelve with the gradient."""


class Table(Field):
    """A field of three components at a context, by trilinear interpolation between the nodes of a grid.

    The error is of second order in ``step``; who uses it measures it (`medinr.fields.dense.evaluate_dense`). The
    gradient is interpolated on its own: it is that of the spline, not the derivative of the interpolation.

    Args:
        field: a spline; of another field, only `values` come from the table.
        lines: normalised coordinates of the nodes along each axis, two or more at even distances. Beyond them the value
            continues constantly.
        context: that the field is read at.
    """

    in_features = 3
    out_features = 3
    in_pieces = False

    def __init__(self, field: Field, lines: Sequence[Tensor], context: Tensor | None) -> None:
        super().__init__()
        self.field, self.context, self.lines = field, context, list(lines)
        self.low = torch.stack([line[0] for line in lines])
        self.steps = torch.stack([(line[-1] - line[0]) / (len(line) - 1) for line in lines])
        self._values: Tensor | None = None
        self._gradient: Tensor | None = None

    @property
    def nodes(self) -> int:
        return nodes_of(self.lines)

    def _at(self, table: Tensor, x: Features) -> Tensor:
        return interpolate(table, (x - self.low.to(x)) / self.steps.to(x)).T

    def values(self, x: Features) -> Features:
        """The values at points [n, 3]; gradients flow to the points, not into the field."""
        if self._values is None:
            with torch.no_grad():
                found = self.field.on_grid(self.lines, context=self.context)
            self._values = found.movedim(-1, 0).contiguous()
        return self._at(self._values, x)

    @torch.no_grad()
    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        return self.values(x)

    @torch.no_grad()
    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        if jet.pairs or not isinstance(self.field, SplineField):
            return self.field.jet(jet, self.context)
        value = self(jet.value)
        if jet.first is None:
            return Jet(value[None], 0)
        if self._gradient is None:
            self._gradient = gradient_on_grid(self.field, self.lines, self.context).flatten(-2).movedim(-1, 0)
            self._gradient = self._gradient.contiguous()
        slopes = self._at(self._gradient, jet.value).unflatten(-1, (3, 3))
        end = torch.stack([line[-1] for line in self.lines])
        within = (jet.value >= self.low) & (jet.value <= end)  # beyond its box the spline is constant along that axis
        slopes = slopes * within[:, None, :]
        return Jet(torch.cat((value[None], torch.einsum("nci,kni->knc", slopes, jet.first))), jet.k)


def tabulated(field: Field, lines: Sequence[Tensor], context: Tensor | None, between: float = 1.0) -> Field | None:
    """A displacement of splines by tables with these nodes; None: it is made of something else, or too large.

    Of one spline after another, the second is asked between the nodes, and beyond them: its table has nodes of its own,
    ``between`` times as far apart.
    """
    if isinstance(field, SplineField):
        return Table(field, lines, context) if nodes_of(lines) <= MOST_NODES else None
    if not isinstance(field, Composed) or not isinstance(field.outer, SplineField):
        return None
    inner = tabulated(field.inner, lines, context)
    step = between * math.prod(float(line[1] - line[0]) for line in lines) ** (1 / 3)
    outer = tabulated(field.outer, even_lines(field.outer, step), context)
    return None if inner is None or outer is None else Composed(inner, outer)


def nodes_of(lines: Sequence[Tensor]) -> int:
    """Number of nodes of a grid."""
    return math.prod(len(line) for line in lines)


def even_lines(field: SplineField, step: float) -> list[Tensor]:
    """Nodes over the boxes of all levels of a spline, at most ``step`` apart.

    They divide the finest distance of control points evenly, so that a node lies where a box ends: beyond it the level
    continues constantly, and its slope jumps.
    """
    finest = float(min(field.spacing))
    parts = max(1, math.ceil(finest / step - 1e-3))
    lines = []
    for axis, low in enumerate(field.origin):
        side = max((n[axis] - 3) * float(h) for n, h in zip(field.shapes, field.spacing, strict=True))
        cells = math.ceil(side / finest - 1e-3)
        lines.append(low + finest / parts * torch.arange(cells * parts + 1, device=low.device))
    return lines


def voxel_lines(domain: Domain, halves: bool) -> list[Tensor] | None:
    """Nodes at the voxel centres of a grid; ``halves``: at its voxels' faces, too. None: it is oblique, or a slice."""
    m = domain.voxel_to_normalised
    own = m[:3, :3].abs().argmax(1).tolist()
    across = m[:3, :3].clone()
    across[range(3), own] = 0
    if across.abs().max() * max(domain.shape) > 1e-3 * float(m[:3, :3].abs().amax()) or min(domain.shape) < 2:
        return None
    lines = []
    for axis, voxel_axis in enumerate(own):
        n = domain.shape[voxel_axis]
        at = (torch.arange(2 * n + 1) - 1) / 2 if halves else torch.arange(n)
        line = (m[axis, voxel_axis] * at.double() + m[axis, 3]).float()
        lines.append(line if m[axis, voxel_axis] > 0 else line.flip(0))
    return lines


def gradient_on_grid(field: SplineField, lines: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
    """[X, Y, Z, c, 3]: derivatives of a spline field along the normalised axes at the points of a grid."""
    total: Tensor | None = None
    for level, shape in enumerate(field.shapes):
        h = field.spacing[level]
        values = field.coefficients(level, context).view(*shape, -1)
        pairs = [
            [_basis(line, field.origin[a], h, shape[a], order) for order in (0, 1)] for a, line in enumerate(lines)
        ]
        if total is None:
            total = values.new_zeros(*(len(line) for line in lines), values.shape[-1], 3)
        for axis in range(3):
            x, y, z = (pairs[a][int(a == axis)] for a in range(3))
            part = torch.tensordot(x, values, dims=([1], [0]))
            total[..., axis] += torch.einsum("zc,xycd->xyzd", z, torch.einsum("yb,xbcd->xycd", y, part))
    assert total is not None
    return field.gain * total


def _basis(line: Tensor, low: Tensor, h: Tensor, n: int, order: int) -> Tensor:
    """[points, n]: weights of the control points, or (order 1) their derivatives by the coordinate."""
    at = ((line - low) / h).clamp(0, n - 3 - 1e-4)
    cell = at.floor()
    columns = cell.long()[:, None] + torch.arange(4, device=at.device)
    weights = cubic_weights(at - cell, order)[order] / h**order
    return at.new_zeros(len(at), n).scatter_(1, columns, weights)
