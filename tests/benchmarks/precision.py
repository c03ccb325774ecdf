"""bfloat16 against float32, every method, five seeds.

    python -m tests.benchmarks.precision --work WORK [--shared ../shared] [--only idir,sinr]
    python -m tests.benchmarks.precision --report

Each fit is `medinr fit` and `medinr test` of an experiment at a reduced size (METHODS below), in a process of its own
that has the libraries already; a row of precision.jsonl is one seed of one precision: the mean of the judged metric
over the test cases, processor seconds of fit and test, and the process's largest memory. The report holds the mean of
bf16-mixed against 3 % of that of float32, or against the spread (standard deviation) of the seeds in float32 if that is
larger.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
from pathlib import Path
from typing import Any

from medinr import cli, io
from medinr.callbacks import runs
from medinr.dashboard.records import read_cases
from tests.benchmarks.measure import ROOT, read_rows
from tests.benchmarks.tables import commit
from tests.medinr import breathing

ROWS = Path(__file__).parent / "precision.jsonl"
SEEDS = range(5)
PRECISIONS = ("32-true", "bf16-mixed")
LUNGS, TUBE, SLABS = "--data.root={lungs}", "--data.root={tube}", "--data.root={slabs}"
PAIR = tuple(
    f"--data.{side}{key}={{tube}}/peristalsis/{side}{name}"
    for side in ("fixed", "moving")
    for key, name in (("", ".nii.gz"), ("_points", "_points.csv"))
)
LEARNED = (SLABS, "--data.spacing=[4,4,2]", "--trainer.max_steps=400", "--data.steps_per_epoch=400")
METHODS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "idir": ("idir_dirlab_best", "tre/mean", (LUNGS, "--trainer.max_steps=300")),
    "cidir": ("cidir_dirlab", "tre/mean", (LUNGS, "--trainer.max_steps=300", "--model.field.hidden=[128,128,128]")),
    "cycle": (
        "ccidir_dirlab", "tre/mean",
        (LUNGS, "--trainer.max_steps=300", "--model.method.field.hidden=[128,128,128]", "--model.method.points=2048"),
    ),
    "hybrid": ("hybrid_dirlab", "tre/mean", (LUNGS,)),
    "sinr": (
        "sinr_pair_best", "tre/mean",
        (*PAIR, "--trainer.max_steps=600", "--model.field.spacing=4", "--model.field.unit=voxel"),
    ),
    "geometry": (
        "geometry_tube_best", "tre/mean",
        (*PAIR, "--data.fixed_mask={tube}/peristalsis/mask.nii.gz", "--trainer.max_steps=300",
         "--data.fixed_labels=null", "--data.moving_labels=null",
         "--model.field.other.centreline={tube}/peristalsis/centreline.csv"),
    ),
    "stnerp": (
        "stnerp_4dct", "image/rms",
        ("--data.root={sequence}", "--data.held_out=[30]", "--data.reference=0", "--trainer.max_steps=300",
         "--model.window=null", "--model.field.hidden=[128,128,128]", "--model.prior.field.hidden=[128,128,128]",
         "--model.lr=3e-4", "--model.prior.lr=3e-4"),
    ),
    "voxelmorph": ("voxelmorph_slabs", "dsc/mean", LEARNED),
    "midir": ("midir_slabs", "dsc/mean", LEARNED),
    "cinema": (
        "cinema_dhcp_best", "dsc/mean",
        ("--data.root={brains}", "--trainer.max_steps=300", "--model.points=4096", "--model.decoder.code=32",
         "--trainer.limit_test_batches=2"),
    ),
    "diffdef": (
        "diffdef_slabs", "atlas/dice",
        (SLABS, "--model.steps={{registration: 100, autoencoder: 150, diffusion: 150, morphology: 10}}",
         "--trainer.max_steps=410", "--model.spacing=[4,4,2]", "--model.refine=5"),
    ),
}  # fmt: skip
"""Name -> experiment, judged metric, what is reduced."""


def places(work: Path, shared: Path) -> dict[str, str]:
    """The data, made where it is not there."""
    made = {name: work / name for name in ("lungs", "tube", "brains", "sequence")}
    words = {
        "lungs": ["dirlab", "--cases", "1", "--size", "64", "--phases", "extremes"],
        "tube": ["tube", "--size", "64"],
        "brains": ["dhcp", "--subjects", "15", "--size", "32"],
    }
    for name, more in words.items():
        if not made[name].exists():
            assert cli.main(["phantom", more[0], "--out", str(made[name]), *more[1:]]) == 0
    if not made["sequence"].exists():
        sequence = breathing.sequence((0, 10, 30, 60, 80))
        for time, image in zip(sequence.times, sequence.images, strict=True):
            io.write_image(made["sequence"] / f"body_T{time:02.0f}.nii.gz", image.data[0], image.domain)
    return {k: str(v) for k, v in made.items()} | {"slabs": str(shared / "data" / "adult_t1_slabs")}


def one(name: str, precision: str, seed: int, work: Path, found: dict[str, str], answer: Any) -> None:
    """Fit and test; the row goes to ``answer``."""
    os.chdir(work)
    experiment, metric, options = METHODS[name]
    label = f"{name}_{precision}_{seed}"
    config = str(ROOT / "experiments" / f"{experiment}.yaml")
    more = [o.format(**found) for o in options]
    words = ["--config", config, "--wandb", "false", "--experiment", label, "--seed_everything", str(seed)]
    words += ["--trainer.precision", precision, *more]
    assert cli.main(["fit", *words]) == 0
    spent = resource.getrusage(resource.RUSAGE_SELF)
    run = runs.runs_of(work / "runs", label)[-1]  # one that was broken off may lie before it
    given = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / runs.LAST)]
    assert cli.main(["test", *given]) == 0
    values = [float(row[metric]) for row in read_cases(run / "results") if row.get(metric) is not None]
    answer.put({
        "method": name, "precision": precision, "seed": seed, "metric": metric, "value": statistics.mean(values),
        "cpu_s": round(spent.ru_utime + spent.ru_stime, 1), "memory_mb": round(spent.ru_maxrss / 1024),
        "commit": commit(),
    })  # fmt: skip


def report() -> str:
    lines = ["| method | metric | float32 | bf16-mixed | allowed | CPU s | MB |", "|---|---|---|---|---|---|---|"]
    rows = read_rows(ROWS)
    for name, (_, metric, _) in METHODS.items():
        sides = [[r for r in rows if (r["method"], r["precision"]) == (name, p)] for p in PRECISIONS]
        if min(map(len, sides)) < 2:
            continue
        values = [[r["value"] for r in side] for side in sides]
        means, spread = [statistics.mean(v) for v in values], [statistics.stdev(v) for v in values]
        allowed = max(0.03 * abs(means[0]), spread[0])
        verdict = "" if abs(means[1] - means[0]) <= allowed else " **exceeded**"
        cells = [f"{m:.4g} ± {s:.2g}" for m, s in zip(means, spread, strict=True)]
        costs = [
            " → ".join(f"{statistics.median(r[k] for r in side):.0f}" for side in sides) for k in ("cpu_s", "memory_mb")
        ]
        lines.append(f"| {name} | {metric} | {' | '.join(cells)} | {allowed:.2g}{verdict} | {' | '.join(costs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report or given.work is None:
        print(report())
        return
    work = given.work.resolve()
    context = multiprocessing.get_context("fork")
    found = places(work, given.shared.resolve())
    for seed in range(given.seeds):
        for name in given.only.split(","):
            for precision in PRECISIONS:
                key = {"method": name, "precision": precision, "seed": seed}
                if any(key.items() <= row.items() for row in read_rows(ROWS)):
                    continue
                answer = context.SimpleQueue()
                process = context.Process(target=one, args=(name, precision, seed, work, found, answer))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"{name}, {precision}, seed {seed}: see above")
                row = answer.get()
                with ROWS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
