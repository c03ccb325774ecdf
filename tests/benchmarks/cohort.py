"""A cohort on two local workers against one, and one whose worker and scheduler are killed.

    python -m tests.benchmarks.cohort --work WORK            # appends to cohort.jsonl; rows that are there are not run
    python -m tests.benchmarks.cohort --report               # as Markdown

`medinr cohort` with the network of idir_dirlab_best.yaml, 30 steps on 5 phantom cases of 48 voxels, 3 seeds: 15 fits
with one thread each. ``one`` and ``two`` are the wall and processor seconds of the whole command with so many workers,
start of Python included. ``killed`` runs with two: when the first fit has a checkpoint, it and its worker are killed
(SIGKILL), after four fits the scheduler, and the command is called again; its seconds are those of the second call. All
three must end with the same numbers: ``difference`` is the largest one of any metric of any fit to those of ``one``,
``repeated`` counts steps that stand twice in a metrics.csv, ``begun`` the claims beyond one a fit. The machine must be
quiet.
"""

import argparse
import csv
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from medinr.cohorts import claims
from medinr.cohorts.state import LAST, is_done
from tests.benchmarks.measure import read_rows
from tests.benchmarks.tables import ROOT, commit

ROWS = Path(__file__).parent / "cohort.jsonl"
CASES, SEEDS, STEPS, SIZE = "1-5", "3", 30, 48
DONE = 4
"""Fits that are done when the scheduler is killed."""
PATIENCE_S = 900.0


def command(work: Path, out: Path, workers: int) -> list[str]:
    config = ROOT / "experiments" / "idir_dirlab_best.yaml"
    return [
        *(sys.executable, "-m", "medinr.cli", "cohort", "--config", str(config), "--data.root", str(work / "phantom")),
        *("--cases", CASES, "--seeds", SEEDS, "--workers", str(workers), "--threads", "1", "--out", str(out)),
        *("--trainer.max_steps", str(STEPS), "--data.steps_per_epoch", "10", "--trainer.log_every_n_steps", "1"),
        *("--wandb", "false"),
    ]


def measured(words: list[str]) -> dict[str, float]:
    """Wall and processor seconds of a command and all that it waits for."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - begin, "cpu_seconds": cpu}


def wait(out: Path, enough: Any) -> None:
    """Until a condition on the folders of the fits holds."""
    end = time.monotonic() + PATIENCE_S
    while not enough(sorted((out / "fits").glob("*"))):
        if time.monotonic() > end:
            raise TimeoutError(f"{out}: waited for {PATIENCE_S:.0f} s")
        time.sleep(0.1)


def under_way(fit: Path) -> bool:
    """A fit that has a checkpoint, and is not done."""
    return bool(list(fit.glob(f"*/*/{LAST}"))) and claims.holder(fit) is not None


def killed(work: Path, out: Path) -> dict[str, float]:
    """The cohort with a worker, its fit and then the scheduler killed."""
    first = subprocess.Popen(command(work, out, 2), cwd=ROOT, stdout=subprocess.DEVNULL)
    wait(out, lambda fits: any(map(under_way, fits)))
    victim = next(filter(under_way, sorted((out / "fits").glob("*"))))
    for pid, _ in (claims.holder(victim) or {"pids": []})["pids"]:
        os.kill(pid, signal.SIGKILL)
    wait(out, lambda fits: sum(map(is_done, fits)) >= DONE)
    first.kill()
    first.wait()
    return measured(command(work, out, 2))


def metrics_of(out: Path) -> dict[tuple[str, str], float]:
    """(fit, metric) -> number, without those of time."""
    with (out / "cohort.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if any(row["state"] != "done" for row in rows):
        raise ValueError(f"{out}: expected all fits done")
    own = ("fit", "case", "seed", "state", "seconds", "failures", "error")
    return {(r["fit"], k): float(v) for r in rows for k, v in r.items() if k not in own and "seconds" not in k and v}


def repeated_steps(out: Path) -> int:
    """Steps whose loss stands in a metrics.csv twice."""
    found = 0
    for file in out.glob("fits/*/*/*/metrics.csv"):
        with file.open(encoding="utf-8") as stream:
            steps = Counter(row["step"] for row in csv.DictReader(stream) if row.get("loss/total") or row.get("loss"))
        found += sum(n - 1 for n in steps.values())
    return found


def checked(out: Path, reference: Path) -> dict[str, float]:
    """What ``out`` has in common with ``reference``."""
    here, there = metrics_of(out), metrics_of(reference)
    if here.keys() != there.keys():
        raise ValueError(f"{out}: expected the fits and metrics of {reference}")
    return {
        "fits": len({fit for fit, _ in here}),
        "difference": max((abs(here[k] - there[k]) for k in here), default=math.nan),
        "repeated": repeated_steps(out),
        "begun": sum(claims.count(fit) - 1 for fit in (out / "fits").iterdir()),
    }


def run(work: Path) -> None:
    done = {row["kind"] for row in read_rows(ROWS)}
    if not (work / "phantom" / "geometry.json").exists():
        words = ["phantom", "dirlab", "--out", str(work / "phantom"), "--cases", CASES, "--size", str(SIZE)]
        subprocess.run([sys.executable, "-m", "medinr.cli", *words, "--phases", "extremes"], check=True, cwd=ROOT)
    for kind, workers in (("one", 1), ("two", 2), ("killed", 2)):
        if kind in done:
            continue
        out = work / kind
        shutil.rmtree(out, ignore_errors=True)  # what is measured is the whole
        found = killed(work, out) if kind == "killed" else measured(command(work, out, workers))
        row = {"kind": kind, "workers": workers, **found, **checked(out, work / "one"), "commit": commit()}
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def report() -> str:
    rows = {row["kind"]: row for row in read_rows(ROWS)}
    head = ["workers", "wall s", "CPU s", "speed-up", "fits", "largest difference", "steps twice", "begun again"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind, row in rows.items():
        gain = rows["one"]["seconds"] / row["seconds"] if kind != "killed" and "one" in rows else None
        name = f"{row['workers']}{', killed (second call)' if kind == 'killed' else ''}"
        cells = [name, f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", "" if gain is None else f"{gain:.2f}"]
        cells += [str(row["fits"]), f"{row['difference']:.2g}", str(row["repeated"]), str(row["begun"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the phantom and the cohorts")
    parser.add_argument("--report", action="store_true", help="print the rows as Markdown")
    given = parser.parse_args()
    if given.report:
        print(report())
    elif given.work is None:
        parser.error("--work is missing")
    else:
        run(given.work.absolute())


if __name__ == "__main__":
    main()
