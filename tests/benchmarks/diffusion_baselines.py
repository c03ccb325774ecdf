"""What Diff-Def is compared with: atlases of a condition by simpler means, and how all of them are judged."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from medinr import io, metrics
from medinr.atlas_volumes import atlas_domain, decoded_at
from medinr.fields.squaring import warp
from medinr.losses.morphology import integrated, neighbourhood_weights, recentred
from medinr.methods import ConditionalAtlas, DiffusionDeformation
from medinr.methods import diffusion_stages as stages
from medinr.methods.diffusion_scans import perceptual
from medinr.sampling import nearest
from medinr.space import Domain, Image, transform_points
from medinr.start import find_start

RATE = 0.3


@dataclass(frozen=True)
class Candidate:
    """An atlas: image [X, Y, Z], label probabilities [L, X, Y, Z], det J of its deformation if it has one."""

    image: Tensor
    probabilities: Tensor
    det: Tensor | None


def weights_of(method: DiffusionDeformation, wanted: Tensor) -> Tensor:
    """Gaussian weights of the training scans."""
    span = (method.embedding.high - method.embedding.low).clamp(min=1e-6)
    scale = torch.where(torch.tensor(method.embedding.levels) > 0, torch.ones_like(span), span)
    return neighbourhood_weights(
        method._values / scale, wanted / scale, method.embedding.levels, method.morphology.bandwidth
    ).float()


def neighbours(method: DiffusionDeformation, wanted: Tensor, count: int = 15) -> list[str]:
    """The nearest training scans of a condition."""
    order = weights_of(method, wanted).argsort(descending=True)[:count]
    return [method.known.names("train")[int(i)] for i in order]


def one_hot(labels: Tensor, values: Sequence[int]) -> Tensor:
    return torch.stack([(labels == v).float() for v in values])


def general(method: DiffusionDeformation, wanted: Tensor) -> Candidate:
    """The general atlas, whatever is wanted."""
    found = method.atlas_of(torch.zeros(1, 3, *method.domain.shape))
    assert found.probabilities is not None
    return Candidate(found.image, found.probabilities, found.det)


def voxel_mean(method: DiffusionDeformation, wanted: Tensor) -> Candidate:
    """Mean of the neighbourhood's images and labels, voxel by voxel."""
    names = neighbours(method, wanted)
    values = method.state["label_values"]
    labels = [one for n in names if (one := method.space_.labels(n)) is not None]
    seen = torch.stack([(one >= 0).float() for one in labels]).sum(0)
    total = torch.stack([one_hot(one, values) for one in labels]).sum(0)
    return Candidate(method.space_.mean(names)[0], total / seen.clamp(min=1), None)


def template(method: DiffusionDeformation, wanted: Tensor, rounds: int = 1) -> Candidate:
    """Classical unbiased template of the neighbourhood: mean field of its registrations, then register again."""
    names = neighbours(method, wanted)
    images = [method.space_.image(n) for n in names]
    found = [method.autoencoder.dense(method.coarse(n)[None], method.domain.shape) for n in names]
    for turn in range(rounds + 1):
        image, found = recentred(images, found, method.squarings)
        if turn < rounds:
            found = [method.velocity(n, image, v) for n, v in zip(names, found, strict=True)]
    labels = [(one, v) for n, v in zip(names, found, strict=True) if (one := method.space_.labels(n)) is not None]
    some, theirs = zip(*labels, strict=True)
    probabilities, _ = stages.fused_labels(some, theirs, method.state["label_values"], method.squarings)
    return Candidate(image[0], probabilities, None)


def mean_field(method: DiffusionDeformation, wanted: Tensor) -> Candidate:
    """The general atlas through the Gaussian-weighted mean of the training scans' velocities."""
    weights, total = weights_of(method, wanted), torch.zeros(1, 3, *method.domain.shape)
    for name, w in zip(method.known.names("train"), weights.tolist(), strict=True):
        if w > 1e-4:
            total += w * method.autoencoder.dense(method.coarse(name)[None], method.domain.shape)
    found = method.atlas_of(total)
    assert found.probabilities is not None
    return Candidate(found.image, found.probabilities, found.det)


@torch.no_grad()
def regression(method: DiffusionDeformation, wanted: Tensor) -> Candidate:
    """The plane of latents over the conditions alone, without what the diffusion adds."""
    values = wanted.to(torch.float32)[None]
    found = method.atlas_of(method.decode(method.expected(values)).cpu())
    assert found.probabilities is not None
    return Candidate(found.image, found.probabilities, found.det)


def intensities(method: DiffusionDeformation, wanted: Tensor, seed: int = 0) -> Candidate:
    """Latent diffusion of images; the general atlas is registered to the image for its labels."""
    image = method.generate_image(wanted, seed=seed)
    with torch.no_grad():
        v = method.register_pair(image[None, None], method.template[None])
    v = stages.refined(method.compare, image[None, None], method.template[None], v, (4, 2), method.refine, RATE)
    moved = warp(method.state["probabilities"][None], integrated(v, method.squarings))[0]
    return Candidate(image, moved, None)


