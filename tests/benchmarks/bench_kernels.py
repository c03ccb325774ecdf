"""The step of a penalty as it is, under torch.compile, and, on a GPU, as a CUDA graph.

    python -m tests.benchmarks.bench_kernels [--device cuda] [--points 10000] [--repeats 3] [--out kernels.jsonl]

3 x 256 SIREN, forward and backward. ``as it is``: the library's own rules, of one autograd function an activation.
``compiled``: the network's jet in plain operations, whose activation rules torch.compile fuses (the library's autograd
functions write into buffers of their own, which it would leave as they are). ``graph``: the step as it is, recorded
once and replayed. All must give the gradient of the first. ``first call`` holds the compilation. On one CPU thread
seconds are the process's own. A way that is not to be had is named with the reason.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medinr.fields import SIREN, Map
from medinr.jets import Jet
from tests.benchmarks.bench_jets import ROWS, new_map, new_points
from tests.benchmarks.measure import gigaflops, interleaved, matrix_rate, table

PENALTIES = ("data", "jacobian-jet", "bending-probes", "bending-jet")
SAME = 1e-4
"""Relative difference of gradients above which two ways are not the same."""


def plain(channels: Tensor, k: int, pairs: Sequence[tuple[int, int]], *weights: Tensor) -> Tensor:
    """The jet of a sine network, [1 + k + m, N, 3] to [1 + k + m, N, 3], without autograd functions.

    Args:
        weights: W and b of each layer, in turn.
    """
    *hidden, (last, shift) = zip(weights[::2], weights[1::2], strict=True)
    for weight, bias in hidden:
        z = F.linear(channels, weight)
        v = z[0] + bias
        s, c = torch.sin(v), torch.cos(v)
        d = z[1 : 1 + k]
        parts = [s[None], c * d]
        for m, (a, b) in enumerate(pairs):
            curved = c * z[1 + k + m] if len(z) > 1 + k else 0.0
            parts.append((curved - s * d[a] * d[b])[None])
        channels = torch.cat(parts)
    out = F.linear(channels, last)
    return torch.cat((out[:1] + shift, out[1:]))


@contextmanager
def jet_by(field: Any, function: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, the network's jet, and its values, come from a function such as `plain`."""

    def weights() -> list[Tensor]:
        return [*(p for layer in field.scaled() for p in layer), field.head.weight, field.head.bias]

    def jet(given: Jet, context: Tensor | None = None) -> Jet:
        return Jet(function(given.channels, given.k, given.pairs, *weights()), given.k, given.pairs, given.basis)

    def forward(x: Tensor, context: Tensor | None = None) -> Tensor:
        return function(x[None], 0, (), *weights())[0]

    object.__setattr__(field, "jet", jet)
    object.__setattr__(field, "forward", forward)
    try:
        yield
    finally:
        object.__delattr__(field, "jet")
        object.__delattr__(field, "forward")


Step = Callable[[], None]


def steps_of(name: str, field: Map, x: Tensor) -> dict[str, Step | str]:
    """The ways of a penalty, or why one is not to be had."""
    network: Any = field.field  # type: ignore[attr-defined]
    assert isinstance(network, SIREN)
    way = ROWS[name].way
    compiled = torch.compile(plain, dynamic=False)

    def as_it_is() -> None:
        field.zero_grad(set_to_none=False)
        way(field, x)

    def under_compile() -> None:
        field.zero_grad(set_to_none=False)
        with jet_by(network, compiled):
            way(field, x)

    found: dict[str, Step | str] = {"as it is": as_it_is, "compiled": under_compile, "graph": graph_of(as_it_is, x)}
    if x.device.type == "cpu" and not any(map(shutil.which, ("gcc", "g++", "clang++"))):
        found["compiled"] = "no C++ compiler on the PATH"
    return found


def graph_of(step: Step, x: Tensor) -> Step | str:
    """A step recorded as a CUDA graph, after a few that are not; or the reason why not."""
    if x.device.type != "cuda":
        return "needs a CUDA device"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:  # a copy from the host, say, cannot be recorded
        return " ".join(str(error).split())[:160]
    return graph.replay


def gradient(field: Map, step: Step) -> Tensor:
    torch.manual_seed(0)
    step()
    return torch.cat([p.grad.flatten().double() for p in field.parameters() if p.grad is not None])


def measure(device: str, n: int, repeats: int) -> list[dict[str, Any]]:
    """One record for each penalty and way."""
    field, x = new_map().to(device), new_points(n).to(device)
    rates: list[float] = []
    rate = matrix_rate() if device == "cpu" else None
    records: list[dict[str, Any]] = []
    for name in PENALTIES:
        ways: dict[str, Step] = {}
        first, why = {}, {}
        want: Tensor | None = None
        for label, step in steps_of(name, field, x).items():
            if isinstance(step, str):
                why[label] = step
                continue
            begin = time.perf_counter()
            try:
                found = gradient(field, step)
            except Exception as error:  # the compiler's errors are of many types
                why[label] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                continue
            first[label] = time.perf_counter() - begin
            want = found if want is None else want
            # A graph draws its own random numbers when it is replayed.
            gap = 0.0 if ROWS[name].random and label == "graph" else float((found - want).norm() / want.norm())
            if gap > SAME:
                raise RuntimeError(f"{ROWS[name].title}, {label}: its gradient differs by {gap:.2g}")
            ways[label] = synchronised(step, device)
        timed = interleaved(ways | ({"rate": lambda: rates.append(rate())} if rate else {}), repeats)
        flops = 10 * gigaflops(lambda name=name: ROWS[name].way(field, x[: n // 10]))  # type: ignore[misc]
        base = statistics.median(timed["as it is"])
        for label in ("as it is", "compiled", "graph"):
            record = {"benchmark": "kernels", "penalty": name, "way": label, "device": device, "points": n}
            if label in ways:
                took = statistics.median(timed[label])
                share = flops / took / statistics.median(rates) if rates else None
                record |= {"seconds": took, "speedup": base / took, "first_call": first[label], "product_share": share}
            records.append(record | {"reason": why.get(label)})
    return records


def synchronised(step: Step, device: str) -> Step:
    def run() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def report(records: list[dict[str, Any]]) -> str:
    rows = []
    for r in records:
        measured = "seconds" in r
        share = r.get("product_share")
        rows.append(
            {
                "penalty": ROWS[r["penalty"]].title,
                "way": r["way"],
                "seconds": f"{r['seconds']:.4f}" if measured else f"({r['reason']})",
                "speed-up": f"{r['speedup']:.2f}" if measured else "",
                "first call s": f"{r['first_call']:.1f}" if measured else "",
                "share of product rate": f"{100 * share:.0f}%" if share else "",
            }
        )
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write one JSON line a row")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.device == "cpu" and given.threads == 1:
        from tests.benchmarks import measure as measuring

        measuring.clock = time.process_time
    print(f"torch {torch.__version__}, {given.device}, load before: {os.getloadavg()[0]:.1f}\n", flush=True)
    records = measure(given.device, given.points, given.repeats)
    print(report(records))
    if given.out:
        given.out.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


if __name__ == "__main__":
    main()
