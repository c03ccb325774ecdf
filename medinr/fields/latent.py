"""Autoencoders with a regularized latent space: of deformations, or of images."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medinr.configured import Configured
from medinr.errors import UserError
from medinr.precision import convolutions

CORRECTIONS = 20
"""Iterations of `on_lattice`: 10 leave 15 % of a single control point on a grid of odd sides."""


def padded_to(x: Tensor, multiple: int) -> Tensor:
    """Volumes [B, C, X, Y, Z] with their last slices repeated up to a multiple of voxels along each axis."""
    short = [-n % multiple for n in x.shape[2:]]
    return F.pad(x, (0, short[2], 0, short[1], 0, short[0]), mode="replicate") if any(short) else x


def on_lattice(x: Tensor, size: Sequence[int]) -> Tensor:
    """Values [B, C, *size] between which trilinear interpolation gives volumes [B, C, X, Y, Z], as nearly as it can.

    Means over the cells alone smooth: interpolated again, they had lost half of what a ventricle had widened by. They
    are corrected by the means of what is missing (Landweber's iteration); volumes that were interpolated come back.
    """
    if list(x.shape[2:]) == list(size):
        return x
    found = F.interpolate(x, size=list(size), mode="area")
    for _ in range(CORRECTIONS):
        missing = x - F.interpolate(found, size=list(x.shape[2:]), mode="trilinear", align_corners=False)
        found = found + F.interpolate(missing, size=list(size), mode="area")
    return found


class Autoencoder(Configured, nn.Module):
    """MONAI's AutoencoderKL on volumes of any size: ``encode`` to mean and sigma of the latent, ``decode`` back.

    Rombach et al., CVPR 2022. What is encoded is seen on a lattice of every ``stride``-th voxel (a velocity is smooth),
    divided by its spread in training, so that the weights of the loss do not depend on the unit. Diff-Def's released
    code has three latent channels and an eighth of the resolution; its widths are not published.

    Args:
        inputs: channels: 3 of a displacement or velocity in voxels, 1 of an image.
        latent_channels: of the latent.
        channels: features of each level; every level but the first has half the resolution of the one before.
        stride: of the lattice, in voxels.
        residual: residual blocks a level.
        groups: of the normalisation; a divisor of all ``channels``.
        checkpoint: compute activations again in the backward pass: less memory, more time.
    """

    spread: Tensor

    def __init__(
        self,
        inputs: int = 3,
        latent_channels: int = 4,
        channels: Sequence[int] = (32, 64),
        stride: int = 2,
        residual: int = 1,
        groups: int = 8,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if stride < 1 or not channels or any(c % groups for c in channels):
            raise UserError(
                f"autoencoder: expected a stride of 1 or more and channels that {groups} groups divide, found stride "
                f"{stride} and channels {list(channels)}"
            )
        # Not above: MONAI's networks take a second to import, which other commands would wait for.
        from monai.networks.nets.autoencoderkl import AutoencoderKL

        self.inputs, self.latent_channels, self.stride = inputs, latent_channels, stride
        self.halvings = len(channels) - 1
        self._make: Callable[[int], Any] = lambda outputs: AutoencoderKL(
            3, inputs, outputs, residual, tuple(channels), [False] * len(channels), latent_channels, groups,
            with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, use_checkpoint=checkpoint,
        )  # fmt: skip
        self.network = self._make(inputs)
        self.register_buffer("spread", torch.tensor(1.0))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Autoencoder":
        raise NotImplementedError("an autoencoder is built from its configuration")

    def lattice(self, shape: Sequence[int]) -> list[int]:
        """Points of the lattice over a grid, along each axis."""
        return [-(-n // self.stride) for n in shape]

    def latent_shape(self, shape: Sequence[int]) -> list[int]:
        """[C, x, y, z] of the latent of a grid."""
        return [self.latent_channels, *(-(-n // 2**self.halvings) for n in self.lattice(shape))]

    def coarse(self, x: Tensor) -> Tensor:
        """Values on the lattice [B, inputs, x, y, z], in units of the spread (`on_lattice`)."""
        return on_lattice(x, self.lattice(x.shape[2:])) / self.spread

    def dense(self, coarse: Tensor, shape: Sequence[int]) -> Tensor:
        """The opposite of `coarse`: trilinear on a grid of that shape."""
        if list(coarse.shape[2:]) != list(shape):
            coarse = F.interpolate(coarse, size=list(shape), mode="trilinear", align_corners=False)
        return coarse * self.spread

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sigma of the latent of volumes [B, inputs, X, Y, Z].

        Raises:
            UserError: another number of channels.
        """
        return self.encode_coarse(self.coarse(self._checked(x)))

    def encode_coarse(self, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode`, of what `coarse` gives."""
        coarse = padded_to(coarse, 2**self.halvings)
        with convolutions(coarse.device.type, [n // 2**self.halvings for n in coarse.shape[2:]]):
            mean, sigma = self.network.encode(coarse)
        return mean, sigma

    def decode(self, z: Tensor, shape: Sequence[int]) -> Tensor:
        """Volumes [B, inputs, X, Y, Z] of latents."""
        return self.dense(self.decode_coarse(z, shape), shape)

    def decode_coarse(self, z: Tensor, shape: Sequence[int], head: nn.Module | None = None) -> Tensor:
        """As `decode`, on the lattice and in units of the spread; ``head``: another decoder (`deformation_head`)."""
        x, y, w = self.lattice(shape)
        with convolutions(z.device.type, z.shape[2:]):
            found: Tensor = (self.network.decode if head is None else head)(z)[:, :, :x, :y, :w]
        return found

    def deformation_head(self) -> nn.Module:
        """A decoder of the same latents with three outputs, zero at first, else with this one's weights."""
        made = self._make(3)
        head = nn.Sequential(made.post_quant_conv, made.decoder)
        last = made.decoder.blocks[-1].conv
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return head

    def teach(self, head: nn.Module) -> None:
        """Give a `deformation_head` the weights of this decoder, all but those of the last layer."""
        own = nn.Sequential(self.network.post_quant_conv, self.network.decoder).state_dict()
        there = head.state_dict()
        head.load_state_dict({k: copy.copy(v) if v.shape != own[k].shape else own[k] for k, v in there.items()})

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[1] != self.inputs:
            raise UserError(
                f"autoencoder: expected volumes of {self.inputs} channels [B, {self.inputs}, X, Y, Z], found "
                f"{tuple(x.shape)}"
            )
        return x


def kl_divergence(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL divergence of N(mean, sigma^2) from N(0, 1), mean over the latent's numbers (Kingma and Welling, 2014)."""
    found: Tensor = 0.5 * (mean.square() + sigma.square() - 1 - 2 * sigma.clamp(min=1e-12).log()).mean()
    return found
