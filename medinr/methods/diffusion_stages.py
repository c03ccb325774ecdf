"""The losses of the stages of `DiffusionDeformation`, functions of networks and tensors, and its generated atlas."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medinr.configured import Configured
from medinr.errors import UserError
from medinr.fields.latent import Autoencoder, kl_divergence, on_lattice
from medinr.fields.squaring import grid_jet, inside, warp
from medinr.losses import Regularizer
from medinr.losses.morphology import Register, content, integrated, mean_displacement, morphology_loss
from medinr.losses.volumes import VolumeNCC
from medinr.space import REFERENCE_LENGTH_MM, Domain
from medinr.types import Scalar

Stage = Literal["registration", "autoencoder", "diffusion", "morphology"]
STAGES: tuple[Stage, ...] = ("registration", "autoencoder", "diffusion", "morphology")
CONTRAST = 1e-6
"""Windows of the fixed image with a smaller variance say nothing, and do not count."""


class Morphology(Configured):
    """Settings of morphology preservation.

    Args:
        weight: of the squared mean displacement, in voxels^2 (the released code: 1).
        neighbours: N training scans around a condition, drawn once for each (paper: 15).
        per_step: of those, registered in a step; their mean displacement is a noisy estimate of that of all N. The
            paper takes all; three networks' activations are what a small GPU holds.
        bandwidth: of the Gaussian that draws them, in parts of a condition's trained range.
        steps: DDIM steps of the sample.
        differentiable: of those, at the end, carry the gradient to the denoiser.
    """

    def __init__(
        self,
        weight: float = 1.0,
        neighbours: int = 15,
        per_step: int = 3,
        bandwidth: float = 0.1,
        steps: int = 20,
        differentiable: int = 2,
    ) -> None:
        if min(neighbours, per_step, differentiable) < 1 or bandwidth <= 0 or weight < 0:
            raise UserError(
                "morphology: expected neighbours, per_step and differentiable from 1, a bandwidth above 0 and a weight "
                f"from 0, found {neighbours}, {per_step}, {differentiable}, {bandwidth} and {weight}"
            )
        if differentiable > steps:
            raise UserError(f"morphology: expected no more differentiable steps than {steps}, found {differentiable}")
        self.weight, self.neighbours, self.per_step = weight, neighbours, per_step
        self.bandwidth, self.steps, self.differentiable = bandwidth, steps, differentiable


def penalties(
    regularizers: Mapping[str, Regularizer], u: Tensor, spacing: Sequence[float]
) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
    """Raw and weighted penalties by name of displacements [B, 3, X, Y, Z] in voxels."""
    if not regularizers:
        return {}, {}
    mm = u * torch.tensor(spacing, device=u.device, dtype=u.dtype).view(3, 1, 1, 1)
    order = max(r.order for r in regularizers.values())
    jets = [grid_jet(each, spacing, REFERENCE_LENGTH_MM, order) for each in mm]
    raw = {k: torch.stack([r(jet) for jet in jets]).mean() for k, r in regularizers.items()}
    return raw, {k: regularizers[k].weight * v for k, v in raw.items()}


def registration_similarity(fixed: Tensor, moving: Tensor, u: Tensor, radius: int) -> Scalar:
    """1 - mean local NCC in windows of 2 radius + 1 voxels of fixed [B, 1, X, Y, Z] and moving images through u."""
    moved, weight = warp(moving, u)[:, 0], inside(u).float()
    losses = []
    for f, m, w in zip(fixed[:, 0], moved, weight, strict=True):
        local = VolumeNCC(f, radius)
        losses.append(local(m, w * (local.variance > CONTRAST)))
    return torch.stack(losses).mean()


def autoencoder_terms(autoencoder: Autoencoder, coarse: Tensor, kl_weight: float) -> dict[str, Scalar]:
    """L1 difference of volumes on the lattice and what is decoded of a sample of their latent, and the weighted KL.

    The released code adds a perceptual loss, whose network is not at hand offline, and an adversarial one, which its
    own settings never let begin.
    """
    mean, sigma = autoencoder.encode_coarse(coarse)
    z = mean + sigma * torch.randn_like(sigma)
    shape = [n * autoencoder.stride for n in coarse.shape[2:]]
    found = autoencoder.decode_coarse(z, shape)
    return {"reconstruction": F.l1_loss(found, coarse), "kl": kl_weight * kl_divergence(mean, sigma)}


def mixed_pairs(coarse: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random convex combinations of each volume with the next: an atlas lies between persons, its code must exist."""
    share = torch.rand(len(coarse), 1, 1, 1, 1, generator=generator, device="cpu").to(coarse)
    return share * coarse + (1 - share) * coarse.roll(1, 0)


