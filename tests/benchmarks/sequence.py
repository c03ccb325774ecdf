"""Held-out times of a sequence: a fitted method against the nearest image, intensities between images, and pairs.

    python -m tests.benchmarks.sequence --work WORK --config experiments/stnerp_4dct_best.yaml [--seeds 3]
    python -m tests.benchmarks.sequence --work WORK --config FILE.yaml --only popi_a --steps 20   # does it run at all?
    python -m tests.benchmarks.sequence --report

Every row of tests/benchmarks/sequence.jsonl is one held-out time and one prediction, by one fit; fits that are there
are not run again. Data range 2000 HU, 3-D SSIM, in the body and in the lungs grown by 10 mm, both of the held-out image
itself. Series:

- ``popi_a``: POPI model, every other phase held out (T10, T30, ... T90), reference T60.
- ``popi_b``: trained on T10, T60 and one phase of each limb (T30, T80).
- ``popi``: nothing held out; for ``--fields``.
- ``phantom_a``, ``phantom_b``: the same of the thorax phantom (case 1 at 96 voxels, reference T00; b is trained on T00,
  T20, T50 and T80), with the mean TRE of its 75 landmarks at all times, held out or not (prediction ``transform``).

Predictions: ``reference`` (the reference warped to the time by the fitted method), ``neighbours`` (both neighbouring
training images, warped and averaged), ``interpolated`` (the same, with the share of the motion that predicts the
training images best: what `medinr predict --times` writes), ``nearest``, ``linear`` (intensities), ``linear_extremes``
(of the first of the extremes and the reference alone). ``field``: with ``--fields``, see `field_rows`, for the first
seed.
``--pairs`` adds two by ``medinr register``: ``direct``, the reference registered to the held-out image itself, which no
prediction sees (the ceiling), and ``scaled``, the registration of the two training images before and after with its
displacement scaled by the share of the time.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import medinr
from data_modules import DIRLabSequence, FourDCTSequence
from medinr import io, metrics
from medinr.data.lungs import body_mask, lung_mask
from medinr.data.sequence import Sequence
from medinr.fields import Transform
from medinr.fields.chained import Inverted
from medinr.fields.dense import evaluate_dense, folded
from medinr.fields.warp import resample
from medinr.methods import load_method
from medinr.space import Image, transform_points
from medinr.timeline import displacement_on, held_out_scores
from medinr.types import Mask, Points
from tests.benchmarks.measure import read_rows
from tests.benchmarks.tables import ROOT, commit

ROWS = Path(__file__).parent / "sequence.jsonl"
MARGIN_MM = 10.0
SERIES = {
    "popi_a": ("popi", 60, [10, 30, 50, 70, 90], 10),
    "popi_b": ("popi", 60, [0, 20, 40, 50, 70, 90], 10),
    "popi": ("popi", 60, [], 10),
    "phantom_a": ("phantom", 0, [10, 30, 50, 70, 90], 50),
    "phantom_b": ("phantom", 0, [10, 30, 40, 60, 70, 90], 50),
}
"""Data, reference, held-out phases, and the other extreme."""
SIZE = 96
Row = dict[str, Any]


def regions(image: Image) -> dict[str, Mask]:
    return {"body": body_mask(image), "lungs10": lung_mask(image, MARGIN_MM)}


class Scaled(Transform):
    """p + w (phi(p) - p)."""

    def __init__(self, transform: Transform, w: float) -> None:
        self.transform, self.w, self.domain = transform, w, transform.domain
        self.start = torch.eye(4, dtype=torch.float64)

    def __call__(self, world: Points) -> Points:
        return world + self.w * (self.transform(world) - world)

    def jacobian(self, world: Points) -> Tensor:
        eye = torch.eye(3, dtype=torch.float64)
        return eye + self.w * (self.transform.jacobian(world) - eye)

    def expand(self, world: Points) -> tuple[Points, Tensor, Tensor | None]:
        return self(world), self.jacobian(world), None


def data_of(name: str, shared: Path, work: Path) -> tuple[Sequence, list[str]]:
    """The sequence of a series, and the options of the command that read it."""
    kind, reference, held_out, _ = SERIES[name]
    options = ["--data.reference", str(reference), "--data.held_out", json.dumps(held_out)]
    if kind == "popi":
        root = shared / "data" / "popi_4dct"
        data: Any = FourDCTSequence(str(root), reference, held_out)
        return data.sequence, ["--data", "FourDCTSequence", "--data.root", str(root), *options]
    root = work / "phantom"
    if not (root / "geometry.json").exists():
        run_command("phantom", "dirlab", "--out", str(root), "--cases", "1", "--size", str(SIZE))
    data = DIRLabSequence(str(root), 1, reference, held_out)
    return data.sequence, ["--data", "DIRLabSequence", "--data.root", str(root), "--data.case", "1", *options]


def run_command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "medinr.cli", *words], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)


def fitted(options: list[str], config: str, seed: int, steps: int | None, runs: Path) -> tuple[Any, float]:
    """The method of a real `medinr fit`, and the wall seconds of the command."""
    before = set(runs.rglob("last.ckpt"))
    more = [] if steps is None else ["--trainer.max_steps", str(steps)]
    words = ["--runs", str(runs), "--wandb", "false", "--seed_everything", str(seed), *more]
    begin = time.perf_counter()
    run_command("fit", "--config", config, *options, *words)
    spent = time.perf_counter() - begin
    (checkpoint,) = set(runs.rglob("last.ckpt")) - before
    return load_method(checkpoint), spent


def landmark_rows(method: Any, work: Path) -> list[Row]:
    """TRE in mm of the phantom's 75 landmarks at all times, and how well the two limbs are told apart.

    ``hysteresis`` at a time t of the first half is the mean distance between the places of a landmark at t and 100 - t;
    ``hysteresis_error`` the mean length of the difference of that vector from the truth's.
    """
    places: dict[float, list[list[float]]] = defaultdict(list)
    with (work / "phantom/truth/case1/landmarks.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["set"] == "sampled":
                places[float(line["phase"][1:])].append([float(line[a]) for a in "xyz"])
    truth = {t: torch.tensor(p, dtype=torch.float64) for t, p in places.items()}
    moved = {t: method.transform_at(t)(truth[0.0]) for t in truth}
    rows = []
    for t, there in truth.items():
        row: Row = {"time": t, "prediction": "transform", "tre/mean": metrics.tre(moved[t], there).mean().item()}
        row["tre/initial_mean"] = metrics.tre(truth[0.0], there).mean().item()
        if 0 < t < 50:
            loop, real = moved[t] - moved[100 - t], there - truth[100 - t]
            row["hysteresis"] = real.norm(dim=1).mean().item()
            row["hysteresis_fitted"] = loop.norm(dim=1).mean().item()
            row["hysteresis_error"] = (loop - real).norm(dim=1).mean().item()
        rows.append(row)
    return rows


def field_rows(method: Any, sequence: Sequence, work: Path, phantom: bool) -> list[Row]:
    """Of phi_t at all times but the reference: motion, folding exact and of the written field, the gap of the inverse.

    In the lungs grown by 10 mm of the reference, folding in all voxels. ``inverse_gap``: the largest |phi^-1(phi(p)) -
    p| in mm at 4000 voxels, with the flow backwards alone (no Newton iteration). On the phantom ``volume`` and
    ``volume_truth``: the lung's volume at a time relative to that of the reference, by change of variables, and that
    of the true lung masks.
    """
    domain, rows = sequence.domain, []
    region = lung_mask(sequence.images[sequence.reference], MARGIN_MM)
    size = torch.tensor(domain.shape)
    probes = (torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * size).long().double()
    p = transform_points(domain.voxel_to_world, probes)

    def truth(t: float) -> Tensor:
        found: Tensor = io.read_mask(work / f"phantom/truth/case1/lung_mask_T{t:02.0f}.nii.gz", domain)
        return found

    for t in sequence.times:
        if t == sequence.reference_time:
            continue
        phi = method.transform_at(t)
        dense = evaluate_dense(phi, domain)
        length = dense.displacement.norm(dim=-1)
        written = metrics.finite_difference_jacobian(dense.displacement, domain)
        row: Row = {"time": t, "prediction": "field", "folding": folded(phi, domain, dense.det, None, dense.error_det)}
        row |= {"folding_written": 100 * (written <= 0).float().mean().item(), "det_min": dense.det.min().item()}
        row |= {"displacement_mean": length[region].mean().item(), "displacement_max": length.max().item()}
        row["inverse_gap"] = (method.transform_between(t, sequence.reference_time)(phi(p)) - p).norm(dim=1).max().item()
        row["dense_error"] = dense.error_mm
        if phantom:
            lungs = truth(sequence.reference_time)
            row["volume"] = dense.det[lungs].double().mean().item()
            row["volume_truth"] = truth(t).sum().item() / lungs.sum().item()
        rows.append(row)
    return rows


def extreme_rows(sequence: Sequence, other: int) -> list[Row]:
    """Intensities between the two extremes alone, on either limb; none where an extreme is held out itself."""
    if not sequence.held_out or sequence.index(other) in sequence.held_out:
        return []
    ends = sorted((sequence.index(other), sequence.reference))
    times, images = [sequence.times[i] for i in ends], [sequence.images[i].data for i in ends]
    rows = []
    for i in sequence.held_out:
        made = metrics.weighted_image(images, times, sequence.times[i], sequence.period)
        found = metrics.scores(made, sequence.images[i].data, regions(sequence.images[i]))
        rows.append({"time": sequence.times[i], "prediction": "linear_extremes", **found})
    return rows


def pair_rows(sequence: Sequence, preset: str) -> list[Row]:
    """``direct`` and ``scaled``: see above."""
    training, rows, cache = sequence.training, [], {}
    times = [sequence.times[i] for i in training]
    for i in sequence.held_out:
        image, at = sequence.images[i], sequence.times[i]
        direct = medinr.register(image, sequence.images[sequence.reference], preset=preset, init="none")
        before, after, w = metrics.bracket(times, at, sequence.period)
        if (before, after) not in cache:
            pair = (sequence.images[training[before]], sequence.images[training[after]])
            cache[before, after] = medinr.register(*pair, preset=preset, init="none").transform
        back = Inverted(Scaled(cache[before, after], w))
        field = displacement_on(back, image.domain)
        there = displacement_on(direct.transform, image.domain)
        made = {
            "direct": resample(sequence.images[sequence.reference], image.domain, there, order=3),
            "scaled": resample(sequence.images[training[before]], image.domain, field, order=3),
        }
        masks = regions(image)
        rows += [{"time": at, "prediction": k, **metrics.scores(v, image.data, masks)} for k, v in made.items()]
    return rows


def append(rows: list[Row], **common: Any) -> None:
    """All rows of a fit at once: a fit is there or is not."""
    digits = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    text = "".join(json.dumps({**common, **row}) + "\n" for row in digits)
    with ROWS.open("a", encoding="utf-8") as stream:
        stream.write(text)
    print(text, end="", flush=True)


def report(rows: list[Row]) -> str:
    """Means over held-out times; their spread over seeds where there are several."""
    cells: dict[tuple[str, str, str], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["series"], row["method"], row["prediction"]][row["seed"]].append(row)
    names = ["psnr/body", "ssim/body", "psnr/lungs10", "ssim/lungs10", "tre/mean", "hysteresis_error"]
    lines = ["| series | method | prediction | seeds | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for (series, method, prediction), seeds in sorted(cells.items()):
        shown = []
        for name in names:
            means = [
                np.mean([r[name] for r in some if name in r]) for some in seeds.values() if any(name in r for r in some)
            ]
            spread = f" ± {np.std(means):.3f}" if len(means) > 1 else ""
            shown.append(f"{np.mean(means):.3f}{spread}" if means else "")
        lines.append(f"| {series} | {method} | {prediction} | {len(seeds)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--config", default=None, help="an experiment; without one only rows that need no fit")
    parser.add_argument("--only", default=",".join(SERIES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="instead of the experiment's (for a trial)")
    parser.add_argument("--pairs", default=None, help="preset of `medinr register` for direct and scaled")
    parser.add_argument("--fitted", default=None, help="checkpoint of a fit of this series, instead of a new one")
    parser.add_argument("--fields", action="store_true", help="folding, motion and inverse at all times, too")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.report:
        print(report(read_rows(ROWS)))
        return
    if given.work is None:
        parser.error("--work: expected a folder for runs and the phantom")
    for series in given.only.split(","):
        sequence, options = data_of(series, given.shared, given.work)

        def there(method: str, seed: int, series: str = series) -> bool:
            return any((r["series"], r["method"], r["seed"]) == (series, method, seed) for r in read_rows(ROWS))

        if not there("none", 0):
            append(extreme_rows(sequence, SERIES[series][3]), series=series, method="none", seed=0, commit=commit())
        if given.pairs and not there(f"register_{given.pairs}", 0):
            name = f"register_{given.pairs}"
            append(pair_rows(sequence, given.pairs), series=series, method=name, seed=0, commit=commit())
        for seed in range(given.seeds if given.config else 0):
            name = Path(given.config).stem + (f"_{given.steps}_steps" if given.steps else "")
            if there(name, seed):
                continue
            if given.fitted is None:
                method, seconds = fitted(options, given.config, seed, given.steps, given.work / "runs")
            else:
                method, seconds = load_method(given.fitted), None
            rows = held_out_scores(method, sequence, regions) if sequence.held_out else []
            phantom = series.startswith("phantom")
            rows += landmark_rows(method, given.work) if phantom else []
            rows += field_rows(method, sequence, given.work, phantom) if given.fields and seed == 0 else []
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
            cost = {"seconds": round(seconds, 1), "peak_gb": round(peak, 2)} if seconds is not None else {}
            append(rows, series=series, method=name, seed=seed, **cost, commit=commit())


if __name__ == "__main__":
    main()