def cinema(atlas: ConditionalAtlas, method: DiffusionDeformation, wanted: Tensor) -> Candidate:
    """A CINeMA atlas of the same scans, brought to the general atlas's place by one affine transform."""
    told = {c.name: float(v) for c, v in zip(method.conditions, wanted, strict=True) if not v.isnan()}
    assert atlas.time is not None
    times = torch.tensor([k[atlas.time.name] for k in atlas.state["known"]])
    latent = atlas.at(told.pop(atlas.time.name, float(times.mean())), told)
    place = method.domain
    plain = Image(method.template, place)
    own = atlas_domain(atlas.unit_mm, min(place.spacing))
    image = decoded_at(atlas, latent, transform_points(own.voxel_to_world, own.voxels()))[:, :1]
    guess = Image(image.T.reshape(1, *own.shape).clamp(0, 1), own)
    matrix = find_start(plain, guess, "affine", [(0, 1), (0, 1)])
    world = transform_points(matrix @ place.voxel_to_world, place.voxels().double()).float()
    out = decoded_at(atlas, latent, world)
    shares = out[:, 1:].softmax(1).T.reshape(-1, *place.shape)
    order = [atlas.labels.index(v) for v in method.state["label_values"]]
    known = method.state["probabilities"].sum(0) > 0.05
    for axes in ((1, 2), (0, 2), (0, 1)):  # some planes have no labels at all
        shares = shares * known.amax(axes, keepdim=True)
    return Candidate(out[:, 0].clamp(0, 1).view(place.shape), shares[order], None)


def diffused(
    method: DiffusionDeformation, wanted: Tensor, samples: int = 1, guidance: float = 1.0, seed: int = 0
) -> Candidate:
    """What the method generates."""
    found = method.generate(wanted, samples, guidance, seed=seed)
    assert found.probabilities is not None
    return Candidate(found.image, found.probabilities, found.det)


def volume_ml(method: DiffusionDeformation, probabilities: Tensor, value: int, region: Tensor | None) -> float:
    """Expected volume of a label, in a region or everywhere."""
    found = probabilities[method.state["label_values"].index(value)]
    litre = abs(float(torch.linalg.det(method.domain.voxel_to_world[:3, :3]))) / 1000
    return float((found if region is None else found[region]).sum()) * litre


def nearer(file: Path, domain: Domain, one: int, other: int) -> Tensor:
    """Where a label of a file is nearer than another one, on a grid: of cerebrospinal fluid, that of the ventricles."""
    own = io.read_domain(file)
    labels = io.read_labels(file, own).numpy()
    first, second = (torch.from_numpy(distance_transform_edt(labels != v)) for v in (one, other))
    voxels = transform_points(own.world_to_voxel @ domain.voxel_to_world, domain.voxels().double()).float()
    return nearest((first < second).int(), voxels).view(domain.shape) == 1


@torch.no_grad()
def judged(method: DiffusionDeformation, candidate: Candidate, names: Sequence[str]) -> dict[str, float]:
    """An atlas against unseen scans: Dice as it is and after registration, centrality, folding, smoothness.

    With AlexNet's weights in the file $MEDINR_ALEXNET, LPIPS as well.
    """
    values = method.state["label_values"]
    atlas = candidate.image[None, None]
    found: dict[str, list[float]] = {"dice": [], "dice_registered": []}
    moves = []
    own = stages.likeliest(candidate.probabilities, values)
    for name in names:
        image, truth = method.space_.image(name)[None], method.space_.labels(name)
        assert truth is not None
        u = integrated(method.register_pair(image, atlas), method.squarings)
        carried = stages.likeliest(warp(candidate.probabilities[None], u)[0], values)
        for key, labels in (("dice", own), ("dice_registered", carried)):
            scores = metrics.dice(labels[truth >= 0], truth[truth >= 0], values)
            found[key].append(sum(scores.values()) / len(scores))
        there = integrated(method.register_pair(atlas, image), method.squarings)[0]
        moves.append(stages.world_mm(there, method.domain))
    if weights := os.environ.get("MEDINR_ALEXNET"):
        lpips = perceptual(weights)
        found["lpips"] = [float(lpips(candidate.image, method.space_.image(n)[0], 1.0)) for n in names]
    inside = candidate.image > 0.1
    out = {k: sum(v) / len(v) for k, v in found.items()}
    out["centrality_mm"] = metrics.centrality_mm(torch.stack(moves), inside)
    if candidate.det is not None:
        out["folding_percent"] = metrics.folding_percent(candidate.det)
        out["jacobian_gradient_per_mm"] = metrics.jacobian_gradient(candidate.det, method.domain.spacing, inside)
    return out


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean of each figure that all rows have."""
    return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0] if all(k in r for r in rows)}
