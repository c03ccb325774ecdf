"""Processor seconds until the error that published-style code ends with, each method, both sides in one run.

    python -m tests.benchmarks.bench_error --work WORK [--shared ../shared] [--pair bspline_20] [--only idir,sinr]
    python -m tests.benchmarks.bench_error --report

``published``: comparison_inr.py's declared reduced size and settings, with nested autograd as in bench_methods.py (SINR
needs none: its spline has derivatives of its own). ``ours``: the experiment named below with fewer or more steps (its
schedule runs through all of them), from the least number until one fit has no larger TRE at the landmarks. Seconds are
the process's, of the fit alone: reading, masks and evaluation are not counted. Rows go to error.jsonl.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from jsonargparse import ArgumentParser

from medinr import io
from medinr.commands.register import fit
from medinr.data.pair import Pair
from medinr.methods import ConditionedRegistration, RegistrationModule
from tests.benchmarks import comparison_inr, pairs
from tests.benchmarks.bench_methods import alone, published
from tests.benchmarks.measure import ROOT, read_rows
from tests.benchmarks.tables import commit

ROWS = Path(__file__).parent / "error.jsonl"
BUDGETS = (25, 50, 100, 200, 400, 800)
SIDES = {
    "idir": ("idir_published", "idir_dirlab_best"),
    "cycle-consistent": ("ccidir", "ccidir_dirlab_best"),
    "cidir": ("cidir", "cidir_dirlab"),
    "sinr": ("sinr", "sinr_pair_best"),
}
"""Method -> name in comparison_inr.py, experiment."""
STEPS = {"sinr": 300}
LR = 1e-4


def configured(experiment: str) -> RegistrationModule:
    """The method of an experiment."""
    config = yaml.safe_load((ROOT / "experiments" / f"{experiment}.yaml").read_text(encoding="utf-8"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RegistrationModule, "model")
    method = parser.instantiate(parser.parse_object({"model": config["model"]})).model
    assert isinstance(method, RegistrationModule)
    return method


def error(method: RegistrationModule, pair: Pair) -> float:
    """Mean distance in mm at the landmarks."""
    assert pair.fixed_points is not None and pair.moving_points is not None
    return float((method.transform()(pair.fixed_points) - pair.moving_points).norm(dim=1).mean())


def measured(method: RegistrationModule, pair: Pair, steps: int, nested: bool) -> dict[str, float]:
    """A fit, the choice of alpha included."""
    begin = time.process_time()
    if nested:
        alone(method, pair)
        step = published(method, LR)
        for _ in range(steps):
            step()
        method._trainer = None
        method.eval()
    else:
        fit(method, pair, steps, "cpu")
    if isinstance(method, ConditionedRegistration):
        method.settle()
    took = time.process_time() - begin
    return {"steps": steps, "cpu_seconds": took, "tre": error(method, pair)}


def run(name: str, folder: Path, add: Any) -> None:
    """Rows of one method on one pair."""
    fixed, moving = (io.read_points(folder / f"{side}.csv") for side in ("fixed", "moving"))
    pair = replace(comparison_inr.read_pair(folder), fixed_points=fixed, moving_points=moving)
    theirs, experiment = SIDES[name]
    made = [r for r in read_rows(ROWS) if (r["method"], r["pair"]) == (name, folder.name)]
    goal = next((r for r in made if r["side"] == "published"), None)
    if goal is None:
        lightning.seed_everything(0, verbose=False)
        method: RegistrationModule = comparison_inr.METHODS[theirs](pair, LR)  # type: ignore[operator]
        goal = measured(method, pair, STEPS.get(name, comparison_inr.STEPS), nested=name != "sinr")
        add({"method": name, "side": "published", "pair": folder.name, **goal})
    for steps in BUDGETS:
        found = next((r for r in made if r["side"] == "ours" and r["steps"] == steps), None)
        if found is None:
            lightning.seed_everything(0, verbose=False)
            found = measured(configured(experiment), pair, steps, nested=False)
            add({"method": name, "side": "ours", "pair": folder.name, **found})
        if found["tre"] <= goal["tre"]:
            break


def report() -> str:
    lines = [
        "| pair | method | published style: steps, CPU s, TRE mm | ours: steps, CPU s, TRE mm | times faster |",
        "|---|---|---|---|---|",
    ]
    rows = read_rows(ROWS)
    for goal in (r for r in rows if r["side"] == "published"):
        same = [r for r in rows if r["side"] == "ours" and all(r[k] == goal[k] for k in ("method", "pair"))]
        reached = [r for r in same if r["tre"] <= goal["tre"]]
        last = min(reached or same, key=lambda r: r["cpu_seconds"] if reached else r["tre"])
        cells = [f"{r['steps']}, {r['cpu_seconds']:.1f}, {r['tre']:.2f}" for r in (goal, last)]
        factor = f"{goal['cpu_seconds'] / last['cpu_seconds']:.1f}" if reached else "not reached"
        lines.append(f"| {goal['pair']} | {goal['method']} | {cells[0]} | {cells[1]} | {factor} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--pair", default="bspline_20")
    parser.add_argument("--only", default=",".join(SIDES))
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report or given.work is None:
        print(report())
        return
    torch.set_num_threads(1)
    folder = pairs.make_pair(given.pair, given.shared.resolve(), given.work.resolve())

    def add(row: dict[str, Any]) -> None:
        row["commit"] = commit()
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    for name in given.only.split(","):
        run(name, folder, add)


if __name__ == "__main__":
    main()
