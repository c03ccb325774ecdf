"""`--seed` repeats bit by bit on the CPU: within a process, and from process to process with as many threads."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import medinr
from medinr import io
from medinr.commands.presets import PRESETS, Preset
from tests.medinr import pairs

ROOT = Path(__file__).resolve().parents[1]
SIZE = "Preset((16, 16), 256, 12)"


def displacement(**options: Any) -> torch.Tensor:
    pair = pairs.pair()
    return medinr.register(pair.fixed, pair.moving, preset="fast", **options).evaluation.displacement


def test_python_repeats_and_another_seed_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", Preset((16, 16), 256, 12))
    first = displacement(seed=7)
    torch.rand(5)  # whatever else has drawn numbers in the meantime
    assert torch.equal(displacement(seed=7), first), "bit by bit, the affine start included"
    other = displacement(seed=8)
    assert not torch.equal(other, first)
    assert (other - first).abs().max() < 30, "another result, not a broken one"


def test_the_command_repeats_in_another_process(tmp_path: Path) -> None:
    pair = pairs.pair()
    for side, image in (("fixed", pair.fixed), ("moving", pair.moving)):
        io.write_image(tmp_path / f"{side}.nii.gz", image.data[0], image.domain)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    code = (
        f"import sys; from medinr.commands.presets import PRESETS, Preset; PRESETS['fast'] = {SIZE};"
        "from medinr.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    common = ["register", "fixed.nii.gz", "moving.nii.gz", "--preset", "fast", "--seed", "7", "--out"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *common, out],
            cwd=tmp_path,
            # Python's own hashing differs from process to process: nothing may depend on it.
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(i)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for i, out in enumerate(("one", "two"), start=1)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    for name in ("displacement", "warped", "jacobian_determinant"):
        one, two = (tmp_path / out / f"{name}.nii.gz" for out in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name
    found, _ = io.read_displacement(tmp_path / "one" / "displacement.nii.gz")
    assert found.abs().max() > 0.1, "an unfitted field would repeat, too"
