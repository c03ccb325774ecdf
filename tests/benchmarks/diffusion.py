"""Diff-Def on the adult slabs and on the adult phantom: stages, baselines, response to the condition, ablation.

    python -m tests.benchmarks.diffusion slabs --shared ../shared [--work FOLDER] [--only shared,seed0]
    python -m tests.benchmarks.diffusion phantom [--work FOLDER]
    python -m tests.benchmarks.diffusion memory

Every row is a JSON line in tests/benchmarks/diffusion.jsonl; rows that are there are not made again, and a fit that is
finished in the work folder is not repeated (one that was broken off goes on). Kinds of rows:

    stage      the last validation of a stage: similarity and Dice, PSNR and mm, denoising loss; seconds
    atlas      a variant's atlases for the conditions of unseen scans, against these: Dice as they are and registered,
               centrality, folding, smoothness; the means of a low and a high half of the unseen scans
    response   requested and measured volume of the condition's structure: slope, correlation, and that of no condition
    seconds    of one atlas in 20 steps, and whether it repeats by its seed
    memory     the published size on the meta device

Registration and autoencoder are trained once per data set; seeds vary diffusion and morphology preservation.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from medinr.callbacks import runs
from medinr.methods import ConditionalAtlas, DiffusionDeformation, load_method
from tests.benchmarks import diffusion_baselines as baselines
from tests.benchmarks.measure import ROOT, read_rows
from tests.benchmarks.tables import commit

ROWS = Path(__file__).parent / "diffusion.jsonl"
Row = dict[str, Any]
SEEDS = (0, 1, 2)
CONDITION = {"slabs": ("csf_ml", 1), "phantom": ("ventricles_ml", 1)}
"""The condition that is requested in ml, and the label whose volume answers."""
CINEMA = {"slabs": {"csf_ml": 0.5}, "phantom": {"age": 3.0, "ventricles_ml": 0.0}}
"""Explicit conditions of the CINeMA atlas; the first is its time, with the kernel's width."""
EXPERIMENT = {"slabs": "diffdef_slabs", "phantom": "diffdef_ukb_best"}
CALIBRATED = {"slabs": 1.25, "phantom": 1.75}
"""Guidance at which the response should be nearest to what is asked, interpolated between 1 and 2 with seed 0."""
STEPS = {"registration": 250, "autoencoder": 2000, "diffusion": 500, "morphology": 50}
IMAGE_STEPS = {"autoencoder": 500, "diffusion": 500}
"""Of the baseline of intensities: its autoencoder sees all voxels, and a step takes three times as long."""
IMAGES = ["--model.latents", "images", "--model.autoencoder.inputs", "1", "--model.autoencoder.stride", "1",
          "--model.autoencoder.channels", "[8, 16, 32]"]  # fmt: skip


def add(row: Row) -> None:
    row["commit"] = commit()
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def there(**wanted: Any) -> bool:
    return any(all(r.get(k) == v for k, v in wanted.items()) for r in read_rows(ROWS))


