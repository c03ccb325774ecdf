"""Two phases of a folder of images; the POPI patient as the real one."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from data_modules import FourDCT, check_root
from medinr.data.report import landmark_motion
from medinr.errors import UserError


def write_series(folder: Path, phases: list[int], name: str = "p_T{:02d}.nii.gz") -> None:
    rng = np.random.default_rng(0)
    for phase in phases:
        nib.save(
            nib.Nifti1Image(rng.normal(phase, 1, (6, 6, 6)).astype(np.float32), np.eye(4)), folder / name.format(phase)
        )


def test_phases_are_found_by_pattern(tmp_path: Path) -> None:
    write_series(tmp_path, [0, 50], "{:02d}-P.nii")
    data = FourDCT(str(tmp_path), 50, 0, pattern="{phase:02d}-P.nii", masks="none")
    assert data.pair.fixed.data.mean() == pytest.approx(50, abs=1) and data.pair.moving.data.mean().abs() < 1
    assert data.pair.fixed_mask is None


def test_the_phases_that_are_there_are_named(tmp_path: Path) -> None:
    write_series(tmp_path, [0, 30, 60])
    with pytest.raises(UserError, match="phase 50, found 00, 30, 60"):
        FourDCT(str(tmp_path), 0, 50).prepare_data()
    (tmp_path / "other_T30.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"found 2 \(other_T30"):
        FourDCT(str(tmp_path), 0, 30).prepare_data()
    with pytest.raises(UserError, match="phase"):
        FourDCT(str(tmp_path), 0, 30, pattern="*.nii.gz").prepare_data()
    with pytest.raises(UserError, match="found none"):
        FourDCT(str(tmp_path / "nowhere")).prepare_data()


def test_a_folder_of_masks(tmp_path: Path) -> None:
    write_series(tmp_path, [0, 50])
    masks = tmp_path / "masks"
    masks.mkdir()
    for phase in (0, 50):
        mask = np.zeros((6, 6, 6), np.uint8)
        mask[: 2 + phase // 50] = 1
        nib.save(nib.Nifti1Image(mask, np.eye(4)), masks / f"m_T{phase:02d}.nii.gz")
    pair = FourDCT(str(tmp_path), masks=str(masks)).pair
    assert pair.fixed_mask is not None and pair.fixed_mask.sum() == 72
    assert pair.moving_mask is not None and pair.moving_mask.sum() == 108


def test_no_lungs_is_said(tmp_path: Path) -> None:
    for phase in (0, 50):
        block = np.full((20, 20, 10), -1000, np.float32)
        block[4:16, 4:16] = 40
        nib.save(nib.Nifti1Image(block, np.diag([10.0, 10, 10, 1])), tmp_path / f"p_T{phase:02d}.nii.gz")
    with pytest.raises(UserError, match=r"p_T00\.nii\.gz: expected a thorax CT with lungs"):
        FourDCT(str(tmp_path)).setup()


def test_popi(shared: Path) -> None:
    """End-inhale has more air than end-exhale, and the two differ by breathing inside the fixed lungs."""
    data = FourDCT(str(shared / "data/popi_4dct"), 10, 60)
    pair = data.pair
    assert pair.fixed_mask is not None and pair.moving_mask is not None
    litres = [m.sum().item() * 150 / 1e6 for m in (pair.fixed_mask, pair.moving_mask)]
    assert 4.5 < litres[1] < litres[0] < 6.5
    fixed, moving = (image.data[0].clamp(-1000, 200) for image in (pair.fixed, pair.moving))
    rms = (fixed - moving)[pair.fixed_mask].square().mean().sqrt().item()
    assert rms == pytest.approx(238, rel=0.05)
    assert len(data.check()) == 5


def test_check_root_sees_the_series(shared: Path) -> None:
    (line,) = check_root(shared / "data/popi_4dct")
    assert line.startswith("popi_4dct, phases T00, T10, ") and line.endswith(
        "ok: 100x100x47 at 5x5x6 mm, masks 5.35 and 5.13 litres, no landmarks"
    )


def test_landmark_motion_is_the_distance() -> None:
    a = torch.zeros(2, 3)
    b = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert landmark_motion(a, b).tolist() == [5.0, 0.0]
