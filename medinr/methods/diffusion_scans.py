"""The scans that `DiffusionDeformation` learns from, on one grid: their atlas, their codes, their neighbours."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from medinr import metrics
from medinr.data.cohort import Cohort
from medinr.data.common import CommonSpace, common_grid, content_of, image_of, windowed_image
from medinr.data.working import on_grid
from medinr.errors import UserError
from medinr.fields.conditions import ConditionEmbedding
from medinr.fields.diffusion import Denoiser, denoising_loss
from medinr.fields.latent import Autoencoder, on_lattice
from medinr.fields.squaring import warp_labels
from medinr.fields.unet import PairNetwork
from medinr.io import as_image
from medinr.losses import Regularizer
from medinr.losses.morphology import content, draw_neighbours, neighbourhood_weights, recentred
from medinr.methods import diffusion_stages as stages
from medinr.methods.diffusion_generator import DeformationGenerator, Latents
from medinr.methods.diffusion_stages import Morphology, Stage
from medinr.precision import full
from medinr.space import Domain, Image
from medinr.start import Kind, find_start
from medinr.types import Scalar

RATE = 0.3
"""Voxels: step of the refinement."""
IN_MEMORY = 1000
"""Codes of scans that are kept."""

perceptual = cache(metrics.PerceptualDistance)
"""The network of a file of weights, read once."""


class ScanGenerator(DeformationGenerator):
    """A `DeformationGenerator` that has a cohort attached: what its networks see of the scans, and their figures.

    Args: see `DiffusionDeformation`.
    """

    def __init__(
        self,
        network: PairNetwork,
        autoencoder: Autoencoder,
        denoiser: Denoiser,
        embedding: ConditionEmbedding,
        latents: Latents,
        squarings: int,
        morphology: Morphology | None,
        spacing: list[float] | None,
        margin_mm: float,
        atlas: str | None,
        template_rounds: int,
        modality: str | None,
        align: Kind,
        radius: int,
        refine: int,
        label_weight: float,
        regularizers: dict[str, Regularizer] | None,
        lpips: str | None,
    ) -> None:
        super().__init__(network, autoencoder, denoiser, embedding, latents, squarings)
        self.morphology = morphology or Morphology()
        self.lpips = lpips
        self.spacing, self.margin_mm, self.radius = spacing, margin_mm, radius
        self.atlas, self.template_rounds, self.modality, self.align = atlas, template_rounds, modality, align
        self.refine, self.label_weight = refine, label_weight
        self.regularizers = nn.ModuleDict(regularizers or {})
        self.space: CommonSpace | None = None
        self._begun: Stage | None = None
        self._codes: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    # -- data ----------------------------------------------------------------------------------------------------

    @property
    def subject(self) -> Cohort:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(getattr(data, "cohort", None), Cohort):
            raise UserError(
                f"data: expected a cohort, found {type(data).__name__}; give CohortDataModule or another CohortModule"
            )
        cohort: Cohort = data.cohort
        return cohort

    def size(self, subject: Cohort) -> None:
        self.know(subject.conditions)

    @property
    def attached(self) -> bool:
        return self.space is not None

    @property
    def space_(self) -> CommonSpace:
        assert self.space is not None, "attach a cohort first"
        return self.space

    @property
    def known(self) -> Cohort:
        """The cohort."""
        return self.space_.cohort

    def attach(self, subject: Cohort) -> None:
        """Take a cohort: its grid and general atlas, if no checkpoint has brought them."""
        modality = self.modality or subject.modalities[0]
        names = subject.names("train")
        first = subject.scan(names[0])
        reference = image_of(first, modality) if self.atlas is None else windowed_image(as_image(self.atlas))

        def start(image: Image) -> Tensor:
            return find_start(reference, image, self.align, [(0.0, 1.0), (0.0, 1.0)])

        if "grid" not in self.state:
            spacing = self.spacing or list(reference.domain.spacing)
            content = content_of(subject, names[:50], reference.domain) if self.align == "none" else None
            self.state["grid"] = common_grid(reference.domain, content, spacing, self.margin_mm).to_dict()
        self.domain = Domain.from_dict(self.state["grid"])
        self.space = CommonSpace(subject, modality, self.domain, start)
        if "start_atlas" not in self.state:
            identity = torch.eye(4, dtype=torch.float64)
            self.state["start_atlas"] = (
                self.space.mean(names) if self.atlas is None else on_grid(reference, self.domain, identity)
            )
        count = len(self.conditions)
        self._values = torch.tensor(
            [[subject.known[n].get(c.name, torch.nan) for c in self.conditions] for n in names], dtype=torch.float32
        ).reshape(len(names), count)

    @property
    def compare(self) -> stages.Comparison:
        """What registrations are judged by, in all stages alike."""
        own = {k: v for k, v in self.regularizers.items() if isinstance(v, Regularizer)}
        return stages.Comparison(self.radius, self.squarings, self.domain.spacing, own)

    def velocity(self, name: str, template: Tensor, known: Tensor | None = None) -> Tensor:
        """Velocity [1, 3, X, Y, Z] of a scan: the template [1, X, Y, Z] at exp(v) looks like it.

        The network's, or one that is ``known``, improved on these images for ``refine`` steps on two lattices.
        """
        image = self.space_.image(name).to(self.device)[None]
        with torch.no_grad(), full(self.device.type):
            v = self.register_pair(image, template[None]) if known is None else known.float()
            v = v * content(torch.cat((image, template[None])))  # what a network says of the background means nothing
        if not self.refine:
            return v
        strides = (2 * self.autoencoder.stride, self.autoencoder.stride)
        return stages.refined(self.compare, image, template[None], v, strides, self.refine, RATE, self.label_term(name))

    def label_term(self, name: str) -> Callable[[Tensor], Scalar] | None:
        """What the labels of a training scan add to its refinement, once the atlas has labels."""
        labels = self.space_.labels(name) if name in self.known.names("train") else None
        if not self.label_weight or labels is None or "probabilities" not in self.state:
            return None
        probabilities, values = self.state["probabilities"].to(self.device), self.state["label_values"]
        known = labels.to(self.device)
        return lambda u: self.label_weight * stages.label_difference(probabilities, known, values, u)

    @torch.no_grad()
    def coarse(self, name: str) -> Tensor:
        """What the autoencoder sees of a scan, on its lattice [c, x, y, z]."""
        if self.latents == "images":
            return self.autoencoder.coarse(self.space_.image(name).to(self.device)[None])[0]
        kept = self.state.get("velocities", {}).get(name)
        if kept is None:
            return self.autoencoder.coarse(self.velocity(name, self.template))[0]
        found: Tensor = kept.to(self.device).float() / self.autoencoder.spread
        return found

    def kept(self, name: str, make: Callable[[str], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What the present stage looks at of a scan, made once."""
        if name not in self._codes:
            self._codes[name] = make(name)
            if len(self._codes) > IN_MEMORY:
                self._codes.popitem(last=False)
        return self._codes[name]

    @torch.no_grad()
    def code(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and sigma of a scan's latent [C, x, y, z]."""
        mean, sigma = self.autoencoder.encode_coarse(self.coarse(name)[None])
        return mean[0], sigma[0]

    @torch.no_grad()
    def make_template(self) -> None:
        """The general atlas, its labels and its velocities to the training scans, which all go into the checkpoint.

        Unless it is a file, each round registers the atlas to all scans and puts a new one in their middle. With a
        label weight the last registration sees the labels, too.
        """
        template, names = self.state["start_atlas"].to(self.device), self.known.names("train")
        rounds = self.template_rounds if self.atlas is None else 0
        turns = max(rounds, 1 if self.label_weight and self.refine else 0)
        found: list[Tensor | None] = [None] * len(names)
        for turn in range(turns + 1):
            each = [self.velocity(n, template, v) for n, v in zip(names, found, strict=True)]
            if turn < rounds:
                images = (self.space_.image(n).to(self.device) for n in names)
                template, each = recentred(images, each, self.squarings)
            self._fuse(names, each)
            found = list(each)
        self.state["template"] = template.cpu()
        if self.refine:  # they took minutes; a network's are made again at once
            lattice = self.autoencoder.lattice(self.domain.shape)
            self.state["velocities"] = {
                n: on_lattice(v, lattice)[0].half().cpu() for n, v in zip(names, each, strict=True)
            }

    def _fuse(self, names: Sequence[str], velocities: Sequence[Tensor]) -> None:
        """Labels of the general atlas, from those of scans and its velocities to them."""
        labels = [self.space_.labels(n) for n in names]
        known = [(one.to(self.device), v) for one, v in zip(labels, velocities, strict=True) if one is not None]
        values = list(self.known.label_names) if known else []
        self.state |= {"label_values": values, "label_names": [self.known.label_names[v] for v in values]}
        if values:
            some, theirs = zip(*known, strict=True)
            self.state["probabilities"], self.state["seen"] = stages.fused_labels(some, theirs, values, self.squarings)

    def neighbours(self, values: Tensor, seed: int) -> list[str]:
        """N training scans around conditions [C], the same for the same seed, in random order."""
        span = (self.embedding.high - self.embedding.low).clamp(min=1e-6).cpu()
        levels = self.embedding.levels
        scale = torch.tensor([1.0 if n else float(s) for n, s in zip(levels, span, strict=True)])
        weights = neighbourhood_weights(self._values / scale, values.cpu() / scale, levels, self.morphology.bandwidth)
        generator = torch.Generator().manual_seed(seed)
        drawn = draw_neighbours(weights, self.morphology.neighbours, generator)
        order = torch.randperm(len(drawn))
        return [self.known.names("train")[int(i)] for i in drawn[order]]

    # -- evaluation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The present stage's own figure on a scan of somebody who is not trained on."""
        names = self.known.names("val")
        name, other = names[int(batch)], names[(int(batch) + 1) % len(names)]
        stage = self._begun or list(self.state["trained"])[-1]
        generator = torch.Generator(self.device.type).manual_seed(int(batch))
        found: dict[str, Tensor] = {}
        with full(self.device.type):
            if stage == "registration":
                found = self._registered(name, other)
            elif stage == "autoencoder":
                coarse = self.kept(name, lambda k: (self.coarse(k),))[0][None]
                again = self.autoencoder.decode_coarse(self.autoencoder.encode_coarse(coarse)[0], self.domain.shape)
                error = (again - coarse).square().mean()
                peak = coarse.max() - coarse.min()
                found["val/psnr"] = 20 * torch.log10(peak) - 10 * torch.log10(error)
                if self.latents == "deformations":
                    step = torch.tensor(self.domain.spacing, device=error.device).view(3, 1, 1, 1)
                    apart = (again - coarse)[0] * self.autoencoder.spread * step
                    found["val/error_mm"] = apart.norm(dim=0).mean()
            else:
                mean, _ = self.kept(name, self.code)
                values = torch.tensor([[self.known.known[name].get(c.name, torch.nan) for c in self.conditions]])
                values = values.to(self.device)
                z = ((mean - self.expected(values)) / self.latent_spread).expand(8, -1, -1, -1, -1)
                context = self.embedding(values).expand(8, -1, -1)
                found["val/denoising"] = denoising_loss(self.denoiser, z, context, generator)
        self.log_dict(found, batch_size=1, sync_dist=True)

    def _registered(self, name: str, other: str) -> dict[str, Tensor]:
        fixed, moving = (self.space_.image(n).to(self.device)[None] for n in (name, other))
        u, terms = self.compare(fixed, moving, self.register_pair(fixed, moving))
        found = {"val/similarity": terms["similarity"]}
        det = metrics.finite_difference_jacobian(stages.world_mm(u[0].cpu(), self.domain), self.domain)
        found["val/folding_percent"] = torch.tensor(metrics.folding_percent(det))
        one, two = self.space_.labels(name), self.space_.labels(other)
        if one is not None and two is not None:
            for key, labels in (("val/dice", warp_labels(two, u[0].cpu())), ("val/dice_initial", two)):
                scores = metrics.dice(labels[one >= 0], one[one >= 0], list(self.known.label_names))
                found[key] = torch.tensor(sum(scores.values()) / max(len(scores), 1))
        return found

    @torch.no_grad()
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """The atlas of each test person's conditions: agreement with that person, and how it was deformed."""
        name = self.known.names("test")[int(batch)]
        values = torch.tensor([self.known.known[name].get(c.name, torch.nan) for c in self.conditions])
        atlas = self.generate(values)
        assert atlas.det is not None
        found = {
            "atlas/folding_percent": metrics.folding_percent(atlas.det),
            "atlas/jacobian_gradient_per_mm": metrics.jacobian_gradient(atlas.det, self.domain.spacing),
        }
        truth = self.space_.labels(name)
        if truth is not None and atlas.labels is not None:
            scores = metrics.dice(atlas.labels[truth >= 0], truth[truth >= 0], list(self.known.label_names))
            found["atlas/dice"] = sum(scores.values()) / max(len(scores), 1)
        if self.lpips is not None:
            person = self.space_.image(name)[0]
            found["atlas/lpips"] = float(perceptual(self.lpips)(atlas.image, person, 1.0))
        self.log_dict(found, batch_size=1, sync_dist=True)
        return {"row": {"case": name, **found}}

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """An atlas is asked for conditions, not for scans.

        Raises:
            UserError: always.
        """
        raise UserError("predict: an atlas is written by `medinr generate CKPT --condition NAME=VALUE --out FOLDER`")
