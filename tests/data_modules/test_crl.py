"""The fetal atlas as a cohort, on the real files."""

from pathlib import Path

import pytest

from data_modules.crl import REGIONS, FetalCRL
from medinr.errors import UserError


def test_the_key_has_every_region_once() -> None:
    assert len(REGIONS) == len(set(REGIONS.values())) == 34
    assert REGIONS[112] == "Cortical_Plate_L" and REGIONS[113] == "Cortical_Plate_R" and REGIONS[91] == "CorpusCallosum"


def test_weeks_regions_and_held_out_weeks(shared: Path) -> None:
    data = FetalCRL(
        str(shared / "data" / "fetal_crl"), weeks=[29, 30, 31, 32], test=["sta31"], spacing=3.2, margin_mm=4
    )
    cohort = data.cohort
    assert cohort.names("train") == ("sta29", "sta30", "sta32") and cohort.names("test") == ("sta31",)
    assert (cohort.conditions[0].low, cohort.conditions[0].high) == (29, 32)
    scan = cohort.scan("sta29")
    assert scan.conditions == {"week": 29.0} and scan.mask is not None and scan.labels is not None
    litres = float(scan.mask.sum()) * 3.2**3 / 1e6
    assert 0.15 < litres < 0.4, "a brain of 29 weeks"
    assert set(scan.labels.unique().tolist()) <= {0, *REGIONS} and cohort.scan("sta31").labels is None
    assert cohort.excluded == [] and cohort.notes == ["labels: missing for 2 of 4 scans"]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected templates"):
        FetalCRL(str(tmp_path)).prepare_data()
    (tmp_path / "STA21.nii.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="expected some of 21; found 23"):
        FetalCRL(str(tmp_path), weeks=[23]).prepare_data()
