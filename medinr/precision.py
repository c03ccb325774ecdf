"""Mixed precision: which products may be rounded, and which must not.

Autocast rounds every matrix product, and so the coordinates, the first sine layer (which multiplies them by a
frequency of 30), the sampling positions and the sums of a metric: a coordinate of 8 significant bits is a voxel wrong
in 256. Here it is the other way round: all is float32, and only the products *between hidden layers*, nearly all of
the work, are taken in the type that the precision setting asks for. Second derivatives are products of many such
factors; a jet that carries them is not rounded at all. Sines and their weights are within float16's range too; of its
gradients Lightning's scaler takes care.

Measured with the preset ``fast`` on one CPU core with bfloat16 instructions, float32 against bfloat16, one seed: a
known warp of a 4D-CT phase, TRE 0.922 and 0.936 mm; that CT's end-inhale and end-exhale phases, RMS difference in the
lungs 109.4 and 110.0 HU; 21 and 18 s of processor time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

THIN = 2
"""Voxels along an axis, see `convolutions`."""
_hidden: ContextVar[torch.dtype | None] = ContextVar("type of hidden products", default=None)


@contextmanager
def hidden_products(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, `product` with ``hidden`` rounds its factors to ``dtype`` (None: it does not)."""
    token = _hidden.set(dtype)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def mixed(device_type: str) -> Iterator[None]:
    """Autocast as a coordinate network needs it: off, except that hidden products take its type.

    Outside of autocast it changes nothing.

    Args:
        device_type: ``cpu``, ``cuda``, ...: the device whose autocast is meant.
    """
    dtype = torch.get_autocast_dtype(device_type) if _autocast(device_type) else None
    with torch.autocast(device_type, enabled=False), hidden_products(dtype):
        yield


@contextmanager
def full(device_type: str) -> Iterator[None]:
    """No autocast and no rounded products: for all that is evaluated, not trained."""
    with torch.autocast(device_type, enabled=False), hidden_products(None):
        yield


@contextmanager
def convolutions(device_type: str, coarsest: Sequence[int]) -> Iterator[None]:
    """Autocast as it is, but on a CPU none of it for a network whose coarsest level is thin.

    With torch 2.13 the gradient of a 3 x 3 x 3 convolution's weights in bfloat16 holds numbers that nobody wrote, NaN
    among them, where an axis has two voxels: in nearly all of 60 calls on 2 x 2 x 16 voxels, in none on 3 x 3 x 3.

    Args:
        coarsest: voxels of the level along each axis.
    """
    thin = device_type == "cpu" and min(coarsest) <= THIN
    with torch.autocast(device_type, enabled=_autocast(device_type) and not thin):
        yield


def product(x: Tensor, weight: Tensor, hidden: bool = False) -> Tensor:
    """x W^T in the type of x, whatever autocast says; ``hidden``: factors rounded inside `mixed`, the sum is not.

    Of B networks: x [B, N, in] and weight [B, out, in] in one batched product.

    Rounding factors to bfloat16 gives each product a relative error of up to 2^-8, at random signs: some 0.2 % of a
    hidden unit's value.
    """
    dtype = _hidden.get() if hidden else None
    if dtype is not None and dtype != x.dtype:
        return _times(x.to(dtype), weight.to(dtype)).to(x.dtype)
    if _autocast(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _times(x, weight)
    return _times(x, weight)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if weight.ndim == 2 else torch.bmm(x, weight.transpose(1, 2))


def _autocast(device_type: str) -> bool:
    return torch.is_autocast_enabled(device_type)
