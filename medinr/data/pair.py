"""A pair of images to be registered, with all that is known of it."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from medinr.space import Domain, Image
from medinr.types import Mask, Matrix, Points

KINDS = ("mask", "points", "labels", "exclude", "guides", "regions")
"""What may be known of each image beside the image itself."""
SIDES = (("fixed", "moving"), ("moving", "fixed"))


@dataclass(frozen=True)
class Pair:
    """Fixed and moving image, and optional masks, landmarks and labels of each.

    Images may have several channels [C, X, Y, Z]; channel i of one is compared with channel i of the other. A 2-D image
    is a single slice, [C, X, Y, 1]. Masks and labels are on the grid of their own image: [X, Y, Z], bool and int.
    ``exclude`` masks are True where nothing is compared (a lesion that the other image does not have), while the
    deformation there stays regularised. ``regions`` [X, Y, Z], numbered from 0, slide along each other (the lungs and
    the rest). Points are [n, 3], RAS mm; the i-th fixed point corresponds to the i-th moving one. ``points`` only
    measure the error, ``guides`` only pull the deformation: none is both. ``start`` maps fixed world to moving world
    (RAS mm) and is the transform A of phi(x) = A(x + u(x)).
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
    fixed_exclude: Mask | None = None
    moving_exclude: Mask | None = None
    fixed_guides: Points | None = None
    moving_guides: Points | None = None
    fixed_regions: Tensor | None = None
    moving_regions: Tensor | None = None

    @property
    def domain(self) -> Domain:
        return self.fixed.domain

    def to(self, device: torch.device | str) -> "Pair":
        """The same pair with all its tensors on ``device`` (``start`` stays in float64 on the CPU)."""
        names = [f"{side}_{kind}" for kind in KINDS for side in ("fixed", "moving")]
        moved = {k: v.to(device) for k in names if (v := getattr(self, k)) is not None}
        return replace(self, fixed=self.fixed.to(device), moving=self.moving.to(device), **moved)

    def swapped(self) -> "Pair":
        """The same pair with the images' parts exchanged: what is fixed moves, through the inverse of the start."""
        sides = {f"{a}_{kind}": getattr(self, f"{b}_{kind}") for kind in KINDS for a, b in SIDES}
        return replace(self, fixed=self.moving, moving=self.fixed, start=torch.linalg.inv(self.start), **sides)