def dropped(values: Tensor, share: float) -> Tensor:
    """Conditions [B, C], some of them missing: each with probability ``share``, and all of a row with it, too."""
    one = torch.rand(values.shape, device="cpu") < share
    every = torch.rand(len(values), 1, device="cpu") < share
    return values.masked_fill((one | every).to(values.device), torch.nan)


def morphology_terms(
    register: Register, atlas: Tensor, velocity: Tensor, neighbours: Tensor, squarings: int, weight: float
) -> tuple[Tensor, dict[str, Scalar]]:
    """The displacement [1, 3, X, Y, Z] of a generated atlas, and the weighted morphology loss of its neighbours.

    Args:
        register: frozen; gradients go through it to the atlas.
        atlas: the general one [1, 1, X, Y, Z].
        velocity: generated [1, 3, X, Y, Z].
        neighbours: images [n, 1, X, Y, Z].
    """
    u = integrated(velocity, squarings)
    made = warp(atlas, u)
    mean = mean_displacement(register, made, neighbours, squarings)
    return u, {"morphology": weight * morphology_loss(mean, content(made.detach()))}


@dataclass(frozen=True)
class Comparison:
    """What a registration is judged by: local NCC in windows of 2 ``radius`` + 1 voxels, and penalties."""

    radius: int
    squarings: int
    spacing: tuple[float, float, float]
    regularizers: Mapping[str, Regularizer]

    def __call__(self, fixed: Tensor, moving: Tensor, velocity: Tensor) -> tuple[Tensor, dict[str, Scalar]]:
        """Displacement [1, 3, X, Y, Z], and the similarity of images [1, 1, X, Y, Z] under it."""
        u = integrated(velocity, self.squarings)
        return u, {"similarity": registration_similarity(fixed, moving, u, self.radius)}

    def penalize(self, u: Tensor) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
        """See `penalties`."""
        return penalties(self.regularizers, u, self.spacing)


def label_difference(probabilities: Tensor, labels: Tensor, values: Sequence[int], u: Tensor) -> Scalar:
    """Mean over the labelled voxels of the squared difference of warped label probabilities and labels, summed.

    Auxiliary labels of training scans, as in VoxelMorph (Balakrishnan et al., IEEE TMI 38(8), 2019; there Dice): the
    thin cerebrospinal fluid of the sulci is hardly seen by local NCC on a coarse grid.

    Args:
        probabilities: of the atlas [L, X, Y, Z].
        labels: of the scan [X, Y, Z]; -1: nobody has looked.
        u: [1, 3, X, Y, Z].
    """
    seen = labels >= 0
    truth = torch.stack([labels == v for v in values]).to(u)
    apart = (warp(probabilities[None], u)[0] - truth).square().sum(0)
    return (apart * seen).sum() / seen.sum().clamp(min=1)


