"""DIR-LAB: naming habits, sizes, landmarks counted from 1, masks, and what is said when something is wrong."""

import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from data_modules import DIRLab, check_root
from medinr.data import layouts
from medinr.data.dirlab import read_dirlab_image, read_dirlab_landmarks
from medinr.errors import RegistrationWarning, UserError
from medinr.space import transform_points

WriteCase = Callable[..., Path]

HABITS = {
    "case 1 as downloaded": (1, "Case1Pack", "Images/case1_{phase}_s.img", "ExtremePhases/Case1_300_{phase}_xyz.txt"),
    "case 3 as downloaded": (3, "Case3Pack", "Images/case3_{phase}-ssm.img", "ExtremePhases/Case3_300_{phase}_xyz.txt"),
    "case 3 renamed": (3, "Case3Pack", "Images/case3_{phase}_s.img", "ExtremePhases/Case3_300_{phase}_xyz.txt"),
    "case 7 as downloaded": (7, "Case7Pack", "Images/case7_{phase}.img", "ExtremePhases/Case7_300_{phase}_xyz.txt"),
    "case 7 renamed": (7, "Case7Pack", "Images/case7_{phase}_s.img", "extremePhases/case7_300_{phase}_xyz.txt"),
    "case 8": (8, "Case8Deploy", "Images/case8_{phase}.img", "extremePhases/case8_dirLab300_{phase}_xyz.txt"),
    "case 8 renamed": (8, "Case8Pack", "Images/case8_{phase}_s.img", "ExtremePhases/Case8_300_{phase}_xyz.txt"),
    "case 10": (10, "Case10Pack", "Images/case10_{phase}.img", "extremePhases/case10_dirLab300_{phase}_xyz.txt"),
}


@pytest.mark.parametrize("habit", HABITS)
def test_reads_every_naming_habit(write_case: WriteCase, habit: str) -> None:
    case, folder, images, landmarks = HABITS[habit]
    root = write_case(case, folder, images, landmarks)
    data = DIRLab(str(root), case)
    data.prepare_data()
    data.setup("fit")
    assert data.cases == [f"case{case}"]
    assert data.domain.shape == (40, 36, 20)
    assert data.domain.spacing == pytest.approx((8, 8, 10))
    assert data.pair.fixed_points is not None and data.pair.moving_points is not None
    motion = (data.pair.moving_points - data.pair.fixed_points).mean(0)
    torch.testing.assert_close(motion, torch.tensor([0.0, 0.0, -10.0], dtype=torch.float64))


@pytest.mark.parametrize("where", ["above", "itself", "case folder"])
def test_root_may_be_one_level_off(write_case: WriteCase, where: str) -> None:
    root = write_case()
    given = {"above": root.parent, "itself": root, "case folder": root / "Case1Pack"}[where]
    assert DIRLab(str(given)).domain.shape == (40, 36, 20)


def test_the_truth_folder_is_not_read(write_case: WriteCase) -> None:
    root = write_case()
    (root / "truth").mkdir()
    (root / "Case1Pack").rename(root / "truth" / "Case1Pack")
    with pytest.raises(UserError, match="Case1Pack"):
        DIRLab(str(root)).prepare_data()


def test_landmarks_are_counted_from_one(tmp_path: Path) -> None:
    """A landmark row written for a marker voxel reads as the world position of that very voxel."""
    facts = layouts.replace(layouts.dirlab_case(1), shape=(7, 6, 5), spacing=(1.0, 2.0, 2.5))
    stored = np.zeros((7, 6, 5), dtype="<i2")
    stored[4, 2, 3] = 2000
    stored.transpose(2, 1, 0).tofile(tmp_path / "m.img")
    (tmp_path / "m.txt").write_text("5\t3\t4\n")
    image = read_dirlab_image(tmp_path / "m.img", facts, 1024)
    points = read_dirlab_landmarks(tmp_path / "m.txt", image.domain)
    torch.testing.assert_close(points, torch.tensor([[-4.0, -4.0, 7.5]], dtype=torch.float64))  # R, A are negative
    i, j, k = transform_points(image.domain.world_to_voxel, points)[0].round().long().tolist()
    assert image.data[0, i, j, k] == 2000 - 1024
    assert image.data[0].argmax() == (i * 6 + j) * 5 + k


