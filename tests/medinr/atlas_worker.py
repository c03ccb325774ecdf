"""One of several processes: the gradients of an atlas's step, its scans dealt out. Run by test_atlas.py."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from medinr.ranks import world_size
from tests.medinr import tiny_atlas


class Loss(nn.Module):
    """An atlas as DistributedDataParallel wants it."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.host = host

    def forward(self) -> Tensor:
        return torch.stack(list(self.host.objective(self.host.draw()).values())).sum()


def step() -> dict[str, Tensor | None]:
    """Gradients by name of a step with 5 of 6 scans: an odd number, of which one is left out."""
    cohort = tiny_atlas.cohort()
    host = tiny_atlas.atlas(scans=5, pose="affine", pose_weight=1.0)
    host.size(cohort)
    host.attach(cohort)
    several = world_size() > 1
    module = DistributedDataParallel(Loss(host), find_unused_parameters=True) if several else Loss(host)
    module().backward()
    return {k: p.grad for k, p in host.named_parameters()}


if __name__ == "__main__":
    number, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=size)
    torch.save(step(), f"{folder}/{number}.pt")
    dist.destroy_process_group()
