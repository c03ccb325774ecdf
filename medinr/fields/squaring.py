"""Displacements on whole grids: warping, composition, scaling and squaring, B-spline control grids, finite differences.

Everything here is in voxels of its grid: u [B, 3, X, Y, Z] maps voxel v to v + u(v).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medinr.fields.lattice import basis_matrix
from medinr.jets import BASIS_PAIRS, Jet


def voxel_grid(shape: Sequence[int], like: Tensor) -> Tensor:
    """Voxel coordinates [3, X, Y, Z] of a grid."""
    lines = [torch.arange(n, device=like.device, dtype=like.dtype) for n in shape]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"))


def warp(volume: Tensor, u: Tensor) -> Tensor:
    """Trilinear values [B, C, X, Y, Z] of a volume at v + u(v); the border value continues outside."""
    shape = volume.shape[2:]
    size = torch.tensor(shape, device=u.device, dtype=u.dtype).view(1, 3, 1, 1, 1)
    at = (voxel_grid(shape, u) + u) * (2 / (size - 1).clamp(min=1)) - 1
    grid = at.movedim(1, -1).flip(-1)
    moved: Tensor = F.grid_sample(volume, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return moved


def warp_labels(labels: Tensor, u: Tensor) -> Tensor:
    """Labels [X, Y, Z] at v + u(v), u [3, X, Y, Z]: the one with the largest trilinear weight.

    On a coarse grid the nearest voxel would not see a motion of less than half a voxel.
    """
    names = labels.unique()
    weights = warp((labels == names.view(-1, 1, 1, 1)).to(u)[None], u[None])[0]
    moved: Tensor = names[weights.argmax(0)]
    return moved


def inside(u: Tensor) -> Tensor:
    """Whether v + u(v) lies on the grid, up to the outer edges of its voxels: bool [B, X, Y, Z]."""
    shape = u.shape[2:]
    at = voxel_grid(shape, u) + u
    upper = torch.tensor(shape, device=u.device, dtype=u.dtype).view(1, 3, 1, 1, 1) - 0.5
    found: Tensor = ((at >= -0.5) & (at <= upper)).all(1)
    return found


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Displacement of (id + outer) o (id + inner): inner(v) + outer(v + inner(v))."""
    return inner + warp(outer, inner)


def scaling_and_squaring(velocity: Tensor, squarings: int = 7, midpoint: bool = False) -> Tensor:
    """Displacement of the flow at time 1 of a stationary velocity, exp(v) = exp(v / 2^n)^(2^n).

    Arsigny et al., MICCAI 2006. The first factor is one Euler step, id + v / 2^n, or one of the midpoint rule, whose
    error is of second order in 2^-n.
    """
    u: Tensor = velocity / 2**squarings
    if midpoint:
        u = warp(u, u / 2)
    for _ in range(squarings):
        u = compose(u, u)
    return u


def control_shape(shape: Sequence[int], spacing: int) -> list[int]:
    """Control points along each axis that cover a grid from outer edge to outer edge, as `CubicLattice` lays them."""
    return [-(-n // spacing) + 3 for n in shape]


def dense_spline(control: Tensor, shape: Sequence[int], spacing: int) -> Tensor:
    """Values [B, C, X, Y, Z] at voxel centres of the cubic B-spline with control points [B, C, x, y, z].

    Control point 1 of an axis lies on the outer edge of its first voxel, the next ones ``spacing`` voxels apart
    (`CubicLattice` with ``unit="voxel"``, on cubic voxels).
    """
    out = control
    for axis, n in enumerate(shape):
        at = (torch.arange(n, device=control.device, dtype=control.dtype) + 0.5) / spacing
        weights = basis_matrix(at, control.shape[2 + axis])
        out = torch.tensordot(out, weights, dims=([2 + axis], [1])).movedim(-1, 2 + axis)
    return out


def grid_jet(u: Tensor, spacing: Sequence[float], unit: float, order: int) -> Jet:
    """Jet of a displacement on a grid by finite differences, for the regularizers.

    First derivatives are forward differences, which see a checkerboard; second ones differences of neighbours' values.
    Only voxels with all of these neighbours count.

    Args:
        u: [3, X, Y, Z], in the unit of ``spacing`` (mm).
        spacing: distance of the voxels along each axis.
        unit: length that values and derivatives are taken relative to, in the unit of ``spacing``.
        order: 1 or 2.
    """
    steps = [s / unit for s in spacing]
    value = u / unit
    low = 1 if order == 2 else 0

    def at(*shifts: int) -> Tensor:
        index = [slice(low + s, n - 1 + s) for s, n in zip(shifts, u.shape[1:], strict=True)]
        return value[:, index[0], index[1], index[2]]

    def flat(v: Tensor) -> Tensor:
        return v.flatten(1).T

    centre = at(0, 0, 0)
    one = torch.eye(3, dtype=torch.int).tolist()
    first = torch.stack([flat(at(*one[a]) - centre) / steps[a] for a in range(3)])
    if order < 2:
        return Jet.of(flat(centre), first)
    second = []
    for a, b in BASIS_PAIRS:
        plus, minus = one[a], [-s for s in one[a]]
        if a == b:
            found = at(*plus) - 2 * centre + at(*minus)
        else:
            corners = [
                [i * p + j * q for p, q in zip(one[a], one[b], strict=True)]
                for i, j in ((1, 1), (-1, -1), (1, -1), (-1, 1))
            ]
            found = (at(*corners[0]) + at(*corners[1]) - at(*corners[2]) - at(*corners[3])) / 4
        second.append(flat(found) / (steps[a] * steps[b]))
    return Jet.of(flat(centre), first, torch.stack(second), BASIS_PAIRS)
