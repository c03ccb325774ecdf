"""A transform made of two that were fitted against each other, forward and backward, and what they disagree about."""

from typing import Literal

import torch
from torch import Tensor

from medinr import jets
from medinr.fields.transform import Transform
from medinr.jets import BASIS_PAIRS
from medinr.space import transform_points
from medinr.types import Points

Inference = Literal["newton", "first-order", "second-order"]
TOLERANCE_MM = 1e-2
"""Newton's iterations end below this residual, or a tenth of a voxel: far below what the uncertainty resolves."""


class CycleTransform(Transform):
    """phi(p) = (F(p) + B^-1(p)) / 2: the midpoint between the forward transform and the inverse of the backward one.

    Van Harten, Stoker and Išgum, Robust deformable image registration using cycle-consistent implicit representations,
    IEEE TMI 43(2), 2024. With y = F(p) and d = p - B(y), the inverse of B near y is expanded in a Taylor series:

    - ``first-order``: B^-1(p) = y + v, v = J_B(y)^-1 d;
    - ``second-order``: y + v - J_B^-1 H_B[v, v] / 2. The authors' code contracts one slot of H with d in place of v,
      which is the same for J_B = I alone;
    - ``newton``: damped Newton iterations from y, to 0.01 mm.

    Where B takes what was found no nearer to p than y (it folds, its Jacobian is singular), v is the gap d itself: an
    expansion there is as long as the Jacobian is near to singular, which says nothing of the images.

    The vector B^-1(p) - F(p) is the uncertainty; its length in mm is small where both fits found the same.

    Args:
        ahead: F, fixed world to moving world.
        back: B, moving world to fixed world.
        inference: how B is inverted.
        trust_mm: a result with a larger uncertainty (95th percentile over the mask) is not to be trusted.
    """

    def __init__(
        self, ahead: Transform, back: Transform, inference: Inference = "newton", trust_mm: float = 3.0
    ) -> None:
        super().__init__(ahead.map, ahead.domain, ahead.start, ahead.context)
        self.ahead, self.back, self.inference, self.trust_mm = ahead, back, inference, trust_mm
        self.tolerance_mm = min(TOLERANCE_MM, 0.1 * min(self.domain.spacing))

    def tabulated(self, level: int) -> Transform | None:
        ahead, back = self.ahead.tabulated(level), self.back.tabulated(level)
        return None if ahead is None or back is None else TabulatedCycle(self, ahead, back)

    def judged(self, world: Points) -> Tensor:
        """Where F stays on the moving grid: beyond it B is constant across the border, and has many inverses."""
        voxels = transform_points(self.back.domain.world_to_voxel, self.ahead(world))
        return ((voxels >= 0) & (voxels <= torch.tensor(self.back.domain.shape) - 1)).all(-1)

    @torch.no_grad()
    def __call__(self, world: Points) -> Points:
        y, inverse, _ = self._both(world)
        return (y + inverse) / 2

    @torch.no_grad()
    def offset(self, world: Points) -> Points:
        """The uncertainty's vector B^-1(p) - F(p) at points [n, 3], mm."""
        y, inverse, _ = self._both(world)
        return inverse - y

    @torch.no_grad()
    def jacobian(self, world: Points) -> Tensor:
        """D phi [n, 3, 3] = (DF(p) + [DB(q)]^-1) / 2 with q = B^-1(p): exact for Newton's inverse.

        For the expansions q is their value, so that the figure differs from their derivative by a higher order of d.
        Where B could not be inverted, it is DF alone.
        """
        return self.expand(world)[1]

    @torch.no_grad()
    def expand(self, world: Points) -> tuple[Points, Tensor, Tensor | None]:
        y, inverse, lost = self._both(world)
        ahead = self.ahead.jacobian(world)
        derivative, info = torch.linalg.inv_ex(self.back.jacobian(inverse))
        lost |= info > 0  # singular
        derivative[lost] = ahead[lost]
        return (y + inverse) / 2, (ahead + derivative) / 2, inverse - y

    def _both(self, world: Points) -> tuple[Points, Points, Tensor]:
        """F(p) and B^-1(p), and where the latter could not be found."""
        p = world.double().cpu()
        y = self.ahead(p)
        d = p - self.back(y)
        if self.inference == "newton":
            inverse, residual = self._inverted(p, y)
        else:
            inverse = self._expanded(y, d, second=self.inference == "second-order")
            residual = (self.back(inverse) - p).norm(dim=1)
        lost = ~(residual <= d.norm(dim=1))
        inverse[lost] = y[lost] + d[lost] @ torch.linalg.inv(self.back.start[:3, :3]).T
        return y, inverse, lost

    def _inverted(self, p: Points, guess: Points) -> tuple[Points, Tensor]:
        """B^-1(p) by Newton iterations, and its residual in mm."""
        return self.back.inverse(p, tolerance_mm=self.tolerance_mm, guess=guess)

    def _expanded(self, y: Points, gap: Points, second: bool) -> Points:
        d = gap[..., None]
        j = self.back.jacobian(y)
        v = torch.linalg.solve_ex(j, d).result.nan_to_num(0, 0, 0)
        if not second:
            first: Points = y + v[..., 0]
            return first
        h = self._hessian(y)
        bend = torch.einsum("ncij,ni,nj->nc", h, v[..., 0], v[..., 0])[..., None]
        both: Points = y + (v - 0.5 * torch.linalg.solve_ex(j, bend).result.nan_to_num(0, 0, 0))[..., 0]
        return both

    def _hessian(self, world: Points) -> Tensor:
        """D^2 B [n, 3, 3, 3] at points, in world axes and mm."""
        back, found = self.back, []
        m = back.domain.world_to_normalised
        for q in back._pieces(world):
            x = transform_points(m, q).float().to(back.device)
            second = jets.materialise(back.map.displacement_jet(jets.seed(x, 2), back.context)).second
            assert second is not None
            h = torch.zeros(len(q), 3, 3, 3, dtype=torch.float64)
            for (a, b), row in zip(BASIS_PAIRS, second.double().cpu(), strict=True):
                h[:, :, a, b] = h[:, :, b, a] = row
            found.append(h)
        outer = back.start[:3, :3] @ back.domain.normalised_to_world[:3, :3]
        return torch.einsum("dc,ncij,ik,jl->ndkl", outer, torch.cat(found), m[:3, :3], m[:3, :3])


class TabulatedCycle(CycleTransform):
    """The midpoint of tables; B^-1 is found by B's table, and then by B itself where the table was not exact enough.

    Args:
        exact: what it stands for.
        ahead, back: tables of its F and B.
    """

    def __init__(self, exact: CycleTransform, ahead: Transform, back: Transform) -> None:
        super().__init__(ahead, back, exact.inference, exact.trust_mm or 0.0)
        self.exact = exact

    def _inverted(self, p: Points, guess: Points) -> tuple[Points, Tensor]:
        near, _ = self.back.inverse(p, tolerance_mm=self.tolerance_mm, guess=guess)
        return self.exact.back.inverse(p, tolerance_mm=self.tolerance_mm, guess=near)
