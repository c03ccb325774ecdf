"""Derivatives of a field: nested autograd, torch.func, jets, probes, a subset of the points; forward and backward.

Every way is a function (map, x) that leaves the gradient of one penalty in the parameters. `python -m
tests.benchmarks.bench_jets WAY POINTS THREADS` prints the peak memory of one way, in a process of its own.
"""

import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medinr import jets
from medinr.fields import SIREN, Map, as_map
from medinr.losses import regularizers
from tests.benchmarks.measure import gigaflops, in_fresh_process, interleaved, matrix_rate, peak_megabytes, ratio, table

Way = Callable[[Map, Tensor], None]
EACH = "bending-nested-each"
FUNC_CHUNK = 1000
"""Points at once for torch.func, which holds a Hessian for each: more does not fit a laptop's memory well."""


def new_map() -> Map:
    """The 3 x 256 SIREN of IDIR."""
    torch.manual_seed(0)
    return as_map(SIREN(zero_output=False))


def new_points(n: int) -> Tensor:
    return torch.rand(n, 3) * 2 - 1


def data_term(field: Map, x: Tensor) -> None:
    """Values alone: what a step costs without a regularizer (and without images)."""
    field.displacement(x).pow(2).mean().backward()


def nested_gradients(u: Tensor, x: Tensor) -> list[Tensor]:
    """Du, one call for each component: three tensors [N, 3]."""
    return [torch.autograd.grad(u[:, c].sum(), x, create_graph=True)[0] for c in range(3)]


def bending_nested(field: Map, x: Tensor) -> None:
    """One value, 3 first-order calls, 9 second-order calls that each give a row of a Hessian; 6 distinct terms used."""
    x = x.clone().requires_grad_()
    total = x.new_zeros(())
    for gradient in nested_gradients(field.displacement(x), x):
        rows = [torch.autograd.grad(gradient[:, i].sum(), x, create_graph=True)[0] for i in range(3)]
        for i in range(3):
            for j in range(i, 3):
                total = total + (1 if i == j else 2) * rows[i][:, j].pow(2).mean()
    total.backward()


def bending_nested_each(field: Map, x: Tensor) -> None:
    """One value, 3 first-order calls, and one call for each of the 18 distinct second derivatives."""
    x = x.clone().requires_grad_()
    total = x.new_zeros(())
    for gradient in nested_gradients(field.displacement(x), x):
        for i in range(3):
            for j in range(i, 3):
                entry = torch.autograd.grad(gradient[:, i].sum(), x, create_graph=True)[0][:, j]
                total = total + (1 if i == j else 2) * entry.pow(2).mean()
    total.backward()


def bending_func(field: Map, x: Tensor) -> None:
    """torch.func: vmap of hessian, `FUNC_CHUNK` points at a time, each piece with its own backward pass."""
    hessian = torch.func.vmap(torch.func.hessian(lambda p: field.displacement(p[None])[0]))
    for piece in x.split(FUNC_CHUNK):
        (hessian(piece).pow(2).sum() / len(x)).backward()


def bending_jet(field: Map, x: Tensor) -> None:
    """Exact: six second derivatives of every component, one forward and one backward pass."""
    regularizers.bending(field.displacement_jet(jets.seed(x, 2))).backward()


def bending_probes(field: Map, x: Tensor) -> None:
    """Two random directions for every point, drawn anew: unbiased."""
    regularizers.bending(field.displacement_jet(jets.probe(x))).backward()


