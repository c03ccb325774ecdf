"""Whole training steps: each method against the same step with nested autograd, both sides in one run.

    python -m tests.benchmarks.bench_methods [--points 10000] [--hidden 256] [--repeats 5] [--out methods.jsonl]

A step draws points, evaluates the fields, both images and all penalties, goes backward and lets Adam move. The
published-style side does so as the released codes do: voxel centres by a permutation of all voxels of the mask, one
`autograd.grad` call for each component, and one more for each row of a Hessian where bending is asked for. Networks,
weights, images, losses and optimizer are the same on both sides. One thread, the process's own seconds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from medinr import jets
from medinr.data.pair import Pair
from medinr.fields import SIREN, HarmonizedSIREN
from medinr.losses import NCC, Bending, Jacobian, SymmetricJacobian
from medinr.methods import (
    ConditionedRegistration,
    CycleConsistentRegistration,
    PairRegistration,
    RegistrationMethod,
    RegistrationModule,
)
from medinr.sampling import interpolate
from medinr.space import Domain, Image, transform_points
from tests.benchmarks import measure
from tests.benchmarks.bench_jets import nested_gradients

Step = Callable[[], None]
SIZE = 96


def new_pair() -> Pair:
    """A smooth texture and itself, a little shifted, [96, 96, 96] voxels of 2 mm."""
    domain = Domain.of((SIZE,) * 3, [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    line = torch.linspace(0, 12, SIZE)
    data = torch.sin(line)[:, None, None] + torch.cos(1.3 * line)[None, :, None] * torch.sin(0.7 * line)[None, None]
    images = [Image(d[None], domain) for d in (data, data.roll(1, 0))]
    return Pair("texture", *images, *(torch.ones(domain.shape, dtype=torch.bool) for _ in images))


def methods(points: int, width: int) -> dict[str, RegistrationModule]:
    """By name: IDIR, IDIR with bending, cycle-consistent, conditioned; published sizes where not asked otherwise."""
    common: dict[str, Any] = {"points": points, "jitter": False, "overlap_weight": 0.0}
    hidden = (width,) * 3

    def pairwise(**penalty: Any) -> PairRegistration:
        return PairRegistration(SIREN(hidden=hidden, omega=32.0, zero_output=False), NCC(), penalty, **common)

    return {
        "IDIR, Jacobian": pairwise(jacobian=Jacobian(0.05)),
        "IDIR, bending": pairwise(bending=Bending(1e-3)),
        "cycle-consistent": CycleConsistentRegistration(
            pairwise(symmetric_jacobian=SymmetricJacobian(0.05, published=True))
        ),
        "cIDIR, bending": ConditionedRegistration(
            HarmonizedSIREN(hidden=hidden), NCC(), {"bending": Bending(1e-3)}, ["bending"], alphas=1, **common
        ),
    }


def alone(method: RegistrationModule, pair: Pair) -> None:
    """Attached to a pair, and able to make steps without a trainer."""
    method.attach(pair)
    method._trainer = SimpleNamespace(global_step=1, log_every_n_steps=10**9, estimated_stepping_batches=10**6)  # type: ignore[assignment]
    for part in method.children():
        if isinstance(part, RegistrationModule):
            part._trainer = method._trainer


def ours(method: RegistrationModule) -> Step:
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(method.objective(method.draw()).values())).sum().backward()
        optimizer.step()

    return step


def published(method: RegistrationModule, lr: float = 1e-5) -> Step:
    """The same loss with nested autograd, for one direction or two."""
    parts = [method.ahead, method.back] if isinstance(method, CycleConsistentRegistration) else [method]
    masks = [p.pair.fixed_mask for p in parts]  # type: ignore[union-attr]
    voxels = [mask.nonzero().float() for mask in masks]
    optimizer = torch.optim.Adam(method.parameters(), lr=lr)

    def one(part: RegistrationMethod, all_voxels: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        chosen = all_voxels[torch.randperm(len(all_voxels))[: part.points]]
        x = transform_points(part.domain.voxel_to_normalised, chosen).requires_grad_()
        u = part.map.displacement(x, context)
        level = part.level
        fixed = interpolate(level.fixed, chosen)[0]
        moved = interpolate(level.moving, transform_points(part.to_moving_voxels.to(x), x + u))[0]
        loss = part.similarity(fixed, moved)
        for name, penalty in part.penalties.items():
            loss = loss + penalty.weight * (1.0 if context is None else context[0]) * nested(name, u, x, part)
        return loss, x, x + u

    def step() -> None:
        optimizer.zero_grad()
        [context] = parts[0].conditions()  # type: ignore[union-attr]
        found = [one(p, v, context) for p, v in zip(parts, voxels, strict=True)]  # type: ignore[arg-type]
        loss = torch.stack([f[0] for f in found]).sum()
        if isinstance(method, CycleConsistentRegistration):
            for (_, x, there), other in zip(found, parts[::-1], strict=True):
                back = there + other.map.displacement(there)  # type: ignore[union-attr]
                loss = loss + method.weight * (back - x).square().sum(-1).mean()
        loss.backward()
        optimizer.step()

    return step


def nested(name: str, u: Tensor, x: Tensor, part: RegistrationMethod) -> Tensor:
    gradients = nested_gradients(u, x)
    if name == "bending":
        unit = 100 / part.domain.unit_mm
        rows = [[torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0] for i in range(3)] for g in gradients]
        terms = [
            (1 if i == j else 2) * row[i][:, j].square().mean() for row in rows for i in range(3) for j in range(i, 3)
        ]
        return unit**2 * torch.stack(terms).sum()
    d = jets.det(torch.stack(gradients, dim=1) + torch.eye(3))
    if name == "jacobian":
        return (d - 1).abs().mean()
    d = d.clamp(0.1, 10)
    return ((d - 1) ** 2 / d).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure.clock = time.process_time
    pair, records = new_pair(), []
    print("| method | published style, s a step | ours, s a step | speed-up |\n|---|---|---|---|")
    for name, method in methods(given.points, given.hidden).items():
        alone(method, pair)
        times = measure.interleaved({"published": published(method), "ours": ours(method)}, given.repeats)
        row = {
            "method": name, "points": given.points, "hidden": given.hidden,
            **{k: round(statistics.median(v), 4) for k, v in times.items()},
            "speed_up": round(measure.ratio(times["published"], times["ours"]), 2),
        }  # fmt: skip
        records.append(row)
        print(f"| {name} | {row['published']:.3f} | {row['ours']:.3f} | {row['speed_up']:.2f} |", flush=True)
    if given.out:
        given.out.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


if __name__ == "__main__":
    main()
