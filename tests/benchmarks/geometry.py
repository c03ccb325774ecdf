"""What the tangent-space prior gives on the tube phantom, and where it harms.

    python -m tests.benchmarks.geometry [--seeds 0,1,2] [--only peristalsis] [--table]

Every row is a JSON line in tests/benchmarks/geometry.jsonl; rows that are there are not run again. ``--table`` prints
the table of what is there. A seed is that of the phantom and of the network.

Three models of about as many weights each, at one declared reduced size: 128 units a layer (combined: twice 90;
published 256 and 180), 2,048 points a step (10,000), 1,000 steps (2,500). All else is as published: omega 64, Adam
1e-4, NCC, points in the tube of 40 mm, |det - 1| times 0.05 of each network in its own coordinates, axes normalised
one by one.
``*_ours``, as experiments/geometry_tube_best.yaml: zero start, pyramid, local NCC on extrapolated patches, learning
rate 3e-4 with warm-up and cosine, folding barrier.

The error is the distance to the true displacement at the voxel centres of the tube, mm.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from medinr import jets
from medinr.commands.register import fit
from medinr.data.pair import Pair
from medinr.fields import SIREN, Field, Sum, TangentField
from medinr.losses import NCC, Barrier, Jacobian, LocalNCC, OwnCoordinates
from medinr.methods import PairRegistration
from medinr.phantoms.tube import KINDS, TubeCase
from medinr.space import Image, transform_points
from tests.benchmarks.measure import read_rows

ROWS = Path(__file__).parent / "geometry.jsonl"
ROOT = Path(__file__).resolve().parents[2]
MODELS = ("image", "tangent", "combined")
POINTS, STEPS = 2048, 1000
Row = dict[str, Any]


def network(width: int, ours: bool, first_omega: float = 15.0) -> SIREN:
    """Three layers of sines."""
    if ours:
        return SIREN(hidden=(width,) * 3, omega=30.0, first_omega=first_omega)
    return SIREN(hidden=(width,) * 3, omega=64.0, zero_output=False)


def field(model: str, trace: list[list[float]], ours: bool) -> Field:
    """The displacement of one of `MODELS`."""
    if model == "image":
        return network(128, ours)
    tangent = TangentField(network(90 if model == "combined" else 128, ours, 10.0), trace)
    return Sum(network(90, ours), tangent) if model == "combined" else tangent


def registration(model: str, trace: list[list[float]], ours: bool) -> PairRegistration:
    if ours:
        return PairRegistration(
            field(model, trace, ours),
            LocalNCC(radius_mm=4.0),
            {"barrier": Barrier(10.0)},
            points=POINTS,
            pyramid_mm=(4.0, 2.0, 0.0),
            lr=3e-4,
            warmup=0.05,
            cosine=True,
        )
    return PairRegistration(
        field(model, trace, ours),
        NCC(),
        # In image space both are the same; the plain one is computed together with the displacement.
        {"jacobian": Jacobian(0.05) if model == "image" else OwnCoordinates(Jacobian(0.05))},
        points=POINTS,
        lr=1e-4,
        overlap_weight=0.0,
        scale="per-axis",
    )


def pair_of(case: TubeCase) -> Pair:
    images = [Image(torch.from_numpy(case.image(s)).float()[None], case.domain, s) for s in ("fixed", "moving")]
    points = case.landmarks()
    return Pair(case.kind, *images, case.mask(), fixed_points=points, moving_points=case.truth(points))


def measure(case: TubeCase, pair: Pair, model: str, steps: int) -> Row:
    """Fit one model to one pair and compare it with the truth."""
    name, _, ours = model.partition("_")
    lightning.seed_everything(case.seed, verbose=False)
    method = registration(name, case.trace().tolist(), bool(ours))
    begin, cpu = time.perf_counter(), time.process_time()
    fit(method, pair, steps, "cpu")
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    transform = method.transform()
    assert pair.fixed_mask is not None and pair.fixed_points is not None and pair.moving_points is not None
    x = transform_points(case.domain.voxel_to_world, pair.fixed_mask.nonzero().double())
    truth = case.truth(x)
    gap = (transform(x) - truth).norm(dim=1)
    return {
        "error": gap.mean().item(),
        "error_p95": gap.quantile(0.95).item(),
        "initial_error": (x - truth).norm(dim=1).mean().item(),
        "tre": (transform(pair.fixed_points) - pair.moving_points).norm(dim=1).mean().item(),
        "folding/percent": 100 * (jets.det(transform.jacobian(x)) <= 0).double().mean().item(),
        "weights": sum(p.numel() for p in method.parameters()),
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def table(rows: list[Row]) -> str:
    """Mean error over the seeds (and of each) by kind and model."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    lines = ["| kind | before | " + " | ".join(models) + " |", "|---" * (len(models) + 2) + "|"]
    for kind in KINDS:
        of_kind = [r for r in rows if r["kind"] == kind]
        if not of_kind:
            continue
        cells = [f"{np.mean([r['initial_error'] for r in of_kind]):.2f}"]
        for model in models:
            found = [r["error"] for r in of_kind if r["model"] == model]
            each = ", ".join(f"{v:.2f}" for v in found)
            cells.append(f"{np.mean(found):.2f} ({each})" if found else "")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="beginnings of row names, comma-separated")
    parser.add_argument("--models", default=",".join([*MODELS, *(f"{m}_ours" for m in MODELS)]))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(read_rows(given.rows)))
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    done = {row["row"] for row in read_rows(given.rows)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    for seed in (int(s) for s in given.seeds.split(",")):
        for kind in KINDS:
            wanted = [
                model
                for model in given.models.split(",")
                if (name := f"{kind} {model} seed {seed}") not in done and name.startswith(tuple(given.only.split(",")))
            ]
            if not wanted:
                continue
            case = TubeCase(kind, seed=seed)
            pair = pair_of(case)
            for model in wanted:
                row = {"row": f"{kind} {model} seed {seed}", "kind": kind, "model": model, "seed": seed}
                row |= {**measure(case, pair, model, given.steps), "steps": given.steps}
                row |= {"commit": commit.stdout.strip(), "machine": machine, "load": round(os.getloadavg()[0], 2)}
                row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                with given.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    {k: row[k] for k in ("row", "error", "initial_error", "tre", "folding/percent", "seconds")},
                    flush=True,
                )


if __name__ == "__main__":
    main()