def bending_subset(field: Map, x: Tensor) -> None:
    """Exact, on the first eighth of the points (which are random): unbiased."""
    bending_jet(field, x[: len(x) // 8])


def jacobian_nested(field: Map, x: Tensor) -> None:
    """|det J - 1| with three first-order calls."""
    x = x.clone().requires_grad_()
    j = torch.stack(nested_gradients(field.displacement(x), x), dim=1) + torch.eye(3)
    (jets.det(j) - 1).abs().mean().backward()


def jacobian_jet(field: Map, x: Tensor) -> None:
    regularizers.jacobian(field.displacement_jet(jets.seed(x, 1))).backward()


class Row(NamedTuple):
    """A way and what it is compared with.

    ``target``: the least speed-up that is promised. ``random``: its gradient is itself a draw. ``slow``: left out of
    short runs, for it takes longer than the baseline and only places it.
    """

    title: str
    way: Way
    baseline: str
    target: float | None = None
    random: bool = False
    slow: bool = False


ROWS: dict[str, Row] = {
    "data": Row("data term alone (no derivative)", data_term, "bending-nested"),
    "bending-nested": Row("bending, nested autograd, 3 + 9 calls", bending_nested, "bending-nested"),
    "bending-nested-each": Row(
        "bending, nested autograd, 3 + 18 calls", bending_nested_each, "bending-nested", slow=True
    ),
    "bending-func": Row("bending, torch.func vmap(hessian), chunked", bending_func, "bending-nested", slow=True),
    "bending-jet": Row("bending, exact jet", bending_jet, "bending-nested", 3.5),
    "bending-probes": Row("bending, probes at every point", bending_probes, "bending-nested", 12.0, True),
    "bending-subset": Row("bending, exact jet, 1/8 of the points", bending_subset, "bending-nested", 16.0, True),
    "jacobian-nested": Row("Jacobian, nested autograd, 3 calls", jacobian_nested, "jacobian-nested"),
    "jacobian-jet": Row("Jacobian, exact jet", jacobian_jet, "jacobian-nested"),
}


def gradient(way: Way, field: Map, x: Tensor) -> Tensor:
    """The gradient of all parameters as one vector (float64); no derivative depends on the last bias."""
    field.zero_grad()
    way(field, x)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in field.parameters()]
    return torch.cat([p.flatten() for p in parts]).double()


def check_agreement(field: Map, n: int = 200) -> None:
    """All exact ways of one penalty have the same gradient; a benchmark of two different things would mean nothing."""
    x = new_points(n)
    for name, row in ROWS.items():
        if row.random or row.baseline == name or name == "data":
            continue
        want, got = gradient(ROWS[row.baseline].way, field, x), gradient(row.way, field, x)
        gap = float((got - want).norm() / want.norm())
        if gap > 1e-4:
            raise RuntimeError(f"{row.title}: its gradient differs from that of the baseline by {gap:.2g}")


def spread(way: Way, field: Map, n: int, draws: int, norm: float) -> float:
    """Standard deviation of the gradient, sqrt(E|g - Eg|^2) / norm, over draws of points (and of directions)."""
    found = torch.stack([gradient(way, field, new_points(n)) for _ in range(draws)])
    return math.sqrt(float(found.var(dim=0).sum())) / norm


def peak_memory(name: str, n: int, threads: int) -> float:
    """MB above the process before, in a fresh process."""
    return float(in_fresh_process("tests.benchmarks.bench_jets", name, str(n), str(threads)))


def measure(n: int, threads: int, repeats: int, draws: int, short: bool = False) -> list[dict[str, Any]]:
    """One record for each row of the table."""
    rows = {name: row for name, row in ROWS.items() if not (short and row.slow)}
    field, x = new_map(), new_points(n)
    check_agreement(field)

    def step(way: Way) -> None:
        field.zero_grad()
        way(field, x)

    steps = {name: partial(step, row.way) for name, row in rows.items()}
    rates: list[float] = []
    rate = matrix_rate()
    steps_with_rate = steps | {"rate": lambda: rates.append(rate())}
    times = interleaved(steps_with_rate, repeats)
    peak_rate = statistics.median(rates)
    # Bending's ways share one gradient up to their noise: its norm on a large batch is the unit of the spread.
    norm = {
        b: float(gradient(ROWS[j].way, field, new_points(4 * n)).norm())
        for b, j in (("bending-nested", "bending-jet"), ("jacobian-nested", "jacobian-jet"))
    }
    records: list[dict[str, Any]] = []
    for name, row in rows.items():
        took = statistics.median(times[name])
        tenth = x[: n // 10]
        flops = 10 * gigaflops(lambda way=row.way, few=tenth: way(field, few))  # type: ignore[misc]
        # Exact ways have the same noise, that of the points: it is measured once, on the fastest of them.
        draw = (
            row.way if row.random else ROWS["bending-jet" if row.baseline == "bending-nested" else "jacobian-jet"].way
        )
        records.append(
            {
                "benchmark": "jets",
                "name": name,
                "title": row.title,
                "points": n,
                "threads": threads,
                "seconds": took,
                "fastest_seconds": min(times[name]),
                "speedup": ratio(times[row.baseline], times[name]),
                "baseline": row.baseline,
                "speedup_each": ratio(times[EACH], times[name])
                if EACH in times and name.startswith("bending")
                else None,
                "target": row.target,
                "peak_mb": peak_memory(name, n, threads),
                "gradient_sd": None if name == "data" else spread(draw, field, n, draws, norm[row.baseline]),
                "product_gflop": flops,
                "product_share": flops / took / peak_rate,
                "rate_gflops": peak_rate,
            }
        )
    return records


def report(records: list[dict[str, Any]]) -> str:
    rows = [
        {
            "way": r["title"],
            "seconds": f"{r['seconds']:.3f}",
            "fastest": f"{r['fastest_seconds']:.3f}",
            "speed-up": "1 (baseline)" if r["name"] == r["baseline"] else f"{r['speedup']:.2f}",
            "against 3 + 18": "" if r["speedup_each"] is None else f"{r['speedup_each']:.2f}",
            "target": ""
            if r["target"] is None
            else f"{r['target']:g} {'met' if r['speedup'] >= r['target'] else 'MISSED'}",
            "peak MB": f"{r['peak_mb']:.0f}",
            "gradient s.d.": "" if r["gradient_sd"] is None else f"{r['gradient_sd']:.3f}",
            "product GFLOP": f"{r['product_gflop']:.1f}",
            "share of product rate": f"{100 * r['product_share']:.0f}%",
        }
        for r in records
    ]
    first = records[0]
    head = (
        f"3 x 256 SIREN, {first['points']} points, forward + backward, {first['threads']} threads; matrix products of "
        f"this machine: {first['rate_gflops']:.0f} GFLOP/s (float32)"
    )
    return f"{head}\n\n{table(rows)}"


def main() -> None:
    name, n, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    field, x = new_map(), new_points(n)
    way = ROWS[name].way
    print(peak_megabytes(lambda: way(field, x), lambda: way(field, x[:64])))


if __name__ == "__main__":
    main()
