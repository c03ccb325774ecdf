"""The whole transform phi = A o (id + u), from the fixed image's world to the moving image's, both RAS mm."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from medinr import jets
from medinr.fields.base import computed_once
from medinr.fields.maps import DisplacementMap, Map
from medinr.fields.planar import within
from medinr.fields.table import tabulated, voxel_lines
from medinr.space import Domain, transform_points
from medinr.types import Matrix, Points

LEVELS = 3
"""Of `Transform.tabulated`, each finer than the one before."""
CHUNK = 65_536
"""Points evaluated at once where no gradient is kept."""
PRECISION_MM = 1e-3


class Transform:
    """phi(p) = A(p + u(p)): fixed world to moving world.

    Args:
        map: x -> x + u(x) in the normalised coordinates of ``domain``.
        domain: the fixed image's grid; on a single slice the map is confined to its plane.
        start: A, the rigid or affine start [4, 4], fixed world to moving world.
        context: the condition that the map is evaluated at, if it takes one.
    """

    trust_mm: float | None = None
    """Uncertainty above which a result is not to be trusted; None: the transform knows of no uncertainty."""

    def __init__(self, map: Map, domain: Domain, start: Matrix, context: Tensor | None = None) -> None:
        self.map = within(map, domain)
        self.domain, self.start, self.context = domain, start.double().cpu(), context
        self.device = next(map.parameters()).device

    def tabulated(self, level: int) -> "Transform | None":
        """A form of itself that is faster at many points, finer at higher levels (`LEVELS`); None: there is none.

        Of splines, and of one after the other: a table of the voxels' centres, where it is exact. At level 1 what is
        applied second is read between nodes twice as close, at level 2 all is.
        """
        own = getattr(self, "map", None)  # a stored transform has no map
        field = own.field if isinstance(own, DisplacementMap) else None
        lines = voxel_lines(self.domain, halves=level > 1)
        if field is None or lines is None:
            return None
        lines = [line.to(self.device) for line in lines]
        quick = tabulated(field, lines, self.context, between=0.5 if level == 1 else 1.0)
        return None if quick is None else Transform(DisplacementMap(quick), self.domain, self.start, self.context)

    def judged(self, world: Points) -> Tensor:
        """Which points [n] an approximation of it is measured at: all, unless it is not determined there."""
        return torch.ones(len(world), dtype=torch.bool)

    def _pieces(self, points: Tensor) -> Iterator[Tensor]:
        yield from points.split(CHUNK)

    @torch.no_grad()
    def __call__(self, world: Points) -> Points:
        """Map points [n, 3]; computes in float64 but for the network, whose displacement is float32."""
        moved = []
        with computed_once(self.map):
            for p in self._pieces(world.double().cpu()):
                x = transform_points(self.domain.world_to_normalised, p)
                u = self.map.displacement(x.float().to(self.device), self.context).double().cpu()
                moved.append(transform_points(self.start @ self.domain.normalised_to_world, x + u))
        return torch.cat(moved) if moved else world

    @torch.no_grad()
    def jacobian(self, world: Points) -> Tensor:
        """D phi at points [n, 3] -> [n, 3, 3] (float64), in world axes: exact from the field."""
        a = self.start[:3, :3]
        n = self.domain.normalised_to_world[:3, :3]
        inverse = torch.linalg.inv(n)
        found = []
        with computed_once(self.map):
            for p in self._pieces(world.double().cpu()):
                x = transform_points(self.domain.world_to_normalised, p).float().to(self.device)
                found.append(self.map.displacement_jet(jets.seed(x, 1), self.context).jacobian.double().cpu())
        eye = torch.eye(3, dtype=torch.float64)
        jacobian: Tensor = a @ n @ (torch.cat(found) + eye) @ inverse
        return jacobian

    @torch.no_grad()
    def expand(self, world: Points) -> tuple[Points, Tensor, Tensor | None]:
        """phi(p), D phi(p), and the uncertainty's vector in mm [n, 3] where the transform knows one, of points."""
        return self(world), self.jacobian(world), None

    @torch.no_grad()
    def inverse(
        self, world: Points, iterations: int = 30, tolerance_mm: float | None = None, guess: Points | None = None
    ) -> tuple[Points, Tensor]:
        """Points of the fixed world that phi maps to moving points [n, 3], by damped Newton iterations.

        Args:
            world: moving points, RAS mm.
            iterations: at most.
            tolerance_mm: a point with a smaller residual is done (default: 0.001 mm or a hundredth of a voxel, the
                smaller one).
            guess: where to begin (default: the inverse of the start alone).

        Returns:
            the points, and the residual |phi(p) - world| in mm of each: large where no inverse exists.
        """
        # A stored transform has no map.
        with computed_once(self.map) if hasattr(self, "map") else nullcontext():
            return self._newton(world, iterations, self.precision_mm if tolerance_mm is None else tolerance_mm, guess)

    @property
    def precision_mm(self) -> float:
        """How closely `inverse` is found where nothing else is asked."""
        return min(PRECISION_MM, 0.01 * min(self.domain.spacing))

    def _newton(
        self, world: Points, iterations: int, tolerance_mm: float, guess: Points | None
    ) -> tuple[Points, Tensor]:
        target = world.double().cpu()
        p = transform_points(torch.linalg.inv(self.start), target) if guess is None else guess.double().cpu().clone()
        gap = target - self(p)
        residual = gap.norm(dim=1)
        for _ in range(iterations):
            todo = (residual > tolerance_mm).nonzero()[:, 0]
            if len(todo) == 0:
                break
            # A singular Jacobian gives no step; such a point keeps its residual, which tells.
            step = torch.linalg.solve_ex(self.jacobian(p[todo]), gap[todo, :, None]).result[..., 0].nan_to_num(0, 0, 0)
            for damping in (1.0, 0.5, 0.25):
                trial = p[todo] + damping * step
                trial_gap = target[todo] - self(trial)
                better = trial_gap.norm(dim=1) < residual[todo]
                rows = todo[better]
                p[rows], gap[rows], residual[rows] = trial[better], trial_gap[better], trial_gap[better].norm(dim=1)
                todo, step = todo[~better], step[~better]
                if len(todo) == 0:
                    break
        return p, residual