def test_wrong_size_names_bytes_and_remedy(write_case: WriteCase) -> None:
    root = write_case()
    image = root / "Case1Pack/Images/case1_T50_s.img"
    image.write_bytes(image.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"case1_T50_s.img: expected 57600 bytes .*found 57590.*geometry.json"):
        DIRLab(str(root)).setup()


def test_the_published_size_holds_without_geometry(write_case: WriteCase) -> None:
    root = write_case(geometry=False)
    with pytest.raises(UserError, match=f"expected {256 * 256 * 94 * 2} bytes"):
        DIRLab(str(root)).setup()


@pytest.mark.parametrize(
    ("remove", "match"),
    [
        ("Case1Pack/Images/case1_T50_s.img", r"T50, image: expected .*case1_T50_s.img .*-ssm.*found case1_T00_s.img"),
        ("Case1Pack/ExtremePhases/Case1_300_T00_xyz.txt", r"T00, landmarks: .*data.landmarks to none"),
    ],
)
def test_missing_files_are_named(write_case: WriteCase, remove: str, match: str) -> None:
    root = write_case()
    (root / remove).unlink()
    with pytest.raises(UserError, match=match) as error:
        DIRLab(str(root)).prepare_data()
    assert "\n" not in str(error.value)


def test_runs_without_landmarks_and_masks(write_case: WriteCase) -> None:
    root = write_case()
    (root / "Case1Pack/ExtremePhases/Case1_300_T00_xyz.txt").unlink()
    data = DIRLab(str(root), landmarks="none", masks="none")
    assert data.pair.fixed_mask is None and data.pair.moving_mask is None and data.pair.fixed_points is None
    assert "landmarks: none" in data.check()


def test_landmark_counts_must_agree(write_case: WriteCase) -> None:
    root = write_case()
    file = root / "Case1Pack/ExtremePhases/Case1_300_T50_xyz.txt"
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="found 300 and 299"):
        DIRLab(str(root)).setup()


@pytest.mark.parametrize(
    ("row", "match"), [("0 3 4", "outside"), ("41 3 4", "outside"), ("1 2", "line 1"), ("a b c", "line 1")]
)
def test_bad_landmarks_are_refused(write_case: WriteCase, row: str, match: str) -> None:
    root = write_case()
    file = root / "Case1Pack/ExtremePhases/Case1_300_T50_xyz.txt"
    file.write_text(row + "\n" + "".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=match):
        DIRLab(str(root)).setup()


def test_sampled_landmarks_for_inner_phases(write_case: WriteCase) -> None:
    root = write_case(sampled="Sampled4D/case1_4D-75_{phase}.txt", phases=("T00", "T20", "T50", "T70"))
    data = DIRLab(str(root), moving_phase=20)
    assert data.pair.fixed_points is not None and len(data.pair.fixed_points) == 75
    extreme, sampled = DIRLab(str(root)).pair.fixed_points, DIRLab(str(root), landmarks="sampled").pair.fixed_points
    assert extreme is not None and sampled is not None and (len(extreme), len(sampled)) == (300, 75)
    assert DIRLab(str(root), moving_phase=70).pair.fixed_points is None
    with pytest.raises(UserError, match="T70"):
        DIRLab(str(root), moving_phase=70, landmarks="sampled").prepare_data()


def test_computed_masks_hold_the_landmarks(write_case: WriteCase) -> None:
    report = "\n".join(DIRLab(str(write_case())).check())
    assert "100.0% of the landmarks inside" in report
    assert "300 of the extreme phases" in report


