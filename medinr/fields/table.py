"""A spline's values and gradients at the nodes of a fine grid, read linearly: its flow at many points costs little."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medinr.fields.base import Field
from medinr.fields.lattice import SplineField, cubic_weights
from medinr.jets import Jet
from medinr.sampling import interpolate
from medinr.types import Features

MOST_NODES = 12_000_000
"""A larger table is not made: three numbers a node, twelve with the gradient."""


class Table(Field):
    """A spline field of three components at a context, by trilinear interpolation between the nodes of a grid.

    The error is of second order in ``step``; who uses it measures it (`medinr.fields.dense.evaluate_dense`). The
    gradient is interpolated on its own: it is that of the spline, not the derivative of the interpolation.

    Args:
        field: the spline.
        step: distance of the nodes, normalised.
        context: that the field is read at.
    """

    in_features = 3
    out_features = 3

    def __init__(self, field: SplineField, step: float, context: Tensor | None) -> None:
        super().__init__()
        self.field, self.context = field, context
        self.low = field.origin
        finest = min(range(len(field.shapes)), key=lambda i: float(field.spacing[i]))
        sides = [(n - 3) * float(field.spacing[finest]) for n in field.shapes[finest]]
        counts = [max(2, math.ceil(side / step) + 1) for side in sides]
        self.lines = [
            low + torch.linspace(0, side, n, device=field.origin.device)
            for low, side, n in zip(field.origin, sides, counts, strict=True)
        ]
        self.steps = torch.stack([line[1] - line[0] for line in self.lines])
        self._values: Tensor | None = None
        self._gradient: Tensor | None = None

    @property
    def nodes(self) -> int:
        return math.prod(len(line) for line in self.lines)

    def _at(self, table: Tensor, x: Features) -> Tensor:
        return interpolate(table, (x - self.low.to(x)) / self.steps.to(x)).T

    @torch.no_grad()
    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        if self._values is None:
            self._values = self.field.on_grid(self.lines, context=self.context).movedim(-1, 0).contiguous()
        return self._at(self._values, x)

    @torch.no_grad()
    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        if jet.pairs:
            return self.field.jet(jet, self.context)
        value = self(jet.value)
        if jet.first is None:
            return Jet(value[None], 0)
        if self._gradient is None:
            self._gradient = gradient_on_grid(self.field, self.lines, self.context).flatten(-2).movedim(-1, 0)
            self._gradient = self._gradient.contiguous()
        slopes = self._at(self._gradient, jet.value).unflatten(-1, (3, 3))
        end = self.low + self.steps * torch.tensor([len(line) - 1 for line in self.lines]).to(self.steps)
        within = (jet.value >= self.low) & (jet.value <= end)  # beyond its box the spline is constant along that axis
        slopes = slopes * within[:, None, :]
        return Jet(torch.cat((value[None], torch.einsum("nci,kni->knc", slopes, jet.first))), jet.k)


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
