"""A cohort from a table: what is read, and that every blemish is missing, a listed exclusion, or one clear line."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_modules.cohort import CohortDataModule
from medinr.data.cohort import UNLABELLED, Cohort, Condition
from medinr.data.cohort_build import split_persons
from medinr.data.cohort_files import Entry, ReadScan, read_scan
from medinr.data.tables import condition_of, decoded, read_table
from medinr.errors import UserError
from medinr.io import read_image, write_image
from medinr.space import Domain
from tests.data_modules.tiny_cohort import AFFINE, SHAPE, write_scan, write_table

DOMAIN = Domain.of(SHAPE, AFFINE)


def module(table: Path, **options: Any) -> CohortDataModule:
    settings: dict[str, Any] = {"modalities": ["T2w", "T1w"], "conditions": ["age", "sex"], **options}
    return CohortDataModule(str(table), **settings)


def edit(table: Path, old: str, new: str) -> Path:
    text = table.read_text(encoding="utf-8")
    assert old in text
    table.write_text(text.replace(old, new, 1), encoding="utf-8")
    return table


def test_everything_of_a_table_arrives(tmp_path: Path) -> None:
    cohort = module(write_table(tmp_path), test=["s5"], val=["p0"]).cohort
    assert cohort.splits == {"train": ("s1", "s2", "s3", "s4"), "val": ("s0",), "test": ("s5",)}
    assert cohort.modalities == ("T2w", "T1w") and cohort.label_names == {1: "1", 2: "2"}
    age, sex = cohort.conditions
    assert (age.kind, age.low, age.high) == ("continuous", 32, 38), "the range is that of the training scans"
    assert sex.levels == ("F", "M")
    scan = cohort.scan("s3")
    assert scan.conditions == {"age": 36.0, "sex": 0.0}
    assert torch.equal(scan.images["T1w"], read_image(tmp_path / "s3_T1w.nii.gz").data[0])
    assert scan.labels is not None and scan.mask is not None and torch.equal(scan.labels > 0, scan.mask)
    assert cohort.values("train").tolist() == [[32, 0], [34, 1], [36, 0], [38, 1]]
    assert cohort.excluded == [] and cohort.notes == []
    assert cohort.scan("s3").images["T1w"] is scan.images["T1w"], "read once"


def test_missing_cells_stay_missing(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    edit(table, "s1_T1w.nii.gz", "n/a")
    edit(table, "s2_labels.nii.gz", "")
    edit(table, "\t36\t", "\t \t")
    cohort = module(table).cohort
    assert len(cohort) == 6 and cohort.excluded == []
    assert list(cohort.scan("s1").images) == ["T2w"]
    assert cohort.scan("s2").labels is None
    assert math.isnan(cohort.scan("s3").conditions["age"]) and math.isnan(cohort.values("train")[3, 0])
    assert [note.split(":")[0] for note in cohort.notes] == ["age", "T1w", "labels"]


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path: Path) -> None:
    table = write_table(tmp_path, 10)
    (tmp_path / "s1_T2w.nii.gz").write_bytes((tmp_path / "s1_T2w.nii.gz").read_bytes()[:200])
    nan = read_image(tmp_path / "s2_T2w.nii.gz").data[0]
    nan[0, 0, 0] = math.nan
    write_image(tmp_path / "s2_T2w.nii.gz", nan, DOMAIN)
    write_image(tmp_path / "s3_labels.nii.gz", torch.full(SHAPE, 7, dtype=torch.int16), DOMAIN)
    edit(table, "\t38\tM", "\t\t")  # s4
    edit(table, "s5_T1w", "s55_T1w")
    (tmp_path / "s6_T2w.nii.gz").write_bytes((tmp_path / "s0_T2w.nii.gz").read_bytes())
    edit(table, "s7_T2w.nii.gz", "s8_T2w.nii.gz")  # s8 then has the file of s7
    shifted = AFFINE.copy()
    shifted[0, 3] = 3.0
    moved = Domain.of(SHAPE, shifted)
    write_image(tmp_path / "s9_T1w.nii.gz", read_image(tmp_path / "s9_T1w.nii.gz").data, moved)
    with table.open("a", encoding="utf-8") as file:
        file.write("s0\tp0\ts0_T2w.nii.gz\t\t\t\t31\tM\n")
    cohort = module(table, label_names={1: "outer", 2: "inner"}).cohort
    reasons = dict(cohort.excluded)
    expected = {
        "s0": "more than once", "s1": "cannot be read", "s2": "NaN", "s3": "label values 1, 2, found 7",
        "s4": "no condition", "s5": "found nothing of that name", "s6": "same voxels as s0", "s8": "the image of s7",
        "s9": "expected the grid of T2w",
    }  # fmt: skip
    assert {name: text in reasons.get(name, "") for name, text in expected.items()} == dict.fromkeys(expected, True)
    assert set(reasons) == set(expected)
    assert cohort.names("train") == ("s0", "s7")


def test_nothing_left_is_one_line(tmp_path: Path) -> None:
    table = write_table(tmp_path, 2)
    for name in ("s0", "s1"):
        (tmp_path / f"{name}_T2w.nii.gz").unlink()
    with pytest.raises(UserError, match="expected scans to train on, found none; 2 excluded, the first: s0"):
        module(table).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": ["weeks"]}, "expected a column weeks, found name, person"),
        ({"modalities": ["T2w", "FLAIR"]}, "expected a column FLAIR"),
        ({"conditions": ["sex:continuous"]}, "expected numbers, found 'M'"),
        ({"conditions": ["age:ordinal"]}, "expected age:continuous or age:categorical"),
        ({"test": ["s9"]}, "expected scans or persons that are usable, found 's9'"),
        ({"test": ["s1"], "val": ["p1"]}, "found p1 in val and test"),
        ({"val": 1.5}, "a share from 0 to below 1"),
        ({"spacing": [1.0, 2.0]}, "one or three lengths"),
        ({"margin_mm": -1.0}, "expected 0 or more"),
    ],
)
def test_mistakes_in_the_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    table = write_table(tmp_path, 3)
    with pytest.raises(UserError, match=message):
        module(table, **options).setup()


def test_an_empty_column_is_one_line(tmp_path: Path) -> None:
    table = write_table(tmp_path, 2)
    edit(table, "\t30\t", "\tn/a\t")
    edit(table, "\t32\t", "\t\t")
    with pytest.raises(UserError, match="age: expected a value for some scan, found 2 empty cells"):
        module(table).prepare_data()


def test_tables_as_people_write_them(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_bytes(
        b"\xef\xbb\xbfid\tage \tsite\t\r\n"  # a byte-order mark, a blank, a stray tab
        b"a\t30\tGen\xe8ve\r\n"  # a byte that is not UTF-8, which spoils the mark
        b"\r\n"
        b"b\t\t31\tLyon\n"  # a stray tab inside
        b"c\t32\n"  # a cell too few
        b"d\t33\tRoma\t\t\t\n"
        b"e\t34\tOslo\tx\ty\n"
    )
    found = read_table(table)
    assert found.columns == ("id", "age", "site")
    assert [tuple(row.values()) for row in found.rows] == [
        ("a", "30", "Genève"), ("b", "31", "Lyon"), ("c", "32", ""), ("d", "33", "Roma"),
    ]  # fmt: skip
    assert found.lines == (2, 4, 5, 6)
    assert any("line 7: expected 3 cells, found 5" in note for note in found.notes)
    assert found.column("AGE") == "age"
    assert decoded("a\tü".encode("utf-16")) == "a\tü"


def test_a_word_among_numbers_is_missing_not_a_level() -> None:
    condition, values, notes = condition_of("age", ["38", "39", "40", "38+2", ""], "t")
    assert condition.kind == "continuous" and values[:3] == [38, 39, 40] and all(map(math.isnan, values[3:]))
    assert notes == ["age: '38+2' is no number: kept as missing"]
    assert condition_of("sex:categorical", ["1", "0"], "t")[0].levels == ("0", "1")
    with pytest.raises(UserError, match="at most 20 levels"):
        condition_of("id", [f"x{i}" for i in range(21)], "t")


def test_conditions_speak_and_listen() -> None:
    sex = Condition("sex", "categorical", ("F", "M"))
    age = Condition("age", "continuous", low=30, high=40)
    assert sex.value("M") == 1 and sex.text(1.0) == "M" and age.text(math.nan) == "missing"
    assert age.covers(30) and not age.covers(41) and age.covers(math.nan) and not sex.covers(2)
    for condition, text in ((sex, "X"), (age, "old"), (age, "inf")):
        with pytest.raises(UserError):
            condition.value(text)


def test_persons_never_straddle_splits() -> None:
    entries = [Entry(f"s{i}", f"p{i // 2}", {}) for i in range(20)]
    splits = split_persons(entries, val=0.2, test=["s3"], seed=4)
    place = {name: split for split, names in splits.items() for name in names}
    assert place["s2"] == place["s3"] == "test" and len(splits["val"]) == 4
    assert all(place[f"s{i}"] == place[f"s{i + 1}"] for i in range(0, 20, 2))
    assert split_persons(entries, 0.2, ["s3"], 4) == splits != split_persons(entries, 0.2, ["s3"], 5)


def test_crop_and_working_grid_keep_the_world(tmp_path: Path) -> None:
    write_scan(tmp_path, "s", 0, 40.0)
    entry = Entry(
        "s", "s", {"T2w": tmp_path / "s_T2w.nii.gz"}, tmp_path / "s_labels.nii.gz", tmp_path / "s_mask.nii.gz"
    )
    whole = read_scan(entry)
    crop = read_scan(entry, ReadScan(margin_mm=1.5))
    assert crop.mask is not None and whole.mask is not None and crop.mask.sum() == whole.mask.sum()
    assert crop.domain.shape < whole.domain.shape
    voxel = crop.mask.nonzero()[0]
    world = crop.domain.voxel_to_world @ torch.cat([voxel.double(), torch.ones(1, dtype=torch.float64)])
    i, j, k = (whole.domain.world_to_voxel @ world)[:3].round().int().tolist()
    assert whole.images["T2w"][i, j, k] == crop.images["T2w"][tuple(voxel.tolist())]
    grid = read_scan(entry, ReadScan(spacing=(3.0, 3.0, 3.0)))
    assert grid.domain.spacing == (3.0, 3.0, 3.0) and grid.labels is not None
    volumes = [
        float((s.labels > 0).sum()) * float(np.prod(s.domain.spacing)) for s in (whole, grid) if s.labels is not None
    ]
    assert volumes[1] == pytest.approx(volumes[0], rel=0.25)


def test_planes_that_nobody_labelled(tmp_path: Path) -> None:
    write_scan(tmp_path, "s", 0, 40.0)
    labels = read_scan(
        Entry("s", "s", {"T2w": tmp_path / "s_T2w.nii.gz"}, tmp_path / "s_labels.nii.gz"),
        ReadScan(unlabelled_planes=True),
    ).labels
    assert labels is not None
    assert (labels[:, :, 0] == UNLABELLED).all() and (labels[:, :, 4] >= 0).all() and (labels[0] >= UNLABELLED).any()


def test_a_cache_on_disk_follows_the_files(tmp_path: Path) -> None:
    table = write_table(tmp_path, 2)
    first = module(table, cache_dir=str(tmp_path / "cache")).cohort.scan("s0").images["T2w"]
    again = module(table, cache_dir=str(tmp_path / "cache")).cohort.scan("s0").images["T2w"]
    assert torch.equal(first, again) and len(list((tmp_path / "cache").iterdir())) == 2
    write_image(tmp_path / "s0_T2w.nii.gz", first + 1, DOMAIN)
    changed = module(table, cache_dir=str(tmp_path / "cache")).cohort.scan("s0").images["T2w"]
    assert torch.equal(changed, first + 1)
    (tmp_path / "s0_T2w.nii.gz").write_bytes(b"nothing")
    cohort = module(table, cache_dir=str(tmp_path / "cache")).cohort
    assert [name for name, _ in cohort.excluded] == ["s0"] and "cannot be read" in cohort.excluded[0][1]


def test_the_report_says_it_all(tmp_path: Path) -> None:
    table = edit(write_table(tmp_path, 3), "s1_T2w", "s11_T2w")
    lines = module(table).check()
    assert lines[0].startswith("scans: 2 scans (2 train), T2w, T1w, first grid 9x10x8 at 1.5x1.5x2 mm")
    assert "condition age: continuous, 30 to 34 in training" in lines
    assert lines[-1].startswith("excluded: s1: ") and "s11_T2w" in lines[-1]


def test_loaders_count(tmp_path: Path) -> None:
    data = module(write_table(tmp_path), val=["s0", "s1"], test=["s2"], steps_per_epoch=7)
    data.setup()
    counts = [len(getattr(data, f"{kind}_dataloader")()) for kind in ("train", "val", "test", "predict")]
    assert counts == [7, 2, 1, 1]


def test_a_cohort_refuses_a_scan_in_two_splits() -> None:
    with pytest.raises(UserError, match="found a twice"):
        Cohort("c", ["T2w"], {}, [], {"train": ["a"], "test": ["a"]}, lambda name: None, {"a": {}})  # type: ignore[arg-type,return-value]
