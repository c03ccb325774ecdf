"""A new brain in a fitted atlas: its code, pose and unknown conditions, from its intensities alone."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from medinr.atlas_volumes import AtlasVolume, Decodes
from medinr.data.cohort import UNLABELLED, Condition, Scan
from medinr.data.encoded import decode, encode
from medinr.data.scan_points import Drawn, ScanPoints, brain, placement, weighted_l1
from medinr.fields.poses import RIGID
from medinr.latents import Latent
from medinr.metrics.intensity import psnr, ssim
from medinr.metrics.overlap import dice

Part = Literal["code", "pose", "rigid", "conditions"]
AGES = 9
"""So many ages over the trained range are tried as the start."""
LOOK_EVERY = 10
"""Steps between two looks at the points that were held out."""
MOST_HELD = 8192
TURNS = 40
"""Steps that turn a brain of the atlas onto a scan before its age is chosen."""


class Adaptable(Decodes, Protocol):
    """What a new scan can be fitted to."""

    told: tuple[Condition, ...]
    conditions: tuple[Condition, ...]
    halo: float
    elsewhere: float
    code_lr: float
    code_weight: float
    pose_lr: float
    state: dict[str, Any]

    @property
    def time(self) -> Condition | None:
        """The condition along which the atlas is made."""
        ...

    def at(self, time: float | None, values: Mapping[str, float] | None = None) -> Latent:
        """The mean brain at a time."""
        ...

    def sampler(self, scan: Scan) -> ScanPoints:
        """The scan's points."""
        ...


