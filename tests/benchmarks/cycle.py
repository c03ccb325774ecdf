"""How often a published-style INR fails, alone and cycle-consistent, and whether the uncertainty tells.

    python -m tests.benchmarks.cycle --work WORK [--kinds single,cycle] [--settings plain,provoked,hard] [--seeds 10]

Every row of tests/benchmarks/cycle.jsonl is one fit: a phantom case, a seed, one of

- ``single``: IDIR at a declared reduced size (128 wide, 1,024 points, 1,000 steps; else as in comparison_inr.py);
- ``cycle``: the same in both directions, each with as many points as in the released code (the paper halves them: at
  512 points each, the first three provoked fits diverged to 80 to 91 mm), with the symmetric Jacobian and the cycle
  term of ccidir_dirlab.yaml;

in one of three settings: ``plain`` (lung masks, learning rate 1e-4), ``provoked`` (learning rate 1e-3, no masks, and
the moving image shifted along the body so that landmarks move by 25 mm on average), and ``hard`` (the same with 60 mm,
on cases 1 and 2 alone: 25 mm seldom make these two fail, and a threshold between good and failed needs both).
Failure: a mean TRE above 5 mm or no better than the start. Rows that are there are not run again.

``python -m tests.benchmarks.cycle --report`` prints failure rates with exact (Clopper-Pearson) binomial 95 % intervals,
the trust flag's hits and false alarms at the threshold fixed on cases 1 and 2, and the rank correlation of uncertainty
and error over landmarks.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from scipy.stats import binomtest, spearmanr

from medinr import io
from medinr.commands.register import fit
from medinr.data.pair import Pair
from medinr.fields import CycleTransform
from medinr.methods import RegistrationModule
from medinr.metrics import tre
from medinr.space import Domain, Image
from tests.benchmarks.comparison_inr import STEPS, ccidir, idir, read_pair
from tests.benchmarks.measure import read_rows

ROWS = Path(__file__).parent / "cycle.jsonl"
TUNING = (1, 2)
CASES = (1, 2, 3, 4, 5)
POINTS = 1024
MOTION_MM = {"provoked": 25.0, "hard": 60.0}
LANDMARKS = 60
"""Landmarks of each run whose error and uncertainty are kept in its row."""
Row = dict[str, Any]


def read_case(work: Path, case: int, setting: str) -> Pair:
    """A phantom pair with its landmarks; unless plain, shifted to the mean motion of the setting, and without masks."""
    folder = work / "pairs" / f"phantom_{case}"
    fixed, moving = (io.read_points(folder / f"{side}.csv") for side in ("fixed", "moving"))
    pair = replace(read_pair(folder), fixed_points=fixed, moving_points=moving)
    if setting == "plain":
        return pair
    wanted = MOTION_MM[setting]
    # Along the body: the mean of |m + s z| over landmarks is as wanted at the right s.
    move = (moving - fixed).double()
    along = torch.tensor([0.0, 0.0, 1.0 if move[:, 2].mean() >= 0 else -1.0]).double()
    low, high = 0.0, 2 * wanted
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if (move + middle * along).norm(dim=1).mean() < wanted else (low, middle)
    affine = pair.moving.domain.voxel_to_world.clone()
    affine[:3, 3] += low * along
    shifted = Image(pair.moving.data, Domain.of(pair.moving.domain.shape, affine), pair.moving.source)
    return replace(
        pair, moving=shifted, moving_points=moving + (low * along).to(moving), fixed_mask=None, moving_mask=None
    )


def make(kind: str, pair: Pair, provoked: bool) -> RegistrationModule:
    lr = 1e-3 if provoked else 1e-4
    if kind == "single":
        return idir(pair, lr, POINTS)
    return ccidir(pair, lr, POINTS)


def run(work: Path, case: int, kind: str, setting: str, seed: int, steps: int) -> Row:
    torch.set_num_threads(1)
    pair = read_case(work, case, setting)
    assert pair.fixed_points is not None and pair.moving_points is not None
    lightning.seed_everything(seed, verbose=False)
    method = make(kind, pair, provoked=setting != "plain")
    begun = time.process_time()
    fit(method, pair, steps)
    seconds = time.process_time() - begun
    transform = method.transform()
    error = tre(transform(pair.fixed_points), pair.moving_points.double())
    initial = tre(pair.fixed_points, pair.moving_points).mean().item()
    mean = error.mean().item()
    row: Row = {
        "case": case, "kind": kind, "setting": setting, "seed": seed, "steps": steps,
        "tre_initial": round(initial, 4), "tre": round(mean, 4), "tre_p95": round(error.quantile(0.95).item(), 4),
        "failed": not mean < min(5.0, initial), "cpu_seconds": round(seconds, 1),
    }  # fmt: skip
    if isinstance(transform, CycleTransform):
        length = transform.offset(pair.fixed_points).norm(dim=1)
        some = torch.linspace(0, len(error) - 1, LANDMARKS).long()
        row["uncertainty"], row["uncertainty_p95"] = length.mean().item(), length.quantile(0.95).item()
        row["forward_tre"] = tre(transform.ahead(pair.fixed_points), pair.moving_points.double()).mean().item()
        row["landmark_error"] = [round(v, 2) for v in error[some].tolist()]
        row["landmark_uncertainty"] = [round(v, 2) for v in length[some].tolist()]
    return row


def plan(given: argparse.Namespace) -> Iterator[tuple[int, str, str, int]]:
    for seed in range(given.seeds):
        for setting in given.settings.split(","):
            for case in TUNING if setting == "hard" else CASES:
                for kind in given.kinds.split(","):
                    yield case, kind, setting, seed


# -- report ----------------------------------------------------------------------------------------------------------


def interval(k: int, n: int) -> str:
    found = binomtest(k, n).proportion_ci(method="exact")
    return f"{k} of {n} ({100 * k / n:.1f} %, {100 * found.low:.1f} to {100 * found.high:.1f})"


def threshold(tuning: list[Row]) -> float:
    """Between the certain good runs and the failed ones of the tuning cases: their gap's geometric middle."""
    good = [r["uncertainty_p95"] for r in tuning if not r["failed"]]
    bad = [r["uncertainty_p95"] for r in tuning if r["failed"]]
    high = float(np.quantile(good, 0.99)) if good else 1.0
    return float(np.sqrt(high * min(bad))) if bad and min(bad) > high else high


