"""Wrong input through the real command: one line that names file or key, what was expected and found, and the remedy.

Exit code 2, nothing on stdout, no traceback, and no file or folder made or changed.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medinr import cli
from medinr.commands import checks
from tests.fault_files import check_line, snapshot, write_files
from tests.fault_table import APPLY, FAULTS, ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    write_files(out)
    return out


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
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 2 and result.stdout == ""
    check_line(result.stderr, expected)
    assert snapshot(folder) == before
