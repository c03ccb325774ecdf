"""Wrong input through the real command: one line that names file or key, what was expected and found, and the remedy.

Exit code 2, nothing on stdout, no traceback, and no file or folder made or changed.
"""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medinr import cli, io
from medinr.commands import checks
from medinr.commands.presets import PRESETS, Preset
from tests.medinr import pairs

ROOT = Path(__file__).resolve().parents[1]
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

PAIR = "register fixed.nii.gz moving.nii.gz --out x"
FIT = "fit --config good.yaml"
DIRLAB = f"fit --config {ROOT}/experiments/idir_dirlab_best.yaml --wandb false --data.root"
APPLY = "apply transform.ckpt --points fixed.csv --out x"

# name: (the call, what its line must hold: file or key, expected, found, remedy)
FAULTS: dict[str, tuple[str, tuple[str, ...]]] = {
    # images
    "missing file": (
        "register fixed.nii.gz no.nii.gz --out x",
        ("no.nii.gz: expected a file", "found nothing of that name", "check the path"),
    ),
    "truncated .nii.gz": (
        "register fixed.nii.gz cut.nii.gz --out x",
        ("cut.nii.gz: expected a whole NIfTI file", "found one that cannot be read", "copy or export it again"),
    ),
    "truncated .nii": (
        "register fixed.nii.gz cut.nii --out x",
        ("cut.nii: expected a whole NIfTI file", "found one that cannot be read", "copy or export it again"),
    ),
    "empty file": ("register void.nii.gz moving.nii.gz --out x", ("void.nii.gz: expected data", "0 bytes", "again")),
    "text named .nii.gz": (
        "register text.nii.gz moving.nii.gz --out x",
        ("text.nii.gz: expected a whole NIfTI file", "found one that cannot be read", "copy or export it again"),
    ),
    "another format": (
        "register fixed.csv moving.nii.gz --out x",
        ("fixed.csv: expected .nii", "found .csv", "convert"),
    ),
    "4-D image": (
        "register fixed.nii.gz series.nii.gz --out x",
        ("series.nii.gz: expected a 3-D image", "found 4-D of shape (32, 32, 32, 2)", "give one volume of it"),
    ),
    "NaN voxels": (
        "register fixed.nii.gz nan.nii.gz --out x",
        ("nan.nii.gz: expected finite voxels", "found 1 of 32768", "replace them"),
    ),
    "constant image": (
        "register fixed.nii.gz constant.nii.gz --out x",
        ("constant.nii.gz: expected an image with contrast", "found the constant 5", "is it the right file?"),
    ),
    "singular affine": (
        "register flat.nii.gz moving.nii.gz --out x",
        ("flat.nii.gz: expected an invertible affine", "found [[", "correct sform and qform"),
    ),
    # masks, labels, landmarks
    "empty mask": (
        f"{PAIR} --fixed-mask empty.nii.gz",
        ("empty.nii.gz: expected a mask with voxels above 0.5", "found none", "give a mask that is not empty"),
    ),
    "mask of another shape": (
        f"{PAIR} --fixed-mask small.nii.gz",
        ("small.nii.gz: expected the grid of its image, shape (32, 32, 32)", "found (30, 32, 32)", "resample"),
    ),
    "labels of another shape": (
        f"{PAIR} --moving-labels small.nii.gz",
        ("small.nii.gz: expected the grid of its image", "found", "resample"),
    ),
    "landmark counts that differ": (
        f"{PAIR} --fixed-points fixed.csv --moving-points short.csv",
        ("expected as many fixed as moving landmarks", "found 50 and 3", "give both files"),
    ),
    "landmark outside the image": (
        f"{PAIR} --fixed-points far.csv --moving-points short.csv",
        ("far.csv: expected points inside", "found 1 of 3 outside", "index 1: (500.00", "check --points-space"),
    ),
    "landmarks that are no numbers": (
        f"{PAIR} --fixed-points words.csv --moving-points short.csv",
        ("words.csv: expected a number in row 2", "found 'two'", "correct that row"),
    ),
    # options
    "unknown preset": (f"{PAIR} --preset slow", ("--preset", "invalid choice: 'slow'", "choose from 'fast'")),
    "unknown similarity": (f"{PAIR} --similarity ncx", ("--similarity", "'ncx'", "choose from 'lncc'")),
    "unknown start": (f"{PAIR} --init afine", ("--init: expected none, rigid, affine", "afine")),
    "misspelt option": (f"{PAIR} --presett fast", ("--presett: no such option; did you mean --preset?",)),
    "images by name": (
        "register --fixed fixed.nii.gz --moving moving.nii.gz --out x",
        ("--fixed: no such option", "medinr register FIXED MOVING", "see medinr register --help"),
    ),
    "output without its option": (
        "register fixed.nii.gz moving.nii.gz x",
        ("x: one argument too many; did you mean --out x?",),
    ),
    "short option": ("register fixed.nii.gz moving.nii.gz -o x", ("-o: no such option; did you mean --out?",)),
    "option before the command": (
        "--config good.yaml fit",
        ("--config: expected a command first", "found an option", "medinr COMMAND --config"),
    ),
    "experiment without its option": (
        "fit good.yaml",
        ("good.yaml: one argument too many; did you mean --config good.yaml?",),
    ),
    "misspelt command": ("registr a b", ("registr: no such command; did you mean register?",)),
    "a GPU where there is none": (
        f"{PAIR} --device cuda",
        ("--device cuda", "PyTorch finds no such device", "leave --device out or give cpu"),
    ),
    # output
    "output below a file": (
        "register fixed.nii.gz moving.nii.gz --out fixed.csv/x",
        ("fixed.csv/x: expected a folder that can be written to", "found Not a directory", "choose another"),
    ),
    "output where nobody may write": (
        "register fixed.nii.gz moving.nii.gz --out /proc/medinr",
        ("/proc/medinr: expected a folder that can be written to", "found", "choose another"),
    ),
    "output of apply where nobody may write": (
        "apply transform.ckpt --points fixed.csv --out /proc/medinr",
        ("/proc/medinr: expected a folder that can be written to", "found", "choose another"),
    ),
    "output that is an input": (
        "register fixed.nii.gz old/warped.nii.gz --out old",
        ("--out old: expected to overwrite no input", "found old/warped.nii.gz", "choose another folder"),
    ),
    "output of apply that is an input": (
        "apply transform.ckpt --points old/points.csv --out old",
        ("--out old: expected to overwrite no input", "found old/points.csv", "choose another folder"),
    ),
    "runs where nobody may write": (
        f"{FIT} --runs /proc/medinr",
        ("/proc/medinr", "cannot be made", "choose other --runs"),
    ),
    "results where nobody may write": (
        "predict --config good.yaml --ckpt_path transform.ckpt --out /proc/medinr",
        ("/proc/medinr: expected a folder that can be written to", "found", "choose another"),
    ),
    "phantom where nobody may write": (
        "phantom dirlab --cases 1 --size 16 --phases extremes --out /proc/medinr",
        ("/proc/medinr: expected a folder that can be written to", "found", "choose another"),
    ),
    # configurations
    "--config that is an image": (
        "fit --config fixed.nii.gz",
        ("--config: expected YAML text", "found binary data in fixed.nii.gz", "give the path"),
    ),
    "--config missing": ("fit --config none.yaml", ("--config: no file ", "none.yaml; give the path of a YAML file")),
    "no --config": ("fit", ("model", "missing; give --config FILE.yaml")),
    "YAML syntax error": ("fit --config broken.yaml", ("broken.yaml: not valid YAML", "line 12")),
    "unknown key": (f"{FIT} --model.similarty NCC", ("model.similarty", "did you mean", "similarity?")),
    "unknown key in the file": (
        "fit --config key.yaml",
        ("model.field.hiden: SIREN has no such argument; did you mean hidden?",),
    ),
    "misspelt class": (
        "fit --config class.yaml",
        ("model: no class named PairRegistraton; did you mean PairRegistration?",),
    ),
    "misspelt class of a part": (
        f"{FIT} --model.similarity LocalNC",
        ("model.similarity: no class named LocalNC; did you mean LocalNCC?",),
    ),
    "a GPU where there is none, by YAML": (
        f"{FIT} --trainer.accelerator gpu",
        ("trainer: ", "set trainer.accelerator to auto or cpu, it is gpu"),
    ),
    "missing file in a configuration": (
        f"{FIT} --data.fixed no.nii.gz",
        ("no.nii.gz: expected a file", "found nothing"),
    ),
    "NaN voxels in a configuration": (
        f"{FIT} --data.moving nan.nii.gz",
        ("nan.nii.gz: expected finite voxels", "found 1"),
    ),
    "empty mask in a configuration": (
        f"{FIT} --data.fixed_mask empty.nii.gz",
        ("empty.nii.gz: expected a mask", "found"),
    ),
    "landmarks in a configuration": (
        f"{FIT} --data.fixed_points fixed.csv --data.moving_points short.csv",
        ("expected as many", "found 50 and 3", "give both files"),
    ),
    # DIR-LAB
    "wrong .img size": (
        f"{DIRLAB} cut_dirlab",
        ("case1_T50_s.img: expected", "int16", "found 1000", "copy it again"),
    ),
    "landmarks of DIR-LAB outside the image": (
        f"{DIRLAB} far_dirlab",
        ("T00_xyz.txt", "counted from 1", "expected points inside", "found 1 of"),
    ),
    "landmarks of DIR-LAB that differ": (f"{DIRLAB} short_dirlab", ("expected as many", "found", "same order")),
    "no such folder": (
        f"{DIRLAB} nowhere",
        ("nowhere: expected the folder that holds Case1Pack", "found none", "data.root"),
    ),
    "no such case": (
        f"{DIRLAB} cut_dirlab --data.case 2",
        ("cut_dirlab: expected Case2Pack", "found Case1Pack", "set data.root"),
    ),
    "check of nothing": ("check nowhere", ("nowhere: expected a folder of data", "found nothing")),
    # checkpoints
    "no checkpoint": (
        "apply no.ckpt --points fixed.csv --out x",
        ("no.ckpt", "no such checkpoint", "expected a .ckpt file"),
    ),
    "the folder of a checkpoint": (
        "apply old --points fixed.csv --out x",
        ("old: no such checkpoint", "expected a .ckpt file", "did you mean old/transform.ckpt?"),
    ),
    "not a checkpoint": (
        "apply text.ckpt --points fixed.csv --out x",
        ("text.ckpt: not a readable checkpoint", "expected a .ckpt file that medinr wrote"),
    ),
    "truncated checkpoint": (
        "apply cut.ckpt --points fixed.csv --out x",
        ("cut.ckpt: not a readable checkpoint", "expected a .ckpt file that medinr wrote"),
    ),
    "checkpoint of another program": (
        "apply foreign.ckpt --points fixed.csv --out x",
        ("foreign.ckpt: a checkpoint of another program", "expected a .ckpt file that medinr wrote"),
    ),
    "checkpoint with pickled code": (
        "apply code.ckpt --points fixed.csv --out x",
        ("code.ckpt: not a readable checkpoint", "expected a .ckpt file that medinr wrote"),
    ),
    "checkpoint of a method that is not here": (
        "apply gone.ckpt --points fixed.csv --out x",
        ("elsewhere.Method cannot be imported", "install the package"),
    ),
    "checkpoint that names any callable": (
        "apply callable.ckpt --points fixed.csv --out x",
        ("os.system is not a class that medinr builds",),
    ),
    "nothing to carry": ("apply transform.ckpt --out x", ("nothing to carry", "give --image, --labels or --points")),
    "alpha of a transform without": (
        f"{APPLY} --alpha 0.1",
        ("--alpha: transform.ckpt is not conditioned", "leave --alpha out"),
    ),
    "continue from text": (f"{FIT} --ckpt_path good.yaml", ("good.yaml: expected a checkpoint of medinr", "found")),
    "continue from another program's": (
        f"{FIT} --ckpt_path foreign.ckpt",
        ("foreign.ckpt: expected a checkpoint", "found"),
    ),
    "continue from pickled code": (
        f"{FIT} --ckpt_path code.ckpt",
        ("code.ckpt: expected a checkpoint of medinr", "found"),
    ),
    "continue from another method's": (
        f"{FIT} --ckpt_path conditioned.ckpt",
        (
            "conditioned.ckpt: it was written by another",
            "expected PairRegistration",
            "found",
            "ConditionedRegistration",
            "use the config.yaml of its own run",
        ),
    ),
    "continue from nothing": (
        f"{FIT} --ckpt_path last",
        ("expected an earlier unfinished run", "found none", "leave out --ckpt_path"),
    ),
}


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
    (folder / "text.nii.gz").write_text("no image\n" * 50)
    (folder / "void.nii.gz").touch()
    save("series.nii.gz", np.stack((values, values), axis=-1))
    save("constant.nii.gz", np.full_like(values, 5))
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
        rows = table.read_text().splitlines(keepends=True)
        table.write_text(change + "".join(rows[1:]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    write_images(out)
    write_checkpoints(out)
    (out / "old").mkdir()
    for old, new in (
        ("moving.nii.gz", "warped.nii.gz"),
        ("fixed.csv", "points.csv"),
        ("transform.ckpt", "transform.ckpt"),
    ):
        shutil.copy(out / old, out / "old" / new)
    write_configurations(out)
    write_dirlab(out)
    return out


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


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if "GPU" in name and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    call, expected = FAULTS[name]
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    assert cli.main(call.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    check_line(err, expected)
    assert snapshot(folder) == before, "something was left behind or changed"


def test_a_folder_without_permission(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What root never sees: the system refuses to make a file in the folder."""

    def refused(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks.tempfile, "TemporaryFile", refused)
    monkeypatch.chdir(folder)
    for call in (f"register fixed.nii.gz moving.nii.gz --out {tmp_path}", f"{APPLY[:-1]}{tmp_path}"):
        assert cli.main(call.split()) == 2
        check_line(capsys.readouterr().err, (f"{tmp_path}: expected a folder", "Permission denied", "choose another"))


# -- a full disk ------------------------------------------------------------------------------------------------------

LIMIT = 2000
"""Bytes a file may have: each of the larger results hits it."""

FULL = {
    "register": ("register fixed.nii.gz moving.nii.gz --preset fast --init none --out x", "x/"),
    "apply": ("apply transform.ckpt --image moving.nii.gz --out x", "x/image.nii.gz"),
    "test": ("test --config good.yaml --ckpt_path transform.ckpt --runs r", "config"),
    "fit": ("fit --config good.yaml --runs r", "config.yaml"),
    "phantom": ("phantom dirlab --cases 1 --size 16 --phases extremes --out x", "x/"),
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", Preset((16, 16), 64, 4))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to let any file of this process grow further, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def last_line(err: str) -> str:
    """What is said beside the progress bar."""
    lines = [x for x in err.replace("\r", "\n").splitlines() if x and not x.startswith(("fit:", "test:"))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_leaves_nothing_half_written(
    tiny: None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    call, file = FULL[name]
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    with files_of_at_most(LIMIT):
        assert cli.main(call.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    check_line(last_line(err), (file, "found: File too large", "has room"))
    assert snapshot(folder) == before


def test_a_checkpoint_that_does_not_fit_leaves_the_run_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Configuration and metrics are small enough, the first checkpoint is not."""
    monkeypatch.chdir(folder)
    with files_of_at_most(300_000):
        assert cli.main(f"fit --config good.yaml --model.field.hidden [128,128,128] --runs {tmp_path}".split()) == 2
    check_line(last_line(capsys.readouterr().err), ("last.ckpt", "File too large", "some space"))
    assert not [p.name for p in tmp_path.rglob("*") if p.suffix in (".ckpt", ".part")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where this process may mount one."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("no permission to mount a file system of 64 KiB")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_disk_that_is_really_full(
    tiny: None, folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    call = f"register fixed.nii.gz moving.nii.gz --preset fast --init none --out {small_disk}/x"
    assert cli.main(call.split()) == 2
    check_line(last_line(capsys.readouterr().err), (f"{small_disk}/x/", "No space left", "has room"))
    assert list(small_disk.iterdir()) == []


def test_the_command_itself_ends_with_that_code_and_line(folder: Path) -> None:
    """As above, but in a process of its own: nothing else is printed by any library."""
    before = snapshot(folder)
    call, expected = FAULTS["checkpoint with pickled code"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-m", "medinr.cli", *call.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2 and result.stdout == ""
    check_line(result.stderr, expected)
    assert snapshot(folder) == before
