"""Learned comparators on the adult T1 slabs: training curves, and the test pairs beside `medinr register`.

    python -m tests.benchmarks.learned --shared ../shared --work /tmp/medinr_learned [--only midir_slabs]
    python -m tests.benchmarks.learned --figure curves.png

Every row is a JSON line in tests/benchmarks/learned.jsonl; rows that are there are not made again, and a training that
is finished in the work folder is not repeated. Kinds of rows:

    training   an experiment: its command, seconds, scans and persons seen
    curve      one validation of it (persons that are neither trained nor tested on), or the mean of the loss until then
    test       one test pair by one tool: Dice over four tissues, HD95 in mm, folding

The scans of the test pairs were in no training, and their persons neither. `register` starts as the networks do, from
the slabs as they are (affinely aligned): --init none.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data_modules.slabs import AdultSlabs
from medinr import metrics
from medinr.callbacks import runs
from medinr.fields.warp import resample_labels
from medinr.methods import LearnedRegistration, load_method
from medinr.results import Evaluation, evaluate
from tests.benchmarks.measure import read_rows
from tests.benchmarks.tables import ROOT, commit, medinr

ROWS = Path(__file__).parent / "learned.jsonl"
EXPERIMENTS = ("voxelmorph_slabs", "midir_slabs")
PRESETS = ("fast",)
TEST_PAIRS = 5
Row = dict[str, Any]


def add(row: Row) -> None:
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def train(name: str, root: Path, work: Path) -> Path:
    """The finished run of an experiment, trained now if there is none."""
    done = [run for run in runs.runs_of(work / "runs", name) if runs.is_finished(run)]
    if not done:
        config = ROOT / "experiments" / f"{name}.yaml"
        words = ["fit", "--config", config, "--data.root", root, "--runs", work / "runs", "--wandb", "false"]
        subprocess.run(
            [sys.executable, "-m", "medinr.cli", *map(str, words)], check=True, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        done = [run for run in runs.runs_of(work / "runs", name) if runs.is_finished(run)]
    return done[-1]


def curve(name: str, run: Path) -> Iterator[Row]:
    """Validations, each with the mean training loss since the one before."""
    seen: list[float] = []
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["loss/similarity"]:
                seen.append(float(line["loss/similarity"]))
            if line["val/dice"]:
                found = {k: float(v) for k, v in line.items() if k.startswith("val/") and v}
                yield {
                    "kind": "curve", "experiment": name, "step": int(line["step"]) + 1,
                    "train/similarity": sum(seen) / max(len(seen), 1), **found,
                }  # fmt: skip
                seen = []


def costs(run: Path) -> float:
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return max(float(row["costs/seconds"]) for row in csv.DictReader(file) if row["costs/seconds"])


def scores(tool: str, pair: Any, found: Evaluation, seconds: float) -> Row:
    moved = resample_labels(pair.moving_labels, pair.moving.domain, pair.domain, found.displacement)
    hd95 = metrics.hd95(moved, pair.fixed_labels, pair.domain)
    keys = ("dsc/initial_mean", "dsc/mean", "folding/percent", "folding/sdlogj", "displacement/max_mm", "image/rms")
    return {
        "kind": "test", "tool": tool, "pair": pair.name, **{k: found.metrics[k] for k in keys},
        "hd95_mm": sum(hd95.values()) / len(hd95),
        **{k: v for k, v in found.metrics.items() if k.startswith("dsc/label")},
        "seconds": round(seconds, 2), "commit": commit(),
    }  # fmt: skip


def learned(name: str, root: Path, work: Path, data: AdultSlabs, rows: list[Row]) -> None:
    run = train(name, root, work)
    if not any(r["kind"] == "training" and r["experiment"] == name for r in rows):
        for row in curve(name, run):
            add(row)
        some = data.of("train")
        add({
            "kind": "training", "experiment": name, "seconds": costs(run), "scans": len(some),
            "persons": len({s.person for s in some}), "commit": commit(),
            "command": f"medinr fit --config experiments/{name}.yaml",
        })  # fmt: skip
    method = load_method(run / runs.LAST)
    assert isinstance(method, LearnedRegistration)
    for index in range(TEST_PAIRS):
        pair = data.test_pair(index)
        if any((r.get("tool"), r.get("pair")) == (name, pair.name) for r in rows):
            continue
        begin = time.perf_counter()
        method.attach(pair)
        seconds = time.perf_counter() - begin
        add(scores(name, pair, evaluate(method.transform(), pair), seconds))


def fitted(preset: str, work: Path, data: AdultSlabs, rows: list[Row]) -> None:
    for index in range(TEST_PAIRS):
        pair = data.test_pair(index)
        tool = f"register {preset}"
        if any((r.get("tool"), r.get("pair")) == (tool, pair.name) for r in rows):
            continue
        out = work / preset / pair.name
        _, seconds = medinr(
            "register", pair.fixed.source, pair.moving.source, "--preset", preset, "--init", "none", "--out", out
        )
        method = load_method(out / "transform.ckpt")
        add(scores(tool, pair, evaluate(method.transform(), pair), seconds))


def figure(path: Path, rows: list[Row]) -> None:
    """Validation Dice and similarity by step."""
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for name in EXPERIMENTS:
        points = [r for r in rows if r["kind"] == "curve" and r["experiment"] == name]
        if not points:
            continue
        steps = [r["step"] for r in points]
        label = name.split("_")[0]
        [line] = axes[0].plot(steps, [r["val/similarity"] for r in points], label=f"{label}, validation")
        axes[0].plot(steps, [r["train/similarity"] for r in points], ":", color=line.get_color(), label="training")
        axes[1].plot(steps, [r["val/dice"] for r in points], label=label)
        axes[1].axhline(points[0]["val/dice_initial"], color="grey", lw=0.8)
    axes[0].set(xlabel="step", ylabel="1 - local NCC")
    axes[1].set(xlabel="step", ylabel="Dice, common grid (grey: before)")
    for each in axes:
        each.legend(frameon=False)
    drawn.tight_layout()
    drawn.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=Path("/tmp/medinr_learned"))
    parser.add_argument("--only", help="experiments and presets, by commas (default: all)")
    parser.add_argument("--figure", type=Path, help="draw the curves from the rows, and do nothing else")
    args = parser.parse_args()
    if args.figure:
        figure(args.figure, read_rows(ROWS))
        return
    torch.set_num_threads(1)
    root = args.shared.resolve() / "data" / "adult_t1_slabs"
    data = AdultSlabs(str(root), test_pairs=TEST_PAIRS)
    for name in (args.only or ",".join((*EXPERIMENTS, *PRESETS))).split(","):
        if name in EXPERIMENTS:
            learned(name, root, args.work.resolve(), data, read_rows(ROWS))
        else:
            fitted(name, args.work.resolve(), data, read_rows(ROWS))


if __name__ == "__main__":
    main()
