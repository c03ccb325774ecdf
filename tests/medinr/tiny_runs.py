"""A tiny pair with a known shift and its experiments, and the real command in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, shift

from medinr import cli

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]
"""A call of the command: its words -> exit code, standard output, standard error."""
TINY = """\
model:
  class_path: PairRegistration
  init_args:
    field: {class_path: SIREN, init_args: {hidden: [32, 32], omega: 20}}
    similarity: {class_path: LocalNCC}
    regularizers:
      barrier: {class_path: Barrier, init_args: {weight: 10}}
      bending: {class_path: Bending, init_args: {weight: 0.01, directions: probes}}
    points: 100
    lr: 1.0e-3
    warmup: 0.1
    cosine: true
data:
  class_path: PairDataModule
  init_args:
    fixed: fixed.nii.gz
    moving: moving.nii.gz
    fixed_points: fixed.csv
    moving_points: moving.csv
    fixed_labels: fixed_labels.nii.gz
    moving_labels: moving_labels.nii.gz
    steps_per_epoch: 10
trainer: {max_steps: 40, log_every_n_steps: 5}
"""
CONDITIONED = """\
model:
  class_path: ConditionedRegistration
  init_args:
    field: {class_path: HarmonizedSIREN, init_args: {conditions: 1, hidden: [24, 24], omega: 20}}
    similarity: {class_path: NCC}
    regularizers:
      bending: {class_path: Bending, init_args: {weight: 0.01, directions: probes}}
    conditioned: [bending]
    points: 100
    lr: 1.0e-3
    warmup: 0.1
    cosine: true
""" + TINY[TINY.index("data:") :]
MOTION = (2.0, 1.0, 0.0)
"""mm: fixed point p lies at p + MOTION in the moving image."""


def write(folder: Path, size: tuple[int, int, int] = (20, 20, 18)) -> None:
    """Images, landmarks, labels, tiny.yaml and conditioned.yaml."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    fixed = 100 * gaussian_filter(np.random.default_rng(0).normal(size=size), 1.5).astype(np.float32)
    moving = shift(fixed, [m / 2 for m in MOTION], order=3, mode="nearest")
    for name, volume in (("fixed", fixed), ("moving", moving)):
        nib.save(nib.Nifti1Image(volume, affine), folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image((volume > 0).astype(np.uint8), affine), folder / f"{name}_labels.nii.gz")
    points = np.random.default_rng(1).uniform(8, 28, size=(12, 3))
    np.savetxt(folder / "fixed.csv", points, delimiter=",", header="x,y,z", comments="")
    np.savetxt(folder / "moving.csv", points + MOTION, delimiter=",", header="x,y,z", comments="")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "conditioned.yaml").write_text(CONDITIONED)


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "medinr.cli", *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=pipe, stderr=pipe, encoding="utf-8")


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def calls(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process."""

    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(list(args))
        out, err = capsys.readouterr()
        return code, out, err

    return call
