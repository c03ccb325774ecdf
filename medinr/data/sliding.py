"""Which parts of the body slide along each other: the lungs of a chest CT along its wall."""

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from medinr.data.lungs import lung_mask
from medinr.data.pair import Pair
from medinr.data.report import litres
from medinr.errors import RegistrationWarning, UserError
from medinr.sampling import nearest
from medinr.space import Domain, Image, transform_points
from medinr.types import Mask

OFFSETS = (0.0, 1024.0)
"""Stored values less Hounsfield units: CT as it should be, and as DIR-LAB and old exports have it."""
AIR_HU, SOFT_HU = -500.0, 200.0
LUNG_LITRES = (0.8, 14.0)
LEAST_DICE = 0.5
"""Of both lungs after the start; far below what any breathing leaves."""
FINE_VOXELS, FINE_MM = 4_000_000, 2.0
"""Larger images are looked at in steps of about this length: the morphology of the mask takes its time."""


def lung_regions(image: Image) -> Tensor:
    """1 in the lungs of a CT, 0 elsewhere, [X, Y, Z] uint8.

    Raises:
        UserError: no lungs in the image.
    """
    domain = image.domain
    if domain.n_voxels <= FINE_VOXELS:
        return lung_mask(image).to(torch.uint8)
    steps = [max(1, round(FINE_MM / s)) for s in domain.spacing]
    x, y, z = steps
    coarse = Domain.of(
        [-(-n // s) for n, s in zip(domain.shape, steps, strict=True)],
        domain.voxel_to_world @ torch.diag(torch.tensor([*steps, 1], dtype=torch.float64)),
    )
    found = lung_mask(replace(image, data=image.data[:, ::x, ::y, ::z], domain=coarse)).to(torch.uint8)
    for axis, (n, step) in enumerate(zip(domain.shape, steps, strict=True)):
        near = (torch.arange(n) / step).round().long().clamp(max=found.shape[axis] - 1)
        found = found.index_select(axis, near)
    return found


def breathing_regions(pair: Pair) -> Tensor | None:
    """`lung_regions` of the fixed image where both images surely are chest CT, else None.

    Sure: one channel in Hounsfield units (or 1024 above), lungs of a possible volume in both, which overlap after the
    pair's start.
    """
    fixed, moving = (_lungs(image) for image in (pair.fixed, pair.moving))
    if fixed is None or moving is None:
        return None
    voxels = fixed.nonzero().double()
    voxels = voxels[:: max(1, len(voxels) // 100_000)]
    to_moving = pair.moving.domain.world_to_voxel @ pair.start @ pair.domain.voxel_to_world
    share = nearest(moving, transform_points(to_moving, voxels)).double().mean().item()
    first, second = litres(fixed, pair.domain), litres(moving, pair.moving.domain)
    return fixed.to(torch.uint8) if 2 * share * first / (first + second) > LEAST_DICE else None


def _lungs(image: Image) -> Mask | None:
    if len(image.data) > 1 or min(image.domain.shape) < 8:
        return None
    hounsfield = _in_hounsfield(image.data)
    if hounsfield is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RegistrationWarning)
            mask = lung_regions(replace(image, data=hounsfield)) > 0
    except UserError:
        return None
    return mask if LUNG_LITRES[0] <= litres(mask, image.domain) <= LUNG_LITRES[1] else None


def _in_hounsfield(data: Tensor) -> Tensor | None:
    """Values in HU, if air and soft tissue are where CT has them."""
    some = data.flatten()[:: max(1, data.numel() // 200_000)]
    for offset in OFFSETS:
        low = torch.quantile(some - offset, 0.005).item()
        soft = ((some - offset).abs() < SOFT_HU).float().mean().item()
        if -1500 < low < AIR_HU and soft > 0.05:
            return data - offset
    return None
