"""Two maps fitted against each other, forward and backward, for any pairwise method; their gap is the uncertainty."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from medinr.configured import build, spec
from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.fields import CycleTransform, Inference
from medinr.methods.base import RegistrationMethod
from medinr.methods.grids import voxel_mm
from medinr.methods.method import Group
from medinr.methods.module import RegistrationModule
from medinr.space import transform_points
from medinr.types import Points, Scalar

Batch = tuple[Points, Points]


class CycleConsistentRegistration(RegistrationModule):
    """min over F, B of L(F) + L(B) + weight (mean |B(F(p)) - p|^2 + mean |F(B(q)) - q|^2), p fixed and q moving points.

    Van Harten, Stoker and Išgum, Robust deformable image registration using cycle-consistent implicit representations,
    IEEE TMI 43(2), 2024 (ccIDIR; arXiv 2310.01934). L is the loss of any pairwise method: points or grids, conditioned
    or not, whatever its field, similarity and penalties; F is the method that is given, B another one built alike, with
    weights of its own, and with fixed and moving exchanged. Each direction draws from its own image's mask. The result
    is the midpoint of F and the inverse of B, and the gap between them the uncertainty in mm (see `CycleTransform`).

    The published profile is experiments/ccidir_dirlab.yaml. The authors' code means its cycle term in mm but never
    passes the size of the voxels: it is in voxels there (``unit: voxel``).

    Args:
        method: the forward method.
        weight: of the cycle term, for gaps in ``unit``.
        unit: ``mm`` or ``voxel`` (geometric mean of the fixed image's voxel sides).
        fraction: share of the points that the cycle term looks at, (0, 1].
        inference: how the backward map is inverted.
        trust: a result whose uncertainty (95th percentile over the mask) is larger is not to be trusted; in voxels (the
            geometric mean of the fixed image's sides), so that it means the same for a mouse.
    """

    def __init__(
        self,
        method: RegistrationMethod,
        weight: float = 1e-3,
        unit: Literal["mm", "voxel"] = "mm",
        fraction: float = 1.0,
        inference: Inference = "newton",
        trust: float = 1.5,
    ) -> None:
        super().__init__()
        if weight < 0 or not 0 < fraction <= 1:
            raise UserError(f"cycle: expected weight >= 0 and fraction in (0, 1], got {weight} and {fraction}")
        if trust <= 0:
            raise UserError(f"trust: expected a length above 0, got {trust}")
        backward = build(spec(method))
        assert isinstance(backward, RegistrationMethod)
        self.ahead, self.back = method, backward
        self.weight, self.unit, self.fraction = weight, unit, fraction
        self.inference, self.trust = inference, trust
        self.lr = method.lr
        for name, part in (("forward", self.ahead), ("backward", self.back)):
            part.journal = self._reporter(name)

    def _reporter(self, name: str) -> Any:
        return lambda values: self._log({f"{name}/{k}": v for k, v in values.items()})

    # -- the pair ------------------------------------------------------------------------------------------------

    def attach(self, pair: Pair) -> None:
        self.ahead.attach(pair)
        self.back.attach(pair.swapped())
        self.domain = self.ahead.domain
        told = self.ahead.state
        self.state |= {"domain": told["domain"], "start": told["start"], "forward": told, "backward": self.back.state}
        self.pair = pair

    @property
    def attached(self) -> bool:
        return self.ahead.attached and self.back.attached

    def size(self, pair: Pair) -> None:
        self.ahead.size(pair)
        self.back.size(pair.swapped())

    def restore(self, kept: Mapping[str, Any]) -> None:
        self.ahead.restore(kept["forward"])
        self.back.restore(kept["backward"])
        self.domain = self.ahead.domain

    # -- the loss ------------------------------------------------------------------------------------------------

    def draw(self) -> Batch:
        return self.ahead.draw(), self.back.draw()

    def objective(self, batch: Batch) -> dict[str, Scalar]:
        x, y = batch
        conditions = self.ahead.conditions()
        terms = {f"forward/{k}": v for k, v in self.ahead.loss_at(x, conditions).items()}
        terms |= {f"backward/{k}": v for k, v in self.back.loss_at(y, conditions).items()}
        if self.weight:
            gap = self.gap(self.ahead, self.back, x, conditions) + self.gap(self.back, self.ahead, y, conditions)
            self._log({"raw/cycle_mm": (gap.detach() / 2).sqrt()})
            unit = voxel_mm(self.ahead.domain) if self.unit == "voxel" else 1.0
            terms["cycle"] = self.weight * gap / unit**2
        return terms

    def gap(
        self, first: RegistrationMethod, second: RegistrationMethod, x: Points, conditions: list[Tensor | None]
    ) -> Scalar:
        """mean |second(first(p)) - p|^2 in mm^2 over the first points of x (normalised coordinates of ``first``).

        The starts of the two directions are each other's inverse, so that only the maps of normalised space remain.
        """
        x = x[: max(len(conditions), round(self.fraction * len(x)))]
        into = second.domain.world_to_normalised @ first.start @ first.domain.normalised_to_world
        out, into = torch.linalg.inv(into).to(x), into.to(x)
        mm = first.domain.normalised_to_world[:3, :3].to(x)
        squares = []
        for some, condition in zip(x.tensor_split(len(conditions)), conditions, strict=True):
            y = transform_points(into, some + first.motion.displacement(some, condition))
            back = transform_points(out, y + second.motion.displacement(y, condition))
            squares.append(((back - some) @ mm.T).square().sum(-1))
        return torch.cat(squares).mean()

    # -- optimization --------------------------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        return self.ahead.groups() + self.back.groups()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for part in (self.ahead, self.back):
            part.on_before_optimizer_step(optimizer)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        self.ahead.settle()

    def transform(self) -> CycleTransform:
        """The midpoint of both directions, at the forward method's condition."""
        back = self.back.transform(self.ahead.context())
        return CycleTransform(self.ahead.transform(), back, self.inference, self.trust * voxel_mm(self.domain))

    def report(self, out: Path) -> list[Path]:
        return self.ahead.report(out)
