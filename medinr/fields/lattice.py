"""Cubic B-splines on control lattices, from coarse to fine."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from medinr.fields.base import Field
from medinr.jets import BASIS_PAIRS, Jet
from medinr.space import Domain
from medinr.types import Features


def cubic_weights(t: Tensor, order: int) -> list[Tensor]:
    """Weights [..., 4] of the four control points around a point, and their derivatives up to ``order``.

    Uniform cubic B-spline (Rueckert et al., IEEE TMI 18(8), 1999); ``t`` in [0, 1) is the position between the second
    and the third of the control points, derivatives are by t.
    """
    s = 1 - t
    found = [
        torch.stack((s**3, 3 * t**3 - 6 * t**2 + 4, 3 * s**3 - 6 * s**2 + 4, t**3), dim=-1) / 6,
        torch.stack((-(s**2), 3 * t**2 - 4 * t, 4 * s - 3 * s**2, t**2), dim=-1) / 2,
        torch.stack((s, 3 * t - 2, 3 * s - 2, t), dim=-1),
    ]
    return found[: order + 1]


def basis_matrix(at: Tensor, n: int) -> Tensor:
    """[points, n]: weights of ``n`` control points at positions in units of their distance, 0 at the box's low end."""
    at = at.clamp(0, n - 3 - 1e-4)
    cell = at.floor()
    columns = cell.long()[:, None] + torch.arange(4, device=at.device)
    return at.new_zeros(len(at), n).scatter_(1, columns, cubic_weights(at - cell, 0)[0])


