"""The contract of every field, and the chunked evaluation that keeps its activations in the processor's cache."""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from medinr.configured import Configured
from medinr.jets import Jet
from medinr.space import Domain
from medinr.types import Features

CPU_CHUNK = 500
"""Points per piece on a CPU: a few channels of 256 floats then stay in the cache (250 to 500 measured best)."""


class Field(Configured, nn.Module):
    """A coordinate network: x [N, in_features] -> [N, out_features], with a jet rule.

    ``context`` is one vector [p] for all points of a call (a regularization weight, a time, a condition) or None.
    A subclass without its own `jet` falls back on ``torch.func`` and says so once.

    Attributes:
        conditions: length p of the context that the field needs; 0: none.
        in_pieces: whether jets are faster on a few hundred points at a time (see `in_chunks`).
    """

    in_features: int
    out_features: int
    conditions: int = 0
    in_pieces = True
    _shared: dict[Hashable, tuple[Tensor | None, Tensor]] | None = None

    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        raise NotImplementedError

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        """Value and derivatives of the field along the directions of the incoming jet."""
        return fallback_jet(self, jet, context)

    def cover(self, domain: Domain) -> None:
        """Take the size of the image, where the parameters depend on it; called before training and before loading."""
        for part in self.children():
            if isinstance(part, Field):
                part.cover(domain)

    def on_grid(self, lines: Sequence[Tensor], *, context: Tensor | None = None) -> Tensor:
        """[X, Y, Z, c]: the values at all points of a grid parallel to the axes, by its coordinates along each of them.

        By default the field is asked at every point. Splines are much faster: their basis is a product.
        """
        return values_at(self, torch.cartesian_prod(*lines), context).view(*(len(line) for line in lines), -1)

    def once(self, make: Callable[[], Tensor], context: Tensor | None = None) -> Tensor:
        """``make()``; inside `computed_once`, what it gave before at the same context (the same tensor object)."""
        if self._shared is None:
            return make()
        # What was made without gradients is of no use where they are needed.
        key = (id(context), torch.is_grad_enabled())
        if key not in self._shared:
            self._shared[key] = (context, make())  # the context is kept, so that its id stays its own
        return self._shared[key][1]


@contextmanager
def computed_once(module: nn.Module) -> Iterator[None]:
    """Inside, all fields of ``module`` compute what does not depend on the points once for each context.

    Some fields do work that is the same for all points of a step, as the coefficients that a network gives to a lattice
    (`medinr.fields.SINR`). A step asks such a field several times: for the data term, for each penalty, for each piece
    of `in_chunks`. The block says that the weights stay as they are until its end, where all is forgotten; gradients of
    all that was computed from the shared values arrive where they belong. Most fields share nothing: for them the block
    does nothing. Blocks may be nested; the outermost counts.
    """
    opened = [part for part in module.modules() if isinstance(part, Field) and part._shared is None]
    for part in opened:
        part._shared = {}
    try:
        yield
    finally:
        for part in opened:
            part._shared = None


_told: set[type] = set()


def fallback_jet(field: Field, jet: Jet, context: Tensor | None = None) -> Jet:
    """Jet of a field without a rule, by ``torch.func`` (per point: the full Jacobian and Hessian; slow)."""
    if type(field) not in _told:
        _told.add(type(field))
        warnings.warn(
            f"{type(field).__name__} has no jet rule: torch.func is used instead, which is slow", stacklevel=3
        )

    def at(point: Tensor) -> Tensor:
        value: Tensor = field(point[None], context)[0]
        return value

    x = jet.value
    value = field(x, context)
    if jet.first is None:
        return Jet(value[None], 0)
    jacobian = torch.func.vmap(torch.func.jacrev(at))(x)
    first = torch.einsum("nci,kni->knc", jacobian, jet.first)
    if not jet.pairs:
        return Jet.of(value, first, basis=jet.basis)
    hessian = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(at)))(x)
    a, b = (list(i) for i in zip(*jet.pairs, strict=True))
    second = torch.einsum("ncij,mni,mnj->mnc", hessian, jet.first[a], jet.first[b])
    if not jet.affine and jet.second is not None:
        second = second + torch.einsum("nci,mni->mnc", jacobian, jet.second)
    return Jet.of(value, first, second, jet.pairs, jet.basis)


def in_chunks(function: Callable[[Jet], Jet], jet: Jet, chunk: int | None = None) -> Jet:
    """``function(jet)`` piece by piece; gradients flow. On a CPU pieces of `CPU_CHUNK` points, else all at once.

    Large temporaries are slow on a CPU: each is fetched from the system page by page and leaves the cache before it is
    read again. Pieces of some hundred points made the step 1.2 to 1.5 times faster.
    """
    n = jet.channels.shape[1]
    if chunk is None:
        chunk = CPU_CHUNK if jet.channels.device.type == "cpu" else n
    if n <= chunk:
        return function(jet)
    pieces = [function(jet[slice(i, i + chunk)]) for i in range(0, n, chunk)]
    return replace(pieces[0], channels=torch.cat([p.channels for p in pieces], dim=1))


def values_at(field: Field, x: Features, context: Tensor | None = None) -> Features:
    """The field at many points [N, in_features], piece by piece (`in_chunks`)."""
    return in_chunks(lambda piece: Jet(field(piece.value, context)[None], 0), Jet(x[None], 0)).value
