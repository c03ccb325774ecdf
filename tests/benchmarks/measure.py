"""Timing, memory, flops: what every benchmark measures with."""

import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]
clock: Callable[[], float] = time.perf_counter
"""What times are read from; `run` puts the process's own seconds here for a machine that others use too."""
Step = Callable[[], None]
"""One thing to be timed: a forward and a backward pass, say."""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, none where there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def seconds(step: Step) -> float:
    start = clock()
    step()
    return clock() - start


def interleaved(steps: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of every step, round by round, after one round that is not counted.

    All steps run once in every round, in random order: whatever else the machine does meets all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    shuffle = random.Random(0)
    for round_ in range(repeats + 1):
        names = list(steps)
        shuffle.shuffle(names)
        for name in names:
            took = seconds(steps[name])
            if round_:
                times[name].append(took)
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow / fast: both sides of a round met the same load."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def matrix_rate(rows: int = 40_000, width: int = 256) -> Callable[[], float]:
    """A function that measures GFLOP/s of [rows, width] @ [width, width] (float32, output already allocated)."""
    a, b, out = torch.randn(rows, width), torch.randn(width, width), torch.empty(rows, width)

    def rate() -> float:
        return 2e-9 * rows * width**2 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(5))

    return rate


class _Products(TorchDispatchMode):
    """Adds up what torch's own formulas say of matrix products. (FlopCounterMode itself refuses autograd.grad.)"""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def gigaflops(step: Step) -> float:
    """1e9 floating point operations of the matrix products of a step."""
    with _Products() as counter:
        step()
    return counter.flops / 1e9


def peak_megabytes(step: Step, small: Step) -> float:
    """Largest resident memory of a step above that after a small one; the process must be fresh."""
    small()
    before = _high_water()
    step()
    return (_high_water() - before) / 1024


def _high_water() -> int:
    """Largest resident memory so far, kB. Linux' getrusage would include what the parent had before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(
            next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")).split()[
                1
            ]
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_fresh_process(module: str, *arguments: str) -> str:
    """Standard output of ``python -m module arguments``, run at the repository's root."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout


def table(rows: list[dict[str, str]]) -> str:
    """Rows with the same keys as a Markdown table."""
    widths = {k: max(len(k), *(len(r[k]) for r in rows)) for k in rows[0]}
    lines = [[k.ljust(w) for k, w in widths.items()], ["-" * w for w in widths.values()]]
    lines += [[r[k].ljust(w) for k, w in widths.items()] for r in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
