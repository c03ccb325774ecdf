"""Several processes that share one fit: who this one is, and sums over all of them.

Each process (rank) draws its own share of a step's points; DistributedDataParallel averages the gradients. A loss that
is a mean over points then has the gradient of one process with all points. A loss that is a function of sums (NCC over
all points, a mean weighted by overlap) has not: the mean of the shares' values is another number. `sum_over_ranks`
makes it exact: every rank computes the loss of all points, and its gradient reaches each rank's own.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Number of processes of this fit, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share(points: int) -> int:
    """Points of one process, so that all have equally many and together at least ``points``."""
    return -(-points // world_size())


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of x over all processes, on each of them; differentiable. x itself in a single one.

    Only where gradients are recorded: a search or a metric, which may run on one rank alone, must not wait for others.
    The backward pass sums the gradients of all ranks' losses, W times that of one; the average over W processes, which
    DistributedDataParallel takes, undoes the factor.
    """
    if world_size() == 1 or not torch.is_grad_enabled():
        return x
    out: Tensor = _Sum.apply(x)  # type: ignore[no-untyped-call]
    return out


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether the flag is set in any process. All of them must ask at the same time."""
    if world_size() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    dist.all_reduce(found)
    return bool(found)


def from_first(x: Tensor) -> Tensor:
    """Rank 0's x, on every rank (no gradient)."""
    if world_size() > 1:
        x = x.contiguous()
        dist.broadcast(x, src=0)
    return x


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order of rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def is_first(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process is, or starts, rank 0, before torch.distributed is up.

    torchrun sets RANK; srun SLURM_PROCID; Lightning's own copies of a command have LOCAL_RANK, and NODE_RANK on other
    machines.
    """
    given = os.environ if environment is None else environment
    for name in ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        if given.get(name, "").isdigit():
            return int(given[name]) == 0
    return all(given.get(name, "0") in ("", "0") for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))