class Study:
    """Fits and checkpoints of one data set in a work folder."""

    def __init__(self, data: str, shared: Path, work: Path) -> None:
        self.data, self.work = data, work
        self.experiment = EXPERIMENT[data]
        if data == "slabs":
            self.place = ["--data.root", str(shared / "data" / "adult_t1_slabs")]
        else:
            root = work / "ukb"
            if not (root / "phenotypes.csv").exists():
                call("phantom", "ukb", "--out", str(root), "--subjects", "40")
            self.place = ["--data.root", str(root), "--data.table", str(root / "phenotypes.csv")]

    def fit(self, name: str, stages: dict[str, int], *more: str) -> Path:
        """The last checkpoint of a finished fit; done now, or continued, if there is none."""
        root, name = self.work / "runs", f"{self.data}_{name}"
        if not [run for run in runs.runs_of(root, name) if runs.is_finished(run)]:
            words = ["fit", "--config", str(ROOT / "experiments" / f"{self.experiment}.yaml"), *self.place]
            words += ["--runs", str(root), "--wandb", "false", "--experiment", name]
            words += ["--model.steps", json.dumps(stages).replace('"', ""), *more]
            words += ["--trainer.max_steps", str(sum(stages.values()))]
            broken = [run for run in runs.runs_of(root, name) if not runs.is_finished(run)]
            call(*words, *(["--ckpt_path", "last"] if broken else []))
        run = [run for run in runs.runs_of(root, name) if runs.is_finished(run)][-1]
        self._curves(name, run, stages)
        return run / runs.LAST

    def shared(self) -> Path:
        first = self.fit("registration", {"registration": STEPS["registration"]})
        return self.fit("shared", {"autoencoder": STEPS["autoencoder"]}, "--model.earlier", str(first))

    def diffusion(self, seed: int) -> Path:
        more = ["--model.earlier", str(self.shared()), "--seed_everything", str(seed)]
        return self.fit(f"diffusion_s{seed}", {"diffusion": STEPS["diffusion"]}, *more)

    def morphology(self, seed: int, neighbours: int) -> Path:
        more = ["--model.earlier", str(self.diffusion(seed)), "--seed_everything", str(seed)]
        more += [
            "--model.morphology.neighbours",
            str(neighbours),
            "--model.morphology.per_step",
            str(min(2, neighbours)),
        ]
        return self.fit(f"n{neighbours}_s{seed}", {"morphology": STEPS["morphology"]}, *more)

    def images(self, seed: int) -> Path:
        more = ["--model.earlier", str(self.shared()), "--seed_everything", str(seed), *IMAGES]
        return self.fit(f"images_s{seed}", IMAGE_STEPS, *more)

    def cinema(self) -> ConditionalAtlas:
        """The atlas of experiments/cinema_dhcp_best.yaml, of the same scans and conditions."""
        root, name = self.work / "runs", f"{self.data}_cinema"
        if not [run for run in runs.runs_of(root, name) if runs.is_finished(run)]:
            ours, theirs = (
                yaml.safe_load((ROOT / "experiments" / f"{e}.yaml").read_text(encoding="utf-8"))
                for e in ("cinema_dhcp_best", self.experiment)
            )
            asked = list(CINEMA[self.data])
            given = {"explicit": asked, "time": asked[0], "sigma": CINEMA[self.data][asked[0]], "points": 16384}
            ours["model"]["init_args"] |= given
            if self.data == "slabs":
                ours["model"]["init_args"] |= {"strip": False, "elsewhere": 0.5}
            ours["data"] = theirs["data"]
            config = self.work / "cinema.yaml"
            config.write_text(yaml.safe_dump(ours), encoding="utf-8")
            call(
                "fit", "--config", str(config), *self.place, "--runs", str(root), "--wandb", "false",
                "--experiment", name,
            )  # fmt: skip
        run = [run for run in runs.runs_of(root, name) if runs.is_finished(run)][-1]
        method = load_method(run / runs.LAST)
        assert isinstance(method, ConditionalAtlas)
        return method

    def _curves(self, name: str, run: Path, stages: dict[str, int]) -> None:
        """A row for each stage: its last validation, and the seconds until then."""
        with (run / "metrics.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        end = 0
        for stage, n in stages.items():
            begin, end = end, end + n
            if there(kind="stage", data=self.data, run=name, stage=stage):
                continue
            found: Row = {}
            for row in rows:
                if begin <= int(row["step"]) < end:
                    found |= {k: float(v) for k, v in row.items() if v and k.startswith(("val/", "costs/", "loss/"))}
            add({"kind": "stage", "data": self.data, "run": name, "stage": stage, "steps": n, **found})

    def region(self, method: DiffusionDeformation) -> torch.Tensor | None:
        """Where the condition's label counts: of the phantom's fluid, what is nearest to the lateral ventricles (4)."""
        if self.data == "slabs":
            return None
        return baselines.nearer(self.work / "ukb" / "atlas" / "labels.nii.gz", method.domain, 4, 1)

    def load(self, checkpoint: Path) -> DiffusionDeformation:
        """A checkpoint with the cohort attached."""
        from jsonargparse import ArgumentParser

        from medinr.commands.experiment import import_data_modules
        from medinr.data.cohort_module import CohortModule

        import_data_modules()
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(CohortModule, "data")
        config = runs.read_config(runs.run_of_checkpoint(checkpoint) or Path())
        data = parser.instantiate(parser.parse_object({"data": config["data"]})).data
        method = load_method(checkpoint)
        assert isinstance(method, DiffusionDeformation)
        method.attach(data.cohort)
        return method


def call(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "medinr.cli", *words], check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def halves(method: DiffusionDeformation, name: str) -> list[tuple[float, list[str]]]:
    """Unseen scans (of validation and test) in a low and a high half, each with its mean condition."""
    unseen = [*method.known.names("val"), *method.known.names("test")]
    order = sorted(unseen, key=lambda n: method.known.known[n][name])
    parts = [order[: len(order) // 2], order[len(order) // 2 :]]
    return [(sum(method.known.known[n][name] for n in part) / len(part), part) for part in parts]


def wanted(
    method: DiffusionDeformation, name: str, value: float, fixed: Mapping[str, float] | None = None
) -> torch.Tensor:
    told = {**(fixed or {}), name: value}
    return torch.tensor([told.get(c.name, float("nan")) for c in method.conditions])


def means_of_others(method: DiffusionDeformation, name: str) -> dict[str, float]:
    """Of the other conditions, over the training scans."""
    known = [method.known.known[n] for n in method.known.names("train")]
    values = {c.name: torch.tensor([k.get(c.name, float("nan")) for k in known]) for c in method.conditions}
    return {k: float(v.nanmean()) for k, v in values.items() if k != name}


def atlas_rows(study: Study, method: DiffusionDeformation, variant: str, seed: int, make: Any) -> None:
    if there(kind="atlas", data=study.data, variant=variant, seed=seed):
        return
    name, _ = CONDITION[study.data]
    found = [baselines.judged(method, make(method, wanted(method, name, v)), part) for v, part in halves(method, name)]
    add({"kind": "atlas", "data": study.data, "variant": variant, "seed": seed, **baselines.mean_of(found)})


def response_rows(study: Study, method: DiffusionDeformation, variant: str, seed: int, make: Any) -> None:
    """Seven requests over the middle nine tenths of the trained values; once more with other conditions held fixed."""
    name, _ = CONDITION[study.data]
    if others := means_of_others(method, name):
        response_row(study, method, f"{variant}; {', '.join(others)} fixed", seed, make, others)
    response_row(study, method, variant, seed, make, {})


def response_row(
    study: Study, method: DiffusionDeformation, variant: str, seed: int, make: Any, fixed: dict[str, float]
) -> None:
    if there(kind="response", data=study.data, variant=variant, seed=seed):
        return
    name, value = CONDITION[study.data]
    known = torch.tensor([method.known.known[n][name] for n in method.known.names("train")])
    low, high = torch.quantile(known, torch.tensor([0.05, 0.95])).tolist()
    asked, region = np.linspace(low, high, 7), study.region(method)

    def measured(request: float) -> float:
        found = make(method, wanted(method, name, request, fixed))
        return baselines.volume_ml(method, found.probabilities, value, region)

    got, free = [measured(float(v)) for v in asked], measured(float("nan"))
    slope, correlation = float(np.polyfit(asked, got, 1)[0]), float(np.corrcoef(asked, got)[0, 1])
    add({
        "kind": "response", "data": study.data, "variant": variant, "seed": seed, "slope": slope,
        "correlation": correlation, "asked": asked.tolist(), "got": got, "none": free,
    })  # fmt: skip


def scans_row(study: Study, method: DiffusionDeformation) -> None:
    """The same measurement of the training scans themselves: what the grid and the region make of true volumes."""
    if there(kind="response", data=study.data, variant="training scans"):
        return
    (name, value), region = CONDITION[study.data], study.region(method)
    asked, got = [], []
    for scan in method.known.names("train"):
        labels = method.space_.labels(scan)
        if labels is not None:
            shares = baselines.one_hot(labels, method.state["label_values"])
            asked.append(method.known.known[scan][name])
            got.append(baselines.volume_ml(method, shares, value, region))
    slope, correlation = float(np.polyfit(asked, got, 1)[0]), float(np.corrcoef(asked, got)[0, 1])
    add({
        "kind": "response", "data": study.data, "variant": "training scans", "seed": 0, "slope": slope,
        "correlation": correlation, "asked": asked, "got": got,
    })  # fmt: skip


def seconds_row(study: Study, method: DiffusionDeformation) -> None:
    if there(kind="seconds", data=study.data):
        return
    open_ = torch.full((len(method.conditions),), float("nan"))
    begin = time.perf_counter()
    one = method.generate(open_, seed=5)
    took = time.perf_counter() - begin
    same = torch.equal(one.image, method.generate(open_, seed=5).image)
    add({"kind": "seconds", "data": study.data, "seconds": took, "repeats": same, "steps": 20})


def variants(study: Study, parts: list[str]) -> None:
    torch.set_num_threads(1)
    if "shared" in parts:
        method = study.load(study.shared())
        scans_row(study, method)
        for plain in (baselines.general, baselines.voxel_mean, baselines.mean_field, baselines.template):
            atlas_rows(study, method, plain.__name__, 0, plain)
            if plain in (baselines.voxel_mean, baselines.mean_field):  # the template takes minutes for each condition
                response_rows(study, method, plain.__name__, 0, plain)
    if "cinema" in parts:
        method, atlas = study.load(study.shared()), study.cinema()
        atlas_rows(study, method, "cinema", 0, partial(baselines.cinema, atlas))
        response_rows(study, method, "cinema", 0, partial(baselines.cinema, atlas))
    for seed in SEEDS:
        if f"seed{seed}" not in parts:
            continue
        made = {"diffusion": study.diffusion(seed)}
        for n in (15, 5, 1) if seed == 0 and "ablation" in parts else (15,):
            made[f"diffdef N={n}"] = study.morphology(seed, n)
        for variant, checkpoint in made.items():
            method = study.load(checkpoint)
            if variant == "diffusion":
                atlas_rows(study, method, "regression", seed, baselines.regression)
                response_rows(study, method, "regression", seed, baselines.regression)
            strong = [(CALIBRATED[study.data], 5)] if variant.endswith("15") else []
            strong += [(2.0, 5)] if seed == 0 and variant.endswith("15") else []
            for guidance, samples in ((1.0, 1), (1.0, 5), *strong):
                told = f"{variant}, guidance {guidance:g}, {samples} sample(s)"

                make = partial(baselines.diffused, samples=samples, guidance=guidance, seed=seed)
                atlas_rows(study, method, told, seed, make)
                response_rows(study, method, told, seed, make)
        seconds_row(study, method)
    if "images" in parts:
        method = study.load(study.images(0))
        atlas_rows(study, method, "intensities", 0, baselines.intensities)
        response_rows(study, method, "intensities", 0, baselines.intensities)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["slabs", "phantom", "memory"])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=Path("/tmp/medinr_diffusion"))
    parser.add_argument("--only", default="shared,cinema,seed0,seed1,seed2,ablation,images", help="parts, by commas")
    args = parser.parse_args()
    if args.data == "memory":
        from tests.benchmarks.diffusion_memory import published

        if not there(kind="memory"):
            add({"kind": "memory", **published()})
        return
    variants(Study(args.data, args.shared.resolve(), args.work.resolve()), args.only.split(","))


if __name__ == "__main__":
    main()