def report() -> str:
    found, lines = (
        read_rows(ROWS),
        ["| setting | method | failures, 95 % interval | TRE mm, mean (sd over runs) |", "|---|---|---|---|"],
    )
    for setting in ("plain", *MOTION_MM):
        for kind in ("single", "cycle"):
            some = [r for r in found if r["setting"] == setting and r["kind"] == kind]
            if some:
                tres = np.array([r["tre"] for r in some])
                failures = interval(sum(r["failed"] for r in some), len(some))
                lines.append(f"| {setting} | {kind} | {failures} | {tres.mean():.2f} ({tres.std():.2f}) |")
    cycle = [r for r in found if r["kind"] == "cycle"]
    tuning, test = ([r for r in cycle if (r["case"] in TUNING) is which] for which in (True, False))
    if tuning and test:
        mm = threshold(tuning)
        caught = [r["uncertainty_p95"] > mm for r in test if r["failed"]]
        alarms = [r["uncertainty_p95"] > mm for r in test if not r["failed"]]
        lines += ["", f"Trust flag: not trusted above {mm:.2f} mm (95th percentile over landmarks), from cases 1-2."]
        if caught:
            lines.append(f"Cases 3-5: failures caught {interval(sum(caught), len(caught))}")
        if alarms:
            lines.append(f"Cases 3-5: false alarms {interval(sum(alarms), len(alarms))}")
        for name, some in (("all test runs", test), ("good test runs", [r for r in test if not r["failed"]])):
            error = np.concatenate([r["landmark_error"] for r in some])
            length = np.concatenate([r["landmark_uncertainty"] for r in some])
            lines.append(f"Rank correlation of uncertainty and error, {name}: {spearmanr(error, length).statistic:.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="holds pairs/, which comparison.py makes")
    parser.add_argument("--kinds", default="single,cycle")
    parser.add_argument("--settings", default="hard,provoked,plain")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        print(report())
        return
    done = {(r["case"], r["kind"], r["setting"], r["seed"]) for r in read_rows(ROWS)}
    for key in plan(given):
        if key not in done:
            row = run(given.work, *key, given.steps)
            with ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print({k: v for k, v in row.items() if not k.startswith("landmark_")}, flush=True)


if __name__ == "__main__":
    main()
