"""Stands in for `medinr fit` and `medinr test` where a test is about who runs what, and when. Standard library only.

    python fake_fit.py fit  --data.case=1 --seed_everything=0 --data.steps=5 ... --runs FOLDER [--ckpt_path FILE]
    python fake_fit.py test ...

Its checkpoint is the list of the steps that were computed, one line each: a step that two processes computed, or that
one computed again after it was kept, is there twice. ``--data.fail=1`` makes fits of case 1 fail with one line,
``--data.fail_once=1`` only the first time.
"""

import json
import signal
import sys
import time
from pathlib import Path


def main(command: str, words: list[str]) -> int:
    given = dict(w.split("=", 1) for w in words if "=" in w)
    named = {words[i]: words[i + 1] for i in range(len(words) - 1) if "=" not in words[i]}
    case, seed = given.get("--data.case", "0"), int(given["--seed_everything"])
    folder = Path(named["--runs"])
    if command == "test":
        run = Path(named["--ckpt_path"]).parents[1]
        (run / "results").mkdir(exist_ok=True)
        metrics = {"case": f"case{case}", "tre/mean": float(case) + 0.1 * seed, "dsc/mean": 0.5, "image/psnr": None}
        (run / "results" / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        return 0
    if given.get("--data.fail") == case or (given.get("--data.fail_once") == case and not list(folder.glob("once"))):
        (folder / "once").touch()
        print("a line of no weight", file=sys.stderr)
        print("medinr: error: data.root: expected a folder, found nothing", file=sys.stderr)
        return 2
    if "--ckpt_path" in named:
        last = Path(named["--ckpt_path"])
    else:
        last = folder / "fake" / f"{time.time_ns()}" / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True)
        (last.parents[1] / "config.yaml").touch()
    interrupted: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    steps = int(given.get("--data.steps", "3"))
    done = len(last.read_text(encoding="utf-8").split()) if last.exists() else 0
    for step in range(done, steps):
        time.sleep(0.05)
        with last.open("a", encoding="utf-8") as file:
            file.write(f"{step}\n")
        if interrupted:
            return 130
    (last.parents[1] / "finished").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
