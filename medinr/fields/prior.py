"""An image as a continuous function, fitted before what uses it (Ref-Net of ST-NeRP)."""

import torch
from torch import Tensor, nn

from medinr.configured import Configured
from medinr.errors import UserError
from medinr.fields.base import Field, values_at
from medinr.types import Features, Points, Scalar


class ImagePrior(Configured, nn.Module):
    """min over the network of mean |net(x) - I(x)|^2 / 2 + decay |weights|^2 / 2, I windowed to [0, 1].

    Shen, Pauly and Xing, NeRP: Implicit Neural Representation Learning with Prior Embedding for Sparsely Sampled Image
    Reconstruction, IEEE TNNLS 2022: Adam, learning rate 1e-4, weight decay 1e-4, 2000 steps on the whole grid. Here a
    step looks at random points.

    Args:
        field: the network, from 3 to the image's channels (see `FourierSIREN`).
        share: of all steps, for the prior: the first ones.
        lr: learning rate.
        decay: as Adam's ``weight_decay``, which adds the gradient of this term.
        as_reference: let its rendering on the image's grid take the image's place afterwards.
    """

    def __init__(
        self, field: Field, share: float = 0.5, lr: float = 1e-4, decay: float = 0.0, as_reference: bool = False
    ) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise UserError(f"prior.share: expected a share of the steps in (0, 1), found {share}; correct it")
        self.field, self.share, self.lr, self.decay, self.as_reference = field, share, lr, decay, as_reference

    def steps(self, total: int) -> int:
        """The number of steps that are the prior's, of ``total``: at least one, and not all."""
        return min(max(1, round(self.share * total)), max(1, total - 1))

    def forward(self, x: Points) -> Features:
        return values_at(self.field, x)

    def terms(self, x: Points, truth: Tensor) -> dict[str, Scalar]:
        """The terms of the loss at points, with the image's values [N, C] there."""
        found = {"prior": 0.5 * (self(x) - truth).square().mean()}
        if self.decay:
            squares = torch.stack([p.square().sum() for p in self.parameters()]).sum()
            found["prior_decay"] = 0.5 * self.decay * squares
        return found
