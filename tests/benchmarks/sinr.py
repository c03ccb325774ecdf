"""SINR against a dense SIREN at equal processor time, one contrast and two.

    python -m tests.benchmarks.sinr --work WORK [--pairs mouse_1,phantom_1] [--seeds 3] [--contrasts mono,multi]
    python -m tests.benchmarks.sinr --report

WORK/pairs is written by tests/benchmarks/pairs.py. Every row of tests/benchmarks/sinr.jsonl is one fit: a pair, a
contrast, a field, a seed. Both fields have a network of 3 x 128 units, zero output, omega 30 and a first omega of 15,
images that get sharper in three equal parts (smoothed by 2, 1 and 0 voxels), a bending energy and a folding barrier,
Adam with warm-up and cosine, and points in the mask of `comparison_inr` (lungs, brain).

- ``dense``: the network is the displacement; 2,048 random points, 1,000 steps. Its processor time is the budget.
- ``sinr``: the network drives a spline of 8 mm (mouse: 8 voxels, 1.2 mm) and all points of grids of 4, 2 and 1 voxels
  are compared (at most 200,000 at once); as many steps as the budget allows, by the time of two short trials.

``mono``: NCC. ``multi``: the moving image inverted and bent, v -> (1 - v)^2 of its window with the background left,
and NMI of 32 bins. The weight of the bending energy (1e-5, 1e-3; SINR also 1e-2) was chosen on mouse_1, mono, seed 0,
and so was SINR's learning rate (1e-3 was worse). Rows that are there are not run again.
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from medinr.commands.register import fit
from medinr.data.pair import Pair
from medinr.fields import SINR, SIREN
from medinr.fields.dense import evaluate_dense
from medinr.losses import NCC, NMI, Barrier, Bending, Regularizer
from medinr.methods import PairRegistration, RegistrationMethod, VolumeRegistration
from medinr.methods.grids import voxel_mm
from medinr.methods.levels import robust_window, windowed
from medinr.space import REFERENCE_LENGTH_MM
from tests.benchmarks.comparison_inr import HIDDEN, POINTS, STEPS, read_pair
from tests.benchmarks.comparison_measure import failure, measure
from tests.benchmarks.measure import read_rows

ROWS = Path(__file__).parent / "sinr.jsonl"
SHRINKS = (4.0, 2.0, 1.0)
TRIALS = (3, 12, 36)
"""Steps; the first trial warms up."""
SETTINGS = {
    ("dense", "mono"): (3e-4, 1e-3),
    ("dense", "multi"): (3e-4, 1e-3),
    ("sinr", "mono"): (3e-4, 1e-3),
    ("sinr", "multi"): (3e-4, 1e-3),
}
"""Learning rate, and weight of the bending energy with lengths in normalised units."""
Row = dict[str, Any]


def bent(pair: Pair) -> Pair:
    """The moving image in another contrast."""
    values = windowed(pair.moving.data, robust_window(pair.moving))
    other = torch.where(pair.moving.data == 0, values, (1 - values).square())
    return replace(pair, moving=replace(pair.moving, data=1000 * other))


def make(kind: str, contrast: str, pair: Pair, lr: float, bending: float) -> RegistrationMethod:
    similarity = NCC() if contrast == "mono" else NMI()
    weight = bending * (pair.domain.unit_mm / REFERENCE_LENGTH_MM) ** 2
    penalties: dict[str, Regularizer] = {"bending": Bending(weight, fraction=0.25), "barrier": Barrier(1.0)}
    network = SIREN(hidden=HIDDEN, omega=30.0, first_omega=15.0)
    voxel = voxel_mm(pair.domain)
    common: dict[str, Any] = {"lr": lr, "warmup": 0.05, "cosine": True, "use_moving_mask": False}
    if kind == "dense":
        smoothing = [0.5 * s * voxel if s > 1 else 0.0 for s in SHRINKS]
        return PairRegistration(network, similarity, penalties, POINTS, smoothing, **common)
    field = SINR(network, 8.0, "voxel" if pair.name.startswith("mouse") else "mm")
    return VolumeRegistration(field, similarity, penalties, SHRINKS, most=200_000, points=POINTS, **common)


def run(
    folder: Path,
    kind: str,
    contrast: str,
    seed: int,
    budget: float | None,
    settings: tuple[float, float] | None = None,
) -> Row:
    """One fit and what it is worth; without a budget (processor seconds), the steps of the dense network."""
    pair = read_pair(folder)
    if contrast == "multi":
        pair = bent(pair)
    lr, bending = settings or SETTINGS[kind, contrast]
    steps = STEPS
    if budget is not None:  # what it takes to prepare counts once
        spent = []
        for trial in TRIALS:
            begin = time.process_time()
            fit(make(kind, contrast, pair, lr, bending), pair, trial, "cpu")
            spent.append(time.process_time() - begin)
        step = (spent[-1] - spent[-2]) / (TRIALS[-1] - TRIALS[-2])
        steps = max(30, round((budget - spent[-2]) / step) + TRIALS[-2])
    lightning.seed_everything(seed, verbose=False)
    method = make(kind, contrast, pair, lr, bending)
    begin, wall = time.process_time(), time.perf_counter()
    fit(method, pair, steps, "cpu")
    spent, passed = time.process_time() - begin, time.perf_counter() - wall
    found = measure(folder, evaluate_dense(method.transform(), pair.domain).displacement, pair.domain)
    return {
        "pair": folder.name, "contrast": contrast, "field": kind, "seed": seed, "lr": lr, "bending": bending,
        "steps": steps,
        "cpu_seconds": round(spent, 1), "seconds": round(passed, 1), "failure": failure(found),
        **{k: round(v, 4) for k, v in found.items()},
    }  # fmt: skip


def find(rows: list[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row[k] == v for k, v in wanted.items())), None)


def report(rows: list[Row]) -> str:
    """Means and standard deviations over seeds."""
    cells: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["pair"], row["contrast"], row["field"]].append(row)
    lines = [
        "| pair | contrast | field | seeds | steps | CPU s | Dice | TRE mm | folding % (region) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def spread(some: list[Row], key: str, initial: str) -> str:
        if key not in some[0]:
            return ""
        values = [row[key] for row in some]
        return f"{some[0][initial]:.3f} -> {np.mean(values):.3f} ± {np.std(values):.3f}"

    for (pair, contrast, field), some in sorted(cells.items()):
        steps, seconds, folding = (np.mean([r[k] for r in some]) for k in ("steps", "cpu_seconds", "folding_percent"))
        dice, tre = spread(some, "dice", "dice_initial"), spread(some, "tre_mean", "tre_initial")
        lines.append(
            f"| {pair} | {contrast} | {field} | {len(some)} | {steps:.0f} | {seconds:.0f} | {dice} | {tre} "
            f"| {folding:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--pairs", default="mouse_1,mouse_4,phantom_1,bspline_10")
    parser.add_argument("--contrasts", default="mono,multi")
    parser.add_argument("--fields", default="dense,sinr", help="sinr needs the budget of dense")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.report:
        print(report(read_rows(ROWS)))
        return
    if given.work is None:
        parser.error("--work: expected the folder that holds pairs/")
    for pair in given.pairs.split(","):
        for contrast in given.contrasts.split(","):
            for seed in range(given.seeds):
                for kind in given.fields.split(","):
                    rows = read_rows(ROWS)
                    if find(rows, pair=pair, contrast=contrast, field=kind, seed=seed):
                        continue
                    dense = find(rows, pair=pair, contrast=contrast, field="dense", seed=seed)
                    if kind == "sinr" and dense is None:
                        continue
                    budget = dense["cpu_seconds"] if kind == "sinr" and dense else None
                    row = run(given.work / "pairs" / pair, kind, contrast, seed, budget)
                    with ROWS.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
