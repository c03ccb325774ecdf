"""A rigid or affine start: centres of mass and identity as candidates, then the similarity decides.

The result is A of phi(x) = A(x + u(x)): fixed world to moving world, RAS mm.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medinr.losses.similarities import ncc
from medinr.sampling import gaussian_smooth, interpolate
from medinr.space import Domain, Image, transform_points
from medinr.types import Mask, Matrix, Volume

Kind = Literal["none", "rigid", "affine"]
Level = tuple[Image, Image]
"""Fixed and moving image at one smoothing."""
POINTS = 20_000
MINIMAL_OVERLAP = 0.3
"""A start that leaves less of the fixed points inside the moving image is no candidate."""


def rotation(vector: Tensor) -> Tensor:
    """Rotation matrix [3, 3] of a rotation vector [3] (radians), the matrix exponential of its cross product."""
    x, y, z = vector
    zero = torch.zeros_like(x)
    rows = [torch.stack(r) for r in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    out: Tensor = torch.linalg.matrix_exp(torch.stack(rows))
    return out


def affine_matrix(parameters: Tensor, centre: Tensor) -> Matrix:
    """[4, 4] from 6 (rotation vector, translation / 100 mm) or 12 (and log scales, shears), about a centre in mm."""
    linear = rotation(parameters[:3])
    if len(parameters) > 6:
        stretch = torch.diag(parameters[6:9].exp()) + torch.zeros(3, 3).to(parameters)
        upper = torch.zeros(3, 3).to(parameters)
        upper[[0, 0, 1], [1, 2, 2]] = parameters[9:12]
        linear = linear @ (stretch + upper)
    shift = centre + 100 * parameters[3:6] - linear @ centre
    top = torch.cat((linear, shift[:, None]), dim=1)
    return torch.cat((top, torch.tensor([[0.0, 0.0, 0.0, 1.0]]).to(top)))


def centre_of_mass(volume: Volume, domain: Domain, mask: Mask | None = None) -> Tensor:
    """Intensity-weighted centre in world mm; of the mask alone where one is given."""
    weight = (volume.mean(0) if mask is None else mask).double().cpu()
    total = weight.sum().clamp(min=1e-9)
    voxel = [
        (weight.sum(dim=[a for a in range(3) if a != axis]) * torch.arange(n).double()).sum() / total
        for axis, n in enumerate(weight.shape)
    ]
    return transform_points(domain.voxel_to_world, torch.stack(voxel))


def coarse_image(volume: Volume, domain: Domain, smoothing_mm: float) -> Image:
    """The smoothed volume, with voxels no smaller than half the smoothing needs: a small volume stays in the cache."""
    step = [max(1, int(smoothing_mm / 2 / s)) for s in domain.spacing]
    smooth = gaussian_smooth(volume, smoothing_mm, domain.spacing)[:, :: step[0], :: step[1], :: step[2]].contiguous()
    steps = torch.diag(torch.tensor([*step, 1], dtype=torch.float64))
    return Image(smooth, Domain.of(smooth.shape[1:], domain.voxel_to_world @ steps))


def find_start(
    fixed: Image,
    moving: Image,
    kind: Kind,
    windows: Sequence[tuple[float, float]],
    fixed_mask: Mask | None = None,
    moving_mask: Mask | None = None,
    levels_mm: Sequence[float] = (8.0, 4.0),
    iterations: int = 60,
    seed: int = 0,
) -> Matrix:
    """Rigid or affine transform that maximises the global NCC, coarse to fine, on a fixed sample of points.

    Starts from the identity and from the centres of mass, keeps the better one after the coarsest level, and returns
    the identity where nothing is better than it.
    """
    identity = torch.eye(4, dtype=torch.float64)
    if kind == "none":
        return identity
    generator = torch.Generator().manual_seed(seed)
    f, m = (((i.data - a) / (b - a)).clamp(0, 1) for i, (a, b) in zip((fixed, moving), windows, strict=True))
    domain = fixed.domain
    size = torch.tensor(domain.shape, dtype=torch.float32)
    voxels = torch.rand(POINTS, 3, generator=generator) * size - 0.5
    world = transform_points(domain.voxel_to_world, voxels.double())
    centre = transform_points(domain.normalised_to_world, torch.zeros(1, 3).double())[0]
    shift = centre_of_mass(m, moving.domain, moving_mask) - centre_of_mass(f, domain, fixed_mask)

    def score(parameters: Tensor, level: Level) -> Tensor:
        moved = transform_points(affine_matrix(parameters, centre), world)
        with torch.no_grad():
            inside = moving.domain.contains_voxels(transform_points(moving.domain.world_to_voxel, moved)).double()
        a, b = (
            interpolate(i.data, transform_points(i.domain.world_to_voxel, p).float()).mean(0).double()
            for i, p in zip(level, (world, moved), strict=True)
        )
        similarity = ncc(a, b, inside)
        # Little overlap makes a high correlation easy: it must not win.
        return similarity - (MINIMAL_OVERLAP - inside.mean()).clamp(min=0) * 10

    def improve(parameters: Tensor, level: Level) -> tuple[Tensor, float]:
        free = parameters.clone().requires_grad_()
        optimizer = torch.optim.Adam([free], lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        best, found = parameters, -float("inf")
        for _ in range(iterations):
            value = score(free, level)
            if value.item() > found:
                best, found = free.detach().clone(), value.item()
            optimizer.zero_grad()
            (-value).backward()
            optimizer.step()
            schedule.step()
        return best, found

    def pyramid(mm: float) -> Level:
        return coarse_image(f, domain, mm), coarse_image(m, moving.domain, mm)

    coarse = pyramid(levels_mm[0])
    at_identity = torch.zeros(6, dtype=torch.float64)
    at_centres = torch.cat((torch.zeros(3, dtype=torch.float64), shift / 100))
    candidates = [improve(p, coarse) for p in (at_identity, at_centres)]
    parameters = max(candidates, key=lambda c: c[1])[0]
    if kind == "affine":
        parameters = torch.cat((parameters, torch.zeros(6, dtype=torch.float64)))
        parameters, _ = improve(parameters, coarse)
    for mm in levels_mm[1:]:
        coarse = pyramid(mm)
        parameters, _ = improve(parameters, coarse)
    with torch.no_grad():
        if score(parameters, coarse) <= score(at_identity, coarse):
            return identity
    return affine_matrix(parameters, centre)
