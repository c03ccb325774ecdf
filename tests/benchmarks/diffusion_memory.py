"""The published size of Diff-Def without any data: parameters, and the activations that one step keeps."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import medinr.data.cohort
import medinr.fields.conditions
import medinr.fields.diffusion
import medinr.fields.latent
import medinr.fields.unet
import medinr.losses
import medinr.methods
import medinr.methods.diffusion_stages
from medinr.configured import build
from medinr.methods import DiffusionDeformation
from medinr.methods.diffusion_stages import autoencoder_terms, morphology_terms
from medinr.space import Domain

SHAPE = (160, 224, 160)
PLACES = (
    medinr.methods, medinr.losses, medinr.methods.diffusion_stages, medinr.fields.unet, medinr.fields.latent,
    medinr.fields.diffusion, medinr.fields.conditions,
)  # fmt: skip
CONFIG = Path(__file__).resolve().parents[2] / "experiments" / "diffdef_ukb.yaml"


def full_names(value: Any) -> Any:
    """A configuration as `build` takes it: classes with their modules, arguments always there."""
    if isinstance(value, dict) and "class_path" in value:
        [cls] = {getattr(place, value["class_path"]) for place in PLACES if hasattr(place, value["class_path"])}
        inner = {k: full_names(v) for k, v in value.get("init_args", {}).items()}
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": inner}
    return {k: full_names(v) for k, v in value.items()} if isinstance(value, dict) else value


class Kept:
    """Bytes of the distinct tensors that the backward pass will look at again."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        self.seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    @property
    def gib(self) -> float:
        return sum(t.untyped_storage().nbytes() for t in self.seen.values()) / 2**30


def measured(step: Any, parameters: set[int]) -> float:
    """GiB of what a step keeps, without the weights."""
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda t: t):
        loss = step()
    kept.seen = {k: t for k, t in kept.seen.items() if k not in parameters}
    found = kept.gib
    loss.backward()
    return found


def published() -> dict[str, float]:
    """Parameters in millions, and GiB: weights with gradients and Adam's moments, activations of each stage's step.

    Float32 throughout; bfloat16 halves most of the activations. A step is one scan (the registration: one pair). The
    tensors have shapes and no data.
    """
    given = full_names(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"])["init_args"]
    network = build(given.pop("network"))  # its constructor computes with numbers
    domain = Domain.of(SHAPE, torch.eye(4))
    assert domain.spacing == (1, 1, 1)  # computed here, where tensors have data
    with FakeTensorMode(allow_non_fake_inputs=True):
        method = DiffusionDeformation(network=network, **build(given))
        method.domain = domain
        return sizes(method)


def sizes(method: DiffusionDeformation) -> dict[str, float]:
    """See `published`; inside of FakeTensorMode."""
    method.embedding.size([0], [45.0], [80.0])
    weights = {p.untyped_storage()._cdata for p in method.parameters()}
    parts = {"network": method.network, "autoencoder": method.autoencoder, "denoiser": method.denoiser}
    out = {f"{k}_million": sum(p.numel() for p in part.parameters()) / 1e6 for k, part in parts.items()}
    images, latent = torch.empty(3, 1, *SHAPE), torch.empty(1, *method.autoencoder.latent_shape(SHAPE))
    context = torch.empty(1, 1, method.embedding.width)

    def registration() -> Tensor:
        _, terms = method.compare(images[:1], images[1:2], method.register_pair(images[:1], images[1:2]))
        return terms["similarity"]  # the penalties' differences need numbers, and little memory

    def autoencoder() -> Tensor:
        return torch.stack(list(autoencoder_terms(method.autoencoder, images[:1], 1e-6).values())).sum()

    def diffusion() -> Tensor:
        return F.mse_loss(method.denoiser(latent, torch.zeros(1, dtype=torch.long), context), latent)

    def morphology() -> Tensor:
        method.network.requires_grad_(False)
        method.autoencoder.requires_grad_(False)
        z = latent + method.denoiser(latent, torch.zeros(1, dtype=torch.long), context)  # the differentiable step
        velocity = method.decode(z)
        _, terms = morphology_terms(method.register_pair, images[:1], velocity, images, 0, 1.0)
        return terms["morphology"] + diffusion()

    for step in (registration, autoencoder, diffusion, morphology):
        out[f"{step.__name__}_gib"] = measured(step, weights)
    trained = {"registration": parts["network"], "autoencoder": parts["autoencoder"], "diffusion": parts["denoiser"]}
    for stage, part in trained.items():
        out[f"{stage}_adam_gib"] = 4 * 4 * sum(p.numel() for p in part.parameters()) / 2**30
    return out
