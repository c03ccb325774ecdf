"""A transform on a whole grid: by the network at every voxel, or by cubic splines with a measured error."""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from torch import Tensor

from medinr import jets
from medinr.fields.regional import RegionalTransform
from medinr.fields.transform import LEVELS, Transform
from medinr.fields.warp import CHUNK, chunks
from medinr.space import Domain, transform_points

TOLERANCE_MM = 0.05
PROBES = 2048
"""Voxel centres at which the lattice's error is measured."""
SLAB = 1_000_000
"""Voxels that are interpolated at once: twelve numbers each, fifteen with the uncertainty."""


class Dense(NamedTuple):
    """A transform on a grid.

    Attributes:
        displacement: phi(p) - p [X, Y, Z, 3], RAS mm.
        det: det J_phi [X, Y, Z].
        uncertainty: length in mm of the vector that the transform is uncertain by [X, Y, Z]; None: it knows of none.
        error_mm: the largest measured error of the displacement.
        error_det: of the determinant, less in all but one of a thousand voxels.
    """

    displacement: Tensor
    det: Tensor
    uncertainty: Tensor | None
    error_mm: float
    error_det: float


def spline_matrix(n: int, nodes: int) -> Tensor:
    """[n, nodes]: cubic-spline interpolation at voxels 0 .. n-1 of values at ``nodes`` even positions over them."""
    at = np.linspace(0, n - 1, nodes)
    basis = make_interp_spline(at, np.eye(nodes), k=min(3, nodes - 1))(np.arange(n))
    return torch.as_tensor(basis, dtype=torch.float32)


def _evaluate(transform: Transform, world: Tensor) -> Tensor:
    """[n, 12 or 15]: displacement, the nine entries of the Jacobian, and the uncertainty where there is one."""
    moved, jacobian, offset = transform.expand(world)
    parts = [moved - world, jacobian.flatten(1)] + ([] if offset is None else [offset])
    return torch.cat(parts, dim=1).float()


