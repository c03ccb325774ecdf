"""The command line: its help, and one line with exit code 2 for every mistake."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from medinr import cli
from medinr.commands.messages import did_you_mean
from medinr.commands.phantom import case_numbers
from medinr.errors import UserError
from tests.medinr.tiny_runs import Run, calls

ROOT = Path(__file__).resolve().parents[2]

GOOD = """\
model:
  class_path: PairRegistration
  init_args:
    field: {class_path: SIREN, init_args: {hidden: [16, 16]}}
    similarity: {class_path: NCC}
    points: 100
    regularizers:
      barrier: {class_path: Barrier, init_args: {weight: 10}}
data: {class_path: PairDataModule, init_args: {fixed: fixed.nii.gz, moving: moving.nii.gz, steps_per_epoch: 2}}
trainer: {max_steps: 2}
wandb: false
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command in an empty folder with two small images; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    volume = 100 * gaussian_filter(np.random.default_rng(0).normal(size=(13, 13, 12)), 2).astype(np.float32)
    for name in ("fixed", "moving"):
        nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / f"{name}.nii.gz")

    return calls(capsys)


def test_help_is_fast_and_lists_every_command_on_one_screen() -> None:
    code = (
        "import sys; from medinr.cli import main; main(['--help']);"
        "print(*sorted({'torch', 'lightning', 'monai', 'jsonargparse'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert result.stderr.split() == [], "help must not import these"
    assert len(result.stdout.splitlines()) <= 24
    for name, line in cli.COMMANDS.items():
        assert f"  {name} " in result.stdout and line in result.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_each_command_has_help_with_an_example(run: Run, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "example" in out and f"medinr {name}" in out


MISTAKES = {
    "top-level key": ("trainer:", "trainr:", "trainr.max_steps: no such key; did you mean trainer.max_steps?"),
    "trainer key": ("max_steps", "max_step", "trainer.max_step: no such key; did you mean trainer.max_steps?"),
    "method key": ("similarity:", "similarty:", "model.similarty", "did you mean similarity?"),
    "field key": ("hidden:", "hiden:", "model.field.hiden: SIREN has no such argument; did you mean hidden?"),
    "regularizer key": ("weight:", "wieght:", "Barrier has no such argument; did you mean weight?"),
    "data key": ("fixed:", "fixd:", "data.fixd: PairDataModule has no such argument; did you mean fixed?"),
    "method class": ("PairRegistration", "PairRegistraton", "no class named PairRegistraton; did you mean PairReg"),
    "data class": (
        "PairDataModule",
        "PairDataModul",
        "data: no class named PairDataModul; did you mean PairDataModule",
    ),
    "field class": ("SIREN", "SIRENN", "model.field: no class named SIRENN; did you mean SIREN?"),
    "regularizer class": ("Barrier", "Barier", "model.regularizers: no class named Barier; did you mean Barrier?"),
    "class of another kind": ("NCC}", "SIREN}", "model.similarity: no class named SIREN"),
    "wrong type": ("weight: 10", "weight: ten", "expected float, got ten"),
    "wrong type of a number": ("points: 100", "points: many", "model.points: expected int, got many"),
    "refused by a constructor": ("points: 100", "points: 0", "points: expected at least one point a step, got 0"),
    "refused deep inside": ("weight: 10", "weight: 1, fraction: 3", "fraction: expected a share of the points"),
    "missing argument": ("fixed: fixed.nii.gz, ", "", "data: PairDataModule needs fixed"),
    "missing file": ("fixed.nii.gz", "nothing.nii.gz", "nothing.nii.gz: expected a file"),
    "invalid YAML": ("{max_steps: 2}", "{max_steps: 2", "e.yaml: not valid YAML"),
    "no such device": ("max_steps: 2", "accelerator: tpu", "trainer: "),
    "folder of its own": ("max_steps: 2", "default_root_dir: x", "trainer.default_root_dir", "--runs"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_configuration_are_one_line(run: Run, tmp_path: Path, name: str) -> None:
    old, new, *expected = MISTAKES[name]
    assert old in GOOD
    (tmp_path / "e.yaml").write_text(GOOD.replace(old, new, 1))
    code, out, err = run("fit", "--config", "e.yaml")
    assert code == 2
    assert err.startswith("medinr: error: ") and len(err.splitlines()) == 1, err
    assert all(part in err for part in expected), err
    assert out == ""
    assert not (tmp_path / "runs").exists(), "a run that never began leaves no folder"


CALLS = {
    ("fitt",): "fitt: no such command; did you mean fit?",
    ("fit",): "missing; give --config",
    ("fit", "--config", "none.yaml"): "--config: no file",
    ("fit", "--config", "good.yaml", "--data.fixd", "x"): "data.fixd: PairDataModule has no such argument",
    ("fit", "--config", "good.yaml", "--trainer.max_step", "3"): "did you mean --trainer.max_steps?",
    ("fit", "--config", "good.yaml", "--model.lr=fast"): "model.lr: expected float, got fast",
    ("fit", "--config", "good.yaml", "--runs", "good.yaml"): "choose other --runs",
    ("fit", "--config", "good.yaml", "--out", "x"): "it belongs to test and predict",
    ("fit", "--config", "good.yaml", "--ckpt_path", "last"): "expected an earlier unfinished run",
    ("test", "--config", "good.yaml"): "expected an earlier run with a checkpoint",
    ("test", "--config", "good.yaml", "--ckpt_path", "none.ckpt"): "none.ckpt: expected a checkpoint, found no such",
    ("test", "--config", "good.yaml", "--ckpt_path", "good.yaml"): "good.yaml: expected a checkpoint of medinr",
    ("phantom", "dirlb", "--out", "x"): "invalid choice: 'dirlb'",
    ("phantom", "dirlab"): "out: missing",
    ("phantom", "dirlab", "--out", "x", "--cases", "0-3"): "--cases: expected cases from 1 to 10, got 0-3",
    ("check", "nowhere"): "nowhere: expected a folder of data, found nothing",
    ("check", "--rot", "x"): "--rot: no such option",
}


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_mistakes_in_a_call_are_one_line(run: Run, tmp_path: Path, call: tuple[str, ...]) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    code, out, err = run(*call)
    assert code == 2
    assert err.startswith("medinr: error: ") and len(err.splitlines()) == 1, err
    assert CALLS[call] in err, err
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDINR_DEBUG", "1")
    code, _, err = run("check", "nowhere")
    assert code == 2
    assert "Traceback" in err and err.splitlines()[-1].startswith("medinr: error: nowhere")


def test_program_errors_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, args: list[str]) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "dispatch", broken)
    with pytest.raises(KeyError, match="a bug"):
        run("check", "x")


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    program = "import sys; from medinr.cli import main; sys.exit(main(['--help']))"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


def test_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str, args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", interrupted)
    code, _, err = run("check", "x")
    assert code == 130 and err == "medinr: interrupted\n"


def test_print_config_resolves_short_names_and_defaults(run: Run, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    code, out, _ = run("fit", "--config", "good.yaml", "--data.fixed", "other.nii.gz", "--print_config")
    assert code == 0
    assert "class_path: medinr.methods.PairRegistration" in out
    assert "fixed: other.nii.gz" in out
    assert "num_sanity_val_steps: 0" in out, "from defaults.yaml"


def test_did_you_mean_keeps_quiet_where_nothing_is_near() -> None:
    assert did_you_mean("wieght", ["weight", "eps"]) == "; did you mean weight?"
    assert did_you_mean("zzz", ["weight", "eps"]) == ""


def test_case_numbers() -> None:
    assert case_numbers("1-3,5, 2") == [1, 2, 3, 5]
    for wrong in ("", "a", "1-", "3-1", "11", "1--2"):
        with pytest.raises(UserError, match="--cases"):
            case_numbers(wrong)


def test_a_misspelt_option_of_register_names_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["register", "f.nii.gz", "m.nii.gz", "--out", "o", "--presett", "fast"]) == 2
    assert "--presett: no such option; did you mean --preset?" in capsys.readouterr().err
