"""The measured rows of experiments/RESULTS.md, each by the real command; run again, it goes on where it stopped.

    python tests/benchmarks/tables.py --shared ../shared --work /tmp/medinr_tables [--only popi,warp,phantom,cidir,idir]

Every row is a JSON line in tests/benchmarks/rows.jsonl: name, git commit, command, wall seconds of the whole command,
and the metrics that it wrote. Rows that are there are not run again. The phantom is written once into the work folder.
"""

import argparse
import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import ndimage

from data_modules.dirlab import DIRLab
from medinr import io
from medinr.data.lungs import lung_mask
from medinr.metrics import rms_difference
from medinr.space import Image, transform_points

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).parent / "rows.jsonl"
CIDIR_CASE = 4
ALPHA_STEPS = (2, 6, 8)
"""Three of the search's eleven alphas 10^(-4 + 0.4 k): 6.3e-4, 0.025 and 0.16."""
Row = dict[str, Any]


def medinr(*args: str | Path) -> tuple[str, float]:
    """Run the command; returns it as text, and its wall seconds."""
    words = [str(a) for a in args]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "medinr.cli", *words], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    return "medinr " + " ".join(words), round(time.perf_counter() - begin, 1)


def commit() -> str | None:
    """The commit that is measured, with ``+`` where medinr or data_modules differ from it; None outside of git."""
    git = ["git", "-C", str(ROOT)]
    try:
        name, changed = (
            subprocess.run([*git, *words], check=True, capture_output=True, text=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--short", "--", "medinr", "data_modules"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+" if changed else "")


def phantom_root(work: Path) -> Path:
    """Phantom cases 1 to 5 at the real size, extremes only."""
    root = work / "phantom"
    if not (root / "truth" / "case5").exists():
        medinr("phantom", "dirlab", "--out", root, "--cases", "1-5", "--phases", "extremes")
    return root


def popi(shared: Path, work: Path, seed: int, preset: str) -> Row:
    """T10 against T60, mask-free; RMS difference inside the lungs of T10, clipped to [-1000, 200] HU."""
    files = [shared / "data" / "popi_4dct" / f"popi_T{p}.nii.gz" for p in (10, 60)]
    out = work / f"popi_{preset}_{seed}"
    command, seconds = medinr("register", *files, "--out", out, "--seed", str(seed), "--preset", preset)
    fixed, moving, warped = (io.read_image(f) for f in (*files, out / "warped.nii.gz"))
    lungs = lung_mask(fixed)
    before, after = (
        rms_difference(i.data[0].clamp(-1000, 200), fixed.data[0].clamp(-1000, 200), lungs) for i in (moving, warped)
    )
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return {"command": command, "seconds": seconds, **found, "rms_lungs_before": before, "rms_lungs": after}


def known_warp(shared: Path, work: Path, seed: int) -> tuple[Path, Callable[[np.ndarray], np.ndarray]]:
    """T10 seen through phi(p) = p + sum of six long sine waves, at most 15 mm in the lungs; 1,000 lung points."""
    folder = work / f"warp_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    image = io.read_image(shared / "data" / "popi_4dct" / "popi_T10.nii.gz")
    domain, lungs = image.domain, lung_mask(image)
    rng = np.random.default_rng(seed)
    grid = transform_points(domain.voxel_to_world, domain.voxels().double()).numpy()
    centre = grid.mean(0)
    waves = [(rng.normal(size=3) * 2 * np.pi / 180, rng.uniform(0, 2 * np.pi), rng.normal(size=3)) for _ in range(6)]

    def raw(p: np.ndarray) -> np.ndarray:
        return sum(a * np.sin((p - centre) @ k + phase)[:, None] for k, phase, a in waves)

    size = 15.0 / np.linalg.norm(raw(grid[lungs.numpy().ravel()]), axis=1).max()

    def phi(p: np.ndarray) -> np.ndarray:
        return p + size * raw(p)

    voxels = transform_points(domain.world_to_voxel, torch.tensor(phi(grid))).numpy()

    def through(volume: np.ndarray) -> np.ndarray:
        return ndimage.map_coordinates(volume.astype(float), voxels.T, order=1, mode="nearest").reshape(domain.shape)

    # Noise of its own, as a second scan would have.
    values = through(image.data[0].numpy()) + rng.normal(0, 20, domain.shape)
    inside = grid[(through(lungs.numpy()) > 0.5).ravel()]
    points = inside[rng.choice(len(inside), 1000)] + rng.uniform(-2, 2, (1000, 3))
    io.write_image(folder / "fixed.nii.gz", torch.tensor(values, dtype=torch.float32), domain)
    io.write_image(folder / "moving.nii.gz", image.data[0], domain)
    io.write_points(folder / "fixed.csv", torch.tensor(points))
    io.write_points(folder / "moving.csv", torch.tensor(phi(points)))
    return folder, phi


def register_folder(folder: Path, out: Path, seed: int, preset: str) -> Row:
    """`register` on fixed, moving and their landmarks in a folder."""
    points = ["--fixed-points", folder / "fixed.csv", "--moving-points", folder / "moving.csv"]
    images = [folder / "fixed.nii.gz", folder / "moving.nii.gz"]
    command, seconds = medinr("register", *images, "--out", out, *points, "--seed", str(seed), "--preset", preset)
    return {"command": command, "seconds": seconds, **json.loads((out / "metrics.json").read_text(encoding="utf-8"))}


def phantom_case(work: Path, case: int) -> Path:
    """A phantom case as two NIfTI files and two CSV files: what a user of `register` brings."""
    folder = work / f"case{case}"
    if not (folder / "moving.csv").exists():
        pair = DIRLab(root=str(phantom_root(work)), case=case, masks="none").pair
        folder.mkdir(parents=True, exist_ok=True)
        for name, image, points in (
            ("fixed", pair.fixed, pair.fixed_points),
            ("moving", pair.moving, pair.moving_points),
        ):
            assert isinstance(image, Image) and points is not None
            io.write_image(folder / f"{name}.nii.gz", image.data[0], image.domain)
            io.write_points(folder / f"{name}.csv", points)
    return folder


def experiment(config: Path, work: Path, case: int, seed: int, name: str, dense: bool = True) -> tuple[Row, Path]:
    """fit and test of an experiment on a phantom case; returns the row and the run's results folder.

    Not ``dense``: no test; the landmark errors are those that the fit itself logged after its last step.
    """
    common = ["--config", config, "--data.root", phantom_root(work), "--data.case", str(case), "--wandb", "false"]
    common += ["--runs", work / "runs", "--experiment", name, "--seed_everything", str(seed)]
    command, fit = "medinr fit " + " ".join(map(str, common)), None
    if not list((work / "runs" / name).glob("*/finished")):
        command, fit = medinr("fit", *common)
    if not dense:
        [log] = (work / "runs" / name).glob("*/metrics.csv")
        with log.open(encoding="utf-8") as file:
            last = [line for line in csv.DictReader(file) if line.get("tre/mean")][-1]
        errors = {k: float(v) for k, v in last.items() if k and k.startswith("tre/") and v}
        return {"command": command, "seconds": fit, "step": int(last["step"]), **errors}, log.parent
    _, test = medinr("test", *common)
    [results] = (work / "runs" / name).glob("*/results")
    found = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    return {"command": command, "seconds": fit, "seconds_test": test, **found}, results


def cidir(work: Path, seed: int) -> Row:
    """cIDIR on one case; its whole search table."""
    row, results = experiment(ROOT / "experiments" / "cidir_dirlab.yaml", work, CIDIR_CASE, seed, f"cidir_{seed}")
    with (results / "alpha_search.csv").open(encoding="utf-8") as file:
        row["table"] = [{k: float(v) for k, v in line.items()} for line in csv.DictReader(file)]
    return row


def idir_at(work: Path, seed: int, k: int) -> Row:
    """The same network, similarity and points as cIDIR's, trained 600 steps (cIDIR: 1200) for one alpha alone."""
    alpha = 10 ** (-4 + 0.4 * k)
    config = yaml.safe_load((ROOT / "experiments" / "cidir_dirlab.yaml").read_text(encoding="utf-8"))
    model = config["model"]
    model["class_path"] = "PairRegistration"
    model["field"] = model["init_args"]["field"]
    arguments = model["init_args"]
    arguments["field"]["class_path"] = "SIREN"
    for key in ("conditions", "harmonizer"):
        del arguments["field"]["init_args"][key]
    arguments["regularizers"]["bending"]["init_args"]["weight"] *= alpha
    for key in ("conditioned", "prior", "form", "alphas", "select"):
        del arguments[key]
    del model["field"]
    config["trainer"]["max_steps"] = 600
    file = work / f"idir_{k}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    row, _ = experiment(file, work, CIDIR_CASE, seed, f"idir_{k}_{seed}", dense=False)
    return {"alpha": alpha, **row}


def plan(shared: Path, work: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """All rows in order: name and how to measure it."""
    for seed in range(5):
        yield f"popi accurate seed {seed}", lambda s=seed: popi(shared, work, s, "accurate")  # type: ignore[misc]
        yield f"popi fast seed {seed}", lambda s=seed: popi(shared, work, s, "fast")  # type: ignore[misc]
    for seed in range(5):
        yield (
            f"warp accurate seed {seed}",
            lambda s=seed: register_folder(known_warp(shared, work, s)[0], work / f"warp_{s}" / "out", s, "accurate"),  # type: ignore[misc]
        )
    for seed in range(3):
        for case in range(1, 6):
            yield (
                f"phantom case {case} accurate seed {seed}",
                lambda c=case, s=seed: register_folder(  # type: ignore[misc]
                    phantom_case(work, c), work / f"case{c}" / f"out_{s}", s, "accurate"
                ),
            )
    for seed in range(3):
        yield f"cidir case {CIDIR_CASE} seed {seed}", lambda s=seed: cidir(work, s)  # type: ignore[misc]
        for k in ALPHA_STEPS:
            yield f"cidir idir alpha-step {k} seed {seed}", lambda s=seed, k=k: idir_at(work, s, k)  # type: ignore[misc]
    for profile in ("idir", "ccidir"):
        for case in (1, 2):
            yield (
                f"{profile} published case {case} seed 0",
                lambda p=profile, c=case: experiment(  # type: ignore[misc]
                    ROOT / "experiments" / f"{p}_dirlab.yaml", work, c, 0, f"{p}_case{c}"
                )[0],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("MEDINR_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="", help="first words of row names, comma-separated")
    given = parser.parse_args()
    shared, work = given.shared.resolve(), given.work.resolve()
    done = (
        {json.loads(line)["row"] for line in ROWS.read_text(encoding="utf-8").splitlines()} if ROWS.exists() else set()
    )
    wanted = set(given.only.split(",")) - {""}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    for name, measure in plan(shared, work):
        if name in done or (wanted and name.split()[0] not in wanted):
            continue
        row = {"row": name, "commit": commit(), "machine": machine, "load": round(os.getloadavg()[0], 2), **measure()}
        row["command"] = row["command"].replace(str(work), "WORK").replace(str(shared), "SHARED")
        row = {k: round(v, 6) if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()}
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {k: row[k] for k in ("seconds", "rms_lungs", "tre/mean", "tre/p95", "folding/percent") if k in row}
        print(name, shown, flush=True)


if __name__ == "__main__":
    main()
