"""The transform on a whole grid: lattice against network, and folded voxels counted exactly."""

import math

import pytest
import torch
from scipy.interpolate import CubicSpline

from medinr.fields import SIREN, Composed, CubicLattice, CycleTransform, DisplacementMap, Transform, as_map
from medinr.fields.dense import TOLERANCE_MM, evaluate_dense, folded, spline_matrix
from medinr.fields.transform import LEVELS
from medinr.fields.warp import chunks
from medinr.jets import det as determinant
from medinr.space import Domain, transform_points
from tests.medinr import grids, pairs
from tests.medinr.tolerances import assert_close

EYE = torch.eye(4).double()


def smooth(domain: Domain, omega: float = 4.0, size: float = 0.2) -> Transform:
    """Some mm, after an affine start that turns."""
    start = torch.as_tensor(grids.affine("oblique")) / 2
    start[3, 3] = 1
    return Transform(
        DisplacementMap(pairs.gentle(SIREN(hidden=(16, 16), omega=omega, zero_output=False), size)), domain, start
    )


@pytest.mark.parametrize("kind", ["oblique", "left-handed", "permuted"])
def test_lattice_is_the_network_to_a_twentieth_of_a_mm(kind: str) -> None:
    domain = grids.domain(kind, (48, 52, 30))
    transform = smooth(domain)
    lattice, exact = (evaluate_dense(transform, domain, exact=e) for e in (False, True))
    assert lattice.error_mm > 0 == exact.error_mm, "the lattice was used"
    gap = (lattice.displacement - exact.displacement).norm(dim=-1)
    assert gap.max() < TOLERANCE_MM
    assert lattice.error_mm <= gap.max() * 1.01, "the error that is reported was really found"
    assert (lattice.det - exact.det).abs().max() < 4 * lattice.error_det + 1e-6


def test_exact_is_the_transform_itself() -> None:
    domain = grids.domain("oblique")
    transform = smooth(domain)
    dense = evaluate_dense(transform, domain, exact=True)
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    assert (world + dense.displacement.reshape(-1, 3) - transform(world)).abs().max() < 1e-4
    assert (determinant(transform.jacobian(world)) - dense.det.flatten()).abs().max() < 1e-5


def test_a_rough_field_is_evaluated_at_every_voxel() -> None:
    domain = grids.domain("oblique")
    assert evaluate_dense(smooth(domain, omega=60.0, size=2.0), domain).error_mm == 0


@pytest.mark.parametrize("shape", [(12, 10, 1), (2, 9, 3), (1, 1, 1)])
def test_thin_grids(shape: tuple[int, int, int]) -> None:
    domain = grids.domain("oblique", shape)
    dense = evaluate_dense(smooth(domain), domain)
    assert dense.displacement.shape == (*shape, 3) and torch.isfinite(dense.det).all()


@pytest.mark.parametrize(("n", "nodes"), [(40, 9), (7, 4), (5, 3), (3, 2)])
def test_spline_matrix_interpolates(n: int, nodes: int) -> None:
    at = torch.linspace(0, n - 1, nodes).double()
    values = 1 + 0.3 * at + (0.02 * at**3 if nodes > 3 else 0)
    found = spline_matrix(n, nodes).double() @ values
    line = torch.arange(n).double()
    expected = 1 + 0.3 * line + (0.02 * line**3 if nodes > 3 else 0)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    if nodes > 4:
        wave = torch.sin(at / 3)
        spline = torch.as_tensor(CubicSpline(at.numpy(), wave.numpy())(line.numpy()))
        assert (spline_matrix(n, nodes).double() @ wave - spline).abs().max() < 1e-5


WAVE, GAIN = 9.0, 1.5


def folding(domain: Domain) -> Transform:
    """x -> x - GAIN sin(WAVE x) / WAVE along the first axis: det J = 1 - GAIN cos(WAVE x), which folds in bands."""
    field = SIREN(hidden=(1,), omega=WAVE)
    with torch.no_grad():
        field.layers[0].weight.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
        field.layers[0].bias.zero_()
        field.head.weight.copy_(torch.tensor([[-GAIN / WAVE], [0.0], [0.0]]))
        field.head.bias.zero_()
    return Transform(DisplacementMap(field), domain, EYE)


def true_det(domain: Domain) -> torch.Tensor:
    x = transform_points(domain.voxel_to_normalised, domain.voxels().double())[:, 0]
    return (1 - GAIN * torch.cos(WAVE * x)).reshape(domain.shape)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_folded_voxels_are_counted_exactly(exact: bool, masked: bool) -> None:
    domain = Domain.of((40, 20, 12), torch.diag(torch.tensor([1.1, 1.3, 2.0, 1.0])))
    mask = torch.zeros(domain.shape, dtype=torch.bool)
    mask[15:33, 3:, 2:9] = True
    truth = true_det(domain)
    assert truth.abs().min() > 1e-4, "no voxel on the edge between the two"
    transform = folding(domain)
    dense = evaluate_dense(transform, domain, exact)
    expected = 100 * (truth <= 0)[mask if masked else ...].double().mean().item()
    assert 10 < expected < 60
    found = folded(transform, domain, dense.det, mask if masked else None, dense.error_det)
    assert found == pytest.approx(expected, abs=1e-9)


