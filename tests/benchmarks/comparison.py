"""An honest comparison of registration tools: one row for each tool, setting, pair and seed, appended to
comparison.jsonl; run again, it goes on where it stopped.

    python -m tests.benchmarks.comparison --work WORK --tools greedy,ants --plan
    python -m tests.benchmarks.comparison --work WORK --tools medinr_fast --split test [--seeds 0,1] [--label v2]

``--plan`` runs the whole order: all settings on one pair of each kind, then the chosen setting on the other tuning
pairs, then on the test pairs; a rival that is not deterministic runs three times. Without it: ``--settings`` (``all``,
``chosen`` or names) on ``--pairs`` or ``--split``. A row whose failure is ``error`` is the runner's or the tool's
breakdown, not a bad result: mend it, delete the row, run again.

How a rival's setting is chosen: for MR the highest Dice on mouse_1, for CT the lowest mean over bspline_10 and
phantom_1 of TRE / initial TRE; failed runs lose. Only tuning rows are looked at. Published IDIR is treated alike; our
own presets are one setting each.

Every tool has one thread. Time and memory are those of its whole process, reading and writing included; a run past
20 minutes of CPU time counts as failed. All fields are read back from their files by one evaluator
(comparison_measure.py). Pairs are made by pairs.py; tools and settings are in comparison_tools.py.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import torch

from medinr import io
from medinr.space import Domain
from tests.benchmarks import comparison_tools as tools
from tests.benchmarks import pairs
from tests.benchmarks.comparison_measure import failure, measure
from tests.benchmarks.measure import read_rows

ROOT = Path(__file__).resolve().parents[2]
ROWS = Path(__file__).parent / "comparison.jsonl"
LIMIT_SECONDS = 1200.0
HUMAN_VOXEL_MM = 1.0
DECIDING = {"mr": ("mouse_1",), "ct": ("bspline_10", "phantom_1")}
OTHER_TUNING = ("mouse_2", "mouse_3", "phantom_2")
TEST = ("bspline_20", "sliding_10", "sliding_20", "rbf_10", "rbf_20", "popi", *pairs.MICE[3:], *pairs.PHANTOMS[2:])
SHOWN = (
    "failure",
    "cpu_seconds",
    "memory_mb",
    "tre_initial",
    "tre_mean",
    "dice_initial",
    "dice",
    "rms",
    "folding_percent",
)
Row = dict[str, Any]
Task = tuple[str, str, str, int]
"""Tool, setting, pair, seed."""


def append(row: Row, rows: Path = ROWS) -> None:
    """One line, under a lock: two runs may write at the same time."""
    with rows.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
        file.flush()


def key(row: Row) -> Task:
    return row["tool"], row["setting"], row["pair"], row["seed"]


def modality(pair: str) -> str:
    return "mr" if pair.startswith(("mouse", "adult", "fetal")) else "ct"


def chosen(rows: list[Row], tool: str, kind: str) -> str:
    """The setting of a tool for MR or CT, by the rule above."""
    names = list(tools.TOOLS[tool].settings)
    if len(names) == 1:
        return names[0]

    def loss(name: str) -> float:
        found = [r for r in rows if (r["tool"], r["setting"]) == (tool, name) and r["pair"] in DECIDING[kind]]
        if {r["pair"] for r in found} != set(DECIDING[kind]) or any(r["failure"] for r in found):
            return math.inf
        if kind == "mr":
            return -statistics.mean(r["dice"] for r in found)
        return statistics.mean(r["tre_mean"] / r["tre_initial"] for r in found)

    return min(names, key=loss)


def planned(names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Tool, setting (or ``chosen``) and pair, in the order in which they run."""
    deciding = [p for group in DECIDING.values() for p in group]
    for tool in names:
        for pair in deciding:
            for setting in tools.TOOLS[tool].settings:
                yield tool, setting, pair
    for group in (OTHER_TUNING, TEST):
        for pair in group:
            for tool in names:
                yield tool, "chosen", pair


