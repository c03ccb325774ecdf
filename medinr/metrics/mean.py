"""A number per case, averaged over cases and processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class CaseMean(Metric):
    """Mean of what ``update`` hands to :meth:`add`."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    cases: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("cases", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, value: float) -> None:
        self.total += value
        self.cases += 1

    def compute(self) -> Tensor:
        return self.total / self.cases
