"""An atlas as volumes: intensities, label probabilities and labels on any grid."""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from medinr.latents import Latent
from medinr.precision import full
from medinr.space import Domain, transform_points

CHUNK = 4096
COARSE = 4
"""A coarse look, at every so many voxels, says where there is anything to look at closely."""
FAINT = 0.02
"""Of the intensity window: below it, and surely background, nothing is looked at closely."""


class Decodes(Protocol):
    """What can say of a brain what it looks like at any point."""

    modalities: tuple[str, ...]
    labels: tuple[int, ...]
    unit_mm: float

    def decode(self, world: Tensor, codes: Tensor, encoded: Tensor, poses: Tensor, centres: Tensor) -> Tensor:
        """Intensities and logits [S, n, M + K] at world points [S, n, 3] of S brains."""
        ...


@dataclass(frozen=True)
class AtlasVolume:
    """One brain on a grid.

    Attributes:
        domain: the grid.
        images: [X, Y, Z] by modality, 0 to 1; 0 outside the brain.
        labels: [X, Y, Z] int16, label values; None without labels.
        probabilities: [X, Y, Z, K], half precision, the background first; None without labels.
        label_values: of the K classes.
    """

    domain: Domain
    images: dict[str, Tensor]
    labels: Tensor | None = None
    probabilities: Tensor | None = None
    label_values: tuple[int, ...] = field(default=(0,))

    def volumes_ml(self) -> dict[int, float]:
        """Volume of each label above 0, in ml."""
        if self.labels is None:
            return {}
        voxel = math.prod(self.domain.spacing) / 1000
        counts = torch.bincount(self.labels.flatten().long(), minlength=max(self.label_values) + 1)
        return {v: float(counts[v]) * voxel for v in self.label_values[1:]}

    @property
    def inside(self) -> Tensor:
        """Where there is a brain [X, Y, Z]."""
        if self.labels is not None:
            return self.labels > 0
        return torch.stack([v > FAINT for v in self.images.values()]).any(0)


def atlas_domain(unit_mm: float, spacing: float) -> Domain:
    """A grid along R, A and S around the atlas's origin that holds its cube."""
    n = math.ceil(2 * unit_mm / spacing)
    affine = torch.diag(torch.tensor([spacing] * 3 + [1.0], dtype=torch.float64))
    affine[:3, 3] = -spacing * (n - 1) / 2
    return Domain.of((n, n, n), affine)


@torch.no_grad()
def decoded_at(atlas: Decodes, latent: Latent, world: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Intensities and logits [n, M + K] at world points [n, 3], piece by piece, in full precision, on the CPU."""
    one = [v[None].to(device) for v in (latent.code, latent.encoded, latent.pose, latent.centre)]
    step = CHUNK if str(device) == "cpu" else 64 * CHUNK
    with full(torch.device(device).type):
        return torch.cat([atlas.decode(piece[None].to(device), *one)[0].cpu() for piece in world.split(step)])


def _anything(atlas: Decodes, out: Tensor) -> Tensor:
    """Where outputs [n, M + K] show anything: an intensity, or a label that is not surely background."""
    m = len(atlas.modalities)
    seen = (out[:, :m] > FAINT).any(1)
    return seen | (out[:, m:].softmax(1)[:, 0] < 1 - FAINT) if len(atlas.labels) > 1 else seen


def render(atlas: Decodes, latent: Latent, domain: Domain, device: torch.device | str = "cpu") -> AtlasVolume:
    """The brain on a grid. What is not connected with its central piece is cleared.

    Args:
        atlas: the decoder.
        latent: which brain; in the world of its own pose (`Latent.upright` for that of the atlas).
        domain: the grid.
        device: of the decoder.
    """
    shape = domain.shape
    sparse = [torch.arange(0, n, COARSE) for n in shape]
    grid = torch.cartesian_prod(*sparse).float()
    seen = _anything(atlas, decoded_at(atlas, latent, transform_points(domain.voxel_to_world, grid), device))
    rough = F.max_pool3d(seen.float().view(1, 1, *(len(s) for s in sparse)), 3, stride=1, padding=1)
    for axis, n in enumerate(shape):
        rough = rough.repeat_interleave(COARSE, dim=axis + 2).narrow(axis + 2, 0, n)
    rough[..., 0, 0, 0] = 1  # at least one voxel is looked at, also where there is nothing
    flat = (rough[0, 0] > 0.5).flatten().nonzero()[:, 0]
    _, ny, nz = shape
    voxels = torch.stack((flat // (ny * nz), flat // nz % ny, flat % nz), dim=1).float()
    m, k = len(atlas.modalities), len(atlas.labels)
    images = torch.zeros(m, domain.n_voxels)
    world = transform_points(domain.voxel_to_world, voxels)
    out = decoded_at(atlas, latent, world, device)
    images[:, flat] = out[:, :m].clamp(0, 1).T
    images = images.view(m, *shape)
    weight = torch.zeros(domain.n_voxels)
    weight[flat] = torch.exp(-((world - latent.centre).norm(dim=1) / (0.5 * atlas.unit_mm)).square()).float()
    weight = weight.view(*shape)
    if k == 1:
        images = images * central_piece((images > FAINT).any(0), weight)
        return AtlasVolume(domain, dict(zip(atlas.modalities, images, strict=True)))
    probabilities = torch.zeros(domain.n_voxels, k, dtype=torch.float16)
    probabilities[:, 0] = 1
    probabilities[flat] = out[:, m:].softmax(1).half()
    classes = torch.zeros(domain.n_voxels, dtype=torch.int16)
    classes[flat] = out[:, m:].argmax(1).to(torch.int16)
    labels = torch.tensor(atlas.labels, dtype=torch.int16)[classes.long()].view(shape)
    piece = central_piece(labels > 0, weight)
    probabilities[~piece.flatten()] = torch.eye(k, dtype=torch.float16)[0]
    labels = labels * piece
    edge = torch.from_numpy(ndimage.binary_dilation(labels.numpy() > 0, iterations=1))
    return AtlasVolume(
        domain, dict(zip(atlas.modalities, images * edge, strict=True)), labels,
        probabilities.view(*shape, k), atlas.labels,
    )  # fmt: skip


def central_piece(mask: Tensor, weight: Tensor) -> Tensor:
    """The connected part (by faces) of a mask [X, Y, Z] with the largest sum of weights [X, Y, Z].

    Far from every training scan the decoder says anything, and such pieces may be larger than a small brain.
    """
    pieces, count = ndimage.label(mask.numpy())
    if count < 2:
        return mask
    sums = ndimage.sum_labels(weight.numpy(), pieces, range(1, count + 1))
    return torch.from_numpy(pieces == int(sums.argmax()) + 1)