def test_a_flipped_mask_is_noticed(write_case: WriteCase, tmp_path: Path) -> None:
    root = write_case()
    data = DIRLab(str(root))
    for phase, mask in (("T00", data.pair.fixed_mask), ("T50", data.pair.moving_mask)):
        assert mask is not None
        # A header of its own: masks are matched by voxel index.
        nib.save(nib.Nifti1Image(mask.numpy().astype(np.uint8), np.eye(4)), tmp_path / f"case1_{phase}_mask.nii.gz")
    given = DIRLab(str(root), masks=str(tmp_path)).pair
    assert torch.equal(given.fixed_mask, data.pair.fixed_mask) and torch.equal(given.moving_mask, data.pair.moving_mask)
    upside_down = data.pair.fixed_mask.numpy().copy()  # type: ignore[union-attr]
    upside_down[:, :, :] = np.roll(upside_down, 8, axis=2)
    nib.save(nib.Nifti1Image(upside_down.astype(np.uint8), np.eye(4)), tmp_path / "case1_T00_mask.nii.gz")
    with pytest.warns(RegistrationWarning, match="of the fixed landmarks lie inside the fixed mask"):
        DIRLab(str(root), masks=str(tmp_path)).setup()


def test_a_mask_of_another_size_is_refused(write_case: WriteCase, tmp_path: Path) -> None:
    for phase in ("T00", "T50"):
        nib.save(
            nib.Nifti1Image(np.eye(9, dtype=np.uint8)[..., None] * np.ones(9, np.uint8), np.eye(4)),
            tmp_path / f"case1_{phase}.nii.gz",
        )
    with pytest.raises(UserError, match="expected a mask of shape"):
        DIRLab(str(write_case()), masks=str(tmp_path)).setup()


@pytest.mark.parametrize(("stored", "given", "advice"), [(1024, 0, "1024 or 1000"), (0, 1024, "hu_offset to 0")])
def test_a_wrong_hu_offset_is_noticed(write_case: WriteCase, stored: int, given: int, advice: str) -> None:
    root = write_case(offset=stored)
    with pytest.warns(RegistrationWarning, match=advice):
        DIRLab(str(root), hu_offset=given, masks="none").setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DIRLab(str(root), hu_offset=stored).setup()


def test_motion_is_compared_with_the_published(write_case: WriteCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """An original case (no geometry.json) whose landmarks move 10 mm where 3.89 mm are published."""
    small = layouts.replace(layouts.dirlab_case(1), shape=(40, 36, 20), spacing=(8.0, 8.0, 10.0))
    monkeypatch.setattr(layouts, "DIRLAB_CASES", {**layouts.DIRLAB_CASES, 1: small})
    root = write_case(geometry=False)
    with pytest.warns(RegistrationWarning, match=r"mean landmark motion of 3.89 mm as published, found 10.00"):
        DIRLab(str(root)).setup()
    monkeypatch.setattr(layouts, "DIRLAB_CASES", {1: layouts.replace(small, mean_motion=9.9)})
    DIRLab(str(root)).setup()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"case": 11}, "1 to 10"),
        ({"moving_phase": 55}, "0, 10"),
        ({"moving_phase": 0}, "twice"),
        ({"margin_mm": -1.0}, "margin_mm"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path: Path, arguments: dict[str, float], match: str) -> None:
    with pytest.raises(UserError, match=match):
        DIRLab(str(tmp_path), **arguments)  # type: ignore[arg-type]


def test_check_root_gives_a_line_a_case(write_case: WriteCase) -> None:
    root = write_case()
    write_case(3, "Case3Pack", "Images/case3_{phase}-ssm.img", "ExtremePhases/Case3_300_{phase}_xyz.txt")
    (root / "Case3Pack/Images/case3_T50-ssm.img").unlink()
    lines = check_root(root)
    assert len(lines) == 2
    assert lines[0].startswith("case1: ok: 40x36x20 at 8x8x10 mm, masks ")
    assert lines[0].endswith("300 landmarks, mean motion 10.00 mm, 100.0% of them in the masks")
    assert lines[1].startswith("case3: problem: DIR-LAB case 3, T50, image")


def test_check_root_refuses_the_unknown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none of them"):
        check_root(tmp_path)
    with pytest.raises(UserError, match="found none"):
        check_root(tmp_path / "nowhere")