class Bench:
    """Runs single rows; ``work`` holds the pairs and one scratch folder for each process."""

    def __init__(self, shared: Path, work: Path, peers_env: Path, label: str, extra: tuple[str, ...]) -> None:
        self.shared, self.work, self.peers_env, self.label, self.extra = shared, work, peers_env, label, extra

    def run(self, task: Task) -> Row:
        name, setting_name, pair, seed = task
        tool = tools.TOOLS[name]
        setting = tool.settings.get(setting_name) or next(iter(tool.settings.values()))
        folder = pairs.make_pair(pair, self.shared, self.work)
        scratch = self.work / "runs" / f"{name}_{os.getpid()}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        fixed, moving, out = folder / "fixed.nii.gz", folder / "moving.nii.gz", scratch / "displacement.nii.gz"
        factor = self.millimetres(fixed) if tool.in_mm else 1.0
        if factor != 1:
            fixed, moving = (rescaled(f, scratch / f.name, factor) for f in (fixed, moving))
        words = tools.command(
            name, setting, (fixed, moving, out), folder, self.shared / "peers", self.peers_env, seed, self.extra
        )
        load = os.getloadavg()[0]
        cost = self.launch(words, setting.environment, scratch)
        row: Row = {
            "tool": name, "setting": setting_name, "pair": pair, "family": pair.split("_")[0],
            "split": pairs.split_of(pair), "seed": seed, "failure": "", **cost, "threads": 1, "load": round(load, 2),
            "version": self.version(name), "command": self.shown(words),
        }  # fmt: skip
        written = tools.field_file(name, out)
        if cost.pop("late"):
            row["failure"] = f"time above {LIMIT_SECONDS:.0f} CPU s"
        elif cost["exit"] or not written.exists():
            row |= {"failure": "error", "log": self.shown([(scratch / "log").read_text(errors="replace")[-300:]])}
        else:
            displacement, domain = io.read_displacement(written)
            found = measure(folder, displacement / factor, unscaled(domain, factor))
            row |= {k: round(v, 6) for k, v in found.items()}
            row["failure"] = failure(found)
        row.pop("late", None)
        shutil.rmtree(scratch)
        return row

    def millimetres(self, image: Path) -> float:
        """1 for human images; for the mouse what makes its voxels as large as those of a human brain scan."""
        spacing = min(io.read_image(image).domain.spacing)
        return HUMAN_VOXEL_MM / spacing if spacing < 0.5 else 1.0

    def launch(self, words: list[str], environment: dict[str, str], scratch: Path) -> Row:
        report = scratch / "cost.json"
        launcher = [sys.executable, "-S", "-I", str(Path(__file__).parent / "comparison_launch.py")]
        # Scripts of an environment look for its programs; ours for this repository.
        own = {"PYTHONPATH": str(ROOT)} if words[0] == sys.executable else {}
        path = {"PATH": f"{Path(words[0]).parent}{os.pathsep}{os.environ['PATH']}", **own}
        everything = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | tools.ENVIRONMENT | environment | path
        with (scratch / "log").open("w", encoding="utf-8") as log:
            subprocess.run(
                [*launcher, str(LIMIT_SECONDS), str(report), *words], check=True, cwd=scratch, env=everything,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        found: Row = json.loads(report.read_text(encoding="utf-8"))
        return found

    @cache  # noqa: B019  (one bench a process)
    def version(self, name: str) -> str:
        """Of a rival its packages, of our own tools the commit (``+``: with changes that are not committed)."""
        tool = tools.TOOLS[name]
        if not tool.script:
            git = ["git", "-C", str(ROOT)]
            commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
            changed = subprocess.run([*git, "status", "--porcelain", "medinr"], capture_output=True, text=True).stdout
            return commit.stdout.strip() + ("+" if changed else "")
        python = self.peers_env / tool.environment / "bin" / "python"
        code = "import sys, importlib.metadata as m; print(', '.join(f'{p} {m.version(p)}' for p in sys.argv[1:]))"
        done = subprocess.run([python, "-c", code, *tool.packages], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def shown(self, words: list[str]) -> str:
        """The command without this machine's folders."""
        text = " ".join("python" if w == sys.executable else w for w in words).replace(tools.ONE_CORE, "'one core'")
        for path, name in ((self.work, "WORK"), (self.shared, "SHARED"), (self.peers_env, "ENVIRONMENTS")):
            text = text.replace(str(path), name)
        return text.replace(f"_{os.getpid()}", "")


def rescaled(source: Path, target: Path, factor: float) -> Path:
    """The same voxels under a header whose lengths are ``factor`` times as long."""
    image: Any = nib.load(source)  # type: ignore[attr-defined]
    affine = image.affine.copy()
    affine[:3] *= factor
    nib.save(nib.Nifti1Image(image.get_fdata(dtype="float32"), affine), target)  # type: ignore[attr-defined]
    return target


def unscaled(domain: Domain, factor: float) -> Domain:
    affine = domain.voxel_to_world.clone()
    affine[:3] /= factor
    return Domain.of(domain.shape, affine)


def tasks(given: argparse.Namespace) -> Iterator[Task]:
    """The rows to run, each settled only when its turn comes: the choice of a setting needs the rows before it."""
    names = list(tools.RIVALS) if given.tools == "rivals" else given.tools.split(",")
    unknown = set(names) - set(tools.TOOLS)
    if unknown:
        sys.exit(f"--tools: expected some of {', '.join(tools.TOOLS)}, got {', '.join(sorted(unknown))}")
    if given.plan:
        wanted = list(planned(names))
    else:
        selected = given.pairs.split(",") if given.pairs else pairs.NAMES
        selected = [p for p in selected if given.split in ("both", pairs.split_of(p))]
        wanted = []
        for pair in selected:
            for tool in names:
                own = list(tools.TOOLS[tool].settings) if given.settings == "all" else given.settings.split(",")
                wanted += [(tool, s, pair) for s in own]
    for tool, setting, pair in wanted:
        name = chosen(read_rows(given.rows), tool, modality(pair)) if setting == "chosen" else setting
        name = given.label if given.label and tool in tools.OURS else name
        for seed in map(int, given.seeds.split(",")) if tool in tools.OURS else range(tools.TOOLS[tool].repeats):
            yield tool, name, pair, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("MEDINR_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--work", type=Path, required=True, help="holds pairs/ and the runs")
    parser.add_argument("--environments", type=Path, help="holds peers-env and peers-torch (default: beside WORK)")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where the rows are")
    parser.add_argument("--tools", default="rivals", help=f"rivals, or some of {', '.join(tools.TOOLS)}")
    parser.add_argument("--plan", action="store_true", help="the whole order: settings, tuning pairs, test pairs")
    parser.add_argument("--settings", default="chosen", help="all, chosen, or names")
    parser.add_argument("--pairs", default="", help="names; default: all of the split")
    parser.add_argument("--split", choices=["tuning", "test", "both"], default="both")
    parser.add_argument("--seeds", default="0", help="of our own tools")
    parser.add_argument("--label", default="", help="name of the setting in the rows of our own tools")
    parser.add_argument("--extra", default="", help="further arguments of our own tools' command")
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = given.work.resolve()
    environments = (given.environments or work.parent).resolve()
    bench = Bench(given.shared.resolve(), work, environments, given.label, tuple(given.extra.split()))
    for task in tasks(given):
        if task in {key(r) for r in read_rows(given.rows)}:
            continue
        row = bench.run(task)
        append(row, given.rows)
        print(*task, {k: row[k] for k in SHOWN if row.get(k, "") != ""}, flush=True)


if __name__ == "__main__":
    main()
