"""How closely numbers must agree: one table for all tests, by type."""

from typing import Any

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-10,  # two exact ways to one number: only rounding is allowed to differ
    torch.float32: 2e-5,  # the same in single precision, through a few layers of a network
}
"""Largest difference |a - b| <= tolerance (1 + max |b|)."""


def assert_close(actual: Any, expected: Any, tolerance: float | None = None) -> None:
    """Two tensors (or numbers) agree within the table's tolerance for the coarser of their types."""
    a, b = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    if tolerance is None:
        tolerance = max(TOLERANCES[t.dtype] for t in (a, b))
    gap = _largest(a.double() - b.double())
    bound = tolerance * (1 + _largest(b.double()))
    assert gap <= bound, f"largest difference {gap:.3g}, allowed {bound:.3g}"


def _largest(values: Tensor) -> float:
    assert torch.isfinite(values).all(), "not finite"
    return float(values.abs().max()) if values.numel() else 0.0
