"""`--init` with displacements: the lattice starts where another registration, or another program, has ended."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import medinr
from medinr import io
from medinr.commands.presets import PRESETS, Preset
from medinr.commands.register import initial
from medinr.errors import UserError
from medinr.fields import CubicLattice
from medinr.methods import Refinement
from medinr.space import transform_points
from tests.medinr import pairs

ONE_STEP = Preset((16,), 64, 2, Refinement(shrinks=(1.0,), steps=(1,), lr=1e-6))


def written_truth(path: Path) -> Path:
    """The true warp of the small pair, as a displacement file."""
    world = transform_points(pairs.CUBE.voxel_to_world, pairs.CUBE.voxels().double())
    io.write_displacement(path, (pairs.warp(world) - world).float().reshape(*pairs.CUBE.shape, 3), pairs.CUBE)
    return path


def test_approximation_repeats_what_the_lattice_can_hold() -> None:
    field, again = CubicLattice((12.0,), unit="mm"), CubicLattice((48.0, 12.0), unit="mm")
    for lattice in (field, again):
        lattice.cover(pairs.CUBE)
    torch.nn.init.normal_(field.levels[0], std=0.1)
    again.approximate(lambda x: field(x))
    x: Tensor = 2 * torch.rand(200, 3) - 1
    assert (again(x) - field(x)).abs().max() < 1e-4


@pytest.mark.parametrize("suffix", ["nii.gz", "h5"])
def test_the_fit_starts_at_the_given_displacement(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", ONE_STEP)
    start = written_truth(tmp_path / "truth.nii.gz")
    if suffix == "h5":
        pytest.importorskip("SimpleITK")
        displacement, domain = io.read_displacement(start)
        start = tmp_path / "truth.h5"
        io.write_composite(start, torch.eye(4, dtype=torch.float64), displacement, domain)
    pair = pairs.pair()
    result = medinr.register(pair.fixed, pair.moving, preset="fast", init=str(start), device="cpu")
    world = pairs.points()
    error = (result.transform(world) - pairs.warp(world)).norm(dim=1)
    assert error.mean() < 0.1, "one step of next to no length: what is found is what was given"
    assert (pairs.warp(world) - world).norm(dim=1).mean() > 2


def test_a_network_refuses_displacements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "fast", ONE_STEP)
    pair = pairs.pair()
    start = written_truth(tmp_path / "truth.nii.gz")
    with pytest.raises(UserError, match="expected a linear transform with --similarity ncc"):
        medinr.register(pair.fixed, pair.moving, preset="fast", similarity="ncc", init=str(start), device="cpu")


@pytest.mark.parametrize(("side", "told"), [(-1.0, 1), (1.0, 0)])
def test_a_start_that_mirrors_is_told(tmp_path: Path, side: float, told: int) -> None:
    (tmp_path / "start.txt").write_text(f"{side} 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        matrix, residual = initial(pairs.pair(), str(tmp_path / "start.txt"))
    assert float(matrix[0, 0]) == side and residual is None
    assert ["it mirrors the image" in str(w.message) for w in found] == [True] * told
