"""Maps x -> x + u(x) of normalised space, whose displacement u is a field."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medinr import jets
from medinr.errors import UserError
from medinr.fields.base import Field, computed_once, in_chunks, values_at
from medinr.jets import Jet
from medinr.types import Points


class Map(Field):
    """A transform of space. `jet` is that of the transform, so maps compose; `displacement_jet` that of u."""

    in_features = 3
    out_features = 3

    def displacement(self, x: Points, context: Tensor | None = None) -> Points:
        """u(x) in normalised units."""
        u: Points = self(x, context) - x
        return u

    def displacement_jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        """Jet of u: that of the transform less that of x."""
        moved = self.jet(jet, context)
        base = jet if moved.affine else jets.materialise(jet)
        return replace(moved, channels=moved.channels - base.channels)

    def displacement_on_grid(self, lines: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
        """u [X, Y, Z, 3] at all points of a grid parallel to the axes, by its coordinates along each of them."""
        points = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)
        return self.on_grid(lines, context=context) - points


class DisplacementMap(Map):
    """x + u(x), u a field of three components."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        if field.in_features != 3 or field.out_features != 3:
            raise ValueError(
                f"a displacement needs a field from 3 to 3, got {field.in_features} to {field.out_features}"
            )
        self.field = field
        self.conditions = field.conditions

    def forward(self, x: Points, context: Tensor | None = None) -> Points:
        moved: Points = x + self.field(x, context)
        return moved

    def displacement(self, x: Points, context: Tensor | None = None) -> Points:
        u: Points = self.field(x, context)
        return u

    def displacement_jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        with computed_once(self.field):  # for all pieces
            chunk = None if self.field.in_pieces else jet.channels.shape[1]
            return in_chunks(lambda piece: self.field.jet(piece, context), jet, chunk)

    def displacement_on_grid(self, lines: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
        return self.field.on_grid(lines, context=context)

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        return jets.add(self.displacement_jet(jet, context), jet)


class Composition(Map):
    """One map after another: x -> outer(inner(x)). The jet of the inner map is fed into the outer one.

    Args:
        inner: applied first; a field counts as a displacement.
        outer: applied to the result.
    """

    def __init__(self, inner: Field, outer: Field) -> None:
        super().__init__()
        self.inner, self.outer = as_map(inner), as_map(outer)
        self.conditions = max(inner.conditions, outer.conditions)

    def forward(self, x: Points, context: Tensor | None = None) -> Points:
        moved: Points = self.outer(self.inner(x, context), context)
        return moved

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        return self.outer.jet(self.inner.jet(jet, context), context)


def check_displacement(name: str, field: Field) -> None:
    """Refuse a map as a part of another field: there x + u(x) would be taken for a displacement.

    Raises:
        UserError: names the argument.
    """
    if isinstance(field, Map):
        raise UserError(f"{name}: expected a field of displacements, got the map {type(field).__name__}")


class Composed(Field):
    """The displacement of one map after another, u(x) = v(x) + w(x + v(x)): id + u = (id + w) o (id + v).

    As a `Composition`, but a displacement, so that it can be a part of other fields.

    Args:
        inner: v, applied first.
        outer: w, a displacement too.
    """

    in_features = 3
    out_features = 3

    def __init__(self, inner: Field, outer: Field) -> None:
        super().__init__()
        for name, field in (("inner", inner), ("outer", outer)):
            check_displacement(name, field)
            if (field.in_features, field.out_features) != (3, 3):
                raise ValueError(f"{name}: expected a field from 3 to 3, got {type(field).__name__}")
        self.inner, self.outer = inner, outer
        self.conditions = max(inner.conditions, outer.conditions)
        self.in_pieces = inner.in_pieces or outer.in_pieces

    def forward(self, x: Points, context: Tensor | None = None) -> Points:
        v: Points = self.inner(x, context)
        total: Points = v + self.outer(x + v, context)
        return total

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        v = self.inner.jet(jet, context)
        return jets.add(v, self.outer.jet(jets.add(v, jet), context))

    def on_grid(self, lines: Sequence[Tensor], *, context: Tensor | None = None) -> Tensor:
        v = self.inner.on_grid(lines, context=context)
        points = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)
        return v + values_at(self.outer, (points + v).flatten(0, 2), context).view_as(v)


class Sum(Field):
    """Sum of two fields, u(x) = one(x) + other(x): a global network and a local lattice, say."""

    def __init__(self, one: Field, other: Field) -> None:
        super().__init__()
        check_displacement("one", one)
        check_displacement("other", other)
        if (one.in_features, one.out_features) != (other.in_features, other.out_features):
            raise ValueError(
                f"a sum needs fields of the same dimensions, got {one.in_features} to {one.out_features} "
                f"and {other.in_features} to {other.out_features}"
            )
        self.in_features, self.out_features = one.in_features, one.out_features
        self.one, self.other = one, other
        self.conditions = max(one.conditions, other.conditions)

    def forward(self, x: Points, context: Tensor | None = None) -> Points:
        total: Points = self.one(x, context) + self.other(x, context)
        return total

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        return jets.add(self.one.jet(jet, context), self.other.jet(jet, context))

    def on_grid(self, lines: Sequence[Tensor], *, context: Tensor | None = None) -> Tensor:
        return self.one.on_grid(lines, context=context) + self.other.on_grid(lines, context=context)


def as_map(field: Field) -> Map:
    """A field as a map: itself if it is one, else as a displacement."""
    return field if isinstance(field, Map) else DisplacementMap(field)
