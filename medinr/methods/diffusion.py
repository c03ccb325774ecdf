"""Atlases for given conditions: a general atlas and a deformation that a latent diffusion model generates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medinr.errors import UserError
from medinr.fields.conditions import ConditionEmbedding
from medinr.fields.diffusion import Denoiser, denoising_loss
from medinr.fields.latent import Autoencoder
from medinr.fields.unet import PairNetwork
from medinr.losses import Regularizer
from medinr.methods import diffusion_stages as stages
from medinr.methods.diffusion_generator import Latents
from medinr.methods.diffusion_scans import ScanGenerator, perceptual
from medinr.methods.diffusion_stages import STAGES, Morphology, Stage
from medinr.methods.diffusion_trend import columns, fit_trend
from medinr.methods.method import Group, check_precision, load_method, share_of_rate
from medinr.precision import full
from medinr.ranks import any_rank
from medinr.start import Kind
from medinr.types import Scalar

WEIGHTS: dict[str, tuple[Stage, ...]] = {
    "network": ("registration",),
    "autoencoder": ("autoencoder",),
    "denoiser": ("diffusion", "morphology"),
    "embedding": ("diffusion", "morphology"),
    "head": ("morphology",),
}
"""Parts, and the stages that they learn in."""
RATES: dict[str, float] = {"registration": 1e-3, "autoencoder": 1e-3, "diffusion": 5e-4, "morphology": 1e-4}


class DiffusionDeformation(ScanGenerator):
    """Diff-Def: general atlas o exp(v), v decoded from a latent that is denoised under the wanted conditions.

    Starck, Sideri-Lampretsa, Kainz, Menten, Mueller, Rueckert, arXiv 2403.16776. One fit goes through the stages that
    have ``steps``; the others come from the checkpoint ``earlier``, so that each can run alone:

    1. ``registration``: a network that registers any two scans, or a scan and the general atlas (local NCC and
       ``regularizers``). Afterwards the general atlas becomes the unbiased template of the training scans
       (``template_rounds``), unless it is a file, and the velocities to them may be refined one by one (``refine``).
    2. ``autoencoder``: of the velocities from the general atlas to each training scan.
    3. ``diffusion``: denoises those latents under any conditions, each of which may be missing.
    4. ``morphology``: the same, and the atlas sampled for a training person's conditions must have no mean displacement
       to N scans of its neighbourhood: weight |mean_n u_n|^2, plus ``regularizers`` on the generated deformation.

    What differs from the paper: in the released code the autoencoder is one of images, and its decoder is turned into a
    decoder of displacements while the denoiser goes on denoising codes of images; the two never meet, as sampling is
    without gradient. Here the latent is that of deformations from the start (as in morphldm), and the last sampling
    steps are differentiable, so that the morphology loss reaches the denoiser. ``latents="images"`` is the published
    arrangement with that gradient. Conditions are embedded offline (`ConditionEmbedding`), velocities are integrated
    (``squarings``: 0 gives the displacement of the paper), the general atlas may be any image.

    Args:
        steps: of each stage; those that are left out come from ``earlier``. Their sum must be trainer.max_steps.
        network: registers; without squarings of its own.
        autoencoder: with ``inputs`` 3, or 1 for ``latents="images"``.
        denoiser, embedding: of the diffusion.
        regularizers: of the registration and of generated deformations; lengths in 100 mm.
        morphology: settings of the last stage.
        latents: what the latent is a code of.
        squarings: of every velocity; 0: they are displacements.
        spacing: of the grid, mm along R, A and S.
        margin_mm: around the content of the training scans (their masks or labels).
        atlas: file of the general atlas; None: made of the training scans.
        template_rounds: of the unbiased template, if it is; 0: their mean image.
        modality: of the scans; None: the cohort's first.
        align: rigid or affine start of each scan to the atlas; ``none``: they are in one space.
        earlier: checkpoint with the stages that have no steps.
        radius: of the windows of local NCC, voxels.
        refine: steps that each training scan's velocity is improved by on its own images, at each of two resolutions;
            the velocities are kept in the checkpoint. For cohorts of tens or hundreds; 0: the network's are taken.
        label_weight: of the labels of training scans in that refinement (ours; the paper uses none).
        kl_weight: of the autoencoder.
        dropout: share of conditions that are hidden in training.
        trend: the mean latent is a plane over the conditions (`medinr.methods.diffusion_trend`), and the diffusion
            generates what it leaves; guidance scales both. The paper leaves all to the diffusion.
        lpips: file of AlexNet's weights (`medinr.metrics.PerceptualDistance`); with it a test tells the perceptual
            distance of each atlas to its person.
        batch: latents, or velocities, a step.
        lr: peak learning rate of each stage; those left out have `RATES`.
        warmup, cosine: schedule within each stage.
    """

    def __init__(
        self,
        steps: dict[str, int],
        network: PairNetwork,
        autoencoder: Autoencoder,
        denoiser: Denoiser,
        embedding: ConditionEmbedding,
        regularizers: dict[str, Regularizer] | None = None,
        morphology: Morphology | None = None,
        latents: Latents = "deformations",
        squarings: int = 6,
        spacing: list[float] | None = None,
        margin_mm: float = 4.0,
        atlas: str | None = None,
        template_rounds: int = 1,
        modality: str | None = None,
        align: Kind = "none",
        earlier: str | None = None,
        radius: int = 2,
        refine: int = 0,
        label_weight: float = 0.0,
        kl_weight: float = 1e-6,
        dropout: float = 0.1,
        trend: bool = False,
        lpips: str | None = None,
        batch: int = 4,
        lr: dict[str, float] | None = None,
        warmup: float = 0.02,
        cosine: bool = True,
    ) -> None:
        super().__init__(
            network, autoencoder, denoiser, embedding, latents, squarings, morphology, spacing, margin_mm, atlas,
            template_rounds, modality, align, radius, refine, label_weight, regularizers, lpips,
        )  # fmt: skip
        if unknown := sorted((set(steps) | set(lr or {})) - set(STAGES)):
            raise UserError(f"steps, lr: expected the stages {', '.join(STAGES)}, found {unknown[0]!r}; correct it")
        if not steps or min(steps.values()) < 1:
            raise UserError(f"steps: expected 1 or more of at least one stage, found {steps}")
        self.steps: dict[Stage, int] = {stage: steps[stage] for stage in STAGES if stage in steps}
        if "".join(self.steps) not in "".join(STAGES):
            raise UserError(f"steps: expected stages that follow each other ({', '.join(STAGES)}), found {steps}")
        self.earlier, self.kl_weight, self.dropout, self.batch = earlier, kl_weight, dropout, batch
        self.trend, self.rates = trend, RATES | (lr or {})
        self.lr, self.warmup, self.cosine = max(self.rates.values()), warmup, cosine

    # -- stages --------------------------------------------------------------------------------------------------

    def stage_at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and the stage's first step."""
        first = 0
        *before, last = self.steps
        for stage in before:
            if step < first + self.steps[stage]:
                return stage, first
            first += self.steps[stage]
        return last, first

    def groups(self) -> list[Group]:
        def rate_in(own: Sequence[Stage]) -> Any:
            def rate(step: int) -> float:
                stage, first = self.stage_at(step)
                if stage not in own:
                    return 0.0
                return self.rates[stage] * share_of_rate(step - first, self.steps[stage], self.warmup, self.cosine)

            return rate

        parts: dict[tuple[Stage, ...], list[Tensor]] = {}
        for name, own in WEIGHTS.items():
            part = getattr(self, name)
            if part is not None:
                parts.setdefault(own, []).extend(part.parameters())
        return [(parameters, rate_in(own)) for own, parameters in parts.items()]

    def begin(self, stage: Stage, fresh: bool) -> None:
        """Prepare a stage. ``fresh``: at its first step, not where a broken fit goes on. Draws no random number."""
        self._codes.clear()
        stages.frozen({k: getattr(self, k) for k in WEIGHTS}, [k for k, own in WEIGHTS.items() if stage in own])
        for k, own in WEIGHTS.items():  # normalisation by batches is in none of them; dropout may be
            if getattr(self, k) is not None:
                getattr(self, k).train(stage in own)
        if stage != "registration" and "template" not in self.state:
            self.make_template()
        if fresh and stage == "autoencoder":
            some = self.known.names("train")[:100]
            self.autoencoder.spread.fill_(1.0)
            self.autoencoder.spread.fill_(float(torch.stack([self.coarse(name).std() for name in some]).mean()))
            self._codes.clear()
        if fresh and stage == "diffusion":
            self._standardize()
        if fresh and stage == "morphology" and self.head is not None:
            self.autoencoder.teach(self.head)
        self._begun = stage

    def _standardize(self) -> None:
        """What the diffusion generates has mean 0 and variance 1: in each channel, or around the trend everywhere."""
        names = self.known.names("train")
        if not self.trend:
            names = names[:100]
        codes = torch.stack([self.code(name)[0] for name in names])
        self.latent_mean.copy_(codes.mean((0, 2, 3, 4)).view_as(self.latent_mean))
        if self.trend:
            values = self._values.to(self.device)
            self.state["trend"] = fit_trend(codes, columns(self.embedding, values))
            codes = codes - self.expected(values)
        self.latent_spread.copy_(codes.std((0, 2, 3, 4)).view_as(self.latent_spread))

    # -- steps ---------------------------------------------------------------------------------------------------

    def draw(self) -> Any:
        """Numbers of the training scans that a step looks at."""
        stage, first = self.stage_at(self.global_step)
        if stage != self._begun:
            with full(self.device.type):
                self.begin(stage, self.global_step == first)
        trained: dict[str, int] = self.state.setdefault("trained", {})
        trained[stage] = self.global_step - first + 1
        return stage, torch.randint(len(self.known.names("train")), (max(2, self.batch),)).tolist()

    def objective(self, batch: tuple[Stage, list[int]]) -> dict[str, Scalar]:
        stage, drawn = batch
        names = [self.known.names("train")[i] for i in drawn]
        if stage == "registration":
            return self._registration(names)
        if stage == "autoencoder":
            coarse = torch.stack([self.kept(n, lambda k: (self.coarse(k),))[0] for n in names])
            shown = stages.mixed_pairs(coarse) if self.latents == "deformations" else coarse
            return stages.autoencoder_terms(self.autoencoder, shown, self.kl_weight)
        terms = {"denoising": self._denoising(names, drawn)}
        return terms if stage == "diffusion" else terms | self._morphology(drawn[0])

    def _registration(self, names: Sequence[str]) -> dict[str, Scalar]:
        """Two scans, or one and the general atlas (as often in either role)."""
        atlas = self.state["start_atlas"]
        images = [self.space_.image(n).to(self.device)[None] for n in names[:2]]
        turn = float(torch.rand(()))
        if turn < 0.5:
            images[int(turn < 0.25)] = atlas.to(self.device)[None]
        fixed, moving = images
        v = self.register_pair(fixed, moving)
        with full(self.device.type):
            u, terms = self.compare(fixed, moving, v)
            return terms | self._penalize(u)

    def _penalize(self, u: Tensor) -> dict[str, Scalar]:
        raw, weighted = self.compare.penalize(u)
        self._log({f"raw/{k}": v.detach() for k, v in raw.items()})
        return weighted

    def _denoising(self, names: Sequence[str], drawn: Sequence[int]) -> Scalar:
        codes = [self.kept(n, self.code) for n in names]
        mean, sigma = (torch.stack([c[k] for c in codes]) for k in (0, 1))
        values = stages.dropped(self._values[list(drawn)], self.dropout).to(self.device)
        z = (mean + sigma * torch.randn_like(sigma) - self.expected(values)) / self.latent_spread
        return denoising_loss(self.denoiser, z, self.embedding(values))

    def _morphology(self, person: int) -> dict[str, Scalar]:
        values = stages.dropped(self._values[person][None], self.dropout)
        images = self.neighbours(values[0], person)
        some = images[: self.morphology.per_step]
        noise = torch.randn(1, *self.autoencoder.latent_shape(self.domain.shape), device=self.device)
        z = self.sample(noise, values.to(self.device), 1.0, self.morphology.steps, self.morphology.differentiable)
        velocity = self.decode(z)
        neighbours = self.space_.images(some).to(self.device)
        with full(self.device.type):
            u, terms = stages.morphology_terms(
                self.register_pair, self.template[None], velocity, neighbours, self.squarings, self.morphology.weight
            )
            return terms | self._penalize(u)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As that of all methods, but the networks may run in the type that autocast gives them."""
        terms = self.objective(self.draw())
        loss = torch.stack(list(terms.values())).sum()
        if any_rank(not bool(torch.isfinite(loss)), self.device):  # all stop, or those who go on wait for ever
            raise UserError(f"the loss is {loss.item()} at step {self.global_step}: lower the learning rate (lr)")
        self._log({"loss": loss.detach()}, prog_bar=True)
        self._log({f"loss/{k}": v.detach() for k, v in terms.items()})
        return loss

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        check_precision(self.trainer.precision)
        if self.lpips is not None:
            perceptual(self.lpips)  # who names a wrong file is told now, not after the fit
        if stage == "fit":
            total = sum(self.steps.values())
            if self.trainer.max_steps != total:
                raise UserError(
                    f"trainer.max_steps: expected the sum of model.steps, {total}, found {self.trainer.max_steps}; "
                    "set it"
                )
            self.take_earlier()
        self.size(self.subject)

    def take_earlier(self) -> None:
        """Weights, atlas and grid of the stages that this fit leaves out.

        Raises:
            UserError: no checkpoint for them; one in which they were not trained; one of other networks.
        """
        missing = STAGES[: STAGES.index(next(iter(self.steps)))]
        if not missing:
            return
        if self.earlier is None:
            raise UserError(
                f"model.earlier: expected a checkpoint with the stages {', '.join(missing)}, found none; name one, or "
                "give them steps"
            )
        other = load_method(self.earlier)
        if not isinstance(other, DiffusionDeformation):
            raise UserError(
                f"{self.earlier}: expected a checkpoint of {type(self).__name__}, found {type(other).__name__}"
            )
        for needed in missing:
            if needed not in other.state.get("trained", {}):
                raise UserError(
                    f"{self.earlier}: expected the stage {needed} in it, found it untrained; train it first"
                )
        if "registration" in missing:
            names = (
                "grid", "start_atlas", "template", "velocities", "label_values", "label_names", "probabilities", "seen",
            )  # fmt: skip
            self.state |= {k: other.state[k] for k in names if k in other.state}
        if "diffusion" in missing:
            self.state |= {k: other.state[k] for k in ("conditions", "trend") if k in other.state}
            self.know(self.conditions)
        self.state["trained"] = {s: other.state["trained"][s] for s in missing}
        parts = [k for k, own in WEIGHTS.items() if set(own) & set(missing)]
        parts += ["latent_"] if "diffusion" in missing else []
        theirs = {k: v for k, v in other.state_dict().items() if k.startswith(tuple(parts))}
        try:
            self.load_state_dict(self.state_dict() | theirs)
        except RuntimeError as error:
            what = " ".join(str(error).split())[:160]
            raise UserError(
                f"{self.earlier}: expected the same networks as the configuration's, found {what}"
            ) from None
