"""A rigid or affine start: many coarse poses at once, the best of them refined, and a local measure has the last word.

The result is A of phi(x) = A(x + u(x)): fixed world to moving world, RAS mm. All lengths inside are in units of half
the fixed image's longest side, so that a mouse brain and a thorax are searched alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from medinr.losses.similarities import ncc
from medinr.sampling import interpolate, patch_offsets
from medinr.space import Domain, Image, transform_points
from medinr.types import Mask, Matrix, Volume

Kind = Literal["none", "rigid", "affine"]
MINIMAL_OVERLAP = 0.3
"""A start that leaves less of the fixed points inside the moving image is no candidate."""
LEVELS = ((0.032, 2_000), (0.016, 6_000), (0.008, 20_000))
"""Smoothing in parts of the fixed image's longest side (at least 0.75 voxels), and points, of the levels."""
TURN = math.radians(35.0)
"""The poses that are tried: no turn, and this one about each axis in both directions."""
BINS = 16
"""Of the correlation ratio."""
MARGIN = 2.0
"""Spread of the points around a mask, in the level's smoothing."""


def rotation(vector: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of rotation vectors [..., 3] (radians), exponentials of their cross products."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(r, dim=-1) for r in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    out: Tensor = torch.linalg.matrix_exp(torch.stack(rows, dim=-2))
    return out


def affine_matrix(parameters: Tensor) -> Tensor:
    """Matrices [..., 4, 4] about the origin of parameters [..., 6 or 12].

    Rotation vector (radians), translation; then logarithms of the scales, and the shears xy, xz, yz.
    """
    linear = rotation(parameters[..., :3])
    if parameters.shape[-1] > 6:
        upper = torch.diag_embed(parameters[..., 6:9].exp())
        upper[..., [0, 0, 1], [1, 2, 2]] = parameters[..., 9:12]
        linear = linear @ upper
    top = torch.cat((linear, parameters[..., 3:6, None]), dim=-1)
    last = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).to(top).expand(*top.shape[:-2], 1, 4)
    return torch.cat((top, last), dim=-2)


def centre_of_mass(volume: Volume, domain: Domain, mask: Mask | None = None) -> Tensor:
    """Centre in world mm of a mask, or of what differs from the image's border, bright or dark, weighted by how far.

    The border's median stands for the background, so that the centre of a scan is that of its inverted contrast.
    """
    if mask is None:
        values = volume.mean(0)
        faces = [values.select(axis, side).flatten() for axis in range(3) for side in (0, -1)]
        weight = (values - torch.cat(faces).median()).abs()
    else:
        weight = mask
    sums = [weight.sum(dim=[a for a in range(3) if a != axis]).double().cpu() for axis in range(3)]
    voxel = [(s * torch.arange(len(s))).sum() / s.sum().clamp(min=1e-9) for s in sums]
    return transform_points(domain.voxel_to_world, torch.stack(voxel))


def coarse_image(image: Image, smoothing_mm: float) -> Image:
    """The image smoothed by a Gaussian, on voxels of about its standard deviation between the same outer edges.

    Each axis is one product with a small matrix, so that large volumes cost little, and it does not matter from which
    end the array counts.
    """
    data, affine = image.data, image.domain.voxel_to_world.clone()
    for axis, (n, spacing) in enumerate(zip(image.domain.shape, image.domain.spacing, strict=True)):
        m = min(n, math.ceil(n * spacing / smoothing_mm))
        centres = (torch.arange(m).double() + 0.5) * n / m - 0.5
        distance = (centres[:, None] - torch.arange(n)) * spacing / smoothing_mm
        weight = torch.exp(-0.5 * distance.square())
        weight = (weight / weight.sum(1, keepdim=True)).float()
        data = torch.tensordot(data, weight, dims=([axis + 1], [1])).movedim(-1, axis + 1)
        affine[:3, 3] += affine[:3, axis] * centres[0]
        affine[:3, axis] *= n / m
    return Image(data.contiguous(), Domain.of(data.shape[1:], affine))


def correlation_ratio(fixed: Tensor, moved: Tensor, weight: Tensor) -> Tensor:
    """Share [B] of the variance of ``moved`` [B, N] that a function of ``fixed`` [N] (in [0, 1]) explains.

    eta^2 = Var(E[moved | fixed]) / Var(moved) (Roche et al., MICCAI 1998), with linear bins of the fixed intensity and
    weights [B, N]. One for any functional relation of the contrasts, an inverted one included.
    """
    centres = torch.linspace(0, 1, BINS).to(fixed)
    bins = (1 - (fixed[:, None] - centres).abs() * (BINS - 1)).clamp(min=0)
    total = weight.sum(-1).clamp(min=1e-6)
    mean = (weight * moved).sum(-1) / total
    centred = weight * (moved - mean[:, None])
    explained = ((centred @ bins).square() / (weight @ bins).clamp(min=1e-3)).sum(-1) / total
    variance = (centred * (moved - mean[:, None])).sum(-1) / total
    return explained / (variance + 1e-6)


