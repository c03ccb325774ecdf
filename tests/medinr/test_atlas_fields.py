"""Codes on nodes, modulations, poses: the parts of an atlas's decoder."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medinr.errors import UserError
from medinr.fields import codes
from medinr.fields.codes import read_nodes
from medinr.fields.modulated import ModulatedSIREN
from medinr.fields.poses import AFFINE, RIGID, move, pose_matrix, pose_size, roughness, shape_part, spline_basis


def points(scans: int = 2, n: int = 50, reach: float = 1.3) -> Tensor:
    return (torch.rand(scans, n, 3, generator=torch.Generator().manual_seed(0)).double() * 2 - 1) * reach


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 7])
def test_nodes_are_read_as_grid_sample_does(nodes: int) -> None:
    """Both ways of reading: all nodes at once (up to 64), and the eight around a point."""
    torch.manual_seed(0)
    table = torch.randn(2, nodes**3, 6, dtype=torch.float64, requires_grad=True)
    x = points().requires_grad_()
    volume = table.mT.reshape(2, 6, nodes, nodes, nodes)
    grid = x.flip(-1)[:, :, None, None]
    wanted = F.grid_sample(volume, grid, padding_mode="border", align_corners=True)[..., 0, 0].mT
    found = read_nodes(table, x, nodes)
    assert torch.allclose(found, wanted, atol=1e-12)
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), (table, x), allow_unused=True)
    theirs = torch.autograd.grad((wanted * weight).sum(), (table, x))
    assert torch.allclose(ours[0], theirs[0], atol=1e-12)
    if nodes > 1:
        assert torch.allclose(ours[1], theirs[1], atol=1e-10)


def test_memory_does_not_grow_with_points_times_nodes() -> None:
    def kept(nodes: int) -> int:
        total = 0

        def count(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel() if x.numel() != table.numel() else 0
            return x

        table = torch.randn(1, nodes**3, 4, requires_grad=True)
        x = torch.rand(1, 1000, 3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            read_nodes(table, x, nodes)
        return total

    assert kept(6) == kept(12)
    assert 10 * kept(12) < 1000 * 12**3


def test_many_nodes_take_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "DENSE_NODES", 0)
    table, x = torch.randn(2, 27, 3).double(), points()
    few = read_nodes(table, x, 3)
    monkeypatch.setattr(codes, "DENSE_NODES", 64)
    assert torch.allclose(few, read_nodes(table, x, 3), atol=1e-12)


def test_modulations_at_the_nodes_are_those_of_interpolated_codes() -> None:
    """Linear maps and interpolation commute: the published order of the two gives the same numbers."""
    torch.manual_seed(0)
    net = ModulatedSIREN(width=8, layers=3, modulated=(1, 3), code=5, omega=3.0).double()
    net.size(4, 2)
    net.double()
    torch.nn.init.normal_(net.modulation.weight)
    z, conditions, x = torch.randn(2, 5, 3, 3, 3).double(), torch.randn(2, 2).double(), points(reach=1.0)
    here = read_nodes(z.flatten(2).mT, x, 3)
    m = net.modulation(torch.cat((here, conditions[:, None].expand(-1, x.shape[1], -1)), -1))
    h = torch.sin(net.first_omega * net.first(x))
    for i, layer in enumerate(net.hidden, start=1):
        s = net.omegas[i - 1] * layer(h)
        if i in (1, 3):
            k = {1: 0, 3: 16}[i]
            s = s * (1 + m[..., k : k + 8]) + m[..., k + 8 : k + 16]
        h = torch.sin(s)
    wanted = net.head(h) + m[..., 32:]
    assert torch.allclose(net(x, net.table(z, conditions)), wanted, atol=1e-10)


def test_a_zero_code_gives_the_shared_anatomy_and_published_gains_start_near_zero() -> None:
    torch.manual_seed(0)
    x = points().float()
    ours, plain = ModulatedSIREN(width=16, code=4), ModulatedSIREN(width=16, code=4, unit_gain=False)
    for net in (ours, plain):
        net.size(1, 1)
    zero = torch.zeros(2, 4, 3, 3, 3), torch.zeros(2, 1)
    first, second = ours(x, ours.table(*zero))
    assert torch.allclose(ours(x[:1], ours.table(*zero)[:1])[0], first) and not torch.allclose(first, second)
    assert torch.all(ours.table(*zero) == 0), "no modulation at all"
    gain = plain.table(torch.randn(2, 4, 3, 3, 3) * 0.01, torch.zeros(2, 1))[..., :16]
    assert 0 < float(gain.detach().abs().max()) < 0.6


def test_features_of_the_shared_space_enter() -> None:
    torch.manual_seed(0)
    net = ModulatedSIREN(width=8, layers=1, modulated=(1,), code=2, grids=(4, 6), features=3)
    net.size(2, 0)
    x, table = points().float(), net.table(torch.zeros(2, 2, 3, 3, 3), torch.zeros(2, 0))
    before = net(x, table)
    with torch.no_grad():
        net.features[1].add_(1.0)
    assert not torch.allclose(before, net(x, table))


def test_what_a_decoder_refuses() -> None:
    with pytest.raises(UserError, match="layers from 1 to 2"):
        ModulatedSIREN(layers=2, modulated=(3,))
    with pytest.raises(UserError, match="sizes of 1"):
        ModulatedSIREN(width=0)


def test_a_pose_turns_as_its_rotation_vector_says() -> None:
    quarter = torch.tensor([[0.0, 0.0, math.pi / 2, 0.1, 0.2, 0.3]], dtype=torch.float64)
    y = move(quarter, torch.tensor([[[1.0, 0.0, 0.0]]]).double())
    assert torch.allclose(y, torch.tensor([[[0.1, 1.2, 0.3]]]).double(), atol=1e-12)
    matrix = pose_matrix(quarter)[0]
    assert torch.allclose(matrix[:3, :3] @ matrix[:3, :3].T, torch.eye(3).double(), atol=1e-12)


def test_no_gimbal_lock_at_the_identity() -> None:
    """Six parameters move the pose in six independent ways; Euler angles z, x, z have but five there."""
    at = torch.zeros(RIGID, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda p: pose_matrix(p).flatten())(at)
    assert int(torch.linalg.matrix_rank(jacobian)) == 6


def test_stretches_and_splines() -> None:
    x = points(1, 40, 0.9)
    pose = torch.zeros(1, pose_size("affine", 0), dtype=torch.float64)
    pose[0, RIGID : RIGID + 3] = math.log(2.0)
    assert torch.allclose(move(pose, x), 2 * x, atol=1e-12)
    assert torch.all(shape_part(pose)[0, RIGID:] == pose[0, RIGID:]) and pose_size("spline", 5) == AFFINE + 375
    basis = spline_basis(x, 6)
    assert torch.allclose(basis.sum(-1), torch.ones(1, 40, 3).double(), atol=1e-12)
    control = 6  # coefficients on a line give the line, and no roughness
    line = (torch.arange(control).double() - 1) * 2 / (control - 3) - 1
    lattice = torch.zeros(control, control, control, 3, dtype=torch.float64)
    lattice[..., 1] = 0.1 * line[:, None, None]
    pose = torch.cat((torch.zeros(AFFINE).double(), lattice.flatten()))[None]
    assert torch.allclose(move(pose, x, control) - x, 0.1 * x[..., :1] * torch.tensor([0.0, 1.0, 0.0]), atol=1e-12)
    assert float(roughness(pose, control)) < 1e-20
    bumpy = pose.clone()
    bumpy[0, AFFINE + 3 * 100] += 1
    assert float(roughness(bumpy, control)) > 1e-3