class SplineField(Field):
    """u(x) = gain * sum over levels and control points k of B3((x - x_k) / h) c_k; a subclass says what c_k are.

    Uniform cubic B-splines (Rueckert et al., IEEE TMI 18(8), 1999), twice continuously differentiable; all jets are
    exact. Control points cover the box of the image, so the field takes its size from the domain (`cover`); outside the
    box it continues constantly.

    Args:
        spacings: distance of the control points of each level.
        out_features: dimension of the value.
        gain: factor of the coefficients.
        unit: of ``spacings``: ``mm``, or ``voxel``, the geometric mean of the image's voxel sides.
    """

    in_features = 3
    origin: Tensor
    spacing: Tensor

    def __init__(self, spacings: Sequence[float], out_features: int, gain: float, unit: Literal["mm", "voxel"]) -> None:
        super().__init__()
        if not spacings or min(spacings) <= 0:
            raise ValueError(f"spacings: expected lengths above 0, got {list(spacings)}")
        if unit not in ("mm", "voxel"):
            raise ValueError(f"unit: expected mm or voxel, got {unit}")
        self.spacings, self.out_features, self.gain = tuple(float(s) for s in spacings), out_features, gain
        self.unit = unit
        self.shapes: list[tuple[int, int, int]] = []
        self.register_buffer("origin", torch.zeros(3))
        self.register_buffer("spacing", torch.zeros(len(self.spacings)))

    def coefficients(self, level: int, context: Tensor | None = None) -> Tensor:
        """c_k of a level, [n_x n_y n_z, c], the last axis of control points fastest."""
        raise NotImplementedError

    def cover(self, domain: Domain) -> None:
        super().cover(domain)
        corners = torch.cartesian_prod(*(torch.tensor([-0.5, n - 0.5]) for n in domain.shape)).double()
        m = domain.voxel_to_normalised
        box = corners @ m[:3, :3].T + m[:3, 3]
        low, side = box.min(0).values, box.max(0).values - box.min(0).values
        unit = math.prod(domain.spacing) ** (1 / 3) if self.unit == "voxel" else 1.0
        steps = [s * unit / domain.unit_mm for s in self.spacings]
        self.shapes = [self._shape(side.tolist(), h) for h in steps]
        self.origin = low.to(self.origin)
        self.spacing = torch.tensor(steps).to(self.spacing)

    @staticmethod
    def _shape(side: Sequence[float], h: float) -> tuple[int, int, int]:
        x, y, z = (math.ceil(length / h - 1e-6) + 3 for length in side)
        return x, y, z

    def _check_covers(self) -> None:
        if not self.shapes:
            name = type(self).__name__
            raise ValueError(f"{name}: call cover(domain) first, its control points cover the image's box")

    def forward(self, x: Features, context: Tensor | None = None) -> Features:
        return self.expand(x, 0, context)[0]

    def jet(self, jet: Jet, context: Tensor | None = None) -> Jet:
        order = jet.order
        found = self.expand(jet.value, order, context)
        if order == 0:
            return Jet(found, 0)
        assert jet.first is not None
        gradient = found[1:4]
        parts = [found[:1], torch.einsum("inc,kni->knc", gradient, jet.first)]
        if jet.pairs:
            a, b = (list(i) for i in zip(*jet.pairs, strict=True))
            da, db = jet.first[a], jet.first[b]
            twice = torch.stack(
                [da[..., i] * db[..., j] + (da[..., j] * db[..., i] if i != j else 0) for i, j in BASIS_PAIRS]
            )
            second = torch.einsum("hnc,hmn->mnc", found[4:], twice)
            if not jet.affine and jet.second is not None:
                second = second + torch.einsum("inc,mni->mnc", gradient, jet.second)
            parts.append(second)
        return Jet(torch.cat(parts), jet.k, jet.pairs, jet.basis)

    def expand(self, x: Tensor, order: int, context: Tensor | None = None) -> Tensor:
        """[1, 4 or 10, N, c]: value, gradient and the six second derivatives (`BASIS_PAIRS`) in normalised space."""
        self._check_covers()
        total: Tensor | None = None
        for level, (shape, h) in enumerate(zip(self.shapes, self.spacing, strict=True)):
            part = self._level(x, order, self.coefficients(level, context), shape, h)
            total = part if total is None else total + part
        assert total is not None
        return self.gain * total

    def on_grid(
        self, lines: Sequence[Tensor], levels: Sequence[int] | None = None, *, context: Tensor | None = None
    ) -> Tensor:
        """[X, Y, Z, c]: the levels' sum at the points of a grid parallel to the normalised axes; gradients flow.

        The basis is a product of three, so that a whole grid costs little more than its own size.

        Args:
            lines: the grid's coordinates along each axis.
            levels: indices into ``spacings`` (None: all).
            context: the condition, of a field that takes one.
        """
        self._check_covers()
        total: Tensor | None = None
        for level in range(len(self.spacings)) if levels is None else levels:
            x, y, z = (
                basis_matrix((line - self.origin[axis]) / self.spacing[level], self.shapes[level][axis])
                for axis, line in enumerate(lines)
            )
            values = self.coefficients(level, context).view(*self.shapes[level], -1)
            part = torch.tensordot(x, values, dims=([1], [0]))
            part = torch.einsum("zc,xycd->xyzd", z, torch.einsum("yb,xbcd->xycd", y, part))
            total = part if total is None else total + part
        if total is None:
            return torch.zeros(*(len(line) for line in lines), self.out_features, device=lines[0].device)
        return self.gain * total

    def _level(self, x: Tensor, order: int, coefficients: Tensor, shape: tuple[int, int, int], h: Tensor) -> Tensor:
        upper = torch.tensor(shape, device=x.device) - 3
        free = (x - self.origin.to(x)) / h.to(x)
        at = free.clamp(min=torch.zeros_like(upper), max=upper - 1e-4)
        inside = (at == free).to(x)
        cell = at.detach().floor()
        weights = cubic_weights(at - cell, order)
        first = cell.long()
        _, ny, nz = shape
        near = torch.arange(4, device=x.device)
        rows = (
            ((first[:, 0, None] + near) * ny)[:, :, None, None] + (first[:, 1, None] + near)[:, None, :, None]
        ) * nz + (first[:, 2, None] + near)[:, None, None, :]
        values = coefficients.index_select(0, rows.flatten()).view(len(x), 64, -1)
        axes = [
            [w[:, axis] * (inside[:, axis, None] / h.to(x) ** d if d else 1) for d, w in enumerate(weights)]
            for axis in range(3)
        ]
        # The power of differentiation along each axis, of the value, the gradient and the second derivatives.
        powers = [(0, 0, 0)]
        if order:
            powers += [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
        if order == 2:
            powers += [tuple((i == a) + (j == a) for a in range(3)) for i, j in BASIS_PAIRS]  # type: ignore[misc]
        products = [
            (axes[0][p][:, :, None, None] * axes[1][q][:, None, :, None] * axes[2][r][:, None, None, :]).flatten(1)
            for p, q, r in powers
        ]
        found = torch.bmm(torch.stack(products, dim=1), values)
        return found.transpose(0, 1)


class CubicLattice(SplineField):
    """Sum of cubic B-spline control lattices of several spacings: a free-form deformation, coarse to fine.

    u(x) = sum over levels and control points k of B3((x - x_k) / h) c_k (Rueckert et al., IEEE TMI 18(8), 1999;
    multilevel: Lee et al., IEEE TVCG 3(3), 1997), the coefficients being the parameters. It starts at zero. See
    `SplineField` for what holds of all such splines.

    Args:
        spacings: distance of the control points of each level.
        out_features: dimension of the value.
        gain: factor of the coefficients; with Adam, the displacement moves by about ``gain`` * lr a step.
        unit: of ``spacings``: ``mm``, or ``voxel``, the geometric mean of the image's voxel sides.
    """

    def __init__(
        self,
        spacings: Sequence[float] = (48.0, 24.0, 12.0, 8.0),
        out_features: int = 3,
        gain: float = 1.0,
        unit: Literal["mm", "voxel"] = "mm",
    ) -> None:
        super().__init__(spacings, out_features, gain, unit)
        self.levels = nn.ParameterList()

    def cover(self, domain: Domain) -> None:
        before = self.shapes
        super().cover(domain)
        if self.shapes != before:
            device = self.origin.device
            sizes = [math.prod(n) for n in self.shapes]
            self.levels = nn.ParameterList(torch.zeros(n, self.out_features, device=device) for n in sizes)

    def coefficients(self, level: int, context: Tensor | None = None) -> Tensor:
        values: Tensor = self.levels[level]
        return values

    @torch.no_grad()
    def approximate(self, values: Callable[[Tensor], Tensor]) -> None:
        """Make the finest level the least-squares approximation of a function of points, the others zero.

        Args:
            values: normalised points [n, 3] -> [n, c], asked at two points for each control point and axis.
        """
        for level in self.levels:
            level.zero_()
        shape, h = self.shapes[-1], self.spacing[-1]
        at = [torch.linspace(0, n - 3, 2 * n, device=h.device, dtype=torch.float64) for n in shape]
        lines = [self.origin[axis] + h * line.to(h) for axis, line in enumerate(at)]
        samples = values(torch.cartesian_prod(*lines)).view(*(len(line) for line in lines), -1).double()
        x, y, z = (torch.linalg.pinv(basis_matrix(line, n)) for line, n in zip(at, shape, strict=True))
        fitted = torch.einsum("ax,by,cz,xyzd->abcd", x, y, z, samples) / self.gain
        self.levels[-1].copy_(fitted.reshape(-1, self.out_features))
