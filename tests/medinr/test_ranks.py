"""Two processes against one: gradients of the same points, whole fits, one run folder, whoever starts them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medinr.ranks import any_rank, from_first, gather, is_first, rank, share, sum_over_ranks, world_size
from tests.medinr import rank_worker

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `rank_worker` found in each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(ROOT / "tests" / "medinr" / "rank_worker.py")]
    running = [
        subprocess.Popen([*command, str(r), "2", str(folder)], env=environment(), stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(2)]


@pytest.mark.parametrize("case", rank_worker.CASES)
def test_two_processes_have_the_gradient_of_one(two: list[dict[str, Any]], case: str) -> None:
    one = rank_worker.step(case)
    assert (two[0][case]["loss"] + two[1][case]["loss"]) / 2 == pytest.approx(one["loss"], abs=1e-5)
    scale = max(g.abs().max().item() for g in one["gradients"].values())
    assert scale > 1e-3
    for name, gradient in one["gradients"].items():
        for found in two:
            difference = (found[case]["gradients"][name] - gradient).abs().max().item()
            assert difference < 1e-5 * max(scale, 1), name


def test_an_average_of_shares_would_not_do() -> None:
    """So the test above can fail: the mean of two halves' NCC has another gradient."""
    host = rank_worker.Loss(rank_worker.method("NCC"))
    x = rank_worker.points()
    whole = torch.autograd.grad(host(x.reshape(-1, 3)), list(host.parameters()))
    n = x.shape[1] // 2
    halves = sum(host(part.reshape(-1, 3)) for part in (x[:, :n], x[:, n:])) / 2
    mean = torch.autograd.grad(halves, list(host.parameters()))
    assert max((a - b).abs().max().item() for a, b in zip(whole, mean, strict=True)) > 1e-3


def test_helpers_in_two_processes(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["numbers"] == {
            "share": 4, "any": [False, True], "first": [0.0], "gather": ["rank 0", "rank 1"],
        }  # fmt: skip
    assert "alone" in two[0], "without gradients no process waits for another"


def test_helpers_in_one_process() -> None:
    x = torch.rand(3, requires_grad=True)
    assert sum_over_ranks(x) is x and from_first(x) is x
    assert (world_size(), rank(), share(7), gather(3)) == (1, 0, 7, [3])
    assert any_rank(True) and not any_rank(False)


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),  # torchrun, second machine
        ({"LOCAL_RANK": "1"}, False),  # Lightning's own copy
        ({"NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
    ],
)
def test_who_is_first(variables: dict[str, str], first: bool) -> None:
    assert is_first(variables) == first
