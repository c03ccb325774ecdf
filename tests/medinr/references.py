"""Derivatives by torch.func: the reference that every jet is held against; slow, and without medinr's own rules."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medinr.jets import BASIS_PAIRS, Jet

Function = Callable[[Tensor], Tensor]
"""x [N, 3] -> [N, c], each point on its own."""


def per_point(function: Function) -> Function:
    return lambda point: function(point[None])[0]


def derivatives(function: Function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value [N, c], Jacobian [N, c, 3] and Hessian [N, c, 3, 3]."""
    at = per_point(function)
    return function(x), torch.func.vmap(torch.func.jacrev(at))(x), torch.func.vmap(torch.func.hessian(at))(x)


def analytic_jet(function: Function, x: Tensor, order: int = 2) -> Jet:
    """The jet of a function of space along the canonical basis."""
    value, jacobian, hessian = derivatives(function, x)
    first = jacobian.permute(2, 0, 1)
    if order == 1:
        return Jet.of(value, first)
    second = torch.stack([hessian[..., a, b] for a, b in BASIS_PAIRS])
    return Jet.of(value, first, second, BASIS_PAIRS)


def along(
    function: Function, x: Tensor, directions: Tensor, pairs: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Value [N, c], first [k, N, c] and second [m, N, c] derivatives along directions [k, N, 3] and pairs of them."""
    value, jacobian, hessian = derivatives(function, x)
    first = torch.einsum("nci,kni->knc", jacobian, directions)
    second = torch.stack([torch.einsum("ncij,ni,nj->nc", hessian, directions[a], directions[b]) for a, b in pairs])
    return value, first, second
