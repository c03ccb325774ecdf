"""Run folders: ``<root>/<experiment>/<YYYYmmdd-HHMMSS>[-n]/``, one for every fit.

    config.yaml  metrics.csv  checkpoints/last.ckpt  results/  wandb/  finished

``config.yaml`` is the resolved configuration; ``finished`` marks a fit that reached its last step.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import get_loader

from medinr.errors import UserError
from medinr.io import write_text

CONFIG = "config.yaml"
FINISHED = "finished"
LAST = Path("checkpoints") / "last.ckpt"


def new_run(root: Path, experiment: str, now: time.struct_time | None = None) -> Path:
    """Make and return a folder that no other run has, even if two start within one second.

    Raises:
        UserError: the folder cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", now or time.localtime())
    n = 1
    while True:
        run = Path(root) / experiment / (stamp if n == 1 else f"{stamp}-{n}")
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            if not run.is_dir():
                raise UserError(f"{run}: expected to make a folder there, found a file; choose other --runs") from None
            n += 1
        except OSError as error:
            raise UserError(f"{run}: cannot be made ({error.strerror}); choose other --runs") from None


def discard(run: Path) -> None:
    """Remove the folder of a run that never began, and the folders above it if nothing else is in them."""
    shutil.rmtree(run, ignore_errors=True)
    for folder in (run.parent, run.parent.parent):
        try:
            folder.rmdir()
        except OSError:
            return


def _order(run: Path) -> tuple[str, int]:
    day, _, rest = run.name.partition("-")
    clock, _, n = rest.partition("-")
    return f"{day}-{clock}", int(n) if n.isdigit() else 1


def runs_of(root: Path, experiment: str) -> list[Path]:
    """Runs of an experiment that hold a checkpoint, oldest first."""
    return sorted((p.parents[1] for p in (Path(root) / experiment).glob(f"*/{LAST}")), key=_order)


def is_finished(run: Path) -> bool:
    return (run / FINISHED).exists()


def load_yaml(text: str) -> Any:
    """Plain values from YAML, read as the command line reads it (1e-3 is a number)."""
    return get_loader("yaml")(text)


def read_config(run: Path) -> dict[str, Any]:
    """The resolved configuration of a run, {} where there is none."""
    try:
        found = load_yaml((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys, without ``init_args``, and their values: ``{"model.field": "SIREN", "model.field.hidden": [9]}``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix if key in ("class_path", "init_args") else f"{prefix}.{key}".strip(".")
        found |= flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def newest_run(
    root: Path, experiment: str, data: Mapping[str, Any] | None = None, unfinished: bool = False
) -> Path | None:
    """The newest run of an experiment with a checkpoint, on the same data if they are given; None without one.

    Args:
        root, experiment: where to look.
        data: the resolved ``data`` section of the present run: runs on another case do not count.
        unfinished: only runs that were broken off.
    """
    for run in reversed(runs_of(root, experiment)):
        if unfinished and is_finished(run):
            continue
        if data is not None and read_config(run).get("data") != data:
            continue
        return run
    return None


def run_of_checkpoint(path: Path) -> Path | None:
    """The run folder that a checkpoint belongs to, None for a checkpoint kept elsewhere."""
    run = path.resolve().parent.parent
    return run if path.parent.name == LAST.parent.name and (run / CONFIG).exists() else None


def free_name(run: Path, stem: str, suffix: str) -> Path:
    """``run/stem.suffix``, or with a number where that is taken: nothing is overwritten."""
    n, path = 1, run / f"{stem}{suffix}"
    while path.exists():
        n += 1
        path = run / f"{stem}-{n}{suffix}"
    return path


def write_config(run: Path, config: str, stem: str = "config") -> Path:
    """Write a configuration (YAML) beside those that are already there."""
    path = free_name(run, stem, ".yaml")
    write_text(path, config)
    return path
