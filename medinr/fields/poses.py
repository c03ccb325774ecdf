"""The pose of a scan in an atlas: rigid, affine, or with a low-order spline, as one vector of parameters.

A pose maps a scan's coordinates to the atlas's, y = exp(M) x + t + s(x). The rotation is the exponential of a
skew-symmetric M, which has no gimbal lock (CINeMA's code turns about z, x, z: at the identity two of its three angles
are the same). An affine pose adds a symmetric part to M, the logarithm of a stretch; a spline pose adds s, a cubic
B-spline of few control points. All are zero at the identity, and the mean of several poses is a mean of parameters.
"""

from typing import Literal

import torch
from torch import Tensor

PoseKind = Literal["rigid", "affine", "spline"]
RIGID, AFFINE = 6, 12


def pose_size(kind: PoseKind, control: int) -> int:
    """How many parameters a pose has: rotation 3, translation 3, stretch 6, spline 3 control^3."""
    return {"rigid": RIGID, "affine": AFFINE, "spline": AFFINE + 3 * control**3}[kind]


def generator(pose: Tensor) -> Tensor:
    """M [..., 3, 3] of poses [..., p]: skew part from the rotation vector (radians), symmetric part the stretch."""
    x, y, z = pose[..., :3].unbind(-1)
    zero = torch.zeros_like(x)
    m = torch.stack([torch.stack(r, -1) for r in ((zero, -z, y), (z, zero, -x), (-y, x, zero))], -2)
    if pose.shape[-1] > RIGID:
        a, b, c, d, e, f = pose[..., RIGID:AFFINE].unbind(-1)
        m = m + torch.stack([torch.stack(r, -1) for r in ((a, d, e), (d, b, f), (e, f, c))], -2)
    return m


def pose_matrix(pose: Tensor) -> Tensor:
    """The affine part of poses [..., p] as homogeneous matrices [..., 4, 4]."""
    turned: Tensor = torch.linalg.matrix_exp(generator(pose))
    top = torch.cat((turned, pose[..., 3:RIGID, None]), -1)
    last = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).to(top).expand(*top.shape[:-2], 1, 4)
    return torch.cat((top, last), -2)


def spline_basis(x: Tensor, control: int) -> Tensor:
    """Uniform cubic B-splines [..., control] at x in [-1, 1], clamped beyond; they sum to one.

    Control points lie 2 / (control - 3) apart; the outermost are one interval outside.
    """
    position = (x.clamp(-1, 1) + 1) * ((control - 3) / 2)
    d = (position[..., None] + 1 - torch.arange(control, dtype=x.dtype, device=x.device)).abs()
    near = (4 - 6 * d.square() + 3 * d**3) / 6
    far = (2 - d).clamp(min=0) ** 3 / 6
    basis: Tensor = torch.where(d < 1, near, far)
    return basis


def move(pose: Tensor, x: Tensor, control: int = 0) -> Tensor:
    """y [S, n, 3] of points x [S, n, 3] under poses [S, p], in the atlas's normalised coordinates."""
    turned = torch.linalg.matrix_exp(generator(pose))
    y: Tensor = x @ turned.mT + pose[:, None, 3:RIGID]
    if pose.shape[-1] > AFFINE:
        lattice = pose[:, AFFINE:].unflatten(1, (control, control, control, 3))
        a, b, c = spline_basis(x, control).unbind(-2)
        y = y + torch.einsum("sni,snj,snk,sijkc->snc", a, b, c, lattice)
    return y


def shape_part(pose: Tensor) -> Tensor:
    """The pose without its rotation and translation: what belongs to the anatomy, not to how it lay."""
    return torch.cat((torch.zeros_like(pose[..., :RIGID]), pose[..., RIGID:]), -1)


def roughness(pose: Tensor, control: int) -> Tensor:
    """Mean square of the second differences along each axis of the control points of poses [S, p]."""
    if pose.shape[-1] <= AFFINE:
        return pose.new_zeros(())
    lattice = pose[:, AFFINE:].unflatten(1, (control, control, control, 3))
    return torch.stack([lattice.diff(n=2, dim=axis).square().mean() for axis in (1, 2, 3)]).sum()
