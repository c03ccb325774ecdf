"""What a user can do wrong with a sequence, through the command: one line each, exit code 2, nothing written."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medinr import cli

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (12, 11, 10)


def phase(folder: Path, name: str, value: float = 0.0, shape: tuple[int, ...] = SHAPE) -> None:
    folder.mkdir(exist_ok=True)
    values = np.random.default_rng(0).normal(0, 100, shape).astype(np.float32)
    values[0, 0, 0] += value
    nib.save(nib.Nifti1Image(values, np.diag([3.0, 3.0, 3.0, 1.0])), folder / name)


def two(folder: Path) -> None:
    phase(folder, "a_T00.nii.gz")
    phase(folder, "a_T60.nii.gz")


def one(folder: Path) -> None:
    phase(folder, "a_T60.nii.gz")


def other_grid(folder: Path) -> None:
    two(folder)
    phase(folder, "a_T30.nii.gz", shape=(12, 11, 9))


def invalid(folder: Path) -> None:
    two(folder)
    phase(folder, "a_T30.nii.gz", float("nan"))


def table(rows: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        two(folder)
        (folder / "dates.tsv").write_text("file\ttime\n" + rows, encoding="utf-8")

    return make


PHASES = ["--data", "FourDCTSequence", "--data.root", "4dct", "--data.reference", "60", "--data.masks", "none"]
DATES = ["--data", "LongitudinalSequence", "--data.table", "4dct/dates.tsv"]
FAULTS: dict[str, tuple[Callable[[Path], None], list[str], tuple[str, ...]]] = {
    "a phase that is asked for is missing": (
        two, [*PHASES, "--data.phases", "[0, 30, 60]"], ("30", "expected", "found"),
    ),
    "a held-out phase is missing": (two, [*PHASES, "--data.held_out", "[30]"], ("one of the times 0, 60", "found 30")),
    "phases on different grids": (other_grid, PHASES, ("expected all images on the grid", "found time 30 on another")),
    "a single phase": (one, PHASES, ("expected images of two or more times, found 1", "add another phase or date")),
    "NaN": (invalid, PHASES, ("a_T30.nii.gz", "expected finite", "replace them")),
    "unsorted times": (
        table("a_T60.nii.gz\t5\na_T00.nii.gz\t2\n"), DATES, ("ascending order, found 2 after 5", "sort them"),
    ),
    "a time twice": (
        table("a_T60.nii.gz\t5\na_T00.nii.gz\t5\n"), DATES, ("every time once, found 5 twice", "remove one"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_one_clear_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, options, words = FAULTS[name]
    make(tmp_path / "4dct")
    monkeypatch.chdir(tmp_path)
    model = ["--model", "SpatioTemporalLattice"]
    model += ["--model.time", "PhaseTime" if options is not DATES else "LinearTime"]
    common = ["--wandb", "false", "--trainer.max_steps", "2"]
    assert cli.main(["fit", *model, *options, *common]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0, error
    for word in words:
        assert word in error
    assert {f.name for f in tmp_path.iterdir()} == {"4dct"}
