"""Whole training steps: each method against the same step with nested autograd, both sides in one run.

    python -m tests.benchmarks.bench_methods [--points 10000] [--hidden 256] [--repeats 5] [--only SINR] [--out FILE]

A step draws points, evaluates the fields, both images and all penalties, goes backward and lets Adam move. The
published-style side does so as the released codes do: voxel centres by a permutation of all voxels of the mask, one
`autograd.grad` call for each component, and one more for each row of a Hessian where bending is asked for. SINR takes
no points but all voxels, control points every second voxel (2 mm of 1 mm voxels), a spline by transposed convolutions
and forward differences of the dense field. Networks, weights, images, losses and optimizer are the same on both sides
(SINR: the lattice of the published-style side lies on voxel centres). One thread, the process's own seconds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from medinr import jets
from medinr.data.pair import Pair
from medinr.fields import SINR, SIREN, HarmonizedSIREN
from medinr.losses import NCC, Bending, ForwardDiffusion, Jacobian, SymmetricJacobian
from medinr.methods import (
    ConditionedRegistration,
    CycleConsistentRegistration,
    PairRegistration,
    RegistrationMethod,
    RegistrationModule,
    VolumeRegistration,
)
from medinr.sampling import interpolate
from medinr.space import Domain, Image, transform_points
from tests.benchmarks import measure
from tests.benchmarks.bench_jets import nested_gradients

Step = Callable[[], None]
SIZE = 96
STRIDE = 2
"""Voxels between SINR's control points."""


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
        "SINR, forward differences": VolumeRegistration(
            SINR(SIREN(hidden=hidden, omega=30.0, zero_output=False), STRIDE, "voxel"),
            NCC(),
            {"diffusion": ForwardDiffusion(50.0)},
            overlap_weight=0.0,
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
    """The same loss with nested autograd, for one direction or two; SINR's with all voxels."""
    if isinstance(method, VolumeRegistration):
        return published_sinr(method, lr)
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


def published_sinr(method: VolumeRegistration, lr: float) -> Step:
    """Network at the control points, cubic spline to every voxel, both images whole, NCC and forward differences."""
    domain, level = method.domain, method.grid().level
    index = STRIDE * torch.arange(-1, SIZE // STRIDE + 2).float()
    control = transform_points(domain.voxel_to_normalised, torch.cartesian_prod(index, index, index))
    voxels = domain.voxels().float()
    x = transform_points(domain.voxel_to_normalised, voxels).reshape(*domain.shape, 3)
    taps = (torch.arange(-2 * STRIDE + 1, 2 * STRIDE) / STRIDE).abs()
    kernel = torch.where(taps < 1, 2 / 3 - taps**2 + taps**3 / 2, (2 - taps) ** 3 / 6)
    first = 2 * STRIDE - 1 + STRIDE  # where voxel 0 lies in what the transposed convolution gives
    optimizer = torch.optim.Adam(method.parameters(), lr=lr)
    network, penalty = cast(SINR, method.map.field).network, method.penalties["diffusion"]
    differences = cast(ForwardDiffusion, penalty)

    def spline(u: Tensor) -> Tensor:
        """[1, 3, n, n, n] to [1, 3, SIZE, SIZE, SIZE], one axis at a time."""
        for axis in range(3):
            shape = [1] * 5
            shape[2 + axis] = len(kernel)
            stride = [STRIDE if a == axis else 1 for a in range(3)]
            weight = kernel.reshape(shape).expand(3, 1, *shape[2:])
            u = torch.nn.functional.conv_transpose3d(u, weight, stride=stride, groups=3)
            u = u.narrow(2 + axis, first, SIZE)
        return u

    def step() -> None:
        optimizer.zero_grad()
        u = network(control).T.reshape(1, 3, *(len(index),) * 3)
        dense = spline(u)[0].movedim(0, -1)
        moved = interpolate(level.moving, transform_points(method.to_moving_voxels.to(x), x + dense))[0]
        loss = method.similarity(level.fixed[0].flatten(), moved.flatten())
        (loss + penalty.weight * differences.on_grid(dense, [1.0] * 3, 1.0)).backward()
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
    parser.add_argument("--only", default="", help="first letters of methods, comma-separated")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure.clock = time.process_time
    pair, records = new_pair(), []
    print("| method | published style, s a step | ours, s a step | speed-up |\n|---|---|---|---|")
    for name, method in methods(given.points, given.hidden).items():
        if not name.startswith(tuple(given.only.split(","))):
            continue
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
