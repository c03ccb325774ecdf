"""Run folders, checkpoints' random states, metrics files, previews: the parts, one by one."""

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medinr.callbacks import MetricsFile, RandomStates, runs
from medinr.callbacks.checkpoints import check_checkpoint, check_fits, check_grid, random_states
from medinr.callbacks.logs import why_offline
from medinr.callbacks.results import thinned
from medinr.data.pair import Pair
from medinr.errors import UserError
from medinr.space import Domain, Image, transform_points

NOW = time.strptime("2026-02-03 04:05:06", "%Y-%m-%d %H:%M:%S")


def fill(run: Path, data: dict[str, Any], finished: bool) -> Path:
    (run / "checkpoints").mkdir()
    (run / runs.LAST).write_bytes(b"x")
    runs.write_config(run, f"data: {data}\n")
    if finished:
        (run / runs.FINISHED).touch()
    return run


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path) -> None:
    names = [runs.new_run(tmp_path, "a", NOW).name for _ in range(3)]
    assert names == ["20260203-040506", "20260203-040506-2", "20260203-040506-3"]


def test_the_newest_run_is_found_by_number_data_and_state(tmp_path: Path) -> None:
    made = [fill(runs.new_run(tmp_path, "a", NOW), {"case": i % 2}, finished=i == 10) for i in range(12)]
    fill(runs.new_run(tmp_path, "b", NOW), {"case": 1}, finished=False)
    runs.new_run(tmp_path, "a", NOW)  # no checkpoint: nothing to go on from
    assert runs.newest_run(tmp_path, "a") == made[11]
    assert runs.newest_run(tmp_path, "a", {"case": 0}) == made[10]
    assert runs.newest_run(tmp_path, "a", {"case": 0}, unfinished=True) == made[8]
    assert runs.newest_run(tmp_path, "a", {"case": 7}) is None
    assert runs.newest_run(tmp_path, "none") is None


def test_run_of_a_checkpoint(tmp_path: Path) -> None:
    run = fill(runs.new_run(tmp_path, "a", NOW), {}, finished=True)
    assert runs.run_of_checkpoint(run / runs.LAST) == run
    copy = tmp_path / "transform.ckpt"
    copy.touch()
    assert runs.run_of_checkpoint(copy) is None


def test_configurations_are_not_overwritten(tmp_path: Path) -> None:
    written = [runs.write_config(tmp_path, f"a: {i}\n") for i in range(3)]
    assert [p.name for p in written] == ["config.yaml", "config-2.yaml", "config-3.yaml"]
    assert runs.read_config(tmp_path) == {"a": 0}


def test_discard_leaves_other_runs_alone(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    first, second = runs.new_run(root, "a", NOW), runs.new_run(root, "a", NOW)
    runs.discard(second)
    assert first.exists() and not second.exists()
    runs.discard(first)
    assert not root.exists() and tmp_path.exists()


def draws() -> list[float]:
    numpy = [float(np.random.rand()), float(np.random.randn())]  # noqa: NPY002 - the global state is what is kept
    return [random.random(), random.gauss(0, 1), float(torch.rand(())), *numpy]


def test_random_states_come_back_through_a_plain_checkpoint(tmp_path: Path) -> None:
    draws()  # leaves half a pair of Gaussians behind in both libraries
    torch.save(RandomStates().state_dict(), tmp_path / "states.pt")
    expected = draws()
    again = RandomStates()
    again.load_state_dict(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draws() != expected
    again.on_train_start(None, None)  # type: ignore[arg-type]
    assert draws() == expected


def test_metrics_file_keeps_the_rows_before_the_checkpoint(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    for step in (0, 10, 20):
        first.log_metrics({"loss": 1.0 + step}, step)
    first.log_metrics({"tre/mean": 5.0}, 20)
    again = MetricsFile(tmp_path, resume_step=20)
    again.log_metrics({"loss": 100.0}, 20)
    again.finalize("success")
    lines = (tmp_path / "metrics.csv").read_text(encoding="utf-8").split()
    assert lines == ["loss,step", "1.0,0", "11.0,10", "100.0,20"]


def test_why_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert why_offline() == "WANDB_MODE=offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert why_offline() is None
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert why_offline() == "no account"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password key\n")
    assert why_offline() == "no network"  # tests cannot leave this machine
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert why_offline() == "no network"


def test_foreign_and_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    with pytest.raises(UserError, match="no such file"):
        check_checkpoint(file)
    file.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UserError, match="cannot read"):
        check_checkpoint(file)
    torch.save({"state_dict": {}}, file)
    with pytest.raises(UserError, match="another program"):
        check_checkpoint(file)
    with pytest.raises(UserError, match="a folder"):
        check_checkpoint(tmp_path)


def test_checkpoint_of_another_model_or_grid_is_refused() -> None:
    path = Path("a.ckpt")

    def written(model: torch.nn.Module) -> dict[str, Any]:
        return {"state_dict": model.state_dict(), "medinr": {"method": {"class_path": "torch.nn.Linear"}}}

    there, here = torch.nn.Linear(3, 4), torch.nn.Linear(3, 5)
    with pytest.raises(UserError, match=r"bias is \(4,\) in the checkpoint, \(5,\) in the model"):
        check_fits(path, written(there), here)
    with pytest.raises(UserError, match="absent in the model"):
        check_fits(path, written(here), torch.nn.Linear(3, 5, bias=False))
    with pytest.raises(UserError, match="expected Identity, found Linear"):
        check_fits(path, written(here), torch.nn.Identity())
    check_fits(path, written(here), here)
    domain = Domain.of((4, 5, 6), torch.eye(4))
    checkpoint = {"medinr": {"domain": domain.to_dict()}}
    check_grid(path, checkpoint, domain)
    with pytest.raises(UserError, match="another fixed image"):
        check_grid(path, checkpoint, Domain.of((4, 5, 7), torch.eye(4)))


def test_thinned_pair_lies_where_the_whole_one_lies() -> None:
    affine = torch.tensor([[0.0, 2, 0, 5], [-1.5, 0, 0, 7], [0, 0, 3, -20], [0, 0, 0, 1]], dtype=torch.float64)
    domain = Domain.of((20, 22, 24), affine)
    world = transform_points(affine, domain.voxels().double())
    image = Image(world[:, 0].reshape(1, 20, 22, 24).float(), domain)  # each voxel holds its own world x
    mask = torch.rand(20, 22, 24) > 0.5
    few = thinned(Pair("a", image, image, fixed_mask=mask), 500)
    there = transform_points(few.domain.voxel_to_world, few.domain.voxels().double())
    assert few.domain.n_voxels <= 600
    assert torch.allclose(few.fixed.data.flatten().double(), there[:, 0])
    assert few.fixed_mask is not None and few.fixed_mask.shape == few.domain.shape
    assert few.moving is image
    assert thinned(few, 10**6) is few


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_process_gets_its_own_random_states_back(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(random_states())
    monkeypatch.setattr("medinr.callbacks.checkpoints.rank", lambda: rank)
    again = RandomStates()
    again.load_state_dict({"ranks": states})
    torch.manual_seed(7)
    again.on_train_start(None, None)  # type: ignore[arg-type]
    found = torch.rand(())
    torch.manual_seed(rank if rank < 2 else 7)  # one that was not there before keeps the stream that it was given
    assert found == torch.rand(())
