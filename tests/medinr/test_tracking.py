"""What Weights & Biases gets beside metrics: tables, pictures, artifacts; all of it also in an offline run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from medinr.callbacks import ResultWriter, runs
from medinr.callbacks.artifacts import kept
from tests.medinr.test_cli_runs import read_wandb
from tests.medinr.tiny_runs import Run, calls, write

FEW = ("--trainer.max_steps", "4", "--data.steps_per_epoch", "2")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)

    return calls(capsys)


def tracked(folder: Path) -> list[Path]:
    """Offline runs below a folder."""
    return list(folder.glob("runs/*/*/wandb/offline-run-*"))


def artifacts_of(folder: Path) -> dict[str, Any]:
    """By name, of all runs; W&B makes those of tables by itself."""
    records = [record for run in tracked(folder) for record in read_wandb(next(run.glob("*.wandb")))]
    found = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    return {artifact.name: artifact for artifact in found if artifact.type != "run_table"}


def test_artifacts_hold_checkpoint_and_field_until_they_are_sent(run: Run, tmp_path: Path) -> None:
    assert run("fit", "--config", "tiny.yaml", *FEW, "--artifacts", "true")[0] == 0
    [place] = runs.runs_of(tmp_path / "runs", "tiny")
    found = artifacts_of(tmp_path)["tiny-checkpoint"]
    assert found.type == "model" and set(found.aliases) == {"latest", place.name}
    [entry] = found.manifest.contents
    assert entry.path == "last.ckpt"
    saved = Path(entry.local_path)
    assert saved.is_relative_to(place) and saved.read_bytes() == (place / runs.LAST).read_bytes()

    more = ("--trainer.max_steps", "6", "--data.steps_per_epoch", "2", "--wandb", "false")
    assert run("fit", "--config", "tiny.yaml", *more, "--ckpt_path", str(place / runs.LAST))[0] == 0
    assert torch.load(saved, weights_only=True)["global_step"] == 4, "what is sent later is what was logged"
    assert torch.load(place / runs.LAST, weights_only=True)["global_step"] == 6

    code, _, err = run("predict", "--config", "tiny.yaml", *FEW, "--out", "there", "--artifacts", "true")
    assert code == 0, err
    field = artifacts_of(tmp_path)["tiny-pair-field"]
    names = {e.path: Path(e.local_path) for e in field.manifest.contents}
    assert {"displacement.nii.gz", "transform.ckpt"} <= set(names)
    assert names["displacement.nii.gz"].read_bytes() == (tmp_path / "there" / "displacement.nii.gz").read_bytes()
    assert json.loads(field.metadata)["tre/mean"] > 0


def test_no_artifacts_unless_they_are_asked_for(run: Run, tmp_path: Path) -> None:
    assert run("fit", "--config", "tiny.yaml", *FEW)[0] == 0
    assert artifacts_of(tmp_path) == {}
    code, _, err = run("fit", "--config", "tiny.yaml", "--artifacts", "true", "--wandb", "false")
    assert code == 2 and err.startswith("medinr: error: --artifacts: expected") and len(err.splitlines()) == 1


def test_a_copy_is_made_where_a_further_name_is_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.ckpt").write_text("old")
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    for text in ("old", "new"):
        (tmp_path / "a.ckpt").write_text(text)
        assert kept(tmp_path / "a.ckpt", tmp_path / "sent").read_text() == text


def test_an_offline_evaluation_holds_tables_and_the_curves_over_alpha(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    quick = ("--config", "conditioned.yaml", *FEW)
    assert run("fit", *quick, "--wandb", "false")[0] == 0
    code, _, err = run("test", *quick)
    assert code == 0, err
    [folder] = tracked(tmp_path)
    [place] = runs.runs_of(tmp_path / "runs", "conditioned")
    for source in (place / "config.test.yaml", place / "test" / "metrics.csv"):
        copy = folder / "files" / f"medinr-{source.name}"
        assert copy.read_text(encoding="utf-8") == source.read_text(encoding="utf-8")
    [table] = (folder / "files" / "media" / "table").glob("alpha_search_*.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert content["columns"][:2] == ["alpha", "similarity"] and len(content["data"]) > 5
    assert list((folder / "files" / "media" / "images").glob("alpha_*.png"))
    assert list((folder / "files" / "media" / "table").glob("cases_*.json"))
    records = read_wandb(next(folder.glob("*.wandb")))
    tables = [r.artifact for r in records if r.artifact.type == "run_table"]
    assert {t.name.rpartition("-")[2] for t in tables} == {"alpha_search", "cases"}
    staged = [Path(entry.local_path) for table in tables for entry in table.manifest.contents]
    assert staged and all(path.is_relative_to(place) and path.stat().st_size for path in staged), (
        "not in the home folder"
    )
    assert "WANDB_DATA_DIR" not in os.environ


class Log:
    """A trainer's only logger that remembers tables."""

    def __init__(self) -> None:
        self.tables: list[tuple[str, list[str], list[list[Any]]]] = []

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        self.tables.append((key, columns, data))


def test_the_table_of_cases_has_a_row_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a case has not got what another has."""
    monkeypatch.setattr("medinr.callbacks.logs.WandbLogger", Log)
    log = Log()
    trainer: Any = type("Trainer", (), {"loggers": [log], "is_global_zero": True})()
    writer = ResultWriter(tmp_path)
    for i, metrics in enumerate(({"tre/mean": 1.0}, {"tre/mean": 2.0, "dsc/mean": 0.5})):
        pair: Any = type("Pair", (), {"name": f"case{i + 1}"})()
        evaluation: Any = type("Evaluation", (), {"metrics": metrics})()
        writer._take(trainer, evaluation, pair)
    writer.on_test_end(trainer, None)  # type: ignore[arg-type]
    assert log.tables == [("cases", ["case", "tre/mean", "dsc/mean"], [["case1", 1.0, None], ["case2", 2.0, 0.5]])]
