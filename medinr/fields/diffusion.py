"""Latent diffusion: a conditional denoiser, its loss, and sampling whose last steps can be differentiated.

Rombach et al., CVPR 2022; Ho et al., NeurIPS 2020 (the chain); Salimans and Ho, ICLR 2022 (v-prediction); Song et al.,
ICLR 2021 (DDIM). The networks and schedules are MONAI's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medinr.configured import Configured
from medinr.errors import UserError
from medinr.fields.latent import padded_to
from medinr.precision import convolutions
from medinr.types import Scalar

TRAIN_STEPS = 1000
BETAS = (0.0015, 0.0205)
"""Of the scaled linear schedule, as Diff-Def's released code has them."""


class Denoiser(Configured, nn.Module):
    """MONAI's DiffusionModelUNet with cross-attention, on latents of any size.

    ``forward(x [B, C, x, y, z], timesteps [B], context [B, tokens, context]) -> [B, C, x, y, z]``, the prediction of
    v = sqrt(a) noise - sqrt(1 - a) z.

    Args:
        latent_channels: C.
        channels: features of each level, each of half the resolution of the one before.
        attention: levels that look at the conditions.
        head_channels: of an attention head; 0: one head a level.
        residual: residual blocks a level.
        context: width of a token.
        groups: of the normalisation; a divisor of all ``channels``.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        channels: Sequence[int] = (32, 64),
        attention: Sequence[bool] = (False, True),
        head_channels: int = 16,
        residual: int = 1,
        context: int = 64,
        groups: int = 8,
    ) -> None:
        super().__init__()
        if len(attention) != len(channels) or any(c % groups for c in channels):
            raise UserError(
                f"denoiser: expected one attention flag a level and channels that {groups} groups divide, found "
                f"{list(channels)} and {list(attention)}"
            )
        if head_channels and any(a and c % head_channels for a, c in zip(attention, channels, strict=True)):
            raise UserError(f"denoiser: expected channels that heads of {head_channels} divide, found {list(channels)}")
        # Not above: see `Autoencoder`.
        from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

        self.latent_channels, self.context, self.halvings = latent_channels, context, len(channels) - 1
        heads = [head_channels or c for c in channels]
        self.network: Any = DiffusionModelUNet(
            3, latent_channels, latent_channels, residual, tuple(channels), tuple(attention), groups,
            num_head_channels=heads, with_conditioning=True, cross_attention_dim=context,
        )  # fmt: skip

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        a, b, c = x.shape[2:]
        x = padded_to(x, 2**self.halvings)
        with convolutions(x.device.type, [n // 2**self.halvings for n in x.shape[2:]]):
            found: Tensor = self.network(x, timesteps, context)[:, :, :a, :b, :c]
        return found


Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A denoiser: (latents, timesteps, context) -> v."""


def noising() -> Any:
    """The chain of 1000 steps that training noises latents by: MONAI's DDPMScheduler."""
    from monai.networks.schedulers.ddpm import DDPMScheduler

    return DDPMScheduler(
        TRAIN_STEPS, "scaled_linear_beta", prediction_type="v_prediction", clip_sample=False, beta_start=BETAS[0],
        beta_end=BETAS[1],
    )  # fmt: skip


def sampler(steps: int) -> Any:
    """MONAI's DDIMScheduler. Its steps are 1000 // steps long, a little shorter than the distance of its times.

    For a normal distribution, whose answer is known, that errs less than times that agree with the steps.

    Raises:
        UserError: more steps than training has, or none.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise UserError(f"steps: expected 1 to {TRAIN_STEPS}, found {steps}; the usual number is 20")
    from monai.networks.schedulers.ddim import DDIMScheduler

    made = DDIMScheduler(
        TRAIN_STEPS, "scaled_linear_beta", prediction_type="v_prediction", clip_sample=False, beta_start=BETAS[0],
        beta_end=BETAS[1],
    )  # fmt: skip
    made.set_timesteps(steps)
    made.timesteps = torch.linspace(TRAIN_STEPS - 1, 0, steps).round().long()  # as from MONAI 1.6; 1.5 began at 950
    return made


def denoising_loss(denoiser: nn.Module, z: Tensor, context: Tensor, generator: torch.Generator | None = None) -> Scalar:
    """E over steps t and noise e of |v_theta(sqrt(a_t) z + sqrt(1 - a_t) e, t, context) - v|^2 for latents z."""
    from monai.inferers.inferer import DiffusionInferer

    chain = noising()
    noise = torch.randn(z.shape, device=z.device, generator=generator)
    t = torch.randint(TRAIN_STEPS, (len(z),), device=z.device, generator=generator)
    network: Any = denoiser
    found = DiffusionInferer(chain)(inputs=z, diffusion_model=network, noise=noise, timesteps=t, condition=context)
    return F.mse_loss(found, chain.get_velocity(z, noise, t))


def guided(denoiser: Predict, z: Tensor, t: Tensor, context: Tensor, without: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: v(without) + guidance (v(context) - v(without)); 1 is the conditional network."""
    conditional = denoiser(z, t, context)
    if guidance == 1:
        return conditional
    unconditional = denoiser(z, t, without)
    return unconditional + guidance * (conditional - unconditional)


def ddim(
    denoiser: Predict,
    noise: Tensor,
    context: Tensor,
    without: Tensor,
    steps: int = 20,
    guidance: float = 1.0,
    differentiable: int = 0,
) -> Tensor:
    """Latents of noise by deterministic DDIM, whose last steps carry a gradient.

    In Diff-Def's released code all of the sampling is without gradient, so the morphology loss never reaches the
    denoiser; here it does, through the last ``differentiable`` steps (all would take their activations' memory).

    Args:
        denoiser: predicts v.
        noise: [B, C, x, y, z], standard normal.
        context: [B, tokens, width] of the conditions.
        without: the same of no condition at all.
        steps: 1 to 1000.
        guidance: see `guided`.
        differentiable: steps at the end.
    """
    chain = sampler(steps)
    z = noise
    for i, step in enumerate(chain.timesteps.tolist()):
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= steps - differentiable):
            t = torch.full((len(z),), step, device=z.device)
            z, _ = chain.step(guided(denoiser, z, t, context, without, guidance), step, z)
    return z
