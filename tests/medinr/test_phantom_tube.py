"""The tube phantom: what it writes is what it says, and the truth is true."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_modules import PairDataModule
from medinr import cli, io
from medinr.errors import UserError
from medinr.fields.warp import resample, resample_labels
from medinr.metrics import dice
from medinr.phantoms.tube import DIAMETER_MM, KINDS, LANDMARKS, NOISE, TubeCase, write_tube_phantom
from medinr.space import Image, transform_points

SIZE = 48


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tube")
    write_tube_phantom(out, size=SIZE)
    return out


def points(case: TubeCase, n: int = 400) -> torch.Tensor:
    """In and around the tube."""
    generator = torch.Generator().manual_seed(0)
    knots = torch.from_numpy(case.line.knots)
    some = torch.randint(len(knots), (n,), generator=generator)
    return knots[some] + 12 * torch.randn(n, 3, generator=generator).double()


@pytest.mark.parametrize("kind", KINDS)
def test_truth_has_an_inverse(kind: str) -> None:
    case = TubeCase(kind)
    x = points(case)
    assert (case.inverse(case.truth(x)) - x).norm(dim=1).max() < 1e-6
    moved = (case.truth(x) - x).norm(dim=1)
    assert moved.max() > 3 if kind != "motionless" else moved.max() == 0


@pytest.mark.parametrize("seed", range(4))
def test_truth_does_not_fold_and_the_tube_is_not_bent_too_strongly(seed: int) -> None:
    case = TubeCase("peristalsis", seed=seed)
    x = points(case)
    step = 1e-4 * torch.eye(3).double()
    columns = [(case.truth(x + d) - case.truth(x - d)) / 2e-4 for d in step]
    det = torch.linalg.det(torch.stack(columns, dim=-1))
    assert det.min() > 0.1 and det.max() < 6
    assert case.line.smallest_radius > 25 and case.line.overlap(DIAMETER_MM / 2) == 0


def test_peristalsis_is_radial_at_the_rings() -> None:
    """At full contraction the wall moves inwards by mean and wave, along the tube by nothing."""
    case = TubeCase("peristalsis")
    wave, _ = case.motions
    ring = (-wave.phase + 4 * np.pi) * wave.wavelength_mm / (2 * np.pi)
    assert 30 < ring < case.line.length - 30
    shift = wave.shift(torch.tensor([[ring, 11.0, 0.0], [ring, 0.0, 5.5], [ring, 20.0, 0.0]]).double())
    assert shift[0].tolist() == pytest.approx([0, -4.5, 0], abs=1e-6)
    assert shift[1].tolist() == pytest.approx([0, 0, -2.25], abs=1e-6)
    assert shift[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_written_field_explains_the_moving_image(root: Path, kind: str) -> None:
    """Warped by the truth, the moving image becomes the fixed one but for noise and interpolation; landmarks agree."""
    fixed, moving = (io.read_image(root / kind / f"{side}.nii.gz") for side in ("fixed", "moving"))
    displacement, domain = io.read_displacement(root / kind / "truth" / "displacement.nii.gz")
    mask = io.read_mask(root / kind / "mask.nii.gz", domain)
    assert domain.same_grid(fixed.domain) and 500 < mask.sum() < 0.1 * domain.n_voxels
    before = (moving.data - fixed.data)[0][mask].std().item()
    after = (resample(moving, domain, displacement) - fixed.data)[0][mask].std().item()
    if kind == "motionless":
        assert before == pytest.approx(NOISE * np.sqrt(2), rel=0.1)
    else:
        assert after < 0.7 * before

    labels = [io.read_labels(root / kind / f"{side}_labels.nii.gz", domain) for side in ("fixed", "moving")]
    carried = resample_labels(labels[1], domain, domain, displacement)
    overlap = dice(carried, labels[0])
    assert set(overlap) == {1, 2} and overlap[2] > 0.75  # voxels of 5 mm
    if kind == "motionless":
        assert torch.equal(labels[0], labels[1])
    else:
        assert overlap[2] > dice(labels[1], labels[0])[2] + 0.01

    p, q = (io.read_points(root / kind / f"{side}_points.csv") for side in ("fixed", "moving"))
    assert len(p) == LANDMARKS
    at = Image(displacement.movedim(-1, 0), domain)
    voxels = transform_points(domain.world_to_voxel, p).round().long()
    assert (at.data[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].T - (q - p)).norm(dim=1).mean() < 1.0
    facts = json.loads((root / kind / "truth" / "parameters.json").read_text(encoding="utf-8"))
    assert facts["landmark_motion_mm"] == pytest.approx((q - p).norm(dim=1).mean().item(), abs=1e-3)
    trace = io.read_points(root / kind / "centreline.csv").numpy()
    gap = np.linalg.norm(trace[:, None] - TubeCase(kind).line.knots, axis=-1).min(1)
    assert 0.1 < gap.mean() < 1.0


def test_kinds_share_the_fixed_image_and_noise_differs(root: Path) -> None:
    images = {kind: [io.read_image(root / kind / f"{s}.nii.gz").data for s in ("fixed", "moving")] for kind in KINDS}
    assert all(torch.equal(images[kind][0], images["peristalsis"][0]) for kind in KINDS)
    assert not torch.equal(*images["motionless"])


def test_same_arguments_same_content(root: Path, tmp_path: Path) -> None:
    write_tube_phantom(tmp_path, ["breathing"], size=SIZE)
    for file in sorted(path for path in (root / "breathing").rglob("*.*") if path.suffix in (".csv", ".json")):
        again = tmp_path / "breathing" / file.relative_to(root / "breathing")
        assert file.read_bytes() == again.read_bytes(), file.name
    one, other = (io.read_image(r / "breathing" / "moving.nii.gz").data for r in (root, tmp_path))
    assert torch.equal(one, other)
    assert not torch.equal(TubeCase("breathing", SIZE, seed=1).landmarks(), TubeCase("breathing", SIZE).landmarks())


def test_it_is_read_as_any_pair(root: Path) -> None:
    folder = root / "peristalsis"
    data = PairDataModule(
        **{name: str(folder / f"{name}.nii.gz") for name in ("fixed", "moving")},
        fixed_mask=str(folder / "mask.nii.gz"),
        fixed_points=str(folder / "fixed_points.csv"),
        moving_points=str(folder / "moving_points.csv"),
    )
    pair = data.pair
    assert pair.fixed_mask is not None and pair.fixed_points is not None and pair.moving_points is not None
    assert pair.fixed.domain.spacing == pytest.approx((5.0, 5.0, 5.0))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    assert cli.main(["phantom", "tube", "--out", str(out), "--size", "32"]) == 0
    assert {folder.name for folder in out.iterdir()} == set(KINDS)
    assert cli.main(["phantom", "tube", "--out", str(tmp_path / "no"), "--cases", "1"]) == 2
    assert "--cases: expected with the layout dirlab only" in capsys.readouterr().err
    assert cli.main(["phantom", "tube", "--out", str(tmp_path / "no"), "--size", "20"]) == 2
    assert not (tmp_path / "no").exists()
    with pytest.raises(UserError, match="kind: expected one of"):
        write_tube_phantom(tmp_path / "no", ["walking"])