def refined(
    compare: Comparison,
    fixed: Tensor,
    moving: Tensor,
    velocity: Tensor,
    strides: Sequence[int],
    steps: int,
    lr: float,
    also: Callable[[Tensor], Scalar] | None = None,
) -> Tensor:
    """A network's velocity [1, 3, X, Y, Z] improved on the very images (instance optimisation, Balakrishnan et al.).

    Adam on control points of every ``stride``-th voxel, trilinear between them, for each stride in turn. Its epsilon is
    the first gradient's root mean square: without it, what shows nothing (the background) moves as fast as the rest.

    Args:
        fixed, moving: [1, 1, X, Y, Z].
        steps: at each stride.
        lr: voxels.
        also: a further term of the displacement.
    """
    shape = list(velocity.shape[2:])
    found = velocity.detach()
    for stride in strides:
        control = on_lattice(found, [-(-n // stride) for n in shape]).requires_grad_()
        adam: torch.optim.Adam | None = None
        for _ in range(steps):
            with torch.enable_grad():
                dense = F.interpolate(control, size=shape, mode="trilinear", align_corners=False)
                u, terms = compare(fixed, moving, dense)
                loss = terms["similarity"] + sum(compare.penalize(u)[1].values())
                loss = loss if also is None else loss + also(u)
            (control.grad,) = torch.autograd.grad(loss, control)
            if adam is None:
                scale = float(control.grad.square().mean().sqrt())
                adam = torch.optim.Adam([control], lr=lr, eps=max(scale, 1e-12))
            adam.step()
        found = F.interpolate(control.detach(), size=shape, mode="trilinear", align_corners=False)
    return found


@torch.no_grad()
def fused_labels(
    labels: Sequence[Tensor], velocities: Sequence[Tensor], values: Sequence[int], squarings: int
) -> tuple[Tensor, Tensor]:
    """Label probabilities [L, X, Y, Z] on a template, and where most have been looked at [X, Y, Z].

    Args:
        labels: [X, Y, Z] of each scan; -1: nobody has looked.
        velocities: [1, 3, X, Y, Z] from the template to each scan.
        values: labels above 0.
    """
    total: Tensor | float = 0.0
    for found, v in zip(labels, velocities, strict=True):
        parts = torch.stack([(found == value).to(v) for value in values] + [(found >= 0).to(v)])
        total = total + warp(parts[None], integrated(-v, squarings))[0].cpu()
    total = torch.as_tensor(total)
    seen = total[-1]
    known = seen > 0.5 * len(labels)
    return total[:-1] / seen.clamp(min=1e-6) * known, known


@dataclass(frozen=True)
class GeneratedAtlas:
    """An atlas of requested conditions, on the grid of the general one.

    Attributes:
        domain: its grid.
        image: [X, Y, Z] in [0, 1].
        displacement: phi(p) - p [X, Y, Z, 3], RAS mm: the atlas at p shows the general atlas at phi(p). None: it was
            decoded as intensities.
        det: det J_phi [X, Y, Z], None likewise.
        probabilities: of the labels above 0, [L, X, Y, Z]; None: no labels were known.
        labels: the likeliest [X, Y, Z].
        volumes_ml: expected volume of each label, by its value.
        spread_mm: of several samples: root mean square distance of their displacements from the mean one.
    """

    domain: Domain
    image: Tensor
    displacement: Tensor | None
    det: Tensor | None
    probabilities: Tensor | None
    labels: Tensor | None
    volumes_ml: dict[int, float]
    spread_mm: Tensor | None


def likeliest(probabilities: Tensor, values: Sequence[int]) -> Tensor:
    """Labels [X, Y, Z] of probabilities [L, X, Y, Z]; 0 where the rest is likelier."""
    rest = (1 - probabilities.sum(0, keepdim=True)).clamp(min=0)
    names = torch.tensor([0, *values], dtype=torch.int32)
    found: Tensor = names[torch.cat((rest, probabilities)).argmax(0)]
    return found


def world_mm(u: Tensor, domain: Domain) -> Tensor:
    """Displacement [X, Y, Z, 3] in RAS mm of one in voxels [3, X, Y, Z]."""
    mm: Tensor = torch.einsum("ij,j...->...i", domain.voxel_to_world[:3, :3].to(u), u)
    return mm


def frozen(parts: Mapping[str, nn.Module | None], learning: Sequence[str]) -> None:
    """Gradients for the weights of some parts alone."""
    for name, part in parts.items():
        if part is not None:
            part.requires_grad_(name in learning)


Decode = Callable[[Tensor], Tensor]
"""Velocity [1, 3, X, Y, Z] of a latent."""


def generated_velocities(
    sample: Callable[[Tensor], Tensor], decode: Decode, shape: Sequence[int], samples: int, seed: int
) -> Tensor:
    """Velocities [samples, 3, X, Y, Z] of as many latents drawn by a seed, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(samples):
        noise = torch.randn(1, *shape, generator=generator)
        found.append(decode(sample(noise)).cpu())
    return torch.cat(found)
