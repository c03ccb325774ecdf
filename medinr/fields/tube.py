"""Tangent coordinates of a tube: a map of space with its inverse, and jets of both."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from medinr import jets
from medinr.fields.centreline import Centreline
from medinr.jets import Jet
from medinr.types import Points

NEWTON_STEPS = 2
"""From within half a millimetre on the curve; two more, on R itself, follow."""


def smooth_step_rule(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 below 0, 0 above 1, between them 1 - v^3 (10 - 15 v + 6 v^2): twice continuously differentiable."""
    t = v.clamp(0, 1)
    return 1 - t**3 * (10 - 15 * t + 6 * t * t), -30 * (t * (1 - t)) ** 2, -60 * t * (1 - t) * (1 - 2 * t)


def columns(jet: Jet, first: int, last: int) -> Jet:
    """Some of a jet's components."""
    return replace(jet, channels=jet.channels[..., first:last])


def inverse(gradient: Tensor) -> Tensor:
    """Inverse of matrices [N, 3, 3]; of a singular one a finite matrix without meaning."""
    det = jets.det(gradient)
    safe = torch.where(det.abs() < 1e-3, torch.full_like(det, 1e-3), det)
    return jets.cofactor(gradient).mT / safe[:, None, None]


class TubeCoordinates(nn.Module):
    """R: (s, u, v) -> c(s) + u n1(s) + v n2(s), all in mm, and R^-1.

    c is a curve by its arc length, n1 and n2 the normals of its parallel-transport frame; beyond its ends it goes on
    straight. Curve and normals are cubic splines, so R is given in closed form and its inverse is exact: the foot point
    of x is the nearest knot's, refined by Newton's method on the plane of the normals, and derivatives of R^-1 come
    from those of R (inverse function theorem). Where several parts of the curve have a foot point, the nearest counts.

    The published code interpolates centre and frame linearly between samples, whose derivatives jump.

    Args:
        centreline: the curve, mm.
        centre: point [3] that all positions are relative to (small numbers keep float32 exact enough).
    """

    knots: Tensor
    spline: Tensor

    def __init__(self, centreline: Centreline, centre: Tensor | None = None) -> None:
        super().__init__()
        shift = torch.zeros(3) if centre is None else centre
        table = torch.from_numpy(centreline.table()).permute(1, 0, 2).contiguous()
        table[:, 3, :3] -= shift.double()
        # They follow from the centreline, so a checkpoint need not hold them.
        self.register_buffer("knots", (torch.from_numpy(centreline.knots) - shift.double()).float(), persistent=False)
        self.register_buffer("spline", table.float(), persistent=False)
        self.length, self.step = centreline.length, centreline.step

    def curve(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Position, normals and curvatures (c, n1, n2, k1, k2) at s [N, 1] -> [N, 11], with first and second slope."""
        inside = s.clamp(0, self.length)
        piece = (inside.detach()[:, 0] / self.step).floor().long().clamp(0, len(self.spline) - 1)
        a, b, c, d = self.spline[piece].unbind(1)
        t = inside - self.step * piece[:, None].to(s)
        value, slope = ((a * t + b) * t + c) * t + d, (3 * a * t + 2 * b) * t + c
        beyond = s - inside
        curved = ((s >= 0) & (s <= self.length)).to(s)
        straight = torch.arange(11, device=s.device) < 3
        slope = torch.where(straight, slope, slope * curved)
        return value + beyond * slope, slope, (6 * a * t + 2 * b) * curved

    def to_image(self, q: Points) -> Points:
        """R at tangent coordinates (s, u, v) [N, 3] -> [N, 3]."""
        f = self.curve(q[:, :1])[0]
        return f[:, :3] + q[:, 1:2] * f[:, 3:6] + q[:, 2:3] * f[:, 6:9]

    def image_jet(self, q: Jet) -> Jet:
        """Jet of R."""
        f = jets.activate(columns(q, 0, 1), self.curve)
        across = jets.add(
            jets.multiply(columns(q, 1, 2), columns(f, 3, 6)), jets.multiply(columns(q, 2, 3), columns(f, 6, 9))
        )
        return jets.add(columns(f, 0, 3), across)

    def stretch_jet(self, q: Jet) -> Jet:
        """1 - u k1(s) - v k2(s) [N, 1]: length along the tube at (u, v) by that on the centreline; 0: planes meet."""
        f = jets.activate(columns(q, 0, 1), self.curve)
        lost = jets.add(
            jets.multiply(columns(q, 1, 2), columns(f, 9, 10)), jets.multiply(columns(q, 2, 3), columns(f, 10, 11))
        )
        one = torch.zeros_like(lost.channels)
        one[0] = 1
        return replace(lost, channels=one - lost.channels)

    def linearised(self, q: Points) -> tuple[Points, Tensor]:
        """R [N, 3] and DR [N, 3, 3]."""
        f, slope, _ = self.curve(q[:, :1])
        u, v = q[:, 1:2], q[:, 2:3]
        along = slope[:, :3] + u * slope[:, 3:6] + v * slope[:, 6:9]
        gradient = torch.stack((along, f[:, 3:6], f[:, 6:9]), dim=-1)
        return f[:, :3] + u * f[:, 3:6] + v * f[:, 6:9], gradient

    @torch.no_grad()
    def foot(self, x: Points) -> Points:
        """Arc length [N, 1] of the foot point of x [N, 3] (mm, relative to the centre)."""
        x = x.detach()
        nearest = torch.cdist(x, self.knots.to(x)).argmin(1, keepdim=True)
        low = (nearest - 1) * self.step
        # The last planes have all that is beyond the ends.
        low = torch.where(nearest == 0, torch.full_like(low, -torch.inf), low)
        high = (nearest + 1) * self.step
        high = torch.where(nearest == len(self.knots) - 1, torch.full_like(high, torch.inf), high)
        s = nearest.to(x) * self.step
        for _ in range(NEWTON_STEPS):
            f, slope, _ = self.curve(s)
            normal = torch.linalg.cross(f[:, 3:6], f[:, 6:9])
            offset = x - f[:, :3]
            turned = torch.linalg.cross(slope[:, 3:6], f[:, 6:9]) + torch.linalg.cross(f[:, 3:6], slope[:, 6:9])
            descent = (normal * slope[:, :3]).sum(1, keepdim=True) - (turned * offset).sum(1, keepdim=True)
            step = (offset * normal).sum(1, keepdim=True) / descent.clamp(min=1e-2)
            s = torch.minimum(torch.maximum(s + step, low), high)
        return s

    def to_tangent(self, x: Points) -> Points:
        """R^-1: (s, u, v) [N, 3] of positions [N, 3]. Differentiable: two Newton steps on R end it."""
        s = self.foot(x)
        f = self.curve(s)[0]
        offset = x.detach() - f[:, :3]
        q = torch.cat((s, (offset * f[:, 3:6]).sum(1, keepdim=True), (offset * f[:, 6:9]).sum(1, keepdim=True)), dim=1)
        for _ in range(2):
            reached, gradient = self.linearised(q)
            q = q + (inverse(gradient) * (x - reached)[:, None]).sum(-1)
        return q

    def tangent_jet(self, x: Jet) -> Jet:
        """Jet of R^-1: q_a = DR^-1 x_a and q_ab = DR^-1 (x_ab - D2R[q_a, q_b])."""
        q = self.to_tangent(x.value)
        if x.first is None:
            return Jet(q[None], 0)
        back = inverse(self.linearised(q)[1])
        first = (back * x.first[:, :, None]).sum(-1)
        flat = Jet(torch.cat((q[None], first)), x.k, x.pairs, x.basis)
        if not x.pairs:
            return flat
        bent = self.image_jet(flat).second
        assert bent is not None
        rest = -bent if x.affine or x.second is None else x.second - bent
        return replace(flat, channels=torch.cat((flat.channels, (back * rest[:, :, None]).sum(-1))))
