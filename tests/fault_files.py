"""Files that cannot be used, beside those that can; and how to tell that a call changed nothing."""

import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from medinr import cli, io
from tests.medinr import pairs

Snapshot = dict[str, tuple[int, int]]

EXPERIMENT = """\
model:
  class_path: PairRegistration
  init_args:
    field: {class_path: SIREN, init_args: {hidden: [16, 16]}}
    similarity: {class_path: NCC}
    points: 64
    regularizers:
      barrier: {class_path: Barrier, init_args: {weight: 10}}
data: {class_path: PairDataModule, init_args: {fixed: fixed.nii.gz, moving: moving.nii.gz, steps_per_epoch: 2}}
trainer: {max_steps: 2}
wandb: false
"""


class Harmful:
    """Unpickling it would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made_by_a_checkpoint",)


def write_images(folder: Path) -> None:
    pair = pairs.pair()
    assert pair.fixed_points is not None and pair.moving_points is not None
    for side, image in (("fixed", pair.fixed), ("moving", pair.moving)):
        io.write_image(folder / f"{side}.nii.gz", image.data[0], image.domain)
    io.write_points(folder / "fixed.csv", pair.fixed_points)
    values, affine = pair.fixed.data[0].numpy(), np.array(pairs.CUBE.affine)

    def save(name: str, array: Any, matrix: Any = affine) -> None:
        nib.loadsave.save(nib.nifti1.Nifti1Image(array.astype(np.float32), matrix), folder / name)

    save("whole.nii", values)
    for name in ("whole.nii", "fixed.nii.gz"):
        content = (folder / name).read_bytes()
        (folder / name.replace("whole", "cut").replace("fixed", "cut")).write_bytes(content[: len(content) // 2])
    stream = bytearray((folder / "fixed.nii.gz").read_bytes())
    stream[-6] ^= 1  # in the checksum
    (folder / "damaged.nii.gz").write_bytes(stream)
    header = bytearray((folder / "whole.nii").read_bytes())
    header[42:44] = (-5).to_bytes(2, "little", signed=True)  # the first side
    (folder / "negative.nii").write_bytes(header)
    (folder / "text.nii.gz").write_text("no image\n" * 50)
    (folder / "void.nii.gz").touch()
    save("series.nii.gz", np.stack((values, values), axis=-1))
    save("constant.nii.gz", np.full_like(values, 5))
    turned = affine.copy()
    turned[:3, 3] += 7
    save("elsewhere.nii.gz", values, turned)
    save("empty.nii.gz", np.zeros_like(values))
    save("small.nii.gz", np.ones_like(values[:-2]))
    values[3, 4, 5] = np.nan
    save("nan.nii.gz", values)
    flat = nib.nifti1.Nifti1Image(np.random.default_rng(0).normal(size=(32, 32, 32)).astype(np.float32), None)
    flat.header.set_sform(np.diag([1.0, 1, 0, 1]), code=1)
    flat.header["qform_code"] = 0
    flat.to_filename(folder / "flat.nii.gz")
    io.write_points(folder / "short.csv", pairs.points(3))
    (folder / "far.csv").write_text("x,y,z\n1,2,3\n500,0,0\n0,0,0\n")
    (folder / "words.csv").write_text("x,y,z\n1,two,3\n")
    (folder / "counted.csv").write_text("1,5,5,5\n2,6,6,6\n3,7,7,7\n")


def write_checkpoints(folder: Path) -> None:
    pairs.plain_method().save(folder / "transform.ckpt")
    pairs.conditioned_method().save(folder / "conditioned.ckpt")
    (folder / "text.ckpt").write_text("no checkpoint\n")
    content = (folder / "transform.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(content[: len(content) // 2])
    torch.save({"state_dict": {"weight": torch.zeros(3)}, "epoch": 3}, folder / "foreign.ckpt")
    whole = torch.load(folder / "transform.ckpt", weights_only=True)
    torch.save({**whole, "extra": Harmful()}, folder / "code.ckpt")
    for name, class_path in (("gone", "elsewhere.Method"), ("callable", "os.system")):
        method = {"class_path": class_path, "init_args": {}}
        torch.save({**whole, "medinr": {**whole["medinr"], "method": method}}, folder / f"{name}.ckpt")


def write_configurations(folder: Path) -> None:
    (folder / "good.yaml").write_text(EXPERIMENT)
    for name, old, new in (
        ("broken", "wandb: false", "wandb: {false"),
        ("key", "hidden:", "hiden:"),
        ("class", "PairRegistration", "PairRegistraton"),
    ):
        (folder / f"{name}.yaml").write_text(EXPERIMENT.replace(old, new))


def write_dirlab(folder: Path) -> None:
    """A case as the phantom writes it, spoilt in three ways."""
    arguments = ["phantom", "dirlab", "--out", str(folder / "cut_dirlab"), "--cases", "1", "--size", "32"]
    assert cli.main([*arguments, "--phases", "extremes"]) == 0
    for name in ("far_dirlab", "short_dirlab"):
        shutil.copytree(folder / "cut_dirlab", folder / name)
    image = next((folder / "cut_dirlab").rglob("case1_T50_s.img"))
    image.write_bytes(image.read_bytes()[:1000])
    for name, change in (("far_dirlab", "4000\t1\t1\n"), ("short_dirlab", "")):
        table = next((folder / name).rglob("*_300_T00_xyz.txt"))
        rows = table.read_text(encoding="utf-8").splitlines(keepends=True)
        table.write_text(change + "".join(rows[1:]))


def write_files(out: Path) -> None:
    """Everything that the table of faults names."""
    write_images(out)
    write_checkpoints(out)
    (out / "old").mkdir()
    for old, new in (
        ("moving.nii.gz", "warped.nii.gz"),
        ("fixed.nii.gz", "image.nii.gz"),
        ("fixed.csv", "points.csv"),
        ("transform.ckpt", "transform.ckpt"),
    ):
        shutil.copy(out / old, out / "old" / new)
    write_configurations(out)
    write_dirlab(out)


def snapshot(folder: Path) -> Snapshot:
    """Every path below a folder with size and time of change."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def check_line(err: str, expected: tuple[str, ...]) -> None:
    assert err.startswith("medinr: error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    position = 0
    for part in expected:
        assert part in err[position:], f"{part!r} is not in (the rest of) {err}"
        position = err.index(part, position) + len(part)
