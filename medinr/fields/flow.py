"""Diffeomorphisms as flows of velocity fields, integrated on points; derivatives by composition of jets."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from medinr import jets
from medinr.errors import RegistrationWarning, UserError
from medinr.fields.base import Field, computed_once, in_chunks
from medinr.fields.lattice import SplineField
from medinr.fields.maps import Composition, Map, check_displacement
from medinr.fields.table import MOST_NODES, Table, even_lines
from medinr.fields.transform import Transform
from medinr.jets import Jet
from medinr.space import Domain, transform_points
from medinr.types import Matrix, Points, Scalar

Scheme = Literal["euler", "midpoint", "rk4"]


class Tableau(NamedTuple):
    """An explicit Runge-Kutta scheme whose stages each use the one before: where they are, and their weights."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


SCHEMES: dict[str, Tableau] = {
    "euler": Tableau((), (1.0,)),
    "midpoint": Tableau((0.5,), (0.0, 1.0)),
    "rk4": Tableau((0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
SAFE = 0.5
"""h Lip(v) that ``steps="auto"`` aims at: one step of each scheme is id + w with Lip(w) <= exp(h Lip(v)) - 1, so that
below ln 2 it is invertible, and the Lipschitz constant is known from a sample of points only."""
MOST_STEPS = 64
PROBES = 512
"""Points at which the Lipschitz constant is estimated."""

Velocity = Callable[[Jet, float], Jet]
"""(jet of a point, s) -> jet of the velocity there at s."""


def moved(y: Jet, factor: float, slope: Jet) -> Jet:
    """y + factor * slope."""
    return jets.add(y, replace(slope, channels=factor * slope.channels))


def integrate(velocity: Velocity, y: Jet, steps: int, scheme: Scheme = "rk4", duration: float = 1.0) -> Jet:
    """The solution at ``duration`` of dy/ds = v(y, s), y(0) = y, in equal steps of an explicit Runge-Kutta scheme.

    With y a jet the derivatives go through every stage: they are those of the discrete solution, exactly. Its error is
    of order 1 (Euler), 2 (midpoint) or 4 (RK4) in the step (Hairer, Norsett and Wanner, Solving ODEs I, 1993, II.1).

    Args:
        velocity: v, from the jet of a point and s to that of the velocity there.
        y: where the flow begins.
        steps: how many.
        scheme: ``euler``, ``midpoint`` or ``rk4``: 1, 2 or 4 evaluations of v a step.
        duration: negative for the flow backwards.
    """
    h = duration / steps
    tableau = SCHEMES[scheme]
    for i in range(steps):
        slope = velocity(y, i * h)
        after = moved(y, h * tableau.weights[0], slope) if tableau.weights[0] else y
        for node, weight in zip(tableau.nodes, tableau.weights[1:], strict=True):
            slope = velocity(moved(y, h * node, slope), (i + node) * h)
            after = moved(after, h * weight, slope)
        y = after
    return y


class Flow(Map):
    """phi = exp(v), the flow at time 1 of a stationary velocity field, phi^-1 = exp(-v).

    Arsigny et al., A Log-Euclidean Framework for Statistics on Diffeomorphisms, MICCAI 2006; ST-NeRP (Qiu et al., arXiv
    2410.19283) integrates the velocity of a coordinate network so. Scaling and squaring needs a lattice, or 2^k
    evaluations at every point; here each point goes its way by a Runge-Kutta scheme, and jets go with it. On a lattice:
    `medinr.fields.squaring.scaling_and_squaring`.

    The flow is a diffeomorphism; its discrete form is one for small enough steps h (see `SAFE`). ``auto`` chooses them
    anew at each evaluation, from the largest |Dv|_2 at 512 points that fill the box of the image, up to 64. `check`
    warns where h Lip(v) >= 1.

    Args:
        velocity: v, from 3 to 3, in normalised units; it may depend on a context.
        steps: how many, or ``auto``.
        scheme: ``rk4``, ``midpoint`` or ``euler``.
    """

    probes: Tensor

    def __init__(self, velocity: Field, steps: int | Literal["auto"] = "auto", scheme: Scheme = "rk4") -> None:
        super().__init__()
        check_displacement("velocity", velocity)
        if velocity.in_features != 3 or velocity.out_features != 3:
            raise UserError(
                f"velocity: expected a field from 3 to 3, found {velocity.in_features} to {velocity.out_features}"
            )
        if steps != "auto" and steps < 1:
            raise UserError(f"steps: expected auto or a number of 1 or more, found {steps}")
        if scheme not in SCHEMES:
            raise UserError(f"scheme: expected one of {', '.join(SCHEMES)}, found {scheme}")
        self.velocity, self.scheme = velocity, scheme
        self.steps: int | Literal["auto"] = steps
        self.conditions = velocity.conditions
        self.duration = 1.0
        self.plane: Matrix | None = None
        unit = torch.quasirandom.SobolEngine(3).draw(PROBES + 1)[1:]  # the first is a corner
        self.register_buffer("probes", 2 * unit - 1, persistent=False)
        self._told = False

    def cover(self, domain: Domain) -> None:
        """Fill the box of the image with the points of the estimate; on a single slice the flow stays in its plane."""
        super().cover(domain)
        unit = torch.quasirandom.SobolEngine(3).draw(PROBES + 1)[1:]
        voxels = unit * torch.tensor(domain.shape) - 0.5
        if domain.flat_axis is not None:
            voxels[:, domain.flat_axis] = 0
        self.probes = transform_points(domain.voxel_to_normalised, voxels).to(self.probes)
        self.plane = domain.in_plane

    # -- the velocity --------------------------------------------------------------------------------------------

    def slope(self, y: Jet, context: Tensor | None = None) -> Jet:
        """The jet of v at the jet of a point."""
        v = self.velocity.jet(y, context) if y.k else Jet(self.velocity(y.value, context)[None], 0)
        return v if self.plane is None else replace(v, channels=v.channels @ self.plane.to(v.channels))

    def slope_at(self, y: Jet, s: float, context: Tensor | None) -> Jet:
        """The right-hand side at s, from 0 to `duration`: v, which does not depend on s."""
        return self.slope(y, context)

    @torch.no_grad()
    def lipschitz(self, context: Tensor | None = None) -> Scalar:
        """Estimate of Lip(v): the largest |Dv|_2 at the probes; a bound from below, without unit."""

        def largest() -> Tensor:
            at = self.probes.to(next(iter(self.parameters()), self.probes))
            j = in_chunks(lambda piece: self.slope(piece, context), jets.seed(at, 1)).jacobian
            norms: Tensor = torch.linalg.matrix_norm(j, 2)
            return norms.max()

        return self.once(largest, context)

    def stepping(self, context: Tensor | None = None) -> float:
        """h Lip(v) at a context, to be below 1."""
        return float(self.lipschitz(context)) / self.count(context)

    def count(self, context: Tensor | None = None) -> int:
        """The number of steps at a context."""
        if self.steps != "auto":
            return int(self.steps)
        found = float(self.lipschitz(context))
        wanted = max(1, math.ceil(found / SAFE)) if math.isfinite(found) else 1
        return min(wanted, MOST_STEPS)

    def check(self, context: Tensor | None = None) -> float:
        """`stepping`, with a warning, once, where it is not below 1."""
        found = self.stepping(context)
        if found >= 1 and not self._told:
            self._told = True
            at = "" if context is None else f" at {', '.join(f'{c:g}' for c in context.tolist())}"
            warnings.warn(
                f"flow: expected h Lip(v) < 1, found {found:.2g}{at} with {self.count(context)} steps: phi may fold; "
                "give more steps, or a larger weight to the penalties of the velocity",
                RegistrationWarning,
                stacklevel=2,
            )
        return found

    # -- the map -------------------------------------------------------------------------------------------------

    def forward(self, x: Points, context: Tensor | None = None) -> Points:
        return self.jet(Jet(x[None], 0), context).value

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        with computed_once(self):
            steps = self.count(context)

            def flow(piece: Jet) -> Jet:
                return integrate(lambda y, s: self.slope_at(y, s, context), piece, steps, self.scheme, self.duration)

            return in_chunks(flow, jet, None if self.velocity.in_pieces else jet.channels.shape[1])

    def backward(self) -> "Flow":
        """phi^-1 = exp(-v), with the same velocity field (it shares the parameters)."""
        other = type(self)(self.velocity, self.steps, self.scheme)
        other.duration, other.plane, other.probes = -self.duration, self.plane, self.probes
        return other


class At(Map):
    """A map at a fixed context.

    Args:
        map: that takes a context.
        context: the one it gets, whatever it is asked with.
    """

    def __init__(self, map: Map, context: Tensor | None) -> None:
        super().__init__()
        self.map, self.context = map, context

    def forward(self, x: Points, context: Tensor | None = None) -> Points:
        return self.map(x, self.context)  # type: ignore[no-any-return]

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        return self.map.jet(jet, self.context)


def between(flow: Flow, source: Tensor, target: Tensor) -> Map:
    """phi_t o phi_s^-1, from time s (context ``source``) to time t (context ``target``)."""
    return Composition(At(flow.backward(), source), At(flow, target))


class FlowTransform(Transform):
    """phi = exp(v) in the world; its inverse is the flow backwards, polished by Newton iterations.

    Args:
        flow: in the normalised coordinates of ``domain``.
        domain: the grid that these are of.
        context: the time or condition that the flow is read at.
    """

    def __init__(self, flow: Flow, domain: Domain, context: Tensor | None = None) -> None:
        start = torch.eye(4, dtype=torch.float64)
        super().__init__(flow, domain, start, context)
        self.back = Transform(flow.backward(), domain, start, context)

    def tabulated(self, level: int) -> "Transform | None":
        """The flow of a spline's table, whose nodes are 5 or 8 times closer than its finest control points."""
        flow = self.map
        if level > 1 or not isinstance(flow, Flow) or not isinstance(flow.velocity, SplineField):
            return None
        step = float(flow.velocity.spacing.min()) / (5.0, 8.0)[level]
        table = Table(flow.velocity, even_lines(flow.velocity, step), self.context)
        if table.nodes > MOST_NODES:
            return None
        quick = Flow(table, flow.count(self.context), flow.scheme)
        quick.duration, quick.plane, quick.probes = flow.duration, flow.plane, flow.probes
        return TabulatedFlow(quick, self.domain, self.context)

    @torch.no_grad()
    def expand(self, world: Points) -> tuple[Points, Tensor, Tensor | None]:
        """As `Transform.expand`, integrated once for both."""
        into, out = self.domain.world_to_normalised, self.domain.normalised_to_world
        places, slopes = [], []
        with computed_once(self.map):
            for p in self._pieces(world.double().cpu()):
                x = transform_points(into, p)
                u = self.map.displacement_jet(jets.seed(x.float().to(self.device), 1), self.context)
                places.append(transform_points(out, x + u.value.double().cpu()))
                slopes.append(u.jacobian.double().cpu())
        own = torch.cat(slopes) + torch.eye(3, dtype=torch.float64)
        return torch.cat(places), out[:3, :3] @ own @ into[:3, :3], None

    @torch.no_grad()
    def inverse(
        self, world: Points, iterations: int = 30, tolerance_mm: float | None = None, guess: Points | None = None
    ) -> tuple[Points, Tensor]:
        return super().inverse(world, iterations, tolerance_mm, self.back(world) if guess is None else guess)


class TabulatedFlow(FlowTransform):
    """The flow of a table; its inverse is the flow backwards as it is: the table is no more exact than that."""

    @torch.no_grad()
    def inverse(
        self, world: Points, iterations: int = 30, tolerance_mm: float | None = None, guess: Points | None = None
    ) -> tuple[Points, Tensor]:
        p = self.back(world)
        return p, torch.full((len(world),), math.nan, dtype=torch.float64)
