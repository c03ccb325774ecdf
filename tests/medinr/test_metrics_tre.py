"""Target registration error, exact and snapped."""

import numpy as np
import pytest
import torch

from medinr.metrics import TargetRegistrationError, snapped_tre, tre
from medinr.space import Domain, transform_points
from tests.medinr import grids
from tests.medinr.tolerances import assert_close


def test_known_answer() -> None:
    assert_close(tre(torch.tensor([[3.0, 4, 12], [0, 0, 1]]), torch.zeros(2, 3)), torch.tensor([13.0, 1.0]))
    with pytest.raises(ValueError, match="got 1 and 2"):
        tre(torch.zeros(1, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("kind", grids.ALL)
def test_snapping_is_to_voxels_of_the_moving_grid(kind: str) -> None:
    """By hand, in voxels: round, difference, length in mm by the affine."""
    domain = grids.domain(kind)
    mapped, target = torch.rand(40, 3).double() * 12, torch.randint(0, 12, (40, 3)).double()
    steps = (mapped.numpy().round() - target.numpy()) @ grids.affine(kind)[:3, :3].T
    found = snapped_tre(
        transform_points(domain.voxel_to_world, mapped), transform_points(domain.voxel_to_world, target), domain
    )
    assert_close(found, torch.from_numpy(np.linalg.norm(steps, axis=1)))


def test_a_hit_of_the_voxel_scores_nothing() -> None:
    domain = Domain.of((20, 20, 20), np.diag([1.0, 1.0, 2.5, 1.0]))
    target = torch.tensor([[5.0, 5.0, 10.0]])
    near, far = target + torch.tensor([[0.4, -0.4, 1.2]]), target + torch.tensor([[0.4, -0.4, 1.3]])
    assert snapped_tre(near, target, domain).item() == 0
    assert snapped_tre(far, target, domain).item() == pytest.approx(2.5)
    assert tre(near, target).item() == pytest.approx(np.sqrt(0.16 + 0.16 + 1.44), rel=1e-6)


def test_the_metric_gathers_all_landmarks() -> None:
    domain = grids.domain("oblique")
    mapped, target = torch.randn(30, 3) * 4, torch.randn(30, 3) * 4
    metric = TargetRegistrationError()
    for part in (slice(0, 7), slice(7, 30)):
        metric.update(mapped[part], target[part], domain)
    found, errors = metric.compute(), (mapped - target).norm(dim=1).numpy()
    assert_close(found["tre/mean"], float(errors.mean()), 1e-5)
    assert_close(found["tre/std"], float(errors.std()), 1e-5)
    assert_close(found["tre/p95"], float(np.percentile(errors, 95)), 1e-5)
    assert_close(found["tre/max"], float(errors.max()), 1e-5)
    snapped = snapped_tre(mapped, target, domain)
    assert_close(found["tre/snapped_mean"], snapped.mean(), 1e-5)
    assert_close(found["tre/snapped_std"], snapped.std(correction=0), 1e-5)
    metric.reset()
    assert metric.exact == []
