"""Jets: values and directional derivatives of a map in one forward pass (truncated Taylor arithmetic).

For y(x) and directions d_a, a jet holds the value y, the first derivatives y_a = Dy[d_a] and, for chosen pairs of
directions, the second derivatives y_ab = D2y[d_a, d_b]. Each layer maps a jet to a jet:

- an affine layer multiplies all 1 + k + m channels by its matrix in one product and adds the bias to the value;
- an activation f maps (v, d_a, h_ab) to (f(v), f'(v) d_a, f''(v) d_a d_b + f'(v) h_ab).

Regularizers thus need one forward and one backward pass, where nested ``autograd.grad`` needs one backward pass for
each first derivative and one more for each second derivative (Griewank and Walther, Evaluating Derivatives, 2008,
ch. 13).

The channels lie in one tensor [1 + k + m, N, c], so that a layer is one matrix product. The sine rule is one autograd
function: it keeps cos of a layer and nothing else of its own (sin is its output). Computing cos anew in the backward
pass would save 4 % of the memory of an exact Jacobian's step (3 x 256, 10,000 points) for 3 % of its time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medinr.precision import product
from medinr.types import Directions, Features, Pairs

Pair = tuple[int, int]
BASIS_PAIRS: tuple[Pair, ...] = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
"""The six distinct second derivatives of a function of space."""
PROBE_PAIRS: tuple[Pair, ...] = ((0, 1),)
"""The one mixed second derivative along two independent random directions."""


@dataclass(frozen=True)
class Jet:
    """Truncated Taylor expansion at N points.

    Attributes:
        channels: [1 + k + m, N, c]: the value, k first and m second derivatives. A jet that is affine in x (the seed,
            say) leaves its second derivatives out although it names pairs: they are zero.
        k: number of directions.
        pairs: the pairs of directions of the second derivatives.
        basis: whether the directions are the canonical basis of space (else random probes).
    """

    channels: Tensor
    k: int
    pairs: tuple[Pair, ...] = ()
    basis: bool = True

    @classmethod
    def of(
        cls,
        value: Features,
        first: Directions | None = None,
        second: Pairs | None = None,
        pairs: Sequence[Pair] = (),
        basis: bool = True,
    ) -> "Jet":
        """A jet from its parts: value [N, c], first [k, N, c], second [m, N, c]."""
        if second is not None and len(pairs) != len(second):
            raise ValueError(
                f"jet: expected {len(second)} pairs for {len(second)} second derivatives, got {len(pairs)}"
            )
        if pairs and first is None:
            raise ValueError("jet: second derivatives need first derivatives")
        parts = [value[None]] + [p for p in (first, second) if p is not None]
        return cls(torch.cat(parts), 0 if first is None else len(first), tuple(pairs), basis)

    @property
    def value(self) -> Features:
        return self.channels[0]

    @property
    def first(self) -> Directions | None:
        return self.channels[1 : 1 + self.k] if self.k else None

    @property
    def second(self) -> Pairs | None:
        if not self.pairs:
            return None
        if self.affine:
            return torch.zeros_like(self.channels[:1]).expand(len(self.pairs), -1, -1)
        return self.channels[1 + self.k :]

    @property
    def affine(self) -> bool:
        """Whether the second derivatives are left out, being zero."""
        return len(self.channels) == 1 + self.k

    @property
    def order(self) -> int:
        return 2 if self.pairs else int(self.k > 0)

    @property
    def jacobian(self) -> Tensor:
        """[N, c, 3], entry (i, j) the derivative of component i along axis j; only for a full basis."""
        if not self.basis or self.k != 3:
            raise ValueError("jet: a Jacobian matrix needs the full basis of directions, not random probes")
        return self.channels[1:4].permute(1, 2, 0)

    def rescale(self, value: float, length: float) -> "Jet":
        """The jet in other units: values times ``value``, inputs times ``length``."""
        factors = [value] + [value / length] * self.k
        if not self.affine:
            factors += [value / length**2] * len(self.pairs)
        scale = torch.tensor(factors, device=self.channels.device, dtype=self.channels.dtype)
        return replace(self, channels=self.channels * scale[:, None, None])

    def __getitem__(self, points: slice) -> "Jet":
        """The jet at some of the points."""
        return replace(self, channels=self.channels[:, points])


def seed(x: Features, order: int, pairs: Sequence[Pair] = BASIS_PAIRS) -> Jet:
    """The jet of the identity at x [N, 3], along the canonical basis, to order 0, 1 or 2."""
    if order == 0:
        return Jet(x[None], 0)
    eye = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)[:, None].expand(-1, len(x), -1)
    return Jet(torch.cat((x[None], eye)), x.shape[1], tuple(pairs) if order == 2 else ())


def probe(x: Features, generator: torch.Generator | None = None) -> Jet:
    """The jet of the identity at x along two directions v, w drawn for every point, isotropic with unit variance.

    For a Hessian H, E[(v'Hw)^2] = |H|_F^2: the pair (v, w) gives an unbiased bending energy at 4, not 10, channels.
    The directions are uniform on the sphere of radius sqrt(3), which has less variance than a normal distribution.
    """
    d = torch.randn(2, *x.shape, device=x.device, dtype=x.dtype, generator=generator)
    d = d * (x.shape[1] ** 0.5 / d.norm(dim=-1, keepdim=True))
    return Jet(torch.cat((x[None], d)), 2, PROBE_PAIRS, basis=False)


def linear(jet: Jet, weight: Tensor, bias: Tensor | None = None, hidden: bool = False) -> Jet:
    """Affine layer: weight [out, in] on all channels in one product, bias [out] on the value only.

    ``hidden``: from one hidden layer to the next. Mixed precision (`medinr.precision`) rounds the factors of such
    products, unless the jet carries second derivatives; all else is computed in the type of the jet.
    """
    channels = product(jet.channels, weight, hidden and jet.order < 2)
    if bias is not None:
        channels = _AddToValue.apply(channels, bias)  # type: ignore[no-untyped-call]
    return replace(jet, channels=channels)


class _AddToValue(torch.autograd.Function):
    """Adds a bias to channel 0 in place: a copy of all channels would cost as much as the activation."""

    @staticmethod
    def forward(ctx: Any, channels: Tensor, bias: Tensor) -> Tensor:
        channels[0] += bias
        ctx.mark_dirty(channels)
        return channels

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0][0].sum(0)


def linear_batched(jet: Jet, weight: Tensor, bias: Tensor, hidden: bool = False) -> Jet:
    """`linear` of B networks at once: channels [1 + k + m, B, N, in], weight [B, out, in], bias [B, out].

    One batched product. The channels of the result lie in memory as [B, 1 + k + m, N, out], which is what the next
    product takes without a copy.
    """
    channels = jet.channels.movedim(1, 0)
    b, c, n, _ = channels.shape
    y = product(channels.reshape(b, c * n, -1), weight, hidden and jet.order < 2)
    y = _AddToFirst.apply(y, bias, n)  # type: ignore[no-untyped-call]
    return replace(jet, channels=y.view(b, c, n, -1).movedim(0, 1))


class _AddToFirst(torch.autograd.Function):
    """`_AddToValue` of several networks, [B, (1 + k + m) N, c]: before it is viewed, as writing into a view costs
    copies in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, n: int) -> Tensor:
        rows[:, :n] += bias[:, None]
        ctx.mark_dirty(rows)
        ctx.n = n
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], grads[0][:, : ctx.n].sum(1), None