@dataclass(frozen=True)
class Adapted:
    """A brain that was fitted to an atlas.

    Attributes:
        latent: code, conditions, pose, in the scan's own space.
        conditions: explicit conditions by name, given or fitted.
        spread: standard deviation over the restarts of each fitted continuous one; 0 of a single fit.
        held_out: mean absolute difference at the points that were held out, in the intensity window.
        steps: that the best state took.
        curve: (step, held_out) as the fit went.
    """

    latent: Latent
    conditions: dict[str, float]
    held_out: float
    steps: int
    spread: dict[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()


def adapt_scan(
    atlas: Adaptable,
    scan: Scan,
    known: Mapping[str, float] | None = None,
    fit: Sequence[Part] = ("code", "pose", "conditions"),
    steps: int = 300,
    points: int = 4096,
    restarts: int = 1,
    start: Latent | None = None,
    held_out: float = 0.1,
    patience: int = 8,
    rate: float = 1.0,
    seed: int = 0,
) -> Adapted:
    """Fit a scan with the decoder frozen (CINeMA, eq. 5), from its intensities alone: labels are never looked at.

    A share of the voxels is held out; the state that fits them best is kept, and the fit ends when they have not been
    fitted better for a while. (The published code has no such points, and takes 5 to 10 passes.) It starts from the
    best of some ages of the atlas, first turns and shifts alone, then everything.

    Args:
        atlas: what was fitted.
        scan: with one modality of the atlas or more.
        known: explicit conditions that are known by name, and stay as they are.
        fit: what is fitted; ``rigid`` is the turn and shift of the pose alone.
        steps: at most.
        points: a step.
        restarts: fits from different starts; the best is returned, their spread beside it.
        start: the brain to start from; None: the best of some ages.
        held_out: share of the voxels.
        patience: looks (every 10 steps) without a better fit before the end.
        rate: factor of the atlas's own learning rates.
        seed: of the points.
    """
    sampler = atlas.sampler(scan)
    centre, extent, _ = placement(brain(scan), scan.domain)
    task = _Task(atlas, sampler, held_out, seed)
    values = {k: v for k, v in (known or {}).items() if not math.isnan(v)}
    starts = (
        [replace(start, centre=centre)]
        if start is not None
        else _starts(atlas, task, values, centre, extent, fit, restarts)
    )
    found = []
    for i in range(restarts):
        generator = torch.Generator().manual_seed(seed + 7919 * i)
        found.append(_fit(atlas, task, starts[i % len(starts)], values, fit, steps, points, patience, rate, generator))
    best = min(found, key=lambda one: one.held_out)
    spread = {
        c.name: float(torch.tensor([one.conditions[c.name] for one in found]).std(correction=min(1, restarts - 1)))
        for c in atlas.told
        if c.kind == "continuous" and c.name not in values
    }
    return replace(best, spread=spread)


class _Task:
    """The points of a scan: those to fit and those held out, and the loss at them."""

    def __init__(self, atlas: Adaptable, sampler: ScanPoints, held_out: float, seed: int) -> None:
        self.atlas, self.sampler = atlas, sampler
        self.weight = sampler.present.float() / sampler.present.sum().clamp(min=1)
        generator = torch.Generator().manual_seed(seed)
        self.free, held = [], []
        inside = min(MOST_HELD, math.ceil(held_out * len(sampler.inside)))
        around = round(inside * atlas.halo / (1 - atlas.halo))  # in the same proportion as the points of a step
        for voxels, most in ((sampler.inside, inside), (sampler.halo, around)):
            order = voxels[torch.randperm(len(voxels), generator=generator)].long()
            n = min(most, len(order) // 2)
            held.append(order[:n])
            self.free.append(order[n:])
        self.held = sampler.at(torch.cat(held))
        self.few = sampler.at(held[0][:2048])

    def draw(self, n: int, generator: torch.Generator) -> Drawn:
        """n of the points that are not held out."""
        around = round(self.atlas.halo * n) if len(self.free[1]) else 0
        pieces = [
            voxels[torch.randint(len(voxels), (count,), generator=generator)]
            for voxels, count in zip(self.free, (n - around, around), strict=True)
            if count
        ]
        return self.sampler.at(torch.cat(pieces))

    def loss(self, drawn: Drawn, latent: Latent) -> Tensor:
        one = (latent.code[None], latent.encoded[None], latent.pose[None], latent.centre[None])
        device = latent.code.device
        m = len(self.atlas.modalities)
        total = []
        for world, values in zip(drawn.world.split(1024), drawn.values.split(1024), strict=True):
            out = self.atlas.decode(world[None].to(device), *one)[0, :, :m]
            total.append(weighted_l1(out, values.to(device), self.weight.to(device)) * len(values))
        return torch.stack(total).sum() / len(drawn.values)

    @torch.no_grad()
    def miss(self, latent: Latent) -> float:
        """The loss at a few of the points that were held out."""
        return float(self.loss(self.few, _moved(latent, _device(self.atlas))))


def _starts(
    atlas: Adaptable,
    task: _Task,
    values: Mapping[str, float],
    centre: Tensor,
    extent: Tensor,
    fit: Sequence[Part],
    count: int,
) -> list[Latent]:
    """The ages of the atlas that fit best as they are, best first; one where the age is known.

    A pose that can stretch starts with the scan's own size, as those of training did: else the size would be taken for
    the age's.
    """

    def placed(latent: Latent) -> Latent:
        pose = latent.pose.clone()
        if "pose" in fit and len(pose) > RIGID and "stretch" in atlas.state:
            pose[RIGID : RIGID + 3] = torch.tensor(atlas.state["stretch"]) - extent.log()
        return replace(latent, centre=centre, pose=pose)

    time, told = atlas.time, [c.name for c in atlas.told]
    given = {k: v for k, v in values.items() if k in told}
    if time is None or not time.high > time.low:
        ages: list[float | None] = [None]
    elif time.name in values:
        ages = [values[time.name]]
    else:
        ages = [*torch.linspace(time.low, time.high, AGES).tolist()]
    tried = [placed(atlas.at(age, given)) for age in ages]
    # What fits best as it lies may be a head that is turned likewise: it is turned, and all ages are tried again.
    if {"pose", "rigid"} & set(fit):
        pose = _turned(atlas, task, min(tried, key=task.miss))
        tried = [replace(latent, pose=pose) for latent in tried]
    return sorted(tried, key=task.miss)[: max(1, min(count, 3))]


def _turned(atlas: Adaptable, task: _Task, start: Latent) -> Tensor:
    """The pose that turns and shifts a brain of the atlas onto the scan."""
    latent = _moved(start, _device(atlas))
    still = torch.zeros_like(latent.pose)
    still[:RIGID] = 1
    turn = torch.zeros_like(latent.pose, requires_grad=True)
    optimizer = torch.optim.Adam([turn], lr=10 * atlas.pose_lr)
    generator = torch.Generator().manual_seed(0)
    for step in range(TURNS):
        optimizer.param_groups[0]["lr"] = 10 * atlas.pose_lr * (1 - step / TURNS)
        loss = task.loss(task.draw(2048, generator), replace(latent, pose=latent.pose + still * turn))
        (turn.grad,) = torch.autograd.grad(loss, turn)
        optimizer.step()
    return (latent.pose + still * turn).detach().cpu()


def _fit(
    atlas: Adaptable,
    task: _Task,
    start: Latent,
    values: Mapping[str, float],
    fit: Sequence[Part],
    steps: int,
    points: int,
    patience: int,
    rate: float,
    generator: torch.Generator,
) -> Adapted:
    start = _moved(start, _device(atlas))
    given = encode(atlas.told, values).to(start.code)
    free = given.isnan()
    code, pose, encoded = (v.clone().requires_grad_() for v in (start.code, start.pose, start.encoded))
    groups: list[dict[str, Any]] = []
    if {"pose", "rigid"} & set(fit):
        groups.append({"params": [pose], "lr": rate * atlas.pose_lr})
    if "code" in fit:
        groups.append({"params": [code], "lr": rate * atlas.code_lr})
    if "conditions" in fit and bool(free.any()):
        groups.append({"params": [encoded], "lr": 5 * rate * atlas.code_lr})
    optimizer = torch.optim.Adam([dict(group) for group in groups])
    turn = steps // 5  # at first it only turns and shifts: codes must not learn what a pose explains
    still = torch.zeros_like(pose)
    still[:RIGID] = 1

    def state() -> Latent:
        return replace(start, code=code, pose=pose, encoded=torch.where(free, encoded, given))

    frozen = [p for p in _parameters(atlas) if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    best, best_loss, best_step, curve = _plain(state()), math.inf, 0, []
    try:
        for step in range(steps + 1):
            if step % LOOK_EVERY == 0:
                with torch.no_grad():
                    held = float(task.loss(task.held, state()))
                curve.append((step, held))
                if held < best_loss:
                    best, best_loss, best_step = _plain(state()), held, step
                elif step > turn and step - best_step >= patience * LOOK_EVERY:
                    break
            if step == steps:
                break
            share = 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            # The weight that codes have in training: what age or another condition explains is left to it.
            prior = atlas.code_weight * code.square().mean()
            (task.loss(task.draw(points, generator), state()) + prior).backward()
            if pose.grad is not None and (step < turn or "rigid" in fit):
                pose.grad *= still
            if step < turn:
                code.grad = encoded.grad = None
            for group, base in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = base["lr"] * max(share, 0.05)
            optimizer.step()
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return Adapted(best, decode(atlas.told, best.encoded), best_loss, best_step, curve=tuple(curve))


def _parameters(atlas: Adaptable) -> list[Tensor]:
    parameters: Callable[[], Any] | None = getattr(atlas, "parameters", None)
    return list(parameters()) if parameters is not None else []


def _device(atlas: Adaptable) -> torch.device:
    return next((p.device for p in _parameters(atlas)), torch.device("cpu"))


def _moved(latent: Latent, device: torch.device) -> Latent:
    return Latent(**{k: v.to(device) for k, v in vars(latent).items()})


def _plain(latent: Latent) -> Latent:
    return Latent(**{k: v.detach().cpu().clone() for k, v in vars(latent).items()})


def scan_metrics(atlas: Adaptable, scan: Scan, found: Adapted, volume: AtlasVolume) -> dict[str, float]:
    """How well a fitted brain shows its scan: PSNR and SSIM in the mask (of the intensity window), mean Dice.

    Args:
        atlas: what it was fitted to.
        scan: the scan, with labels or without.
        found: the fit.
        volume: the fitted brain on the scan's grid.
    """
    sampler, inside = atlas.sampler(scan), brain(scan)
    there = [m for m in atlas.modalities if m in scan.images]
    pairs = [(volume.images[m], sampler.volume[atlas.modalities.index(m)]) for m in there]
    metrics = {
        "image/psnr": sum(psnr(a, b, 1.0, inside) for a, b in pairs) / len(pairs),
        "image/ssim": sum(ssim(a, b, 1.0, inside) for a, b in pairs) / len(pairs),
        "adapt/held_out": found.held_out,
    }
    if volume.labels is not None and scan.labels is not None:
        known = scan.labels != UNLABELLED
        scores = dice(volume.labels[known].int(), scan.labels[known].int(), atlas.labels[1:])
        if scores:
            metrics["dsc/mean"] = sum(scores.values()) / len(scores)
    return metrics
