"""`medinr cohort --batch`: one process for several fits, whose files are those of fits of their own."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from medinr.callbacks import runs
from medinr.cohorts import claims
from medinr.cohorts.plan import Fit, copies, folder_of, make_batches, plan, write_batches, write_plan
from medinr.cohorts.state import JOB, read_json, read_state, write_json, write_state
from medinr.cohorts.worker import BatchWork, Work, work_of
from medinr.commands import batch as command
from tests.medinr import tiny_runs
from tests.test_cohort_command import FILES

FEW = ["--trainer.max_steps", "8", "--data.steps_per_epoch=4", "--trainer.log_every_n_steps=2"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tiny_runs.Run:
    """Call medinr in a folder with tiny.yaml and pairs of images in anna and bert, the second one larger."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", tiny_runs.environment()["PYTHONPATH"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, size in (("anna", (20, 20, 18)), ("bert", (20, 22, 19))):
        (tmp_path / name).mkdir()
        tiny_runs.write(tmp_path / name, size)
    (tmp_path / "tiny.yaml").write_text(tiny_runs.TINY, encoding="utf-8")

    return tiny_runs.calls(capsys)


def rows_of(run_folder: Path) -> list[dict[str, float]]:
    """metrics.csv without costs, and what a picture during the fit says."""
    with (run_folder / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    known = ("epoch", "step", "loss", "raw/", "overlap", "tre/")
    found = [{k: float(v) for k, v in row.items() if v and k.startswith(known)} for row in rows]
    return [row for row in found if set(row) - {"epoch", "step"}]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(run_folder / runs.LAST, weights_only=True)["state_dict"]
    return found


def planned(folder: Path, cases: list[str | None]) -> Path:
    """A cohort as `medinr cohort --batch 2` plans it; the folder of its batch."""
    overrides = [*FILES, *FEW, "--wandb=false"]
    config = [folder / "tiny.yaml"]
    out = folder / "out"
    some = plan(copies(out, config), overrides, cases, [5], {})
    write_plan(out, config, overrides, some)
    [batch] = write_batches(out, make_batches(out, some, 2)).values()
    return batch


def test_a_batch_leaves_what_single_fits_leave(run: tiny_runs.Run, tmp_path: Path) -> None:
    batch = planned(tmp_path, ["anna", "bert"])
    members = [Path(m) for m in read_json(batch / JOB)["members"]]
    assert command.main([str(batch), *(m.name for m in members)]) == 0
    assert not list(batch.rglob("*.ckpt")), "nothing is kept twice"
    for folder in members:
        [batched] = (folder / "tiny").iterdir()
        arguments = read_json(folder / JOB)["arguments"]
        code, _, err = run("fit", *arguments, "--runs", "alone")
        assert code == 0, err
        single = sorted((tmp_path / "alone" / "tiny").iterdir())[-1]
        for name in (runs.CONFIG, runs.FINISHED):
            here, there = ((f / name).read_text(encoding="utf-8") for f in (batched, single))
            assert here.replace(str(folder), "alone") == there, name
        a, b = weights(batched), weights(single)
        assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
        assert (a["map.field.head.weight"].abs().max() > 1e-4).item(), "it has moved"
        rows, expected = rows_of(batched), rows_of(single)
        assert len(rows) == len(expected) > 2
        for row, want in zip(rows, expected, strict=True):
            assert row.keys() == want.keys()
            assert all(row[k] == pytest.approx(want[k], rel=1e-4, abs=1e-5) for k in row)
        kept = [torch.load(f / runs.LAST, weights_only=True) for f in (batched, single)]
        assert kept[0].keys() == kept[1].keys() and kept[0]["medinr"].keys() == kept[1]["medinr"].keys()
        states = [c["callbacks"]["RandomStates"]["ranks"][0]["torch"] for c in kept]
        assert torch.equal(*states), "both would draw the same points next"
        state = read_state(folder)
        assert state["state"] == "open" and 0 < state["seconds"] < 600
    # What the batch left goes on alone.
    last = str(batched / runs.LAST)
    code, _, err = run("fit", *arguments, "--trainer.max_steps", "12", "--runs", str(folder), "--ckpt_path", last)
    assert code == 0, err
    assert torch.load(last, weights_only=True)["global_step"] == 12


@pytest.mark.slow
def test_the_command_fits_as_one_and_tests_each(run: tiny_runs.Run, tmp_path: Path) -> None:
    words = ["--config", "tiny.yaml", "--cases", "anna,bert", *FILES, *FEW, "--wandb", "false", "--batch", "2"]
    code, out, err = run("cohort", *words)
    assert code == 0, err
    assert "1 batch(es) of up to 2 fits" in out and "2 fit(s) are done, 0 failed" in out
    place = tmp_path / "runs" / "cohorts" / "tiny"
    [log] = place.glob("batches/*/log.txt")
    assert log.read_text(encoding="utf-8").count("$ ") == 1, "one process fitted both"
    for case in ("anna", "bert"):
        folder = place / "fits" / f"{case}_seed0"
        commands = [line for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines() if line[:2] == "$ "]
        assert len(commands) == 1 and " test " in commands[0]
        [found] = (folder / "tiny").iterdir()
        metrics = json.loads((found / "results" / "metrics.json").read_text(encoding="utf-8"))
        assert np.isfinite(metrics["tre/mean"])
    code, out, _ = run("cohort", *words)
    assert code == 0 and "batch(es)" not in out and "2 fit(s) are done" in out, "nothing is done twice"


MISTAKES = {
    "tracking": ([], "--batch: expected --wandb false, found true"),
    "clipping": (["--wandb=false", "--trainer.gradient_clip_val=1"], "trainer.gradient_clip_val: expected its default"),
    "network": (["--wandb=false", "--model.field=MLP"], "expected plain SIREN networks in a batch, found MLP"),
    "number": (["--batch", "0"], "--batch: expected 1 or more, got 0"),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_what_cannot_be_batched_is_one_line(run: tiny_runs.Run, tmp_path: Path, name: str) -> None:
    words, expected = MISTAKES[name]
    given = words if "--batch" in words else [*words, "--batch", "2"]
    code, out, err = run("cohort", "--config", "tiny.yaml", "--cases", "anna,bert", *FILES, *given)
    assert code == 2 and out == "" and err.count("\n") == 1 and expected in err, err
    assert not (tmp_path / "runs").exists()


# -- who is in a batch, and what its worker does -----------------------------------------------------------------------


def fits(n: int, setting: str = "") -> list[Fit]:
    settings = {"model.points": setting} if setting else {}
    return [Fit(f"case{i}{setting}", str(i), 0, settings, ("--a=1",)) for i in range(1, n + 1)]


def test_batches_hold_new_fits_of_one_setting(tmp_path: Path) -> None:
    some = [*fits(5), *fits(2, "100"), *fits(1, "200")]
    names = [[fit.name for fit in group] for group in make_batches(tmp_path, some, 2)]
    assert names == [["case1", "case2"], ["case3", "case4"], ["case1100", "case2100"]], "none is alone"
    write_state(folder_of(tmp_path, some[0]), "done", 1.0)
    checkpoint = folder_of(tmp_path, some[1]) / "tiny" / "1" / runs.LAST
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert claims.take(folder_of(tmp_path, some[2])) is not None
    [group] = make_batches(tmp_path, some[:5], 5)
    assert [fit.name for fit in group] == ["case4", "case5"]


def batch_of(tmp_path: Path, script: str) -> Path:
    """A batch of three fits whose command runs a script."""
    some = fits(3)
    for fit in some:
        write_json(folder_of(tmp_path, fit) / JOB, {"arguments": [], "cwd": str(tmp_path), "command": []})
    [folder] = write_batches(tmp_path, [some]).values()
    job = read_json(folder / JOB)
    assert job["command"][1:] == ["-m", command.__name__]
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    write_json(folder / JOB, {**job, "command": [job["command"][0], str(tmp_path / "script.py")]})
    return folder


def test_a_worker_claims_all_fits_of_its_batch(tmp_path: Path) -> None:
    folder = batch_of(tmp_path, "import sys; open('said', 'w').write(' '.join(sys.argv[1:]))")
    first = Path(read_json(folder / JOB)["members"][0])
    held = claims.take(first)
    assert held is not None
    work = work_of(folder)
    assert isinstance(work, BatchWork) and type(work_of(first)) is Work
    assert work.run() == "done"
    assert (tmp_path / "said").read_text(encoding="utf-8").split() == [str(folder), "case2", "case3"]
    assert claims.holder(first) is not None, "another's claim stays"
    others = [Path(m) for m in read_json(folder / JOB)["members"][1:]]
    assert all(claims.count(m) == 1 and claims.holder(m) is None for m in others)
    assert work_of(folder).run() == "done"
    assert all(claims.count(m) == 1 for m in others), "the second call does nothing"


def test_a_batch_that_fails_says_why(tmp_path: Path) -> None:
    script = "import sys; print('medinr: error: trainer.x: no', file=sys.stderr); sys.exit(2)"
    folder = batch_of(tmp_path, script)
    assert work_of(folder).run() == "failed"
    assert read_state(folder)["error"] == "trainer.x: no"
    members = [Path(m) for m in read_json(folder / JOB)["members"]]
    assert all(claims.holder(m) is None and read_state(m)["state"] == "open" for m in members)


def test_values_go_to_the_fit_that_they_are_of() -> None:
    class Kept:
        def __init__(self) -> None:
            self.rows: list[dict[str, float]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append({**metrics, "step": step or 0})

    each = [Kept(), Kept()]
    logger = command.SplitLogger(each)  # type: ignore[arg-type]
    logger.log_metrics({"0/loss": 1.0, "1/loss": 2.0, "0/raw/x": 3.0, "epoch": 0}, 7)
    logger.log_metrics({"0/loss": 4.0, "epoch": 1}, 8)
    logger.log_metrics({"costs/seconds": 9.0}, 9)
    assert each[0].rows == [
        {"loss": 1.0, "raw/x": 3.0, "epoch": 0, "step": 7}, {"loss": 4.0, "epoch": 1, "step": 8},
        {"costs/seconds": 9.0, "step": 9},
    ]  # fmt: skip
    assert each[1].rows == [{"loss": 2.0, "epoch": 0, "step": 7}, {"costs/seconds": 9.0, "step": 9}]


@pytest.mark.slow
def test_a_batch_that_is_killed_goes_on_fit_by_fit(run: tiny_runs.Run, tmp_path: Path) -> None:
    words = ["--config", "tiny.yaml", "--cases", "anna,bert", *FILES, "--wandb", "false", "--batch", "2"]
    long = [*words, "--trainer.max_steps", "400"]
    process = tiny_runs.start(tmp_path, "cohort", *long)
    place = tmp_path / "runs" / "cohorts" / "tiny"
    tiny_runs.wait_for("runs/cohorts/tiny/fits/bert_seed0/tiny/*/checkpoints/last.ckpt", tmp_path, process, 120)
    process.kill()
    [folder] = (place / "batches").iterdir()
    for pid, _ in (claims.holder(folder) or {"pids": []})["pids"]:
        os.kill(pid, 9)
    process.communicate()
    code, out, err = run("cohort", *long)
    assert code == 0 and "batch(es)" not in out and "2 fit(s) are done" in out, err
    for case in ("anna", "bert"):
        [one] = (place / "fits" / f"{case}_seed0" / "tiny").iterdir()
        assert torch.load(one / runs.LAST, weights_only=True)["global_step"] == 400
        steps = [row["step"] for row in rows_of(one) if "loss" in row]
        assert len(steps) == len(set(steps)), "no step is in the table twice"
    shutil.rmtree(place)
