"""``python -m tests.benchmarks.run``: every benchmark, as Markdown tables and, with ``--out``, as JSON lines."""

import argparse
import json
import logging
import os
import platform
import time
from pathlib import Path

import torch

from tests.benchmarks import bench_jets, bench_loop, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--points", type=int, default=10_000, help="points a step (default: 10,000)")
    parser.add_argument("--repeats", type=int, help="timed rounds (default: 7; short: 3)")
    parser.add_argument("--cpu-time", action="store_true", help="the process's own seconds; only with --threads 1")
    parser.add_argument("--short", action="store_true", help="fewer rounds, draws and steps: under a minute or two")
    parser.add_argument("--only", choices=("jets", "loop"), help="one of the two")
    parser.add_argument("--out", type=Path, help="write one JSON line a row")
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.short else 7)
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        if options.threads != 1:
            parser.error("--cpu-time: expected --threads 1, for waiting threads count as working ones")
        measure.clock = time.process_time
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    load = ", ".join(f"{v:.1f}" for v in os.getloadavg())
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load before: {load}\n", flush=True)
    records = []
    if options.only != "loop":
        found = bench_jets.measure(
            options.points, options.threads, repeats, draws=4 if options.short else 12, short=options.short
        )
        print(bench_jets.report(found), end="\n\n", flush=True)
        records += found
    if options.only != "jets":
        found = bench_loop.measure(options.threads, repeats, steps=5 if options.short else 25)
        print(bench_loop.report(found), end="\n\n", flush=True)
        records += found
    if options.out:
        # Beside the target first, so that an interrupted run leaves no half-written file.
        part = options.out.with_name(options.out.name + ".part")
        part.write_text("".join(json.dumps(r) + "\n" for r in records))
        os.replace(part, options.out)


if __name__ == "__main__":
    main()
