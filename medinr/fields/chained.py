"""Transforms made of others: the inverse as a transform, and one after the other, with exact derivatives."""

import torch
from torch import Tensor

from medinr.fields.transform import Transform
from medinr.space import Domain
from medinr.types import Points


class Inverted(Transform):
    """phi^-1 as a transform; D phi^-1(q) = (D phi(phi^-1(q)))^-1.

    Args:
        transform: phi; its `inverse` finds the points.
    """

    def __init__(self, transform: Transform) -> None:
        self.transform, self.domain, self.start = transform, transform.domain, torch.linalg.inv(transform.start)

    def tabulated(self, level: int) -> "Transform | None":
        quick = self.transform.tabulated(level)
        return None if quick is None else Inverted(quick)

    def __call__(self, world: Points) -> Points:
        return self.transform.inverse(world)[0]

    def jacobian(self, world: Points) -> Tensor:
        return self.expand(world)[1]

    def expand(self, world: Points) -> tuple[Points, Tensor, Tensor | None]:
        p = self(world)
        jacobian: Tensor = torch.linalg.inv(self.transform.jacobian(p))
        return p, jacobian, None

    def inverse(
        self, world: Points, iterations: int = 30, tolerance_mm: float | None = None, guess: Points | None = None
    ) -> tuple[Points, Tensor]:
        """phi itself; there is no residual."""
        return self.transform(world), torch.zeros(len(world), dtype=torch.float64)


class PointsOnly(Transform):
    """A transform of whose derivatives nothing is asked: `evaluate_dense` costs the points alone, its det J is 1.

    Args:
        transform: phi.
    """

    def __init__(self, transform: Transform) -> None:
        self.transform, self.domain, self.start = transform, transform.domain, transform.start

    def tabulated(self, level: int) -> "Transform | None":
        quick = self.transform.tabulated(level)
        return None if quick is None else PointsOnly(quick)

    def __call__(self, world: Points) -> Points:
        return self.transform(world)

    def expand(self, world: Points) -> tuple[Points, Tensor, Tensor | None]:
        return self(world), torch.eye(3, dtype=torch.float64).expand(len(world), 3, 3), None


class Chained(Transform):
    """second o first.

    Args:
        first, second: in the order in which they act.
    """

    def __init__(self, first: Transform, second: Transform) -> None:
        self.first, self.second = first, second
        self.domain: Domain = first.domain
        self.start = second.start @ first.start

    def tabulated(self, level: int) -> "Transform | None":
        parts = [part.tabulated(level) or part for part in (self.first, self.second)]
        return None if parts == [self.first, self.second] else Chained(parts[0], parts[1])

    def __call__(self, world: Points) -> Points:
        return self.second(self.first(world))

    def jacobian(self, world: Points) -> Tensor:
        return self.expand(world)[1]

    def expand(self, world: Points) -> tuple[Points, Tensor, Tensor | None]:
        middle, inner, _ = self.first.expand(world)
        end, outer, _ = self.second.expand(middle)
        return end, outer @ inner, None

    def inverse(
        self, world: Points, iterations: int = 30, tolerance_mm: float | None = None, guess: Points | None = None
    ) -> tuple[Points, Tensor]:
        """The two inverses; the residual is the sum of theirs."""
        middle, outer = self.second.inverse(world, iterations, tolerance_mm)
        start, inner = self.first.inverse(middle, iterations, tolerance_mm, guess)
        return start, outer + inner
