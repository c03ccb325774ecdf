"""Atlases: weeks left out of the CRL templates; a phantom cohort with known truth.

    python -m tests.benchmarks.atlas crl --work WORK [--steps N] [--alone 23,35]
    python -m tests.benchmarks.atlas mouse --work WORK [--held 1,2,3]
    python -m tests.benchmarks.atlas cost
    python -m tests.benchmarks.atlas phantom --work WORK [--steps N] [--codes spatial,one,long]
    python -m tests.benchmarks.atlas --report

Rows of tests/benchmarks/atlas.jsonl; fits in WORK and rows that are there are not made again. All fits are real
`medinr fit` commands.

- ``crl``: weeks 23, 26, 29, 32 and 35 left out (together, or each ``alone``), experiments/cinema_crl.yaml.
  Each week is generated, and compared inside its brain mask, intensities windowed to [0, 1] by each volume's own
  percentile; ``rigid`` and ``affine``: after `medinr.start.find_start` of that kind, the same for every prediction:
  ``atlas``, ``before`` and ``after`` (the neighbouring weeks), ``mean`` (voxel-wise, of both after affine).
- ``mouse``: each of some brains left out, experiments/cinema_crl.yaml without conditions; the left-out brain is fitted
  by its intensities alone, and its 37 labels are read from the decoder. Beside it the Dice of `medinr register --preset
  fast` from the training brain whose latents are nearest, as in the comparison (affine start by SimpleITK).
- ``phantom``: 40 subjects to train, 20 to test, of `medinr phantom dhcp`, experiments/cinema_dhcp_best.yaml with codes
  ``spatial`` (256 x 3^3), ``one`` (256) or ``long`` (6,912 numbers for the whole brain). Test subjects are fitted by
  their intensities alone, no condition told.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from data_modules.brains import MouseCohort
from data_modules.crl import FetalCRL
from data_modules.dhcp import DHCP
from medinr.adaptation import adapt_scan, scan_metrics
from medinr.atlas_volumes import atlas_domain, decoded_at, render
from medinr.data.cohort import Cohort, Scan
from medinr.latent_statistics import auc, features, mean_absolute_errors, ridge_predict
from medinr.latent_statistics import nearest as nearest_members
from medinr.methods import ConditionalAtlas, load_method
from medinr.metrics.intensity import psnr, ssim
from medinr.metrics.overlap import dice
from medinr.metrics.topology import topology
from medinr.sampling import interpolate, nearest
from medinr.space import Domain, Image, transform_points
from medinr.start import find_start
from tests.benchmarks.comparison import Bench
from tests.benchmarks.measure import interleaved, peak_megabytes, read_rows
from tests.benchmarks.tables import ROOT, commit
from tests.medinr import tiny_atlas

ROWS = Path(__file__).parent / "atlas.jsonl"
HELD = (23, 26, 29, 32, 35)
CODES = {"spatial": (256, 3), "one": (256, 1), "long": (6912, 1)}
SUBJECTS, SIZE, TEST = 60, 64, 20
Row = dict[str, Any]


def write(row: Row) -> None:
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "commit": commit()}) + "\n")
    print(json.dumps(row), flush=True)


def there(**wanted: Any) -> bool:
    return any(all(row.get(k) == v for k, v in wanted.items()) for row in read_rows(ROWS))


def fitted(config: str, name: str, work: Path, *options: str) -> tuple[ConditionalAtlas, float, float]:
    """The atlas of a real `medinr fit`, its wall seconds and its processor seconds; kept in ``work``."""
    folder = work / "runs"
    done = sorted(folder.glob(f"{name}/*/finished"))
    cost = work / f"{name}.json"
    if not done:
        words = ["fit", "--config", str(ROOT / "experiments" / config), "--runs", str(folder), "--experiment", name]
        start, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, "-m", "medinr.cli", *words, "--wandb", "false", *options], check=True, cwd=ROOT)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        cost.write_text(json.dumps([time.perf_counter() - start, used]), encoding="utf-8")
        done = sorted(folder.glob(f"{name}/*/finished"))
    method = load_method(done[-1].parent / "checkpoints" / "last.ckpt")
    assert isinstance(method, ConditionalAtlas)
    wall, used = json.loads(cost.read_text(encoding="utf-8")) if cost.exists() else (math.nan, math.nan)
    return method, wall, used


# -- weeks left out ----------------------------------------------------------------------------------------------------


def crl(work: Path, steps: int, weeks: tuple[int, ...]) -> None:
    """Rows of weeks that were left out together."""
    series = "crl" if len(weeks) > 1 else "crl_alone"
    if all(there(series=series, week=week, steps=steps) for week in weeks):
        return
    root = Path(os.environ.get("MEDINR_SHARED", "../shared")) / "data" / "fetal_crl"
    held = [f"sta{w}" for w in weeks]
    options = ["--data.root", str(root), "--data.test", json.dumps(held), "--trainer.max_steps", str(steps)]
    method, wall, used = fitted("cinema_crl.yaml", f"{series}_{weeks[0]}_{steps}", work, *options)
    data = FetalCRL(str(root), test=held, spacing=1.6, margin_mm=8.0)
    cohort, m = data.cohort, len(method.modalities)
    for week in weeks:
        if there(series=series, week=week, steps=steps):
            continue
        scan = cohort.scan(f"sta{week}")
        sampler = method.sampler(scan)
        truth, domain, mask = sampler.volume[0], scan.domain, scan.mask
        assert mask is not None
        world = transform_points(domain.voxel_to_world, domain.voxels())
        image = Image(sampler.volume, domain)
        latent = method.at(float(week))
        whole = atlas_domain(method.unit_mm, 1.6)
        guess = Image(render(method, latent, whole).images["T2w"][None], whole)
        row: Row = {"series": series, "week": week, "steps": steps}
        found: dict[str, Tensor] = {}
        labels: dict[str, Tensor] = {}
        for kind in ("rigid", "affine"):
            matrix = find_start(image, guess, kind, [(0, 1), (0, 1)])  # type: ignore[arg-type]
            out = decoded_at(method, latent, transform_points(matrix, world.double()).float())
            found[f"atlas_{kind}"] = out[:, 0].clamp(0, 1).view(domain.shape)
            labels[f"atlas_{kind}"] = torch.tensor(method.labels)[out[:, m:].argmax(1)].view(domain.shape)
            for side, other in (("before", cohort.scan(f"sta{week - 1}")), ("after", cohort.scan(f"sta{week + 1}"))):
                volume = method.sampler(other).volume
                matrix = find_start(image, Image(volume, other.domain), kind, [(0, 1), (0, 1)])  # type: ignore[arg-type]
                voxels = transform_points(other.domain.world_to_voxel @ matrix, world.double()).float()
                found[f"{side}_{kind}"] = interpolate(volume, voxels)[0].view(domain.shape)
                if other.labels is not None:
                    labels[f"{side}_{kind}"] = nearest(other.labels, voxels).view(domain.shape)
        found["mean_affine"] = (found["before_affine"] + found["after_affine"]) / 2
        for name, volume in found.items():
            row[f"psnr_{name}"] = round(psnr(volume, truth, 1.0, mask), 2)
            row[f"ssim_{name}"] = round(ssim(volume, truth, 1.0, mask), 4)
        if scan.labels is not None:
            for name, volume in labels.items():
                scores = dice(volume.int() * mask, scan.labels.int().clamp(min=0) * mask, method.labels[1:])
                row[f"dice_{name}"] = round(sum(scores.values()) / len(scores), 4)
        write({**row, "wall_s": round(wall), "cpu_s": round(used)})
    if not there(series=f"{series}_train", weeks=list(weeks), steps=steps):
        pairs = {name: reconstructed(method, cohort.scan(name), i) for i, name in enumerate(method.names)}
        means = {f"mean_{k}": sum(v[i] for v in pairs.values()) / len(pairs) for i, k in enumerate(("psnr", "ssim"))}
        write({"series": f"{series}_train", "weeks": weeks, "steps": steps, "psnr_ssim": pairs, **means})


def reconstructed(method: ConditionalAtlas, scan: Scan, index: int) -> tuple[float, float]:
    """PSNR and SSIM of a training scan, inside its mask."""
    sampler = method.sampler(scan)
    world = transform_points(scan.domain.voxel_to_world, scan.domain.voxels())
    found = decoded_at(method, method.member(index), world)[:, 0].clamp(0, 1).view(scan.domain.shape)
    truth = sampler.volume[0]
    return round(psnr(found, truth, 1.0, scan.mask), 2), round(ssim(found, truth, 1.0, scan.mask), 4)


# -- brains left out ---------------------------------------------------------------------------------------------------


def mouse(work: Path, steps: int, held: list[int]) -> None:
    root = Path(os.environ.get("MEDINR_SHARED", "../shared")) / "data" / "mouse_fvb"
    for out in held:
        if there(series="mouse", held=out, steps=steps):
            continue
        starts = str(work / "starts")
        data = MouseCohort(str(root), starts, test=[f"mouse-{out}"], margin_mm=1.0)
        given = {"root": root, "starts": starts, "test": f'["mouse-{out}"]', "spacing": "null", "margin_mm": 1.0}
        options = ["--data", "MouseCohort", *(f"--data.{k}={v}" for k, v in given.items())]
        given = {
            "explicit": "[]",
            "smooth_weight": 0,
            "halo_mm": 0.75,
            "balance": "scans",
            "scans": 8,
            "strip": "true",
            "points": 16384,
            "decoder.grids": "[16,32,64]",
        }
        options += [*(f"--model.{k}={v}" for k, v in given.items()), f"--trainer.max_steps={steps}"]
        method, wall, used = fitted("cinema_crl.yaml", f"mouse_{out}_{steps}", work, *options)
        scan = data.cohort.scan(f"mouse-{out}")
        found = adapt_scan(method, scan, steps=400, points=4096)
        metrics = scan_metrics(method, scan, found, render(method, found.latent, scan.domain))
        order = nearest_members(features(method.members()), features([found.latent]))[0][0]
        brain = int(method.names[int(order[0])].removeprefix("mouse-"))
        bench = Bench(root.parent.parent, work, work, "", ())
        paired = bench.run(("medinr_fast", "preset", f"mouse_{brain}_{out}", 0))
        write({
            "series": "mouse", "held": out, "steps": steps, "wall_s": round(wall), "cpu_s": round(used),
            **{k: round(v, 4) for k, v in metrics.items()}, "nearest": brain,
            "dice_register_fast": round(paired["dice"], 4),
        })  # fmt: skip


# -- what a step costs -------------------------------------------------------------------------------------------------


def step_of(subjects: int, points: int, nodes: int) -> Callable[[], None]:
    """A training step of 16 scans."""
    decoder = tiny_atlas.decoder(width=96, layers=3, modulated=(1, 2, 3), code=64, nodes=nodes)
    method = tiny_atlas.atlas(decoder=decoder, points=points, scans=16)
    cohort = tiny_atlas.cohort(tuple(24 + 10 * i / subjects for i in range(subjects)))
    method.size(cohort)
    method.attach(cohort)
    adam = torch.optim.Adam(method.parameters(), lr=1e-4)

    def step() -> None:
        adam.zero_grad()
        torch.stack(list(method.objective(method.draw()).values())).sum().backward()
        adam.step()

    return step


def cost() -> None:
    """CPU ms of a step by the size of the cohort."""
    if not there(series="cost"):
        found = interleaved({str(n): step_of(n, 8192, 3) for n in (20, 80, 320)}, 15)
        write({"series": "cost", "ms_a_step_by_subjects": {n: round(1000 * median(t), 1) for n, t in found.items()}})
    for points, nodes in ((8192, 3), (8192, 12), (32768, 3), (32768, 12)):
        if not there(series="memory", points=points, nodes=nodes):  # a fresh process, or the first's memory hides it
            code = f"from tests.benchmarks import atlas; atlas.memory({points}, {nodes})"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def memory(points: int, nodes: int) -> None:
    """Memory of a step of 16 scans, above that of one with few points and nodes; MB."""
    torch.set_num_threads(1)
    grown = peak_megabytes(step_of(16, points, nodes), step_of(16, 16, 3))
    codes = 16 * 64 * nodes**3 * 4 / 1e6
    write({"series": "memory", "points": points, "nodes": nodes, "mb": round(grown), "codes_mb": round(codes, 1)})


# -- the phantom cohort ------------------------------------------------------------------------------------------------


def phantom(work: Path, steps: int, codes: list[str]) -> None:
    root = work / "phantom"
    if not (root / "truth" / "subjects.tsv").exists():
        words = ["phantom", "dhcp", "--out", str(root), "--subjects", str(SUBJECTS), "--size", str(SIZE)]
        subprocess.run([sys.executable, "-m", "medinr.cli", *words], check=True, cwd=ROOT)
    share = TEST / SUBJECTS
    asked = ["scan_age", "ventricle_volume", "callosum"]
    data = DHCP(str(root), conditions=asked, test=share, margin_mm=8.0)
    for kind in codes:
        code, nodes = CODES[kind]
        options = ["--data.root", str(root), "--data.test", str(share), "--trainer.max_steps", str(steps)]
        options += ["--model.decoder.code", str(code), "--model.decoder.nodes", str(nodes)]
        method, wall, used = fitted("cinema_dhcp_best.yaml", f"phantom_{kind}_{steps}", work, *options)
        cost = {"steps": steps, "wall_s": round(wall), "cpu_s": round(used)}
        if not there(series="phantom", codes=kind, steps=steps):
            write({"series": "phantom", "codes": kind, **cost, **tested(method, data.cohort, root, work, kind)})
        if kind == "spatial" and not there(series="phantom_conditions", steps=steps):
            write({"series": "phantom_conditions", **cost, **asked_for(method)})


def tested(method: ConditionalAtlas, cohort: Cohort, root: Path, work: Path, kind: str) -> Row:
    """The test subjects fitted; ages by their condition, by ridge on the latents, and by total brain volume."""
    truth = json.loads((root / "truth" / "parameters.json").read_text(encoding="utf-8"))
    rows, latents, fits = [], [], []
    for name in cohort.names("test"):
        scan = cohort.scan(name)
        found = adapt_scan(method, scan, steps=150, points=2048)
        metrics = scan_metrics(method, scan, found, render(method, found.latent, scan.domain))
        rows.append(metrics)
        latents.append(found.latent)
        fits.append(found.conditions)
        print(name, cohort.known[name], found.conditions, metrics, flush=True)
    torch.save([vars(x) for x in latents], work / f"latents_{kind}.pt")
    ages = {s: torch.tensor([cohort.known[n]["scan_age"] for n in cohort.names(s)]) for s in ("train", "test")}
    by_latent = ridge_predict(features(method.members()), ages["train"], features(latents))
    by_fit = torch.tensor([f["scan_age"] for f in fits])
    volumes = {s: torch.tensor([[brain_ml(cohort, n)] for n in cohort.names(s)]).double() for s in ("train", "test")}
    line = ridge_predict(volumes["train"], ages["train"], volumes["test"], [1e-9])
    absent = torch.tensor([cohort.known[n]["callosum"] for n in cohort.names("test")])
    level = cohort.condition("callosum").levels.index("absent")
    both = torch.cat([features(method.members()), features(latents)])
    seen = torch.tensor([cohort.known[n]["callosum"] for n in cohort.names("train")])
    score = ridge_predict(both[: len(seen)], (seen == level).double(), both[len(seen) :])
    means = {k: round(sum(r[k] for r in rows) / len(rows), 4) for k in rows[0]}
    wanted = torch.tensor([cohort.known[n]["ventricle_volume"] for n in cohort.names("test")])
    ml = torch.tensor([f["ventricle_volume"] for f in fits])
    named = {"fit": by_fit, "latents": by_latent, "brain_volume": line}
    maes = {f"age_mae_{k}": [round(v, 3) for v in mean_absolute_errors(x, ages["test"])] for k, x in named.items()}
    return {
        **means, **maes, "age_noise_floor": truth["age_noise_floor_mae_weeks"], "age_bias_fit":
        round(float((by_fit - ages["test"]).mean()), 3), "test": len(rows),
        "ventricle_mae_ml": round(float((ml - wanted).abs().mean()), 3),
        "callosum_auc_latents": round(auc(score, absent == level), 3),
    }  # fmt: skip


def brain_ml(cohort: Cohort, name: str) -> float:
    scan = cohort.scan(name)
    assert scan.mask is not None
    return float(scan.mask.sum()) * math.prod(scan.domain.spacing) / 1000


def asked_for(method: ConditionalAtlas) -> Row:
    """Ventricles as requested, at three ages, also beyond the trained range; what else changes; the corpus callosum."""
    ventricles = next(c for c in method.told if c.name == "ventricle_volume")
    known = {v: k for k, v in method.state["labels"].items()}
    label = next(int(k) for name, k in known.items() if "ventricle" in name.lower())
    low, high = ventricles.low, ventricles.high
    requests = [0.9 * low, low, (low + high) / 2, high, 1.1 * high]
    domain = atlas_domain(method.unit_mm, 2.0)
    row: Row = {"requested_ml": [round(r, 2) for r in requests]}
    inner: list[float] = []
    for age in (32.0, 36.0, 40.0):
        volumes = [render(method, method.at(age, {"ventricle_volume": r}), domain).volumes_ml() for r in requests]
        got = [v[label] for v in volumes]
        rest = [sum(v.values()) - v[label] for v in volumes]
        x, y = torch.tensor(requests).double(), torch.tensor(got).double()
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        inside = float((y[3] - y[1]) / (x[3] - x[1]))
        row[f"ml_{age:g}"] = [round(g, 2) for g in got]
        row[f"slope_{age:g}"], row[f"slope_inside_{age:g}"] = round(slope, 3), round(inside, 3)
        inner.append(100 * (max(rest) - min(rest)) / rest[2])
    row["rest_percent"] = [round(v, 2) for v in inner]
    callosum = next(c for c in method.told if c.name == "callosum")
    two = {
        level: render(method, method.at(38.0, {"callosum": float(i)}), domain)
        for i, level in enumerate(callosum.levels)
    }
    white = next(int(k) for name, k in known.items() if "white" in name.lower())
    near = midline(domain, 2.0)
    row["callosum_ml"] = {
        level: round(float(((volume.labels == white) & near).sum()) * 0.008, 2)
        for level, volume in two.items()
        if volume.labels is not None
    }
    gap = (two["present"].images["T2w"] - two["absent"].images["T2w"]).abs()
    inside = two["present"].inside & two["absent"].inside
    middle = midline(domain, 5.0)
    row["callosum_gap_middle"] = round(float(gap[inside & middle].mean()), 4)
    row["callosum_gap_elsewhere"] = round(float(gap[inside & ~middle].mean()), 4)
    cortex = next((int(k) for name, k in known.items() if "cort" in name.lower()), None)
    labels = two["present"].labels
    if cortex is not None and labels is not None:
        row["cortex_38"] = topology(labels == cortex)
    return row


def midline(domain: Domain, within_mm: float) -> Tensor:
    """Voxels near the plane x = 0."""
    x = transform_points(domain.voxel_to_world, domain.voxels())[:, 0]
    return (x.abs() < within_mm).view(domain.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", nargs="?", choices=("crl", "mouse", "cost", "phantom"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--alone", default="", help="weeks, each left out for itself")
    parser.add_argument("--held", default="1,2,3,4,5,6,7,8", help="mice")
    parser.add_argument("--codes", default="spatial,one,long")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.report or given.series is None:
        for row in read_rows(ROWS):
            print(json.dumps(row))
    elif given.series == "crl":
        for week in [int(w) for w in given.alone.split(",") if w]:
            crl(given.work, given.steps or 3000, (week,))
        if not given.alone:
            crl(given.work, given.steps or 3000, HELD)
    elif given.series == "cost":
        cost()
    elif given.series == "mouse":
        mouse(given.work, given.steps or 1000, [int(i) for i in given.held.split(",")])
    else:
        phantom(given.work, given.steps or 2000, given.codes.split(","))


if __name__ == "__main__":
    main()