@dataclass(frozen=True)
class Comparison:
    """Fixed and moving image at one smoothing, compared at a sample of fixed points.

    Attributes:
        x: fixed points [N, 3] in the frame.
        frame: to the fixed world [4, 4], of coordinates about the fixed body's centre along the axes of the fixed
            grid, in units of half its longest side.
        grid: of the moving image as it was given: where its samples count.
        free: 1 for the parameters [12] that may differ from zero, 0 for the others.
    """

    x: Tensor
    frame: Matrix
    fixed: Image
    moving: Image
    grid: Domain
    free: Tensor
    multimodal: bool

    @cached_property
    def values(self) -> Tensor:
        """The fixed image at the points [N]."""
        return self.fixed_at(self.x)

    def fixed_at(self, x: Tensor) -> Tensor:
        to_voxel = self.fixed.domain.world_to_voxel @ self.frame
        return interpolate(self.fixed.data, transform_points(to_voxel, x)).mean(0)

    def matrices(self, parameters: Tensor) -> Tensor:
        """World matrices [B, 4, 4]."""
        inner = affine_matrix(parameters * self.free[: parameters.shape[1]])
        out: Tensor = self.frame @ inner @ torch.linalg.inv(self.frame)
        return out

    def sample(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Moving values and weights [B, ...] at points [..., 3] under B transforms of parameters [B, 6 or 12]."""
        world = self.matrices(parameters) @ self.frame

        def voxels(domain: Domain) -> Tensor:
            matrix = (domain.world_to_voxel @ world).float()
            flat = x.reshape(1, -1, 3) @ matrix[:, :3, :3].mT + matrix[:, None, :3, 3]
            return flat.reshape(len(parameters), *x.shape)

        with torch.no_grad():
            inside = self.grid.contains_voxels(voxels(self.grid)).float()
        return interpolate(self.moving.data, voxels(self.moving.domain)).mean(0), inside

    def score(self, parameters: Tensor) -> Tensor:
        """Similarity [B] of the whole images, higher is better: NCC, or the root of the correlation ratio."""
        moved, inside = self.sample(parameters, self.x)
        if self.multimodal:
            similarity = correlation_ratio(self.values, moved, inside).clamp(min=1e-6).sqrt()
        else:
            similarity = ncc(self.values, moved, inside)
        return similarity - self.missing(inside)

    @staticmethod
    def missing(inside: Tensor) -> Tensor:
        """Penalty of too little overlap, which makes a high correlation easy: it must not win."""
        return (MINIMAL_OVERLAP - inside.mean(-1)).clamp(min=0) * 10

    def improve(self, parameters: Tensor, iterations: int, rate: float) -> tuple[Tensor, Tensor]:
        """Adam on B transforms at once: the best parameters [B, p] and scores [B] that each has seen."""
        free = parameters.clone().requires_grad_()
        optimizer = torch.optim.Adam([free], lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        best, found = parameters.clone(), torch.full((len(parameters),), -math.inf)
        for _ in range(iterations):
            value = self.score(free)
            better = value.detach() > found
            best[better], found[better] = free.detach()[better], value.detach()[better]
            optimizer.zero_grad()
            (-value.sum()).backward()
            optimizer.step()
            schedule.step()
        return best, found

    @torch.no_grad()
    def agreement(self, parameters: Tensor, radius: float, n: int = 4000) -> Tensor:
        """Mean local NCC [B] of patches of 3^3 samples at the first ``n`` points, squared for other contrasts.

        Unlike a correlation of the whole images it sees what a start does to the still parts beside a moving organ.
        Patches count by their contrast in the fixed image.
        """
        x = self.x[:n, None] + patch_offsets(radius)
        fixed = self.fixed_at(x)
        contrast = fixed.std(-1)
        found = []
        for one in parameters:  # patches are many: one transform at a time
            moved, inside = self.sample(one[None], x)
            local = ncc(fixed, moved[0], inside[0], 1e-4)
            local = local.square() if self.multimodal else local
            weight = contrast * inside[0].mean(-1)
            mean = (weight * local).sum() / weight.sum().clamp(min=1e-6)
            found.append(mean - self.missing(inside[0].flatten()))
        return torch.stack(found)


def grid_frame(domain: Domain, centre: Tensor) -> Matrix:
    """From units of half the longest side, about a centre [3] in mm, along the grid's axes, to the world."""
    frame = torch.eye(4, dtype=torch.float64)
    frame[:3, :3] = domain.directions * domain.unit_mm
    frame[:3, 3] = centre
    return frame


def free_parameters(domain: Domain) -> Tensor:
    """Which of the 12 parameters a grid leaves free: a single slice has no others than those of its plane."""
    thick = torch.tensor([float(n > 1) for n in domain.shape], dtype=torch.float64)
    x, y, z = thick
    pairs = torch.stack((x * y, x * z, y * z))
    return torch.cat((pairs.flip(0), thick, thick, pairs))


def sample_voxels(domain: Domain, n: int, generator: torch.Generator, mask: Mask | None, margin_mm: float) -> Tensor:
    """Voxel coordinates [n, 3], uniform over the grid, or over a mask with a normal spread of ``margin_mm``.

    The spread makes the borders of what is in the mask count: they say most of where it lies.
    """
    if mask is None:
        return torch.rand(n, 3, generator=generator) * torch.tensor(domain.shape) - 0.5
    flat = mask.cpu().flatten().nonzero()[:, 0]
    flat = flat[torch.randint(len(flat), (n,), generator=generator)]
    _, ny, nz = domain.shape
    voxels = torch.stack((flat // (ny * nz), flat // nz % ny, flat % nz), dim=1)
    spread = margin_mm / torch.tensor(domain.spacing, dtype=torch.float32)
    voxels = voxels + spread * torch.randn(n, 3, generator=generator) + torch.rand(n, 3, generator=generator) - 0.5
    return voxels.clamp(min=-0.5).minimum(torch.tensor(domain.shape) - 0.5)


def poses(shifts: Sequence[Tensor]) -> Tensor:
    """Parameters [B, 6] of every turn with every shift; the first is no turn with the first shift."""
    turns = [torch.zeros(3)] + [s * TURN * torch.eye(3)[a] for a in range(3) for s in (1, -1)]
    return torch.stack([torch.cat((t.double(), s)) for t in turns for s in shifts])


def find_start(
    fixed: Image,
    moving: Image,
    kind: Kind,
    windows: Sequence[tuple[float, float]],
    fixed_mask: Mask | None = None,
    moving_mask: Mask | None = None,
    multimodal: bool = False,
    seed: int = 0,
) -> Matrix:
    """Rigid or affine transform fixed to moving that brings the images together, coarse to fine, on sampled points.

    Identity, centres of mass (of the masks where both are given) and centres of the grids, each with turns about
    three axes, are improved side by side at the coarsest level; the better ones go on. At the end the measure of small
    patches chooses between the affine, the rigid transform and the identity.

    Args:
        fixed_mask: where the fixed image counts: after the coarsest level only points in and around it are compared.
        moving_mask: with ``fixed_mask``, for the centres of mass.
        windows: intensities of either image that become 0 and 1.
        multimodal: the contrasts are related by any function, an inversion included: correlation ratio for NCC.
    """
    identity = torch.eye(4, dtype=torch.float64)
    if kind == "none":
        return identity
    generator = torch.Generator().manual_seed(seed)
    f, m = (
        Image(((i.data - a) / (b - a)).clamp(0, 1), i.domain)
        for i, (a, b) in zip((fixed, moving), windows, strict=True)
    )
    images = [
        [coarse_image(i, max(share * max(f.domain.sides_mm), 0.75 * max(i.domain.spacing))) for i in (f, m)]
        for share, _ in LEVELS
    ]
    centres = [centre_of_mass(i.data, i.domain) for i in images[0]]
    if fixed_mask is not None and moving_mask is not None:
        centres = [centre_of_mass(i.data, i.domain, k) for i, k in ((f, fixed_mask), (m, moving_mask))]
    frame = grid_frame(f.domain, centres[0])
    to_frame = torch.linalg.inv(frame)
    offsets = [
        torch.zeros(3, dtype=torch.float64),
        centres[1] - centres[0],
        (m.domain.normalised_to_world - f.domain.normalised_to_world)[:3, 3],
    ]
    shifts = [to_frame[:3, :3] @ mm for mm in offsets]
    free = free_parameters(f.domain)
    levels = []
    for i, ((a, b), (share, n)) in enumerate(zip(images, LEVELS, strict=True)):
        # Where to look is found by all that is to be seen; how to lie there, by what counts.
        mask, margin_mm = (fixed_mask if i else None), MARGIN * share * max(f.domain.sides_mm)
        voxels = sample_voxels(f.domain, n, generator, mask, margin_mm)
        x = transform_points(to_frame @ f.domain.voxel_to_world, voxels.double()).float()
        levels.append(Comparison(x, frame, a, b, m.domain, free, multimodal))
    coarse, middle, fine = levels
    found, score = coarse.improve(poses(shifts), 20, 0.04)
    found, score = coarse.improve(found[score.topk(6).indices], 30, 0.02)
    found, score = middle.improve(found[score.topk(2).indices], 40, 0.01)
    rigid, _ = fine.improve(found[score.argmax()][None], 30, 0.005)
    candidates = [torch.zeros(1, 6, dtype=torch.float64), rigid]
    if kind == "affine":
        affine = torch.cat((rigid, torch.zeros_like(rigid)), dim=1)
        affine, _ = middle.improve(affine, 40, 0.01)
        candidates.append(fine.improve(affine, 40, 0.005)[0])
    agreement = torch.cat([fine.agreement(c, 2 * LEVELS[-1][0]) for c in candidates])
    best = int(agreement.argmax())
    return identity if best == 0 else fine.matrices(candidates[best])[0]
