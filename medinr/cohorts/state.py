"""What is known of one fit: files in its folder, each whole or not there."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Literal

State = Literal["open", "done", "failed"]
JOB, STATE, LOG = "job.json", "state.json", "log.txt"
LAST = Path("checkpoints") / "last.ckpt"
FINISHED = "finished"
"""As `medinr.callbacks.runs` has them; that package imports PyTorch, and a worker should not."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file by a whole new one. (`medinr.io.write_text` does the same, but its package imports PyTorch.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The content, {} where the file is missing or not JSON."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_state(folder: Path) -> dict[str, Any]:
    """``state`` (open, done, failed), ``error``, ``failures``, ``seconds`` and ``run`` of a fit."""
    return {"state": "open", "error": "", "failures": 0, "seconds": 0.0, "run": "", **read_json(folder / STATE)}


def is_done(folder: Path) -> bool:
    return bool(read_state(folder)["state"] == "done")


def write_state(folder: Path, state: State, seconds: float, error: str = "", run: str = "") -> None:
    """Note how an attempt ended; ``seconds`` add up over the attempts."""
    before = read_state(folder)
    content = {
        "state": state,
        "error": error,
        "failures": before["failures"] + (state == "failed"),
        "seconds": round(before["seconds"] + seconds, 3),
        "run": run,
    }
    write_json(folder / STATE, content)


def run_of(folder: Path) -> Path | None:
    """The run folder of the fit with the newest checkpoint, None without one."""
    found = sorted(folder.glob(f"*/*/{LAST}"), key=lambda p: p.stat().st_mtime_ns)
    return found[-1].parents[1] if found else None


def discard_unstarted(folder: Path) -> None:
    """Remove the run folders of attempts that were killed before their first checkpoint; only under a claim."""
    for config in list(folder.glob("*/*/config.yaml")):
        if not (config.parent / LAST).exists():
            shutil.rmtree(config.parent, ignore_errors=True)
