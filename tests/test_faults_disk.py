"""A full disk: one line, exit code 2, and no file half-written or left alone without those that belong to it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medinr import cli
from medinr.commands.presets import PRESETS, Preset
from tests.fault_files import check_line, snapshot, write_files

resource = pytest.importorskip("resource", reason="limits on files are a matter of Unix")
LIMIT = 2000
"""Bytes a file may have: each of the larger results hits it."""

FULL = {
    "register": ("register fixed.nii.gz moving.nii.gz --preset fast --init none --out x", "x/"),
    "apply": ("apply transform.ckpt --image moving.nii.gz --out x", "x/image.nii.gz"),
    "test": ("test --config good.yaml --ckpt_path transform.ckpt --runs r", "config"),
    "fit": ("fit --config good.yaml --runs r", "config.yaml"),
    "phantom": ("phantom dirlab --cases 1 --size 16 --phases extremes --out x", "x/"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    write_files(out)
    return out


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
