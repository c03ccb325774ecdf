"""One of several processes: gradients of a step whose points are dealt out. Run by test_ranks.py."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from medinr import losses
from medinr.fields import SIREN, HarmonizedSIREN
from medinr.losses import MSE, NCC, Barrier, Bending, LocalNCC
from medinr.methods import ConditionedRegistration, PairRegistration
from medinr.methods.base import RegistrationMethod
from medinr.ranks import any_rank, from_first, gather, rank, share, world_size
from tests.medinr import pairs

POINTS, ALPHAS = 240, 3
CASES = [name for name in ("NCC", "MSE", "LocalNCC", "NMI", "MINDSSC") if hasattr(losses, name)] + ["conditioned"]


def method(case: str) -> RegistrationMethod:
    """A displacement of some 10 mm, so that part of the samples lies outside; the same in every process."""
    torch.manual_seed(0)
    penalties = {"bend": Bending(0.1), "fold": Barrier(1.0, eps=2.0)}
    made: RegistrationMethod
    if case == "conditioned":
        field = HarmonizedSIREN(1, hidden=(16, 16), omega=4.0, zero_output=False)
        made = ConditionedRegistration(field, NCC(), penalties, ["bend"], alphas=ALPHAS)
    else:
        field = SIREN(hidden=(16, 16), omega=4.0, zero_output=False)
        made = PairRegistration(field, getattr(losses, case)(), penalties)
    made.attach(pairs.pair())
    return made


def points() -> Tensor:
    """[ALPHAS, n, 3]: the halves of the grid differ, which an average over processes would not see."""
    x = torch.rand(POINTS, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return x[x[:, 0].argsort()].reshape(-1, ALPHAS, 3).movedim(0, 1).contiguous()


class Loss(nn.Module):
    """A method as DistributedDataParallel wants it."""

    def __init__(self, host: RegistrationMethod) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(self.host.objective(x).values())).sum()


def step(case: str) -> dict[str, Any]:
    """Loss and gradients of this process's share of the points, after averaging over all."""
    host = method(case)
    module = Loss(host)
    x = points()
    n = x.shape[1] // world_size()
    mine = x[:, rank() * n : (rank() + 1) * n].reshape(-1, 3)
    wrapped = DistributedDataParallel(module) if world_size() > 1 else module
    torch.manual_seed(5 + rank())
    loss = wrapped(mine)
    loss.backward()
    return {"loss": loss.item(), "gradients": {k: p.grad for k, p in host.named_parameters()}}


def main(number: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=size)
    found: dict[str, Any] = {case: step(case) for case in CASES}
    found["numbers"] = {
        "share": share(7),
        "any": [any_rank(False), any_rank(number == 1)],
        "first": from_first(torch.tensor([float(number)])).tolist(),
        "gather": gather(f"rank {number}"),
    }
    with torch.no_grad():  # one rank alone may evaluate a similarity
        if number == 0:
            found["alone"] = LocalNCC()(torch.rand(4, 27), torch.rand(4, 27), torch.ones(4, 27)).item()
            found["alone"] += NCC()(torch.rand(9), torch.rand(9)).item() + MSE()(torch.rand(9), torch.rand(9)).item()
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