def _scalars(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """det J_phi and the length of the uncertainty [...] from values [..., 12 or 15] of `_evaluate`."""
    det = jets.det(values[..., 3:12].unflatten(-1, (3, 3)))
    return det, values[..., 12:].norm(dim=-1) if values.shape[-1] > 12 else None


def _error_det(found: Tensor, truth: Tensor) -> float:
    """The 99.9th percentile: the largest one is that of a voxel beside a kink, at the border of the other image."""
    return (found - _scalars(truth)[0]).abs().quantile(0.999).item()


def evaluate_dense(transform: Transform, domain: Domain, exact: bool = False) -> Dense:
    """Displacement and Jacobian determinant at all voxel centres of a grid.

    Unless ``exact``: where the transform knows a faster form of itself (`Transform.tabulated`), that is evaluated at
    all voxels and compared with the transform at random ones (`Transform.judged`), finer until the largest error is
    below 0.05 mm (or a
    tenth of a voxel). Else the network is evaluated on a lattice of about 8 mm, interpolated by tensor-product cubic
    splines and compared with the network at random voxel centres; while the largest error exceeds that bound the
    lattice is refined, and where it would come close to the voxels they are all visited. Beside the result,
    16 bytes a voxel (20 with the uncertainty), and the lattice only a slab or chunk is in memory. Where regions slide
    along each other, each one's own smooth map is evaluated so.
    """
    if isinstance(transform, RegionalTransform):
        return _by_region(transform, domain, exact)
    # An image of a small animal has other lengths.
    tolerance = min(TOLERANCE_MM, 0.1 * min(domain.spacing))
    if not exact:
        step_mm = min(8.0, max(domain.sides_mm) / 12)
        generator = torch.Generator().manual_seed(0)
        size = torch.tensor(domain.shape)
        probes = (torch.rand(PROBES, 3, generator=generator) * size).long()
        judged = transform.judged(transform_points(domain.voxel_to_world, probes.double()))
        probes = probes[judged] if judged.any() else probes
        truth = _evaluate(transform, transform_points(domain.voxel_to_world, probes.double()))
        found = _by_table(transform, domain, probes, truth, tolerance)
        if found is not None:
            return found
        while True:
            nodes = [
                min(n, max(min(n, 4), 1 + math.ceil((n - 1) * s / step_mm)))
                for n, s in zip(domain.shape, domain.spacing, strict=True)
            ]
            if math.prod(nodes) > 0.5 * domain.n_voxels:
                break
            splines = [spline_matrix(n, k) for n, k in zip(domain.shape, nodes, strict=True)]
            lattice = _lattice(transform, domain, nodes)
            gap = (_at_voxels(lattice, splines, probes) - truth).abs()
            error = gap[:, :3].norm(dim=1).max().item()
            if error <= tolerance:
                displacement, det, uncertainty = _everywhere(lattice, splines)
                error_det = _error_det(det[tuple(probes.T)], truth)
                return Dense(displacement, det, uncertainty, error, error_det)
            del lattice, gap
            step_mm /= 2 if error > 4 * tolerance else 1.4
    return _all_voxels(transform, domain)


def _all_voxels(transform: Transform, domain: Domain) -> Dense:
    """The transform at every voxel centre."""
    displacement, det, uncertain = torch.empty(domain.n_voxels, 3), torch.empty(domain.n_voxels), []
    for rows, world in chunks(domain):
        found = _evaluate(transform, world)
        displacement[rows] = found[:, :3]
        det[rows], length = _scalars(found)
        uncertain += [] if length is None else [length]
    uncertainty = torch.cat(uncertain).reshape(domain.shape) if uncertain else None
    return Dense(displacement.reshape(*domain.shape, 3), det.reshape(domain.shape), uncertainty, 0.0, 0.0)


def _by_region(transform: RegionalTransform, domain: Domain, exact: bool) -> Dense:
    """Every voxel from the map of its own region."""
    region = torch.cat([transform.region(world) for _, world in chunks(domain)]).reshape(domain.shape)
    found: Dense | None = None
    for r, part in enumerate(transform.parts):
        own = evaluate_dense(part, domain, exact)
        if found is None:
            found = own
            continue
        here = region == r
        found.displacement[here], found.det[here] = own.displacement[here], own.det[here]
        found = found._replace(
            error_mm=max(found.error_mm, own.error_mm), error_det=max(found.error_det, own.error_det)
        )
    assert found is not None
    return found


def _by_table(transform: Transform, domain: Domain, probes: Tensor, truth: Tensor, tolerance: float) -> Dense | None:
    """By the transform's faster form, if it has one that is accurate enough."""
    at = transform_points(domain.voxel_to_world, probes.double())
    for level in range(LEVELS):
        quick = transform.tabulated(level)
        if quick is None:
            return None
        error = (quick(at) - at - truth[:, :3]).norm(dim=1).max().item()
        if error <= tolerance:
            error_det = _error_det(_scalars(_evaluate(quick, at))[0], truth)
            return _all_voxels(quick, domain)._replace(error_mm=error, error_det=error_det)
    return None


def _lattice(transform: Transform, domain: Domain, nodes: list[int]) -> Tensor:
    """[x, y, z, c] of `_evaluate` at evenly spaced nodes from the first to the last voxel of each axis."""
    lines = [torch.linspace(0, n - 1, k, dtype=torch.float64) for n, k in zip(domain.shape, nodes, strict=True)]
    _, ny, nz = nodes
    found = []
    for flat in torch.arange(math.prod(nodes)).split(CHUNK):
        index = (flat // (ny * nz), flat // nz % ny, flat % nz)
        voxels = torch.stack([line[k] for line, k in zip(lines, index, strict=True)], dim=1)
        found.append(_evaluate(transform, transform_points(domain.voxel_to_world, voxels)))
    return torch.cat(found).reshape(*nodes, -1)


def _at_voxels(lattice: Tensor, splines: list[Tensor], voxels: Tensor) -> Tensor:
    """[n, c]: the spline of a lattice at some voxels [n, 3], without building the whole volume."""
    found = []
    for some in voxels.split(max(1, SLAB // (lattice.shape[1] * lattice.shape[2]))):
        x, y, z = (matrix[index] for matrix, index in zip(splines, some.T, strict=True))
        planes = torch.einsum("pa,abcd->pbcd", x, lattice)
        found.append(torch.einsum("pb,pc,pbcd->pd", y, z, planes))
    return torch.cat(found)


def _everywhere(lattice: Tensor, splines: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Displacement, det J and uncertainty of a grid: the tensor-product spline, one axis after the other, in slabs."""
    x, y, z = splines
    shape = (len(x), len(y), len(z))
    displacement, det, uncertain = torch.empty(*shape, 3), torch.empty(shape), []
    step = max(1, SLAB // (shape[1] * shape[2]))
    for i in range(0, shape[0], step):
        out = torch.einsum("xa,abcd->xbcd", x[i : i + step], lattice)
        out = torch.einsum("yb,xbcd->xycd", y, out)
        out = torch.einsum("zc,xycd->xyzd", z, out)
        displacement[i : i + step] = out[..., :3]
        det[i : i + step], length = _scalars(out)
        uncertain += [] if length is None else [length]
    return displacement, det, torch.cat(uncertain) if uncertain else None


def folded(transform: Transform, domain: Domain, det: Tensor, mask: Tensor | None, error_det: float) -> float:
    """Folding %: share of voxel centres in the mask with det J_phi <= 0, exact from the field.

    Only voxels whose interpolated determinant is within four times its measured error of zero are asked again.
    """
    inside = torch.ones(domain.shape, dtype=torch.bool) if mask is None else mask.cpu()
    suspects = (inside & (det <= 4 * error_det)).nonzero().double()
    if len(suspects) == 0:
        return 0.0
    exact = jets.det(transform.jacobian(transform_points(domain.voxel_to_world, suspects)))
    return 100 * (exact <= 0).sum().item() / int(inside.sum())
