"""Figures of the Learn2Reg challenge: its formulas written out, and its own engine's numbers."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from medinr.metrics import (
    HausdorffDistance95Learn2Reg,
    StdLogJacobianLearn2Reg,
    hd95,
    hd95_learn2reg,
    sdlogj,
    sdlogj_learn2reg,
)
from medinr.metrics.jacobian import finite_difference_jacobian
from medinr.space import Domain
from tests.medinr import grids


def smooth(domain: Domain, scale: float, seed: int = 0) -> Tensor:
    """A displacement in voxels [X, Y, Z, 3], of a standard deviation."""
    noise = np.random.default_rng(seed).standard_normal((*domain.shape, 3))
    field = ndimage.gaussian_filter(noise, (3, 3, 3, 0))
    return torch.from_numpy(scale * field / field.std())


def by_the_challenge(voxels: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(clip(det + 3)) inside the border, from a displacement in voxels, by correlations with (-1/2, 0, 1/2)."""
    rows = []
    for component in range(3):
        row = []
        for axis in range(3):
            kernel = np.array([-0.5, 0, 0.5]).reshape([3 if a == axis else 1 for a in range(3)])
            row.append(ndimage.correlate(voxels[..., component], kernel, mode="constant"))
        rows.append(np.stack(row, -1))
    j = np.stack(rows, -2) + np.eye(3)
    return np.log((np.linalg.det(j[2:-2, 2:-2, 2:-2]) + 3).clip(1e-9, 1e9))


@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize("kind", grids.ALL)
def test_sdlogj_by_the_challenge(kind: str, scale: float) -> None:
    """On every kind of grid, in mm on our side and in voxels on theirs; also where the field folds."""
    domain = grids.domain(kind)
    voxels = smooth(domain, scale)
    u = voxels @ domain.voxel_to_world[:3, :3].T
    wanted = by_the_challenge(voxels.numpy())
    det = finite_difference_jacobian(u, domain)
    assert sdlogj_learn2reg(det) == pytest.approx(wanted.std(), rel=1e-9)
    mask = torch.rand(domain.shape) > 0.5
    assert sdlogj_learn2reg(det, mask) == pytest.approx(wanted[mask[2:-2, 2:-2, 2:-2].numpy()].std(), rel=1e-9)
    assert (wanted < math.log(3)).any() == (scale > 1), "the larger field folds"


def test_sdlogj_is_not_the_true_one() -> None:
    """The 3 divides the figure by about four while changes of volume are small."""
    domain = grids.domain("oblique")
    u = smooth(domain, 0.1) @ domain.voxel_to_world[:3, :3].T
    det = finite_difference_jacobian(u, domain)
    assert sdlogj(det[2:-2, 2:-2, 2:-2]) / sdlogj_learn2reg(det) == pytest.approx(4, rel=0.1)


def test_sdlogj_leaves_two_voxels_out() -> None:
    domain = Domain.of((7, 7, 7), np.eye(4))
    u = torch.zeros(7, 7, 7, 3, dtype=torch.float64)
    u[0] = 5  # reaches the difference at index 1, not at 2
    det = finite_difference_jacobian(u, domain)
    assert det[1].max() != 1 and sdlogj_learn2reg(det) == 0
    with pytest.raises(ValueError, match="at least 5 voxels a side"):
        sdlogj_learn2reg(torch.ones(7, 7, 4))


def test_sdlogj_metric_is_the_mean_over_cases() -> None:
    domain = grids.domain("identity")
    one, other = smooth(domain, 1.0), smooth(domain, 3.0, seed=1)
    metric = StdLogJacobianLearn2Reg()
    metric.update(one, domain)
    metric.update(other, domain)
    wanted = np.mean([sdlogj_learn2reg(finite_difference_jacobian(u, domain)) for u in (one, other)])
    assert metric.compute().item() == pytest.approx(wanted)


def ball(centre: tuple[int, int, int], radius: float, stretch: tuple[float, float, float] = (1, 1, 1)) -> Tensor:
    grid = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), -1)
    inside = (((grid - np.array(centre)) / np.array(stretch)) ** 2).sum(-1) <= radius**2
    return torch.from_numpy(inside.astype(np.int16))


# What the challenge's engine (surface-distance 0.1, compute_robust_hausdorff at 95, spacing 1) says.
BALLS = [
    (ball((20, 20, 20), 10), ball((23, 20, 20), 10), 2.8284271247461903),
    (ball((20, 20, 20), 10), ball((20, 20, 20), 13), 3.0),
    (ball((20, 20, 20), 8, (1, 1.5, 2)), ball((18, 22, 19), 9), 6.708203932499369),
    (ball((5, 20, 20), 8), ball((2, 20, 20), 8), 2.8284271247461903),  # cut by the border
]


@pytest.mark.parametrize(("fixed", "warped", "wanted"), BALLS)
def test_hd95_by_the_engine_of_the_challenge(fixed: Tensor, warped: Tensor, wanted: float) -> None:
    assert hd95_learn2reg(warped, fixed) == {1: pytest.approx(wanted, rel=1e-6)}
    assert hd95_learn2reg(fixed, warped) == {1: pytest.approx(wanted, rel=1e-6)}
    ours = hd95(warped, fixed, Domain.of((40, 40, 40), np.eye(4)))
    assert ours[1] != pytest.approx(wanted, rel=1e-3), "boundary voxels without areas say something else"


def test_hd95_of_missing_labels() -> None:
    fixed, warped = BALLS[0][0] * 3, BALLS[0][1] * 4
    found = hd95_learn2reg(warped, fixed, [3, 4, 5])
    assert found[3] == math.inf and math.isnan(found[4]) and math.isnan(found[5])
    with pytest.raises(ValueError, match="one grid"):
        hd95_learn2reg(warped[1:], fixed)
    metric = HausdorffDistance95Learn2Reg()
    for a, b, _ in BALLS[:2]:
        metric.update(b, a)
    assert metric.compute().item() == pytest.approx((BALLS[0][2] + BALLS[1][2]) / 2)