def sine(jet: Jet) -> Jet:
    """sin of a jet: (s, c d_a, c h_ab - s d_a d_b) with s, c = sin, cos of the value."""
    channels = _Sine.apply(jet.channels, jet.k, jet.pairs)  # type: ignore[no-untyped-call]
    return replace(jet, channels=channels)


class _Sine(torch.autograd.Function):
    """The sine rule; second derivatives are created here when the input leaves them out (affine input)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int, pairs: tuple[Pair, ...]) -> Tensor:
        # In the memory order of the input, which is that of several networks where it comes from `linear_batched`.
        order = sorted(range(z.ndim), key=z.stride, reverse=True)
        y = torch.empty_permuted((1 + k + len(pairs), *z.shape[1:]), order, dtype=z.dtype, device=z.device)
        s, c = torch.sin(z[0], out=y[0]), torch.cos(z[0])
        if k:
            torch.mul(z[1 : 1 + k], c, out=y[1 : 1 + k])
        curved = len(z) > 1 + k
        for m, (a, b) in enumerate(pairs, start=1 + k):
            torch.mul(z[1 + a], z[1 + b], out=y[m])
            y[m].mul_(s).neg_()
            if curved:
                y[m].addcmul_(z[m], c)
        ctx.save_for_backward(z, y, c)  # the next product keeps y anyway, and its first channel is s
        ctx.k, ctx.pairs = k, pairs
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (g,) = grads
        z, y, c = ctx.saved_tensors
        s, k, pairs = y[0], ctx.k, ctx.pairs
        curved = len(z) > 1 + k
        out = torch.empty_like(z)
        if not k:
            torch.mul(g[0], c, out=out[0])
            return out, None, None
        torch.mul(g[1 : 1 + k], c, out=out[1 : 1 + k])
        # Terms of the value's gradient that share the factor -s are summed first.
        with_s = g[1] * z[1]
        for a in range(2, 1 + k):
            with_s.addcmul_(g[a], z[a])
        with_c = g[0].clone()
        for m, (a, b) in enumerate(pairs, start=1 + k):
            gs = g[m] * s
            with_c.addcmul_(g[m], z[1 + a] * z[1 + b], value=-1)
            out[1 + a].addcmul_(gs, z[1 + b], value=-1)
            out[1 + b].addcmul_(gs, z[1 + a], value=-1)
            if curved:
                with_s.addcmul_(g[m], z[m])
                torch.mul(g[m], c, out=out[m])
        torch.mul(with_c, c, out=out[0])
        out[0].addcmul_(with_s, s, value=-1)
        return out, None, None


Rule = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""value -> (f, f', f'') of an activation, elementwise."""


