"""Which fits a cohort consists of, and its table."""

import csv
import math
from pathlib import Path

import pytest

from medinr.cohorts.plan import (
    Fit,
    case_values,
    check_same,
    copies,
    folder_of,
    plan,
    seed_values,
    setting_axes,
    split_values,
    write_plan,
)
from medinr.cohorts.state import JOB, read_json, write_json, write_state
from medinr.cohorts.table import failure_rate, headline, read_rows, summarise, summary_rows, write_tables
from medinr.cohorts.tracking import log_cohort
from medinr.errors import UserError

CONFIG = [Path("tiny.yaml")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1-3,5", ["1", "2", "3", "5"]),
        ("08-11", ["08", "09", "10", "11"]),
        ("sub-01, b", ["sub-01", "b"]),
        ("data/a-1,data/b", ["data/a-1", "data/b"]),
    ],
)
def test_cases(text: str, expected: list[str]) -> None:
    assert case_values(text) == expected


@pytest.mark.parametrize("text", ["", "1,,2", "5-1", "3-", "-3", "1,2,1", "1-3,2"])
def test_bad_cases(text: str) -> None:
    with pytest.raises(UserError, match="--cases: expected"):
        case_values(text)


def test_seeds() -> None:
    assert seed_values("3") == [0, 1, 2]
    assert seed_values("5,7") == [5, 7] and seed_values("4-6") == [4, 5, 6]
    for text in ("0", "", "a", "1,1", "-1", "3-1"):
        with pytest.raises(UserError, match="--seeds: expected"):
            seed_values(text)


def test_settings() -> None:
    assert split_values("[64,64],{a: 1, b: 2},'x,y'") == ["[64,64]", "{a: 1, b: 2}", "'x,y'"]
    given = ["model.points=100,200", "--model.field.hidden=[8,8],[16]"]
    assert setting_axes(given) == {"model.points": ["100", "200"], "model.field.hidden": ["[8,8]", "[16]"]}
    for text in ("model.points", "=1", "a=", "a=1,,2", "a=1,1"):
        with pytest.raises(UserError, match="--set: expected"):
            setting_axes([text])
    with pytest.raises(UserError, match="each key once"):
        setting_axes(["a=1", "a=2"])
    with pytest.raises(UserError, match="use --seeds"):
        setting_axes(["seed_everything=1,2"])


def test_one_fit_for_each_case_seed_and_setting() -> None:
    fits = plan(CONFIG, ["--data.root=x"], ["1", "2"], [0, 5], {"model.points": ["10", "20"]})
    assert [fit.name for fit in fits[:3]] == ["case1_seed0_points-10", "case1_seed5_points-10", "case1_seed0_points-20"]
    assert len({fit.name for fit in fits}) == 8
    words = ["--config", "tiny.yaml", "--data.root=x", "--model.points=20", "--data.case=2", "--seed_everything=5"]
    assert list(fits[-1].arguments[:6]) == words
    assert fits[-1].setting == "points=20"


def test_a_case_may_be_a_file() -> None:
    [fit] = plan(CONFIG, ["--data.fixed={case}/a.nii", "--data.moving={case}/b.nii"], ["scans/x"], [0], {})
    assert {"--data.fixed=scans/x/a.nii", "--data.moving=scans/x/b.nii"} < set(fit.arguments)
    assert not any(word.startswith("--data.case") for word in fit.arguments)
    assert "/" not in fit.name
    [no_case] = plan(CONFIG, [], [None], [0], {})
    assert no_case.name == "seed0" and not any("case" in word for word in no_case.arguments)
    with pytest.raises(UserError, match="expected --cases"):
        plan(CONFIG, ["--data.fixed={case}"], [None], [0], {})
    with pytest.raises(UserError, match="use --cases"):
        plan(CONFIG, [], ["1"], [0], {"data.case": ["1", "2"]})


def test_folders_are_told_apart() -> None:
    axes = {"model.a.weight": ["1.0e-3", "0.01"], "model.b.weight": ["[1, 2]", "[1. 2]"]}
    names = {fit.name for fit in plan(CONFIG, [], ["a/b", "a b"], [0], axes)}
    assert len(names) == 8 and all(len(name) < 160 and "/" not in name for name in names)
    with pytest.raises(UserError, match="stay unlike"):
        plan(CONFIG, [], ["1", "case1"], [0], {})


def test_a_folder_holds_one_configuration(tmp_path: Path) -> None:
    config, out = tmp_path / "a.yaml", tmp_path / "out"
    config.write_text("model: {lr: 1e-3} # one\n", encoding="utf-8")
    [fit] = plan(copies(out, [config]), ["--x=1"], ["1"], [0], {})
    check_same(out, [config], ["--x=1"])
    write_plan(out, [config], ["--x=1"], [fit])
    job = read_json(folder_of(out, fit) / JOB)
    assert job["arguments"] == list(fit.arguments) and job["command"][1:] == ["-m", "medinr.cli"]
    assert copies(out, [config])[0].read_text(encoding="utf-8") == config.read_text(encoding="utf-8")
    assert copies(out, [config])[0].name == "a.yaml", "its name is the experiment's"
    config.write_text("model: {lr: 1e-3} # another comment\n", encoding="utf-8")
    check_same(out, [config], ["--x=1"])
    with pytest.raises(UserError, match="choose another --out"):
        check_same(out, [config], ["--x=2"])
    config.write_text("model: {lr: 1e-4}\n", encoding="utf-8")
    with pytest.raises(UserError, match="choose another --out"):
        check_same(out, [config], ["--x=1"])
    with pytest.raises(UserError, match="no file"):
        check_same(out, [tmp_path / "b.yaml"], [])


