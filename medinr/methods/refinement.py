"""The settings of a control lattice that is refined on whole grids."""

from collections.abc import Sequence
from typing import Any

from medinr.configured import Configured
from medinr.errors import UserError


class Refinement(Configured):
    """How the lattice is refined: stages from coarse to fine, all lengths in voxels (geometric mean of the sides).

    A stage compares both images on a regular grid of ``shrink`` voxels, with the local NCC of windows of
    (2 radius + 1)^3 of its points, and moves the control lattices of ``spacings`` * shrink voxels; the others stay.

    Two images of one body agree in every detail, and small windows find it. Of two bodies, or with much noise, the
    details do not correspond: windows have to be larger and the deformation stiffer. The first stage tells which: where
    the mean local NCC that it ends with, on the grid of the next and of windows with contrast, is below ``agreement``
    (measured: 0.96 to 0.99 of one chest in two phases, 0.96 of two human brains, 0.91 to 0.93 of two mouse brains with
    their noise), the later stages take ``unlike_radius`` and ``unlike_bending``; of each sliding region by itself.

    With ``composed`` the last stage moves a lattice of its own, applied before the map of all others, instead of adding
    to it: its bending energy and barrier are those of what it adds, so that detail is as free where the images had to
    be bent far as where they had not, and det J of the whole is the product of two that are kept above zero.

    Args:
        shrinks: distance of the grid's points, one for each stage.
        steps: optimizer steps of each stage.
        spacings: of the control points that a stage moves, in units of its shrink.
        radius: half side of the windows in points of the grid.
        floor: added to both variances of the local NCC.
        signed: False takes the square of the NCC, for images of inverted contrast.
        bending: weight of the bending energy with the voxel as the unit of length, of all stages.
        barrier: weight of mean relu(0.1 - det J).
        lr: learning rate of Adam in voxels of the stage's grid.
        most: a stage's grid has at most this many points; larger images get a larger distance.
        agreement: mean local NCC after the first stage below which the images count as unlike (0: never).
        unlike_radius, unlike_bending: of the later stages, for such images.
        unlike_last: the bending weight of the last stage, for such images, where it is composed.
        composed: whether the last of several stages is applied before the others, or added to them.
    """

    def __init__(
        self,
        shrinks: Sequence[float] = (4.0, 2.0, 1.0),
        steps: Sequence[int] = (40, 40, 60),
        spacings: Sequence[float] = (4.0, 2.0),
        radius: int = 2,
        floor: float = 1e-5,
        signed: bool = True,
        bending: float = 1.0,
        barrier: float = 10.0,
        lr: float = 0.3,
        most: int = 4_000_000,
        agreement: float = 0.94,
        unlike_radius: int = 4,
        unlike_bending: float = 5.0,
        unlike_last: float = 3.0,
        composed: bool = True,
    ) -> None:
        if len(shrinks) != len(steps) or not shrinks or min(shrinks) <= 0 or min(steps) < 1:
            raise UserError(f"refinement: expected one number of steps for each shrink, got {steps} for {shrinks}")
        if not 0 <= agreement <= 1 or unlike_radius < 1 or min(unlike_bending, unlike_last) < 0:
            raise UserError(
                "refinement: expected agreement in [0, 1], unlike_radius >= 1, unlike_bending and unlike_last >= 0, "
                f"got {agreement}, {unlike_radius}, {unlike_bending} and {unlike_last}"
            )
        if radius < 1 or min(spacings, default=0) <= 0:
            raise UserError(f"refinement: expected spacings and a radius above 0, got {spacings} and {radius}")
        if floor <= 0 or most < 1000:  # constant windows divide by the floor; an axis keeps some points
            raise UserError(f"refinement: expected a floor above 0 and most >= 1000, got {floor} and {most}")
        self.shrinks, self.steps, self.spacings = tuple(shrinks), tuple(steps), tuple(spacings)
        self.radius, self.floor, self.signed = radius, floor, signed
        self.bending, self.barrier, self.lr, self.most = bending, barrier, lr, most
        self.agreement, self.unlike_radius, self.unlike_bending = agreement, unlike_radius, unlike_bending
        self.unlike_last, self.composed = unlike_last, composed

    def changed(self, **changes: Any) -> "Refinement":
        """The same with other values of some arguments."""
        arguments = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return Refinement(**{**arguments, **changes})

    @property
    def composes(self) -> bool:
        """Whether the last stage has a lattice of its own."""
        return self.composed and len(self.shrinks) > 1

    def own(self, stage: int) -> bool:
        """Whether a stage moves the lattice of the last one."""
        return self.composes and stage == len(self.shrinks) - 1

    def lattice(self, last: bool = False) -> list[float]:
        """Spacings of control points in voxels, coarse to fine: of all stages together, or of the last one's own."""
        stages = [shrink for i, shrink in enumerate(self.shrinks) if self.own(i) == last]
        return sorted({s * shrink for s in self.spacings for shrink in stages}, reverse=True)

    def levels(self, stage: int, shrink: float) -> list[int]:
        """Indices into `lattice` that a stage moves; where the grid had to be coarser, not those below 2 points."""
        own, all_ = [s * self.shrinks[stage] for s in self.spacings], self.lattice(self.own(stage))
        return [all_.index(s) for s in own if s >= 2 * shrink] or [all_.index(max(own))]

    def stiffness(self, stage: int, unlike: bool) -> float:
        """Weight of the bending energy of a stage."""
        if not stage or not unlike:
            return self.bending
        return self.unlike_last if self.own(stage) else self.unlike_bending
