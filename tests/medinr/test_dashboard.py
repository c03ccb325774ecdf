"""``medinr dashboard``: the page from run folders alone, the specification, and the workspace that is made of it."""

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medinr import cli, figures
from medinr.commands.dashboard import find_runs
from medinr.dashboard import workspace
from medinr.dashboard.records import groups, read_record, runs_below
from medinr.dashboard.report import case_values, labels, page
from medinr.dashboard.specification import HEADLINES, read_specification, specification, write_specification
from medinr.errors import UserError
from tests.medinr.test_report import Page

Run = Callable[..., tuple[int, str, str]]
OLD_STYLE = pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")  # wandb-workspaces, on import


def write_run(
    folder: Path, experiment: str, case: int = 1, seed: int = 0, lr: float = 1e-4, tre: float = 2.0, done: bool = True
) -> Path:
    """A run's folder as `medinr fit` and `medinr test` leave it: 40 steps, one case, two pictures, a table of alpha."""
    (folder / "figures").mkdir(parents=True)
    (folder / "results" / "figures").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"experiment: {experiment}\nseed_everything: {seed}\n"
        f"model: {{class_path: PairRegistration, init_args: {{lr: {lr}, field: {{class_path: SIREN}}}}}}\n"
        f"data: {{class_path: DIRLab, init_args: {{case: {case}, root: data}}}}\ntrainer: {{max_steps: 40}}\n"
    )
    rows = ["step,loss,tre/mean,dsc/mean,folding/percent,loss/similarity,costs/seconds,empty"]
    rows += [f"{4 * i},{9 - i},,,,{8 - i},," for i in range(10)]
    rows += [f"39,,{tre},0.9,nan,,12.5,", "39,,,,0.25,,,"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    metrics = {"tre/initial_mean": 8.0, "tre/mean": tre, "dsc/mean": 0.91, "folding/percent": 0.0, "image/psnr": None}
    (folder / "results" / "metrics.json").write_text(json.dumps({"case": f"case{case}", **metrics}))
    for i, path in enumerate(("figures/step-000040.png", "results/figures/registration.png")):
        Image.new("RGB", (2000, 40), (200 * i, 90, 30)).save(folder / path)
    if done:
        (folder / "finished").touch()
    return folder


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Two experiments where `medinr fit` puts them: one with two rates, two cases and two seeds, one broken off."""
    for k, lr in enumerate((1e-4, 1e-3)):
        for case in (1, 2):
            for seed in (0, 1):
                name = f"2026010{k + 1}-0000{case}{seed}"
                write_run(tmp_path / "runs" / "idir" / name, "idir", case, seed, lr, tre=k + case + 0.5 * seed)
    write_run(tmp_path / "runs" / "other" / "20260101-000000", "other", tre=9.0, done=False)
    return tmp_path / "runs"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["dashboard", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return call


# -- what is read --------------------------------------------------------------------------------------------------


def test_a_record_holds_what_the_run_has_left(tmp_path: Path) -> None:
    record = read_record(write_run(tmp_path / "idir" / "20260101-000000", "idir"))
    assert record.name == "idir/20260101-000000" and record.finished and record.steps == 40
    assert record.history["loss"] == ([4.0 * i for i in range(10)], [9.0 - i for i in range(10)])
    assert record.history["folding/percent"] == ([39.0], [0.25]), "no NaN, no empty cell"
    assert "empty" not in record.history
    assert record.metrics["tre/mean"] == 2.0 and record.metrics["folding/percent"] == 0.0, "evaluated, not the fit's"
    assert "image/psnr" not in record.metrics, "null is no number"
    assert [p.name for p in record.pictures] == ["step-000040.png", "registration.png"]


def test_cases_come_from_whichever_file_a_method_writes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "idir" / "20260101-000000", "idir")
    results = folder / "results"
    (results / "metrics.json").write_text('{"case": "mean of 2", "tre/mean": 2.0}')
    for i in (1, 2):
        (results / f"case{i}" / "figures").mkdir(parents=True)
        (results / f"case{i}" / "metrics.json").write_text(json.dumps({"case": f"case{i}", "tre/mean": float(i)}))
        Image.new("RGB", (8, 8)).save(results / f"case{i}" / "figures" / "registration.png")
    found = read_record(folder)
    assert [row["case"] for row in found.cases] == ["case1", "case2"] and found.metrics["tre/mean"] == 1.5
    assert len(found.pictures) == 4
    (results / "cases.csv").write_text("case,dsc/mean,sex\n007,0.5,\n008,0.7,\n")
    found = read_record(folder)
    assert [row["case"] for row in found.cases] == ["007", "008"] and found.metrics == pytest.approx({"dsc/mean": 0.6})
    (results / "cases.csv").unlink()
    for broken in ("not json", "[1]"):
        (results / "case1" / "metrics.json").write_text(broken)
        assert [row["case"] for row in read_record(folder).cases] == ["case2"]


def test_runs_are_found_by_name_file_and_folder(cohort: Path, tmp_path: Path) -> None:
    one = cohort / "other" / "20260101-000000"
    for name in ("other", "experiments/other.yaml", str(one), str(cohort / "other")):
        assert find_runs([name], cohort) == [one]
    assert len(find_runs(["idir", str(cohort), str(one)], tmp_path / "runs")) == 9, "each once"
    (one / "wandb" / "offline-run-1" / "files").mkdir(parents=True)
    (one / "wandb" / "offline-run-1" / "files" / "config.yaml").touch()
    (one / "wandb" / "offline-run-1" / "files" / "metrics.csv").touch()
    assert runs_below(cohort / "other") == [one]
    deep = write_run(tmp_path / "c" / "fits" / "case1-seed0" / "idir" / "20260101-000000", "idir")
    assert runs_below(tmp_path / "c") == [deep], "where `medinr cohort` puts them"
    with pytest.raises(
        UserError, match=r"othr: expected an experiment with runs in .* found none; did you mean other\?"
    ):
        find_runs(["othr"], cohort)


def test_runs_that_repeat_each_other_are_one_group(cohort: Path) -> None:
    records = [read_record(r) for r in runs_below(cohort)]
    found = groups(records)
    assert {name: len(some) for name, some in found.items()} == {"idir lr=0.0001": 4, "idir lr=0.001": 4, "other": 1}
    assert sorted(case_values(found["idir lr=0.001"], "tre/mean")) == [2.0, 2.5, 3.0, 3.5]
    names = labels(records)
    assert len(set(names.values())) == 9 and names[records[3].folder] == "idir/20260101-000021 case 2 seed 1"


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_is_complete_in_itself(cohort: Path) -> None:
    records = [read_record(r) for r in runs_below(cohort)]
    text = page(records, "Runs of <idir> & other")
    found = Page(text)
    words = " ".join(" ".join(found.words).split())
    assert "Runs of <idir> & other" in words and "9 runs, 3 groups, 2 evaluated cases" in words
    for name, value in found.attributes:
        assert name not in ("src", "href") or value.startswith("data:image/")
    assert not re.search(r"https?://", text)
    for part in ("Runs", "Comparison", "Curves", "Cases", "Images", "Loss", "Settings"):
        assert part in found.words, part
    assert "other/20260101-000000 case 1 seed 0 broken off 40 9" in words
    assert "idir lr=0.001 TRE [mm] 4 2.75 0.6455" in words, "mean and standard deviation of 2, 2.5, 3, 3.5"
    assert "Not finished: other/20260101-000000; " in words
    assert "Landmarks are farther apart than before: other/20260101-000000." in words
    pictures = [i for i in found.images if "data-run" in i]
    assert len(pictures) == 18 and {i["data-run"] for i in pictures} == {str(i) for i in range(9)}
    image = Image.open(io.BytesIO(base64.b64decode(pictures[0]["src"].partition(",")[2])))
    assert image.width == 1600 and image.format == "JPEG"


def test_the_page_of_a_run_without_results_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "idir" / "20260101-000000"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("experiment: idir\n")
    (folder / "finished").touch()
    words = " ".join(Page(page([read_record(folder)], "x")).words)
    assert "Not evaluated: idir/20260101-000000" in words and "Nothing here measures the error" in words
    assert "Curves" not in words and "Cases" not in words


def test_curves_and_spreads_are_of_the_values_given() -> None:
    curves = {"a: 1": ([0.0, 4.0], [2.0, 1.0]), "a: 2": ([0.0, 4.0], [3.0, 2.0]), "b: 1": ([1.0], [5.0])}
    figure = figures.overlay_figure({"TRE": curves, "Dice": {"b: 1": ([0.0], [0.5])}}, ["a", "b"])
    tre, dice = figure.axes
    assert [line.get_xydata().tolist() for line in tre.lines] == [[[0, 2], [4, 1]], [[0, 3], [4, 2]], [[1, 5]]]
    one, two, other = (line.get_color() for line in tre.lines)
    assert one == two != other == dice.lines[0].get_color(), "a group has one colour"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    spread = figures.spread_figure({"TRE": {"a": [1.0, 2.0, 9.0], "b": [4.0]}}).axes[0]
    drawn = [sorted(line.get_xdata()) for line in spread.lines if line.get_marker() == "o"]
    assert drawn == [[1, 2, 9], [4]]
    assert 2 in [x for line in spread.lines if line.get_color() == "black" for x in line.get_xdata()], "the median"


def test_alpha_curves_are_drawn_of_the_search(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "cidir" / "20260101-000000", "cidir")
    assert "against alpha" not in page([read_record(folder)], "x")
    (folder / "results" / "alpha_search.csv").write_text("alpha,tre,dice\n0.001,2,0.5\n0.1,3,nan\n")
    (folder / "results" / "metrics.json").write_text('{"case": "1", "search/alpha_0": 0.001}')
    assert "against alpha" in page([read_record(folder)], "x")


# -- the specification and the workspace ---------------------------------------------------------------------------


def panels(spec: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [p for section in spec["sections"] for p in section["panels"] if p["kind"] == kind]


def test_a_specification_shows_what_was_logged(cohort: Path, tmp_path: Path) -> None:
    spec = specification([read_record(r) for r in runs_below(cohort)], ["idir", "other"], "medinr")
    lines = {p["title"]: p["metrics"] for p in panels(spec, "line")}
    assert lines["TRE [mm]"] == ["tre/mean"] and lines["terms"] == ["loss/similarity"]
    assert "SSIM" not in lines and not panels(spec, "curve")
    assert panels(spec, "images")[0]["keys"] == ["registration"]
    everything = specification([], ["cidir"], "medinr", alpha=True)
    assert [p["metrics"][0] for p in panels(everything, "line")][: len(HEADLINES)] == list(HEADLINES)
    assert [p["y"] for p in panels(everything, "curve")] == ["tre", "dice", "folding", "bending"]
    write_specification(tmp_path / "w.json", everything)
    assert read_specification(tmp_path / "w.json") == everything


def test_what_a_method_alone_measures_is_shown_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "diffdef" / "20260101-000000", "diffdef")
    (folder / "metrics.csv").write_text(
        "step,val/dice,tre/p95,ahead/raw/bending,costs/seconds,overlap\n1,0.5,3,1e-3,2,1\n9,0.6,2,1e-3,3,1\n"
    )
    (folder / "results" / "metrics.json").unlink()
    record = read_record(folder)
    spec = specification([record], ["diffdef"], "medinr")
    lines = {p["title"]: p["metrics"] for p in panels(spec, "line")}
    assert lines["val/dice"] == ["val/dice"] and lines["terms"] == ["ahead/raw/bending"]
    assert not {"tre/p95", "overlap"} & set(lines)
    words = " ".join(Page(page([record], "x")).words)
    assert "Curves" in words and "Nothing here measures the error" not in words


def test_a_cohort_adds_its_tables(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "fits" / "case1-seed0" / "idir" / "20260101-000000", "idir")
    for there in (False, True):
        spec = specification([read_record(folder)], ["idir"], "medinr")
        assert ("cohort/fits" in [p["key"] for p in panels(spec, "table")]) == there
        assert labels([read_record(folder)])[folder].startswith("case1-seed0 idir/") == there
        (tmp_path / "cohort.json").write_text("{}")


def test_a_spoilt_specification_is_one_line(tmp_path: Path) -> None:
    good = specification([], ["idir"], "medinr")
    line, table = {"kind": "line"}, {"kind": "table", "key": 3}
    wrong: list[tuple[Any, str]] = [
        ([], "expected a workspace that `medinr dashboard` wrote"),
        ({**good, "medinr_workspace": 2}, "expected a workspace that"),
        ({**good, "project": ""}, "project: expected a str"),
        ({**good, "sections": [{"name": "a"}]}, "expected name and panels"),
        ({**good, "sections": [{"name": "a", "panels": [{"kind": "pie"}]}]}, "section a: .*line, images.* found 'pie'"),
        (
            {**good, "sections": [{"name": "a", "panels": [line]}]},
            "line: metrics: expected a list of names",
        ),
        ({**good, "sections": [{"name": "a", "panels": [table]}]}, "table: key: expected a name"),
    ]
    for content, message in wrong:
        (tmp_path / "w.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            read_specification(tmp_path / "w.json")
    (tmp_path / "w.json").write_text("{")
    with pytest.raises(UserError, match=r"w\.json: expected a workspace in JSON"):
        read_specification(tmp_path / "w.json")


@OLD_STYLE
def test_every_panel_becomes_one_of_wandb() -> None:
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is in the dev extra")
    spec = specification([], ["idir", "cidir"], "medinr", alpha=True)
    spec["sections"][0]["panels"] += [{"kind": "table", "key": "cohort/fits"}]
    view = workspace.build(spec, "lab")._to_model()
    assert (view.entity, view.project, view.display_name) == ("lab", "medinr", "idir, cidir")
    content = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))["section"]
    sections = content["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == [s["name"] for s in spec["sections"]]
    kinds = {
        "line": "Run History Line Plot", "images": "Media Browser", "table": "Weave", "curve": "Vega2",
        "bars": "Bar Chart", "scatter": "Scatter Plot", "settings": "Run Comparer",
    }  # fmt: skip
    made = [[p["viewType"] for p in s["panels"]] for s in sections]
    assert made == [[kinds[p["kind"]] for p in s["panels"]] for s in spec["sections"]]
    tre = sections[0]["panels"][0]["config"]
    assert tre == {"chartTitle": "TRE [mm]", "xAxis": "trainer/global_step", "metrics": ["tre/mean"]}
    [shown] = content["runSets"]
    assert '"experiment"' in json.dumps(shown["filters"]) and '["idir", "cidir"]' in json.dumps(shown["filters"])


@OLD_STYLE
def test_with_an_account_the_workspace_is_made_and_later_brought_up_to_date(
    run: Run, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what stands in for W&B's server: its answers to the two requests that there are."""
    internal = pytest.importorskip(
        "wandb_workspaces.workspaces.internal", reason="wandb-workspaces is in the dev extra"
    )
    views: list[Any] = []

    def save(view: Any) -> dict[str, Any]:
        views.append(view)
        return {"upsertView": {"view": {"name": view.name, "id": view.id or "id1"}}}

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_ENTITY", "lab")
    monkeypatch.setattr(internal, "upsert_view2", save)
    monkeypatch.setattr(
        internal.View, "from_name", classmethod(lambda cls, *_: views[-1].model_copy(update={"id": "id1"}))
    )
    monkeypatch.setattr("wandb_workspaces.workspaces.interface.get_app_url", lambda _: "https://wandb.ai")
    monkeypatch.setattr("wandb.Api", lambda *_: None)
    code, out, err = run("idir", "--out", "d")
    assert code == 0, err
    url = json.loads(Path("d/workspace.json").read_text(encoding="utf-8"))["url"]
    assert url.startswith("https://wandb.ai/lab/medinr?nw=") and url in out
    assert not views[0].id, "a new view"
    for again in (("idir", "--out", "d"), ("--spec", "d/workspace.json")):
        code, out, err = run(*again)
        assert code == 0, err
        assert url in out and views[-1].id == "id1" and views[-1].name == views[0].name, "the same view"

    def refuse(view: Any) -> dict[str, Any]:
        raise ValueError("permission\ndenied")

    monkeypatch.setattr(internal, "upsert_view2", refuse)
    code, _, err = run("idir", "--out", "e")
    assert code == 2 and len(err.splitlines()) == 1 and "found: permission denied" in err
    assert Path("e/dashboard.html").exists() and Path("e/workspace.json").exists(), "what was made without W&B is there"


# -- the command ---------------------------------------------------------------------------------------------------


def test_without_an_account_there_is_a_page_and_a_specification(run: Run, cohort: Path) -> None:
    (cohort / "idir" / "20260101-000010" / "wandb" / "offline-run-1").mkdir(parents=True)
    code, out, err = run("idir", "--out", "d")
    assert code == 0, err
    assert {p.name for p in Path("d").iterdir()} == {"dashboard.html", "workspace.json"}
    assert "(WANDB_MODE=offline); later: medinr dashboard --spec d/workspace.json" in out
    assert "not sent yet: runs/idir/20260101-000010/wandb/offline-run-1;" in out
    assert json.loads(Path("d/workspace.json").read_text(encoding="utf-8"))["experiments"] == ["idir"]
    code, out, _ = run("idir", "--out", "e", "--wandb", "false", "--project", "p", "--entity", "lab")
    assert code == 0 and "later" not in out and "not sent" not in out
    written = json.loads(Path("e/workspace.json").read_text(encoding="utf-8"))
    assert (written["project"], written["entity"]) == ("p", "lab")


def test_an_experiment_has_a_specification_before_its_first_run(run: Run) -> None:
    Path("cidir_x.yaml").write_text("model: {class_path: C, init_args: {conditioned: [bending]}}\n")
    code, out, err = run("--config", "cidir_x.yaml", "--out", "d")
    assert code == 0, err
    assert "no run yet" in out and [p.name for p in Path("d").iterdir()] == ["workspace.json"]
    spec = read_specification("d/workspace.json")
    assert spec["experiments"] == ["cidir_x"] and panels(spec, "curve")


CALLS = {
    (): "--out: missing",
    ("--out", "d"): "RUN: expected an experiment",
    ("nothing", "--out", "d"): "nothing: expected an experiment with runs in runs",
    ("--config", "none.yaml", "--out", "d"): "none.yaml: expected a file",
    ("--config", "list.yaml", "--out", "d"): "list.yaml: expected an experiment with a model",
    ("--spec", "none.json"): "none.json: expected a file",
    ("idir", "--spec", "none.json"): "--spec: expected to stand alone",
    ("--spec", "good.json"): "good.json: expected to make the workspace, found: WANDB_MODE=offline; nothing was sent",
    ("idir", "--out", "list.yaml"): "list.yaml: expected a folder that can be written to",
}


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_mistakes_are_one_line(run: Run, cohort: Path, call: tuple[str, ...]) -> None:
    Path("list.yaml").write_text("- 1\n")
    write_specification(Path("good.json"), specification([], ["idir"], "medinr"))
    code, out, err = run(*call)
    assert code == 2 and out == ""
    assert err.startswith("medinr: error: ") and len(err.splitlines()) == 1, err
    assert CALLS[call] in err, err
    assert not Path("d").exists()
