"""Pairs fitted as one against the same pairs one by one, in one process and one run.

    python -m tests.benchmarks.batched --work WORK [--device cuda] [--only best]   # appends to batched.jsonl, resumes
    python -m tests.benchmarks.batched --report                                    # as Markdown

Ten DIR-LAB phantom cases of 48 voxels, extreme phases, lung masks, a seed each. ``best``: 3 x 128 units, 2,048 points,
local NCC on patches, pyramid, barrier and bending, as experiments/idir_dirlab_best.yaml; ``idir``: 3 x 256 units,
10,000 points, NCC and the Jacobian penalty, as the published one. The clock runs over the fits alone: not over the
start of Python, the phantom's files or an evaluation, all of which a batch has once where single processes have them
ten times. On a CPU `cpu_seconds` are the process's own, which other load on the machine does not change. ``tre`` is the
largest difference of a case's mean error in mm, ``weights`` that of any weight.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch

from data_modules.dirlab import DIRLab
from medinr.callbacks.streams import Stream, Together
from medinr.commands.quiet import quiet
from medinr.data.base import step_loader
from medinr.data.pair import Pair
from medinr.fields import SIREN
from medinr.losses import NCC, Barrier, Bending, Jacobian, LocalNCC
from medinr.methods import PairRegistration
from medinr.methods.batched import BatchedRegistration
from medinr.results import landmark_metrics
from tests.benchmarks.measure import read_rows
from tests.benchmarks.tables import ROOT, commit

ROWS = Path(__file__).parent / "batched.jsonl"
PAIRS, SIZE = 10, 48
STEPS = {"best": 30, "idir": 6}


def method(kind: str) -> PairRegistration:
    if kind == "idir":
        field = SIREN(hidden=(256,) * 3, zero_output=False)
        return PairRegistration(field, NCC(), {"jacobian": Jacobian(0.05)}, points=10_000, lr=1e-5, overlap_weight=0.0)
    penalties = {"barrier": Barrier(10.0), "bending": Bending(0.01, directions="probes")}
    return PairRegistration(
        SIREN(hidden=(128,) * 3), LocalNCC(), penalties, points=2_048, pyramid_mm=(8.0, 4.0, 2.0, 0.0), lr=3e-4,
        warmup=0.1, cosine=True,
    )  # fmt: skip


def phantom(work: Path) -> list[Pair]:
    """The pairs; their files are written once."""
    root = work / "phantom"
    if not (root / "geometry.json").exists():
        words = ["phantom", "dirlab", "--out", str(root), "--cases", f"1-{PAIRS}", "--size", str(SIZE)]
        subprocess.run([sys.executable, "-m", "medinr.cli", *words, "--phases", "extremes"], check=True, cwd=ROOT)
    return [DIRLab(str(root), case).pair for case in range(1, PAIRS + 1)]


class Loader(lightning.LightningDataModule):
    def __init__(self, train: Any) -> None:
        super().__init__()
        self.train = train

    def train_dataloader(self) -> Any:
        return self.train


def trainer(device: str, steps: int) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator=device, devices=1, max_epochs=-1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip


def timed(device: str, step: Callable[[], None]) -> dict[str, float]:
    """Wall and processor seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin, cpu = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}


def measure(kind: str, device: str, pairs: list[Pair], steps: int) -> dict[str, Any]:
    """One row. Both sides are made alike before the clock runs; a short fit of each warms the device up."""
    singles, states = [], []
    methods, streams = [], []
    for seed, pair in enumerate(pairs):
        for made in (singles, methods):
            lightning.seed_everything(seed, verbose=False)
            made.append(method(kind))
        singles[-1].pair = pair
        states.append(torch.get_rng_state())
        streams.append(Stream())
    batch = BatchedRegistration(methods, pairs, streams)

    def one_by_one(some: list[PairRegistration]) -> None:
        for seed, single in enumerate(some):
            lightning.seed_everything(seed, verbose=False)
            torch.set_rng_state(states[seed])
            trainer(device, steps).fit(single, Loader(step_loader(steps)))

    def together() -> None:
        trainer(device, steps).fit(batch, Loader(Together([step_loader(steps) for _ in pairs], streams)))

    warm = method(kind)
    warm.pair = pairs[0]
    trainer(device, 2).fit(warm, Loader(step_loader(2)))
    alone, whole = timed(device, lambda: one_by_one(singles)), timed(device, together)
    gaps, errors = [], []
    for single, batched, pair in zip(singles, batch.give_back(), pairs, strict=True):
        single.cpu(), batched.cpu()
        found = [landmark_metrics(m.transform(), pair)["tre/mean"] for m in (single, batched)]
        errors.append(found)
        parts = zip(single.parameters(), batched.parameters(), strict=True)
        gaps.append(max((a - b).abs().max().item() for a, b in parts))
    return {
        "kind": kind, "device": device, "pairs": len(pairs), "steps": steps, "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0], "alone": alone, "batched": whole,
        "speedup": alone["seconds"] / whole["seconds"], "cpu_speedup": alone["cpu_seconds"] / whole["cpu_seconds"],
        "tre_mean": sum(e[0] for e in errors) / len(errors), "tre": max(abs(a - b) for a, b in errors),
        "weights": max(gaps), "commit": commit(),
    }  # fmt: skip


def report() -> str:
    head = ["kind", "device", "pairs", "steps", "alone s", "batched s", "alone CPU s", "batched CPU s", "speed-up",
            "CPU speed-up", "mean TRE", "largest difference mm", "of weights"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in read_rows(ROWS):
        cells = [r["kind"], r["device"], str(r["pairs"]), str(r["steps"])]
        cells += [f"{r[side][unit]:.1f}" for unit in ("seconds", "cpu_seconds") for side in ("alone", "batched")]
        cells += [f"{r['speedup']:.2f}", f"{r['cpu_speedup']:.2f}", f"{r['tre_mean']:.3f}"]
        cells += [f"{r['tre']:.1g}", f"{r['weights']:.1g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the phantom")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=tuple(STEPS), help="one kind of fit (default: all)")
    parser.add_argument("--steps", type=int, help="of each fit (default: 30 and 6)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="print the rows as Markdown")
    given = parser.parse_args()
    if given.report:
        print(report())
        return
    if given.work is None:
        parser.error("--work is missing")
    torch.set_num_threads(given.threads)
    pairs: list[Pair] = []
    for kind in [given.only] if given.only else list(STEPS):
        steps = given.steps or STEPS[kind]
        key = (kind, given.device, steps, given.threads)
        if any((r["kind"], r["device"], r["steps"], r["threads"]) == key for r in read_rows(ROWS)):
            continue
        pairs = pairs or phantom(given.work.absolute())
        with quiet():
            row = measure(kind, given.device, pairs, steps)
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
