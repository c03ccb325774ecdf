"""The networks of `DiffusionDeformation` and what they generate: everything that needs no scan."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from medinr import metrics
from medinr.data.cohort import Condition
from medinr.errors import UserError
from medinr.fields.conditions import ConditionEmbedding
from medinr.fields.diffusion import Denoiser, ddim
from medinr.fields.latent import Autoencoder
from medinr.fields.squaring import warp
from medinr.fields.unet import PairNetwork
from medinr.losses.morphology import integrated
from medinr.methods import diffusion_stages as stages
from medinr.methods import diffusion_trend as trend
from medinr.methods.diffusion_stages import GeneratedAtlas, Stage
from medinr.methods.method import Method
from medinr.space import Domain

Latents = Literal["deformations", "images"]


class DeformationGenerator(Method):
    """Registration network, autoencoder, denoiser and embedding, as a checkpoint holds them.

    ``state`` knows the general atlas (``template``), its grid, its label probabilities, the conditions and the stages
    that were ``trained``.

    Args:
        network: registers; without squarings of its own.
        autoencoder: with ``inputs`` 3, or 1 for ``latents="images"``.
        denoiser, embedding: of the diffusion.
        latents: what the latent is a code of.
        squarings: of every velocity; 0: they are displacements.
    """

    amortised = True
    """A checkpoint is not bound to the grid of the data."""

    latent_mean: Tensor
    latent_spread: Tensor

    def __init__(
        self,
        network: PairNetwork,
        autoencoder: Autoencoder,
        denoiser: Denoiser,
        embedding: ConditionEmbedding,
        latents: Latents,
        squarings: int,
    ) -> None:
        super().__init__()
        channels = autoencoder.latent_channels
        if autoencoder.inputs != (3 if latents == "deformations" else 1):
            raise UserError(
                f"autoencoder.inputs: expected 3 for deformations, 1 for images, found {autoencoder.inputs} with "
                f"latents {latents}"
            )
        if denoiser.latent_channels != channels or denoiser.context != embedding.width:
            raise UserError(
                "denoiser: expected the autoencoder's latent_channels and the embedding's width as context, found "
                f"{denoiser.latent_channels} and {channels}, {denoiser.context} and {embedding.width}"
            )
        if getattr(network, "squarings", 0):
            raise UserError("network.squarings: expected 0 (the method integrates), found more; set model.squarings")
        self.network, self.autoencoder, self.denoiser, self.embedding = network, autoencoder, denoiser, embedding
        self.head = autoencoder.deformation_head() if latents == "images" else None
        self.register_buffer("latent_mean", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("latent_spread", torch.ones(channels, 1, 1, 1))
        self.latents, self.squarings = latents, squarings

    # -- conditions ----------------------------------------------------------------------------------------------

    def know(self, conditions: Sequence[Condition]) -> None:
        """Take the conditions, or compare them with those of the checkpoint."""
        plain = [
            {"name": c.name, "kind": c.kind, "levels": list(c.levels), "low": c.low, "high": c.high} for c in conditions
        ]
        known = self.state.get("conditions")
        if known is not None and [(k["name"], k["levels"]) for k in known] != [
            (c.name, list(c.levels)) for c in conditions
        ]:
            raise UserError(
                f"data.conditions: expected {', '.join(k['name'] for k in known) or 'none'} as the checkpoint was "
                f"trained on, found {', '.join(c.name for c in conditions) or 'none'} or other levels; give the same"
            )
        if known is None:
            self.state["conditions"] = plain
        kept = self.state["conditions"]
        self.embedding.size([len(k["levels"]) for k in kept], [k["low"] for k in kept], [k["high"] for k in kept])

    @property
    def conditions(self) -> list[Condition]:
        """What the network was trained on."""
        return [
            Condition(k["name"], k["kind"], tuple(k["levels"]), k["low"], k["high"]) for k in self.state["conditions"]
        ]

    def register_pair(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """Velocity [B, 3, X, Y, Z] in voxels from fixed to moving images [B, 1, X, Y, Z]."""
        found: Tensor = self.network(torch.cat((fixed, moving), dim=1))
        return found.float()

    @property
    def template(self) -> Tensor:
        """The general atlas [1, X, Y, Z] on the method's device."""
        found: Tensor = self.state["template"].to(self.device)
        return found

    # -- generation ----------------------------------------------------------------------------------------------

    def sample(self, noise: Tensor, values: Tensor, guidance: float, steps: int, differentiable: int = 0) -> Tensor:
        """Latents of noise [B, C, x, y, z] under conditions [B, c]."""
        context, nothing = self.embedding(values), torch.full_like(values, torch.nan)
        z = ddim(self.denoiser, noise, context, self.embedding(nothing), steps, guidance, differentiable)
        free = self.expected(nothing)
        return z * self.latent_spread + free + guidance * (self.expected(values) - free)

    def expected(self, values: Tensor) -> Tensor:
        """The latents [B or 1, C, x, y, z] around which those of conditions [B, c] lie: what the diffusion adds to."""
        if "trend" not in self.state:
            return self.latent_mean[None]
        return trend.expected(self.state["trend"], trend.columns(self.embedding, values))

    def decode(self, z: Tensor) -> Tensor:
        """Velocity [B, 3, X, Y, Z] in voxels of latents."""
        return self.decode_to(z, self.domain.shape)

    def decode_to(self, z: Tensor, shape: Sequence[int]) -> Tensor:
        """As `decode`, on a grid of another shape."""
        if self.head is None:
            return self.autoencoder.decode(z, shape).float()
        coarse = self.autoencoder.decode_coarse(z, shape, self.head)
        return F.interpolate(coarse.float(), size=list(shape), mode="trilinear", align_corners=False)

    def wanted(self, values: Mapping[str, float]) -> Tensor:
        """Conditions [C] by name, NaN where nothing is asked for; warns outside of what was trained.

        Raises:
            UserError: a condition that the network does not know.
        """
        names = [c.name for c in self.conditions]
        if unknown := [k for k in values if k not in names]:
            raise UserError(
                f"condition: expected any of {', '.join(names) or 'none'}, found {unknown[0]!r}; correct its name"
            )
        for c in self.conditions:
            if c.name in values and not c.covers(values[c.name]):
                warnings.warn(
                    f"{c.name} {c.text(values[c.name])} is outside of the trained range, {c.low:g} to {c.high:g}: the "
                    "atlas is a guess",
                    stacklevel=2,
                )
        return torch.tensor([values.get(n, torch.nan) for n in names])

    @torch.no_grad()
    def generate(
        self, values: Tensor, samples: int = 1, guidance: float = 1.0, steps: int = 20, seed: int = 0
    ) -> GeneratedAtlas:
        """The atlas of conditions [C] (see `wanted`), the same for the same seed.

        Of several samples, the atlas is that of their mean velocity, and `spread_mm` says how far they differ.

        Raises:
            UserError: stages that were never trained.
        """
        self.require("registration", "autoencoder", "diffusion")
        self.domain = Domain.from_dict(self.state["grid"])
        if self.head is not None:
            self.require("morphology")
        self.eval()
        conditions = values.to(self.device, torch.float32)[None]
        velocities = stages.generated_velocities(
            lambda noise: self.sample(noise.to(self.device), conditions, guidance, steps),
            self.decode, self.autoencoder.latent_shape(self.domain.shape), samples, seed,
        )  # fmt: skip
        return self.atlas_of(velocities)

    @torch.no_grad()
    def atlas_of(self, velocities: Tensor) -> GeneratedAtlas:
        """The general atlas and its labels through the mean of velocities [n, 3, X, Y, Z]."""
        u = integrated(velocities.mean(0, keepdim=True), self.squarings)
        image = warp(self.state["template"][None].to(u), u)[0, 0]
        mm = stages.world_mm(u[0], self.domain)
        spread = None
        if len(velocities) > 1:
            each = torch.stack(
                [stages.world_mm(integrated(v[None], self.squarings)[0], self.domain) for v in velocities]
            )
            spread = (each - each.mean(0)).square().sum(-1).mean(0).sqrt()
        values, probabilities, labels = self.state["label_values"], None, None
        volumes: dict[int, float] = {}
        if values:
            probabilities = warp(self.state["probabilities"][None].to(u), u)[0]
            labels = stages.likeliest(probabilities, values)
            litre = abs(float(torch.linalg.det(self.domain.voxel_to_world[:3, :3]))) / 1000
            volumes = {v: float(p.sum()) * litre for v, p in zip(values, probabilities, strict=True)}
        det = metrics.finite_difference_jacobian(mm, self.domain)
        return GeneratedAtlas(self.domain, image, mm, det, probabilities, labels, volumes, spread)

    @torch.no_grad()
    def generate_image(self, values: Tensor, guidance: float = 1.0, steps: int = 20, seed: int = 0) -> Tensor:
        """Intensities [X, Y, Z] decoded from a latent of images: what Diff-Def is compared with.

        Raises:
            UserError: the latents are those of deformations.
        """
        if self.latents != "images":
            raise UserError("latents: expected images, found deformations; train with latents: images")
        self.domain = Domain.from_dict(self.state["grid"])
        noise = torch.randn(
            1, *self.autoencoder.latent_shape(self.domain.shape), generator=torch.Generator().manual_seed(seed)
        )
        self.eval()
        z = self.sample(noise.to(self.device), values.to(self.device, torch.float32)[None], guidance, steps)
        return self.autoencoder.decode(z, self.domain.shape)[0, 0].clamp(0, 1).cpu()

    def require(self, *needed: Stage) -> None:
        """Raises `UserError` unless these stages were trained."""
        trained = self.state.get("trained", {})
        for stage in needed:
            if stage not in trained:
                done = ", ".join(trained) or "none"
                raise UserError(
                    f"stage {stage}: expected a checkpoint in which it was trained, found {done}; give it steps, or "
                    "name the checkpoint that has it as model.earlier"
                )

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def restore(self, kept: Mapping[str, Any]) -> None:
        self.state = {k: v for k, v in kept.items() if k != "method"}
        if "conditions" in self.state:
            self.know(self.conditions)
        if "grid" in self.state:
            self.domain = Domain.from_dict(self.state["grid"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restore(checkpoint["medinr"])
