"""A pair of images to be registered, with all that is known of it."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from medinr.space import Domain, Image
from medinr.types import Mask, Matrix, Points


@dataclass(frozen=True)
class Pair:
    """Fixed and moving image, and optional masks, landmarks and labels of each.

    Masks and labels are on the grid of their own image: [X, Y, Z], bool and int. Points are [n, 3], RAS mm; the i-th
    fixed point corresponds to the i-th moving one. ``start`` maps fixed world to moving world (RAS mm) and is the
    transform A of phi(x) = A(x + u(x)).
    """

    name: str
    fixed: Image
    moving: Image
    fixed_mask: Mask | None = None
    moving_mask: Mask | None = None
    fixed_points: Points | None = None
    moving_points: Points | None = None
    fixed_labels: Tensor | None = None
    moving_labels: Tensor | None = None
    start: Matrix = field(default_factory=lambda: torch.eye(4, dtype=torch.float64))

    @property
    def domain(self) -> Domain:
        return self.fixed.domain

    def to(self, device: torch.device | str) -> "Pair":
        """The same pair with all its tensors on ``device`` (``start`` stays in float64 on the CPU)."""
        tensors = ["fixed_mask", "moving_mask", "fixed_points", "moving_points", "fixed_labels", "moving_labels"]
        moved = {k: v.to(device) for k in tensors if (v := getattr(self, k)) is not None}
        return replace(self, fixed=self.fixed.to(device), moving=self.moving.to(device), **moved)
