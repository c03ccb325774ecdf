"""Whole runs through the real command: folders, results, continuation after a kill, Ctrl-C, tracking, silence."""

import csv
import json
import signal
import struct
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medinr.callbacks import runs
from tests.medinr.tiny_runs import MOTION, Run, calls, start, wait_for, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a pair of images, landmarks, labels and tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return calls(capsys)


def only(folder: Path) -> Path:
    [found] = folder.iterdir()
    return found


def test_fit_validate_test_predict_share_one_folder(run: Run, folder: Path) -> None:
    before = {p.name for p in folder.iterdir()}
    code, out, err = run("fit", "--config", "tiny.yaml", "--wandb", "false")
    assert code == 0, err
    assert {p.name for p in folder.iterdir()} == before | {"runs"}, "nothing in the working directory itself"
    place = only(folder / "runs" / "tiny")
    assert str(Path("runs") / "tiny" / place.name) in out
    assert {"config.yaml", "metrics.csv", "finished", "checkpoints", "figures"} == {p.name for p in place.iterdir()}
    assert [p.name for p in (place / "checkpoints").iterdir()] == ["last.ckpt"]
    fitted = (place / "config.yaml").read_text(encoding="utf-8")
    rows = (place / "metrics.csv").read_text(encoding="utf-8")
    for name in ("tre/mean", "dsc/mean", "image/psnr", "folding/percent", "loss/bending", "costs/seconds"):
        assert name in rows.split("\n")[0].split(",")

    code, out, err = run("validate", "--config", "tiny.yaml", "--wandb", "false")
    assert code == 0, err
    assert "TRE" in out or "tre/mean" in out

    # The run's own configuration serves as well as the experiment's.
    code, out, err = run("test", "--config", str(place / "config.yaml"), "--wandb", "false", "--report", "true")
    assert code == 0, err
    page = (place / "results" / "report.html").read_text(encoding="utf-8")
    assert "model.field.hidden" in page and "TRE, mean" in page
    metrics = json.loads((place / "results" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["tre/mean"] < 0.7 * metrics["tre/initial_mean"], "so the checkpoint was used"
    assert metrics["tre/initial_mean"] == pytest.approx(np.linalg.norm(MOTION), abs=1e-3)

    code, out, err = run("predict", "--config", "tiny.yaml", "--wandb", "false", "--out", "there", "--report", "true")
    assert code == 0, err
    assert "there" in out and "report.html" in (folder / "there" / "files.json").read_text(encoding="utf-8")
    expected = {
        "warped.nii.gz",
        "displacement.nii.gz",
        "jacobian_determinant.nii.gz",
        "metrics.json",
        "transform.ckpt",
        "report.html",
    }
    assert expected <= {p.name for p in (folder / "there").iterdir()}
    assert list((folder / "there" / "figures").glob("*.png"))
    field = nib.load(folder / "there" / "displacement.nii.gz").get_fdata()[5:-5, 5:-5, 5:-5, 0].mean((0, 1, 2))
    assert np.abs(field - np.array([-2, -1, 0])).max() < 0.7, "LPS"
    assert (place / "config.yaml").read_text(encoding="utf-8") == fitted
    assert (place / "metrics.csv").read_text(encoding="utf-8") == rows
    assert only(folder / "runs" / "tiny") == place


def test_checkpoint_rebuilds_with_plain_loading_and_holds_the_configuration(run: Run, folder: Path) -> None:
    assert run("fit", "--config", "tiny.yaml", "--wandb", "false", "--trainer.max_steps", "4")[0] == 0
    path = only(folder / "runs" / "tiny") / runs.LAST
    found = torch.load(path, weights_only=True)
    config = found["medinr"]["config"]
    assert config["experiment"] == "tiny"
    assert config["trainer"]["max_steps"] == 4
    assert config["model"]["init_args"]["field"]["init_args"]["hidden"] == [32, 32]
    assert run("predict", "--config", "tiny.yaml", "--wandb", "false", "--out", "there")[0] == 0
    carried = torch.load(folder / "there" / "transform.ckpt", weights_only=True)["medinr"]
    assert carried["config"]["experiment"] == "tiny" and carried["method"] == found["medinr"]["method"]
    from medinr.methods import PairRegistration

    method = PairRegistration.load_from_checkpoint(path)
    assert torch.equal(method.state_dict()["map.field.head.weight"], found["state_dict"]["map.field.head.weight"])


def test_a_finished_run_takes_more_steps_in_its_own_folder(run: Run, folder: Path) -> None:
    common = ("fit", "--config", "tiny.yaml", "--wandb", "false")
    assert run(*common, "--trainer.max_steps", "4")[0] == 0
    place = only(folder / "runs" / "tiny")
    code, _, err = run(*common, "--trainer.max_steps", "8", "--ckpt_path", str(place / runs.LAST))
    assert code == 0, err
    assert only(folder / "runs" / "tiny") == place and runs.is_finished(place)
    assert torch.load(place / runs.LAST, weights_only=True)["global_step"] == 8


def test_a_checkpoint_of_another_configuration_is_refused(run: Run, folder: Path) -> None:
    quick = ("--config", "tiny.yaml", "--wandb", "false", "--trainer.max_steps", "2")
    assert run("fit", *quick)[0] == 0
    path = str(only(folder / "runs" / "tiny") / runs.LAST)
    for command in ("fit", "test"):
        code, _, err = run(command, *quick, "--ckpt_path", path, "--model.field.hidden", "[16,16]")
        assert code == 2 and len(err.splitlines()) == 1
        assert "another model" in err and "config.yaml" in err
    nib.save(nib.Nifti1Image(nib.load("fixed.nii.gz").get_fdata()[:-1], np.diag([2.0, 2, 2, 1])), "small.nii.gz")
    less = ("--data.fixed", "small.nii.gz", "--data.fixed_labels", "null", "--data.moving_labels", "null")
    code, _, err = run("test", *quick, *less)
    assert code == 2 and "none (1 there" in err, "another image is another run"
    code, _, err = run("test", *quick, *less, "--ckpt_path", path)
    assert code == 2 and "another fixed image" in err


def test_a_killed_fit_continues_to_the_weights_of_an_unbroken_one(run: Run, folder: Path) -> None:
    options = ("--config", "tiny.yaml", "--wandb", "false", "--trainer.max_steps", "200")
    process = start(folder, "fit", *options, "--experiment", "cut")
    wait_for("runs/cut/*/checkpoints/last.ckpt", folder, process)
    process.kill()
    process.communicate()
    place = only(folder / "runs" / "cut")
    step = torch.load(place / runs.LAST, weights_only=True)["global_step"]
    assert 0 < step < 200 and not runs.is_finished(place), "killed too late: take more steps"

    assert run("fit", *options, "--experiment", "whole")[0] == 0
    code, _, err = run("fit", *options, "--experiment", "cut", "--ckpt_path", "last")
    assert code == 0, err
    assert only(folder / "runs" / "cut") == place, "continued in its folder"
    assert runs.is_finished(place)
    unbroken = torch.load(only(folder / "runs" / "whole") / runs.LAST, weights_only=True)["state_dict"]
    continued = torch.load(place / runs.LAST, weights_only=True)["state_dict"]
    assert max((unbroken[k] - continued[k]).abs().max().item() for k in unbroken) <= 1e-6
    with (place / "metrics.csv").open(newline="") as stream:
        steps = [int(row["step"]) for row in csv.DictReader(stream)]
    assert steps == sorted(steps) and steps[0] <= step < steps[-1], "metrics from before and after"
    code, _, err = run("fit", *options, "--experiment", "cut", "--ckpt_path", "last")
    assert code == 2 and "unfinished run" in err and len(err.splitlines()) == 1


def test_interrupt_keeps_the_last_state(folder: Path) -> None:
    process = start(folder, "fit", "--config", "tiny.yaml", "--wandb", "false", "--trainer.max_steps", "100000")
    wait_for("runs/tiny/*/checkpoints/last.ckpt", folder, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "medinr: interrupted"
    assert "Traceback" not in err
    place = only(folder / "runs" / "tiny")
    assert torch.load(place / runs.LAST, weights_only=True)["global_step"] > 0
    assert not runs.is_finished(place)


def test_an_offline_run_holds_configuration_metrics_and_images(run: Run, folder: Path) -> None:
    code, out, err = run("fit", "--config", "tiny.yaml")
    assert code == 0, err
    assert [line for line in out.splitlines() if "offline" in line] == [out.splitlines()[-1]], "said once"
    place = only(folder / "runs" / "tiny")
    [tracked] = place.glob("wandb/offline-run-*")
    files = tracked / "files"
    for name in ("config.yaml", "metrics.csv"):
        assert (files / f"medinr-{name}").read_text(encoding="utf-8") == (place / name).read_text(encoding="utf-8")
    images = list((files / "media" / "images").glob("registration_*.png"))
    assert images and all(i.read_bytes()[1:4] == b"PNG" for i in images)
    records = read_wandb(next(tracked.glob("*.wandb")))
    config = {u.key: json.loads(u.value_json) for r in records for u in r.run.config.update}
    assert config["model"]["init_args"]["field"]["class_path"] == "medinr.fields.SIREN"
    assert config["experiment"] == "tiny"
    [name] = {r.run.display_name for r in records if r.run.display_name}
    assert name == f"tiny/{place.name}"
    logged = {".".join(i.nested_key) or i.key for r in records for i in r.history.item}
    assert {"loss", "tre/mean", "dsc/mean", "image/psnr", "folding/percent", "raw/barrier"} <= logged


def test_an_evaluation_tracks_a_table_and_a_picture(run: Run, folder: Path) -> None:
    assert run("fit", "--config", "tiny.yaml", "--wandb", "false", "--trainer.max_steps", "4")[0] == 0
    code, _, err = run("test", "--config", "tiny.yaml")
    assert code == 0, err
    [tracked] = only(folder / "runs" / "tiny").glob("wandb/offline-run-*")
    [table] = (tracked / "files" / "media" / "table").glob("cases_*.json")
    content = json.loads(table.read_text(encoding="utf-8"))
    assert content["columns"][0] == "case" and "tre/mean" in content["columns"]
    assert len(content["data"]) == 1 and content["data"][0][0] == "pair"
    assert list((tracked / "files" / "media" / "images").glob("registration_*.png"))


def read_wandb(path: Path, seconds: float = 30) -> list[Any]:
    """All records of an offline run that has ended; W&B's own process may write the last ones a moment later."""
    end = time.monotonic() + seconds
    records = parse_wandb(path.read_bytes())
    while not any(r.HasField("exit") for r in records) and time.monotonic() < end:
        time.sleep(0.05)
        records = parse_wandb(path.read_bytes())
    return records


def parse_wandb(data: bytes) -> list[Any]:
    """Records of a LevelDB log (blocks of 32 KiB; checksum, length and kind before each piece)."""
    from wandb.proto import wandb_internal_pb2

    position, piece, records = 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no piece begins in the last bytes of a block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):  # being written
            break
        piece += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            records.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return records


def test_a_run_is_quiet(folder: Path) -> None:
    process = start(folder, "fit", "--config", "tiny.yaml")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.strip()]
    assert all(line.startswith("fit:") for line in lines), err
    assert lines[-1].startswith("fit: 100%") and "loss=" in lines[-1] and "TRE=" in lines[-1]
    assert len(out.splitlines()) <= 10 and "results are in" in out


def test_own_logger_and_callbacks_are_used(run: Run, folder: Path) -> None:
    (folder / "more.yaml").write_text(
        "trainer:\n  logger: {class_path: CSVLogger, init_args: {save_dir: logs, name: mine}}\n"
        "  callbacks:\n  - {class_path: ModelCheckpoint, init_args: {monitor: tre/mean, filename: best}}\n"
    )
    code, out, err = run("fit", "--config", "tiny.yaml", "--config", "more.yaml")
    assert code == 0, err
    assert "Weights & Biases" not in out
    place = only(folder / "runs" / "more")
    assert {p.name for p in (place / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert list((folder / "logs" / "mine").rglob("metrics.csv"))
    code, out, err = run("test", "--config", "tiny.yaml", "--experiment", "more", "--ckpt_path",
                         str(place / "checkpoints" / "best.ckpt"), "--wandb", "false")  # fmt: skip
    assert code == 0, err
    assert (place / "results" / "metrics.json").exists()
