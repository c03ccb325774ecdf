"""Small pairs with a known transform: a smooth texture, read through an analytic map, so no interpolation enters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medinr.data.pair import Pair
from medinr.fields import SIREN, HarmonizedSIREN
from medinr.losses import NCC, Barrier, Bending
from medinr.methods import ConditionedRegistration, PairRegistration
from medinr.space import Domain, Image, transform_points

Warp = Callable[[Tensor], Tensor]
CUBE = Domain.of((32, 32, 32), [[3, 0, 0, -46.5], [0, 3, 0, -46.5], [0, 0, 3, -46.5], [0, 0, 0, 1]])


def texture(world: Tensor) -> Tensor:
    """Sum of 60 plane waves of 18 to 60 mm at points [n, 3] (RAS mm)."""
    generator = torch.Generator().manual_seed(3)
    direction = nn.functional.normalize(torch.randn(60, 3, generator=generator), dim=1).double()
    length = 18 + 42 * torch.rand(60, generator=generator).double()
    phase = 6.283 * torch.rand(60, generator=generator).double()
    return 100 * torch.cos(6.283 * world.double() @ direction.T / length + phase).sum(1)


LOBES = torch.tensor(
    [  # centre in mm, width in mm, height
        [0.0, 0, 0, 14, 0.7],
        [18, 6, -8, 7, 0.9],
        [-6, 18, 14, 6, 0.6],
        [-14, -12, -16, 7, 0.8],
        [8, -18, 15, 6, 1.0],
        [-20, 2, 6, 6, 0.9],
        [4, 12, -22, 6, 0.7],
    ]
).double()


def blob(world: Tensor) -> Tensor:
    """A smooth body of unequal lobes in air, some 60 mm wide: it can be cropped and turned without ambiguity."""
    squares = (world.double()[:, None] - LOBES[:, :3]).square().sum(-1)
    return 1000 * torch.exp(-squares / (2 * LOBES[:, 3] ** 2)) @ LOBES[:, 4]


def warp(world: Tensor) -> Tensor:
    """phi: up to some 6 mm, smooth, invertible."""
    x, y, z = world.double().unbind(-1)
    u = [5 * torch.sin(y / 18 + 0.5), 4 * torch.cos(z / 16), 4 * torch.sin((x + y) / 20)]
    return world.double() + torch.stack(u, dim=-1)


def affine_warp(matrix: Tensor) -> Warp:
    return lambda world: transform_points(matrix, world.double())


def sampled(domain: Domain, function: Warp, through: Warp | None = None, name: str = "") -> Image:
    """``function`` at ``through`` of the voxel centres of a grid."""
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    values = function(world if through is None else through(world))
    return Image(values.float().reshape(1, *domain.shape), domain, name)


def points(n: int = 50, half_mm: float = 36.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (2 * torch.rand(n, 3, generator=generator) - 1).double() * half_mm


def pair(through: Warp = warp, moving_domain: Domain = CUBE) -> Pair:
    """Fixed and moving image with the true transform ``through`` (fixed to moving) and 50 landmarks."""
    fixed = points()
    return Pair(
        "cube",
        sampled(CUBE, texture, through),
        sampled(moving_domain, texture),
        fixed_points=fixed,
        moving_points=through(fixed),
    )


def gentle(field: SIREN, size: float = 0.2) -> SIREN:
    """The same field with a small smooth displacement at once, instead of none."""
    with torch.no_grad():
        field.head.weight.mul_(size)
        field.head.bias.zero_()
    return field


def plain_method(domain: Domain = CUBE) -> PairRegistration:
    """A method as if it had been fitted: a smooth displacement of a few mm after a small shift."""
    start = torch.eye(4).double()
    start[0, 3] = 2.0
    method = PairRegistration(
        gentle(SIREN(hidden=(16, 16), omega=4.0, zero_output=False)), NCC(), {"fold": Barrier(1.0)}
    )
    method.remember(domain, start, [[0.0, 1.0], [0.0, 1.0]])
    return method


def conditioned_method(**arguments: object) -> ConditionedRegistration:
    """A conditioned one, whose displacement depends on alpha."""
    field = HarmonizedSIREN(1, hidden=(16, 16), omega=4.0, zero_output=False)
    nn.init.normal_(field.harmonizer.out.weight, std=0.2)
    options = {"points": 64, "search_points": 64, "grid": 3, **arguments}
    method = ConditionedRegistration(gentle(field), NCC(), {"bend": Bending(1.0)}, ["bend"], **options)
    method.remember(CUBE, torch.eye(4), [[0.0, 1.0], [0.0, 1.0]])
    return method