# -- the table -------------------------------------------------------------------------------------------------------


def rows_of(table: dict[tuple[str, int], float]) -> list[dict[str, object]]:
    return [{"case": case, "seed": seed, "state": "done", "tre/mean": v} for (case, seed), v in table.items()]


def test_summary_of_a_metric() -> None:
    found = summarise(rows_of({("1", 0): 1.0, ("1", 1): 2.0, ("2", 0): 4.0, ("2", 1): 9.0}), "tre/mean")
    assert found["mean"] == 4.0 and found["n"] == 4
    assert found["sd_seeds"] == pytest.approx(abs(5.5 - 2.5) / math.sqrt(2)), "of the means over the cases, 2.5 and 5.5"
    assert found["sd_cases"] == pytest.approx(abs(6.5 - 1.5) / math.sqrt(2)), "of the means over the seeds, 1.5 and 6.5"
    assert found["p50"] == 3.0 and found["p95"] == pytest.approx(8.25)


def test_a_missing_fit_does_not_pass_for_spread_over_seeds() -> None:
    found = summarise(rows_of({("1", 0): 1.0, ("1", 1): 1.0, ("2", 0): 9.0}), "tre/mean")
    assert found["sd_seeds"] == 0.0 and found["n"] == 3
    assert math.isnan(summarise(rows_of({("1", 0): 1.0}), "tre/mean")["sd_seeds"])
    assert summarise([], "tre/mean")["n"] == 0


def test_failure_rate() -> None:
    rows = rows_of({("1", 0): 1.0, ("2", 0): 5.0, ("3", 0): 9.0})
    rows.append({"case": "4", "seed": 0, "state": "failed"})
    assert failure_rate(rows, {}) == 0.25
    assert failure_rate(rows, {"tre/mean": 5.0}) == 0.75
    assert failure_rate(rows[:1], {"dsc/mean": 5.0}) == 1.0, "a metric that is not there"


def finished(out: Path, fit: Fit, metrics: dict[str, object]) -> None:
    folder = folder_of(out, fit)
    write_json(folder / "a" / "1" / "results" / "metrics.json", metrics)
    write_state(folder, "done", 10.0, run="a/1")


def test_tables(tmp_path: Path) -> None:
    fits = plan(CONFIG, [], ["1", "2"], [0, 1], {"model.points": ["10", "20"]})
    for i, fit in enumerate(fits[:-1]):
        metrics = {"case": "x", "tre/mean": float(i), "folding/percent": 0, "image/psnr": None, "ok": True}
        finished(tmp_path, fit, metrics)
    write_state(folder_of(tmp_path, fits[-1]), "failed", 1.0, "no | file")
    summary, changed = write_tables(tmp_path, fits, "tiny", {})
    assert changed and not write_tables(tmp_path, fits, "tiny", {})[1]
    with (tmp_path / "cohort.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and rows[1]["model.points"] == "10" and rows[1]["tre/mean"] == "1.0"
    assert rows[-1]["state"] == "failed" and rows[-1]["error"] == "no | file" and rows[-1]["tre/mean"] == ""
    assert "image/psnr" not in rows[0] and "ok" not in rows[0], "no number in any fit"
    found = {(row["setting"], row["metric"]): row for row in summary}
    assert found["points=10", "tre/mean"]["mean"] == pytest.approx((0 + 1 + 4 + 5) / 4)
    assert found["points=20", "failure_rate"]["mean"] == 0.25 and found["points=20", "tre/mean"]["n"] == 3
    page = (tmp_path / "cohort.md").read_text(encoding="utf-8")
    assert "7 of 8 fits are done" in page and "| no / file |" in page
    assert "| 1 | 0.5 ± 0.71 | 0 ± 0 |" in page
    assert headline(summary)[0] == "  points=10: tre/mean 2.5 ± 0.71 over seeds (median 2.5)"


def test_tables_as_one_offline_run(tmp_path: Path) -> None:
    fits = plan(CONFIG, [], ["1"], [0, 1], {})
    for i, fit in enumerate(fits):
        finished(tmp_path, fit, {"tre/mean": 1.0 + i})
    summary, _ = write_tables(tmp_path, fits, "tiny", {})
    assert log_cohort(tmp_path, "cohort/tiny", {"cases": ["1"]}, summary) == "WANDB_MODE=offline"
    [run] = tmp_path.glob("wandb/offline-run-*")
    names = {p.relative_to(run / "files").as_posix() for p in (run / "files").rglob("*") if p.is_file()}
    assert {"cohort.csv", "summary.csv", "cohort.md"} < names
    assert {name.rpartition("/")[2].partition("_")[0] for name in names if name.startswith("media/table")} == {
        "fits", "summary"
    }  # fmt: skip


def test_rows_of_fits_that_left_nothing(tmp_path: Path) -> None:
    fits = plan(CONFIG, [], ["1"], [0], {})
    [row] = read_rows(tmp_path, fits)
    assert row["state"] == "open" and row["error"] == ""
    assert summary_rows([row], fits, {})[0]["mean"] == 1.0
