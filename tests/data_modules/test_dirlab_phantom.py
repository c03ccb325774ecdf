"""The data module on the breathing-thorax phantom, whose lungs are known."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_modules import DIRLab, check_root
from medinr.phantoms.thorax import write_dirlab_phantom


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantom")
    write_dirlab_phantom(root, [2], size=64, seed=0, phases=(0, 50))
    return root


@pytest.mark.parametrize(("side", "phase"), [("fixed", "T00"), ("moving", "T50")])
def test_computed_lungs_are_the_true_ones(phantom: Path, side: str, phase: str) -> None:
    truth = np.asarray(nib.load(phantom / f"truth/case2/lung_mask_{phase}.nii.gz").dataobj) > 0
    mask = getattr(DIRLab(str(phantom), 2).pair, f"{side}_mask").numpy()
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.95


def test_landmarks_are_those_of_the_truth(phantom: Path) -> None:
    """World positions from the files agree with the table beside them: axes, base and spacing are read as written."""
    pair = DIRLab(str(phantom), 2).pair
    assert pair.fixed_points is not None and pair.moving_points is not None
    rows = (phantom / "truth/case2/landmarks.csv").read_text(encoding="utf-8").splitlines()
    columns = rows[0].split(",")
    table = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]
    for points, phase in ((pair.fixed_points, "T00"), (pair.moving_points, "T50")):
        true = [[float(r[c]) for c in ("x", "y", "z")] for r in table if r["phase"] == phase and r["set"] == "extreme"]
        # Four decimals of a voxel in the landmark files.
        np.testing.assert_allclose(points.numpy(), np.array(true), atol=1e-3)


def test_crop_and_check(phantom: Path) -> None:
    data = DIRLab(str(phantom), 2, margin_mm=10.0)
    assert data.domain.n_voxels < 0.7 * DIRLab(str(phantom), 2, masks="none").domain.n_voxels
    (line,) = check_root(phantom)
    assert line.startswith("case2: ok: 64x64x") and "300 landmarks" in line
