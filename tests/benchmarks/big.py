"""A pair of 512 x 512 x 128 voxels: seconds and peak memory of `register`, which must stay below 8 GiB.

    python tests/benchmarks/big.py --work /tmp/medinr_tables [--preset accurate] [--exact] [--limit 8]

Phantom case 6 at its real size (0.97 x 0.97 x 2.5 mm), one thread. Appends a row to rows.jsonl, as tables.py does; ends
with code 1 where the peak is above the limit.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from data_modules.dirlab import DIRLab
from medinr import io
from tests.benchmarks.tables import ROOT, ROWS

CASE = 6


def pair(work: Path) -> Path:
    """The two images and their landmarks, written once."""
    folder = work / f"case{CASE}"
    if not (folder / "moving.csv").exists():
        phantom = work / f"phantom{CASE}"
        if not (phantom / "truth" / f"case{CASE}").exists():
            words = ["phantom", "dirlab", "--out", str(phantom), "--cases", str(CASE), "--phases", "extremes"]
            subprocess.run([sys.executable, "-m", "medinr.cli", *words], check=True, cwd=ROOT)
        found = DIRLab(root=str(phantom), case=CASE, masks="none").pair
        for name, image, points in (
            ("fixed", found.fixed, found.fixed_points),
            ("moving", found.moving, found.moving_points),
        ):
            assert points is not None
            io.write_image(folder / f"{name}.nii.gz", image.data[0], image.domain)
            io.write_points(folder / f"{name}.csv", points)
    return folder


def measured(words: list[str]) -> dict[str, Any]:
    """Run the command with one thread; its wall and processor seconds, and the largest resident memory in GiB."""
    begin = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "medinr.cli", *words], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"medinr {' '.join(words)}: ended with status {status}")
    return {
        "command": "medinr " + " ".join(words),
        "seconds": round(time.perf_counter() - begin, 1),
        "seconds_processor": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--preset", default="accurate")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--limit", type=float, default=8.0, help="GiB")
    given = parser.parse_args()
    work = given.work.resolve()
    folder = pair(work)
    out = folder / ("exact" if given.exact else "lattice")
    words = ["register", *(str(folder / f"{side}.nii.gz") for side in ("fixed", "moving")), "--out", str(out)]
    for side in ("fixed", "moving"):
        words += [f"--{side}-points", str(folder / f"{side}.csv")]
    words += ["--preset", given.preset, *(["--exact"] if given.exact else [])]
    load = round(os.getloadavg()[0], 2)
    row = measured(words)
    row["command"] = row["command"].replace(str(work), "WORK")
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    name = f"big 512x512x128 {given.preset}{' exact' if given.exact else ''}"
    machine = f"{platform.machine()}, 1 of {os.cpu_count()} cores, torch {torch.__version__}"
    line = {"row": name, "machine": machine, "load": load, **row, **found}
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}) + "\n")
    print(name, {k: line[k] for k in ("seconds", "seconds_processor", "peak_gib", "tre/mean", "folding/percent")})
    if row["peak_gib"] > given.limit:
        raise SystemExit(f"peak memory {row['peak_gib']} GiB is above {given.limit} GiB")


if __name__ == "__main__":
    main()
