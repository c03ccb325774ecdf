"""Smoothness in time of a velocity field."""

from torch import Tensor, nn

from medinr.configured import Configured
from medinr.types import Scalar


def temporal_roughness(before: Tensor, now: Tensor, after: Tensor, step: float, order: int = 2) -> Scalar:
    """mean |d^order v / dt^order|^2 over points, by central differences of velocities [N, 3] at t - step, t, t + step.

    ``order`` 1 also shrinks a motion that is uniform in time; 2 lets it be.
    """
    difference = (after - before) / (2 * step) if order == 1 else (after - 2 * now + before) / step**2
    return difference.square().sum(-1).mean()


class TemporalSmoothness(Configured, nn.Module):
    """See `temporal_roughness`; velocities in 100 mm, time in units of the period, or of the sequence's span.

    A sine of amplitude A has A^2 / 2 times (2 pi)^2 for order 1, (2 pi)^4 for order 2.

    Args:
        weight: factor of the penalty in the loss.
        order: of the derivative, 1 or 2.
        step: of the difference, in the same unit of time.
        fraction: share of the batch's points that is looked at, (0, 1]; each at a random time.
    """

    def __init__(self, weight: float, order: int = 2, step: float = 0.05, fraction: float = 0.25) -> None:
        super().__init__()
        if order not in (1, 2) or not 0 < step < 0.5 or not 0 < fraction <= 1:
            raise ValueError(
                f"temporal: expected order 1 or 2, step in (0, 0.5), fraction in (0, 1], got {order}, {step} and "
                f"{fraction}"
            )
        self.weight, self.order, self.step, self.fraction = weight, order, step, fraction

    def forward(self, before: Tensor, now: Tensor, after: Tensor) -> Scalar:
        return temporal_roughness(before, now, after, self.step, self.order)