def activate(jet: Jet, rule: Rule) -> Jet:
    """Any elementwise activation, from its value and first two derivatives."""
    f, f1, f2 = rule(jet.value)
    parts = [f[None]]
    if jet.k:
        d = jet.channels[1 : 1 + jet.k]
        parts.append(f1 * d)
        if jet.pairs:
            a, b = (list(i) for i in zip(*jet.pairs, strict=True))
            h = f2 * d[a] * d[b]
            parts.append(h if jet.affine else h + f1 * jet.channels[1 + jet.k :])
    return replace(jet, channels=torch.cat(parts))


def relu_rule(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    step = (v > 0).to(v.dtype)
    return v * step, step, torch.zeros_like(v)


def tanh_rule(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tanh(v)
    f1 = 1 - t * t
    return t, f1, -2 * t * f1


def softplus_rule(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.sigmoid(v)
    return F.softplus(v), p, p * (1 - p)


def concatenate(*jets: Jet) -> Jet:
    """Features side by side: jets of the same points and directions."""
    full = any(not j.affine for j in jets)
    channels = [materialise(j).channels if full else j.channels for j in jets]
    return replace(jets[0], channels=torch.cat(channels, dim=-1))


def materialise(jet: Jet) -> Jet:
    """The same jet with its second derivatives written out, even where they are zero."""
    if not jet.pairs or not jet.affine:
        return jet
    zeros = jet.channels.new_zeros(len(jet.pairs), *jet.channels.shape[1:])
    return replace(jet, channels=torch.cat((jet.channels, zeros)))


def add(one: Jet, other: Jet) -> Jet:
    """Sum of two jets at the same points and along the same directions."""
    if one.affine == other.affine:
        return replace(one, channels=one.channels + other.channels)
    return replace(one, channels=materialise(one).channels + materialise(other).channels)


def multiply(one: Jet, other: Jet) -> Jet:
    """Product of two jets at the same points and along the same directions, [N, c] or [N, 1] each (Leibniz's rule)."""
    v, w = one.value, other.value
    parts = [(v * w)[None]]
    if one.first is not None and other.first is not None:
        d, e = one.first, other.first
        parts.append(d * w + v * e)
        if one.second is not None and other.second is not None:
            a, b = (list(i) for i in zip(*one.pairs, strict=True))
            h = d[a] * e[b] + d[b] * e[a]
            h = h if one.affine else h + one.second * w
            parts.append(h if other.affine else h + v * other.second)
    return replace(one, channels=torch.cat(parts))


def cofactor(j: Tensor) -> Tensor:
    """Cofactor matrix of [..., 3, 3], so that d det(J)/dJ = cof(J)."""
    rows = [torch.linalg.cross(j[..., a, :], j[..., b, :], dim=-1) for a, b in ((1, 2), (2, 0), (0, 1))]
    return torch.stack(rows, dim=-2)


def det(j: Tensor) -> Tensor:
    """Determinant of [..., 3, 3] by cofactors (torch.linalg.det is wrong in nested forward differentiation)."""
    return torch.sum(j[..., 0, :] * torch.linalg.cross(j[..., 1, :], j[..., 2, :], dim=-1), dim=-1)
