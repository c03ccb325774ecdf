"""``medinr check`` of cohorts: what is there, what is missing, what is left out and why."""

from pathlib import Path

import pytest

from medinr.cli import main
from medinr.phantoms.adult_cohort import write_ukb_phantom
from medinr.phantoms.perinatal_cohort import draws, write_dhcp_phantom
from tests.data_modules.tiny_cohort import write_table


def test_a_dhcp_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dhcp_phantom(tmp_path, 3, 24, 2)
    assert main(["check", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dhcp: ok: 3 scans (3 train), T2w, T1w, first grid") and "at 6.333" in lines[0]
    assert any(line.startswith("dhcp: condition scan_age: continuous") for line in lines)
    broken = next(tmp_path.rglob(f"{draws(3, 2)[1].name}_desc-restore_T2w.nii.gz"))
    broken.write_bytes(b"nothing")
    assert main(["check", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dhcp: warning: 2 scans")
    assert lines[-1].startswith(f"dhcp: excluded: {draws(3, 2)[1].name}: ") and "cannot be read" in lines[-1]


def test_archives_with_and_without_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ukb_phantom(tmp_path, 2, 24, 0, "synthetic")
    assert main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("ukbiobank: ok: 2 scans (2 train), T1w")
    (tmp_path / "phenotypes.csv").unlink()
    assert main(["check", str(tmp_path)]) == 2
    assert "ukbiobank: problem: " in (out := capsys.readouterr().out) and "found none; add it" in out


def test_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path, 3)
    assert main(["check", str(table)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("scans: ok: 3 scans (3 train), T2w, T1w") and "condition sex: categorical, F, M" in out
    table.write_text("name\tage\na\t3\n", encoding="utf-8")
    assert main(["check", str(table)]) == 2
    assert "expected a column of image files" in capsys.readouterr().out


def test_what_is_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path)]) == 2
    assert "or a cohort (dHCP, UK Biobank, fetal CRL), found none" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "x")]) == 2
    assert "expected a folder of data, found nothing" in capsys.readouterr().err
