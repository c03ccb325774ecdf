"""Blemished cohorts through `medinr fit` of an atlas: what is left out is listed first, or one line ends it."""

from pathlib import Path

import pytest
import torch

from medinr import cli, io
from medinr.callbacks import runs
from medinr.methods import ConditionalAtlas, load_method
from medinr.space import Domain
from tests.data_modules.tiny_cohort import AFFINE, SHAPE, write_table

ROOT = Path(__file__).resolve().parents[1]
DOMAIN = Domain.of(SHAPE, AFFINE)


def fit(table: Path, *options: str) -> int:
    small = ["--model.decoder.width", "8", "--model.decoder.code", "4", "--model.decoder.grids", "[3]"]
    small += ["--model.points", "64", "--model.explicit", "[age]", "--model.time", "age"]
    small += ["--trainer.max_steps", "2", "--wandb", "false"]
    data = ["--data", "CohortDataModule", "--data.table", str(table), "--data.modalities", "[T2w, T1w]"]
    data += ["--data.root", str(table.parent), "--data.test", "0", "--data.margin_mm", "1"]
    data += ["--data.conditions", "[age, sex]", "--data.label_names", "{1: outer, 2: inner}"]
    return cli.main(["fit", "--config", str(ROOT / "experiments" / "cinema_dhcp_best.yaml"), *data, *small, *options])


def edit(table: Path, old: str, new: str) -> None:
    text = table.read_text(encoding="utf-8")
    assert old in text
    table.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_blemishes_are_listed_before_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path, 9)
    edit(table, "s1_T1w.nii.gz", "")  # a missing modality, labels and age leave a scan in
    edit(table, "s2_labels.nii.gz", "")
    edit(table, "\t36\t", "\t\t")  # s3
    (tmp_path / "s4_T2w.nii.gz").write_bytes((tmp_path / "s4_T2w.nii.gz").read_bytes()[:150])
    io.write_image(tmp_path / "s5_labels.nii.gz", torch.full(SHAPE, 9, dtype=torch.int16), DOMAIN)
    for what in ("T2w", "T1w", "labels", "mask"):
        (tmp_path / f"s6_{what}.nii.gz").write_bytes((tmp_path / f"s0_{what}.nii.gz").read_bytes())
    with table.open("a", encoding="utf-8") as file:
        file.write("s8\tp8\ts8_T2w.nii.gz\t\t\t\t31\tM\n")
    assert fit(table) == 0
    shown = capsys.readouterr()
    before = (shown.out + shown.err).split("fit:")[0]
    for name, reason in (("s4", "cannot be read"), ("s5", "found 9"), ("s6", "same voxels"), ("s8", "more than once")):
        assert any(name in line and reason in line for line in before.splitlines()), f"{name} in\n{before}"
    [run] = runs.runs_of(tmp_path / "runs", "cinema_dhcp_best")
    method = load_method(run / runs.LAST)
    assert isinstance(method, ConditionalAtlas) and method.names == ["s0", "s1", "s2", "s3", "s7", "s8"]


def test_nothing_to_learn_from_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path, 2)
    for name in ("s0", "s1"):
        (tmp_path / f"{name}_T2w.nii.gz").unlink()
    assert fit(table) == 2
    error = capsys.readouterr().err.strip()
    assert "expected scans to train on, found none; 2 excluded, the first: s0" in error and "\n" not in error
    assert not (tmp_path / "runs").exists()