def test_an_interpolated_determinant_does_not_decide() -> None:
    domain = Domain.of((40, 20, 12), torch.diag(torch.tensor([1.1, 1.3, 2.0, 1.0])))
    truth = true_det(domain)
    noisy = truth + 0.3 * (2 * torch.rand(domain.shape) - 1)
    assert ((noisy <= 0) != (truth <= 0)).sum() > 20
    expected = 100 * (truth <= 0).double().mean().item()
    assert folded(folding(domain), domain, noisy, None, 0.3) == pytest.approx(expected, abs=1e-9)


def test_nothing_folds_where_nothing_folds() -> None:
    domain = grids.domain("permuted")
    transform = smooth(domain)
    dense = evaluate_dense(transform, domain, exact=True)
    assert dense.det.min() > 0
    assert folded(transform, domain, dense.det, None, 0.0) == 0
    assert math.isclose(dense.det.mean().item(), torch.linalg.det(transform.start[:3, :3]).item(), rel_tol=0.3)


@pytest.mark.parametrize("axes", ["plain", "flipped", "permuted", "oblique"])
def test_splines_are_read_from_a_table_of_the_voxels(axes: str) -> None:
    """Exact at the voxel centres, whatever the order and direction of the axes; an oblique grid has no such table."""
    turn = torch.eye(4, dtype=torch.float64)
    if axes == "flipped":
        turn[0, 0] = turn[1, 1] = -1
    elif axes == "permuted":
        turn[:3, :3] = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, 1, 0]])
    elif axes == "oblique":
        c, s = math.cos(0.3), math.sin(0.3)
        turn[:2, :2] = torch.tensor([[c, -s], [s, c]])
    domain = Domain.of((21, 16, 12), turn @ torch.diag(torch.tensor([2.0, 2.5, 3.0, 1.0]).double()))
    field = CubicLattice((12.0, 6.0))
    field.cover(domain)
    with torch.no_grad():
        for level in field.levels:
            level.normal_(0, 0.03)
    start = torch.eye(4, dtype=torch.float64)
    start[0, 3] = 4.0
    transform = Transform(as_map(field), domain, start)
    quick, exact = evaluate_dense(transform, domain), evaluate_dense(transform, domain, exact=True)
    assert (transform.tabulated(0) is None) == (axes == "oblique")
    assert_close(quick.displacement, exact.displacement, 1e-4 if axes != "oblique" else 0.02)
    if axes != "oblique":
        assert_close(quick.det, exact.det, 1e-4)


def test_a_spline_after_another_is_read_from_finer_nodes_and_beyond_the_grid() -> None:
    """The second one is asked between the voxel centres, and where the first has led out of the grid."""
    domain = Domain.of((24, 20, 16), torch.diag(torch.tensor([2.0, 2.0, 2.5, 1.0]).double()))
    torch.manual_seed(3)
    parts = [CubicLattice((16.0, 8.0)), CubicLattice((32.0, 16.0))]
    for part in parts:
        part.cover(domain)
        with torch.no_grad():
            for level in part.levels:
                level.normal_(0, 0.06)
    transform = Transform(as_map(Composed(parts[0], parts[1])), domain, torch.eye(4, dtype=torch.float64))
    exact = evaluate_dense(transform, domain, exact=True)
    world = torch.cat([world for _, world in chunks(domain)])
    gaps = []
    for level in range(LEVELS):
        quick = transform.tabulated(level)
        assert quick is not None
        gaps.append(float((quick(world) - world - exact.displacement.reshape(-1, 3)).norm(dim=1).max()))
    assert gaps[2] == pytest.approx(gaps[1], rel=0.3) and gaps[1] < 0.4 * gaps[0], gaps
    found = evaluate_dense(transform, domain)
    assert 0 < found.error_mm < 0.05
    assert (found.displacement - exact.displacement).norm(dim=-1).max() < 0.07
    assert (found.det - exact.det).abs().quantile(0.99) < 0.02


def test_midpoints_are_read_from_tables() -> None:
    domain = Domain.of((24, 20, 16), torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0]).double()))
    sides = []
    for sign in (1.0, -1.0):
        torch.manual_seed(3)
        field = CubicLattice((16.0, 8.0))
        field.cover(domain)
        with torch.no_grad():
            for level in field.levels:
                level.normal_(0, 0.05).mul_(sign)
        sides.append(Transform(as_map(field), domain, torch.eye(4, dtype=torch.float64)))
    cycle = CycleTransform(sides[0], sides[1])
    quick, exact = evaluate_dense(cycle, domain), evaluate_dense(cycle, domain, exact=True)
    assert cycle.tabulated(0) is not None and exact.displacement.norm(dim=-1).max() > 1
    inside = cycle.judged(torch.cat([world for _, world in chunks(domain)])).reshape(domain.shape)
    assert 0.5 < inside.float().mean() < 1
    assert (quick.displacement - exact.displacement).norm(dim=-1)[inside].max() < 0.05
    assert quick.uncertainty is not None and exact.uncertainty is not None
    assert (quick.uncertainty - exact.uncertainty).abs()[inside].max() < 0.05
    assert (quick.det - exact.det).abs()[inside].quantile(0.99) < 0.05
