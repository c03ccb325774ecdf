"""Sequences from folders of phases, DICOM series, DIR-LAB cases and tables with dates; and what they refuse."""

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from data_modules import DIRLabSequence, FourDCTSequence, LongitudinalSequence
from data_modules.fourdct_sequence import dicom_phases, read_popi_landmarks
from medinr.data import layouts
from medinr.data.sequence import Sequence
from medinr.errors import RegistrationWarning, UserError
from medinr.io.itk import import_sitk
from medinr.space import Domain

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])


def save(path: Path, value: float, affine: np.ndarray = AFFINE, shape: tuple[int, ...] = (8, 7, 6)) -> Path:
    values = np.random.default_rng(int(abs(value))).normal(value, 1, shape).astype(np.float32)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def write_phases(folder: Path, phases: list[int], name: str = "p_T{:02d}.nii.gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for phase in phases:
        save(folder / name.format(phase), phase)
    return folder


def mean(sequence: Sequence, index: int) -> float:
    return sequence.images[index].data.mean().item()


# -- a folder of phases --------------------------------------------------------------------------------------------


def test_phases_in_order_with_reference_and_held_out(tmp_path: Path) -> None:
    write_phases(tmp_path, [50, 0, 25, 75])
    data = FourDCTSequence(str(tmp_path), reference=50, held_out=[0], masks="none")
    sequence = data.sequence
    assert sequence.times == (0.0, 25.0, 50.0, 75.0) and sequence.period == 100
    assert sequence.reference == 2 and sequence.held_out == (0,) and sequence.training == (1, 2, 3)
    for i, phase in enumerate(sequence.times):
        assert mean(sequence, i) == pytest.approx(phase, abs=0.5)
    # The pair that stands for a sequence is of training images: 0, half a cycle away, is held out.
    assert data.pair.name.endswith("_50_25") and data.domain.same_grid(sequence.domain)


def test_masks_points_and_labels_of_a_folder(tmp_path: Path) -> None:
    write_phases(tmp_path / "images", [0, 50])
    for kind in ("masks", "labels"):
        (tmp_path / kind).mkdir()
        for phase in (0, 50):
            values = np.zeros((8, 7, 6), np.uint8)
            values[2 : 6 + (phase > 0)] = 3
            nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / kind / f"x_T{phase:02d}.nii.gz")
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "p_T00.csv").write_text("x,y,z\n-5,-6,6\n")
    (tmp_path / "points" / "p_T50.csv").write_text("x,y,z\n-7,-6,6\n")
    folders = {kind: str(tmp_path / kind) for kind in ("masks", "labels", "points")}
    sequence = FourDCTSequence(str(tmp_path / "images"), **folders).sequence
    assert [int(m.sum()) for m in sequence.masks if m is not None] == [168, 210]
    assert sequence.labels[1] is not None and set(sequence.labels[1].unique().tolist()) == {0, 3}
    assert sequence.points[0] is not None and sequence.points[1] is not None
    assert torch.equal(sequence.points[1] - sequence.points[0], torch.tensor([[-2.0, 0, 0]]).double())
    cut = FourDCTSequence(str(tmp_path / "images"), margin_mm=2.0, **folders).sequence
    assert cut.domain.shape == (7, 7, 6) and cut.one_grid  # 2 .. 6 of both masks, one voxel before and after
    assert torch.equal(cut.images[1].data, sequence.images[1].data[:, 1:8])
    assert cut.domain.voxel_to_world[0, 3] == -2.0


@pytest.mark.parametrize(
    ("phases", "options", "message"),
    [
        ([0], {}, "expected images of two or more times, found 1"),
        ([], {}, "expected images of phases"),
        ([0, 50], {"held_out": [30]}, r"data.held_out: expected one of the times 0, 50, found 30"),
        ([0, 50], {"reference": 20}, "data.reference: expected one of the times 0, 50, found 20"),
        ([0, 30, 60], {"held_out": [0]}, "expected a reference that is trained on, found time 0 held out"),
        ([0, 50], {"held_out": [50]}, "expected two or more times to train on, found 1 of 2"),
        ([0, 50], {"phases": [0, 20, 50]}, "expected the image of phase 20, found 00, 50"),
        ([0, 50, 99], {"points": "nowhere"}, "nowhere: expected a folder"),
    ],
)
def test_wrong_times_are_one_line_before_anything_is_read(
    tmp_path: Path, phases: list[int], options: dict[str, object], message: str
) -> None:
    tmp_path.joinpath("images").mkdir()
    for phase in phases:
        (tmp_path / "images" / f"p_T{phase:02d}.nii.gz").write_bytes(b"not read")
    with pytest.raises(UserError, match=message) as raised:
        FourDCTSequence(str(tmp_path / "images"), masks="none", **options).prepare_data()  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_gap_between_phases_is_told(tmp_path: Path) -> None:
    write_phases(tmp_path, [0, 10, 20, 40])
    with pytest.warns(RegistrationWarning, match="expected phases every 10%, found none at 30"):
        assert len(FourDCTSequence(str(tmp_path), masks="none").sequence) == 4


def test_phases_on_different_grids_or_with_nan_are_refused(tmp_path: Path) -> None:
    write_phases(tmp_path, [0, 25, 50])
    moved = AFFINE.copy()
    moved[0, 3] = 4.0
    save(tmp_path / "p_T25.nii.gz", 25, moved)
    with pytest.raises(UserError, match=r"expected all images on the grid of time 0 .* found time 25 on another"):
        FourDCTSequence(str(tmp_path), masks="none").setup()
    values = np.full((8, 7, 6), np.nan, np.float32)
    nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "p_T25.nii.gz")
    with pytest.raises(UserError, match=r"p_T25\.nii\.gz.*NaN"):
        FourDCTSequence(str(tmp_path), masks="none").setup()


# -- POPI and DICOM --------------------------------------------------------------------------------------------------


def test_popi_names_landmarks_and_regions(tmp_path: Path) -> None:
    sitk = import_sitk("test")
    for phase in (0, 50):
        values = np.random.default_rng(phase).normal(phase, 1, (6, 7, 8)).astype(np.float32)
        regions = np.full((6, 7, 8), 2, np.uint8)
        regions[1:4, 2:5, 2:5] = 0
        for name, array in ((f"{phase:02d}-P.mhd", values), (f"{phase:02d}-air-lungs-body.mhd", regions)):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((2.0, 2.0, 3.0))
            image.SetOrigin((10.0, 20.0, 30.0))
            sitk.WriteImage(image, str(tmp_path / name))
        rows = [f"{4 + phase / 50} 6 6"] * 40 + ["999 999 999"]
        (tmp_path / f"{phase:02d}-Landmarks.pts").write_text("\n".join(rows))
    sequence = FourDCTSequence(str(tmp_path), points=str(tmp_path)).sequence
    assert sequence.times == (0.0, 50.0)
    first, second = sequence.points
    assert first is not None and second is not None and len(first) == 40  # the 41st is an artefact
    assert torch.allclose(first[0], torch.tensor([-14.0, -26.0, 36.0]).double())  # LPS (14, 26, 36)
    assert torch.allclose((second - first)[0], torch.tensor([-1.0, 0, 0]).double())
    assert sequence.masks[0] is not None and int(sequence.masks[0].sum()) == 27
    assert sequence.masks[0][2:5, 2:5, 1:4].all()
    (tmp_path / "bad.pts").write_text("1 2\n")
    with pytest.raises(UserError, match="line 1: expected three numbers"):
        read_popi_landmarks(tmp_path / "bad.pts", sequence.domain)


def test_dicom_series_by_folder(shared: Path) -> None:
    sequence = FourDCTSequence(str(shared / "data/popi_4dct/dicom"), masks="none").sequence
    assert sequence.times == (0.0, 50.0)
    for index, phase in enumerate(("T00", "T50")):
        plain = nib.load(shared / f"data/popi_4dct/popi_{phase}.nii.gz")
        values = torch.from_numpy(np.asanyarray(plain.dataobj).astype(np.float32))
        # The same scan; the axes of the two files may run the other way.
        assert torch.equal(sequence.images[index].data.flatten().sort().values, values.flatten().sort().values)


def test_dicom_series_by_description(tmp_path: Path, shared: Path) -> None:
    """TCIA's layout: one folder per series, the phase in the description, other series beside."""
    sitk = import_sitk("test")
    told = {"a": "4DFBCT, Gated, 20%A", "b": "P4^P100^S300^I00003, Gated, 0.0%A", "c": "Scout"}
    for number, (folder, description) in enumerate(told.items()):
        (tmp_path / "case" / folder).mkdir(parents=True)
        for k in range(3):
            image = sitk.GetImageFromArray(np.full((1, 5, 4), 10 * k, np.int16))
            image.SetOrigin((0.0, 0.0, 3.0 * k))
            for tag, value in (
                ("0020|000e", f"1.2.3.{number}"),
                ("0020|0032", f"0\\0\\{3 * k}"),
                ("0020|0037", "1\\0\\0\\0\\1\\0"),
                ("0020|0013", str(k)),
                ("0008|103e", description),
                ("0008|0060", "CT"),
            ):
                image.SetMetaData(tag, value)
            writer = sitk.ImageFileWriter()
            writer.KeepOriginalImageUIDOn()
            writer.SetFileName(str(tmp_path / "case" / folder / f"{k}.dcm"))
            writer.Execute(image)
    found = dicom_phases(tmp_path)
    assert {phase: path.parent.name for phase, path in found.items()} == {0: "b", 20: "a"}
    with pytest.raises(UserError, match="expected a DICOM series of phase 50, found 00, 20"):
        FourDCTSequence(str(tmp_path), phases=[0, 50]).prepare_data()
    shutil.copytree(tmp_path / "case", tmp_path / "again")
    with pytest.raises(UserError, match="one DICOM series of phase 00, found two"):
        dicom_phases(tmp_path)


def test_popi(shared: Path) -> None:
    """The lungs are fullest at T10 and emptiest near T60, and all masks are computed."""
    data = FourDCTSequence(str(shared / "data/popi_4dct"), reference=60, held_out=[20], phases=[10, 20, 60, 70])
    sequence = data.sequence
    litres = [m.sum().item() * 150 / 1e6 for m in sequence.masks if m is not None]
    assert len(litres) == 4 and litres[0] > litres[2] + 0.3 and all(4.5 < v < 6.5 for v in litres)
    assert data.pair.name.endswith("60_10") and len(data.check()) == 5


# -- DIR-LAB ---------------------------------------------------------------------------------------------------------


def test_dirlab_sampled_landmarks(write_case: Callable[..., Path]) -> None:
    phases = ("T00", "T10", "T50", "T70")
    root = write_case(sampled="Sampled4D/case1_4D-75_{phase}.txt", phases=phases)
    sequence = DIRLabSequence(str(root), held_out=[10]).sequence
    assert sequence.times == (0.0, 10.0, 50.0, 70.0) and sequence.held_out == (1,)
    assert [None if p is None else len(p) for p in sequence.points] == [75, 75, 75, None]
    first, third = sequence.points[0], sequence.points[2]
    assert first is not None and third is not None
    assert torch.allclose(third - first, torch.tensor([0.0, 0.0, -20.0]).double())  # one voxel of 10 mm a phase
    assert all(m is not None for m in sequence.masks)
    with pytest.raises(UserError, match="case 1, T20, image: expected"):
        DIRLabSequence(str(root), phases=[0, 20]).prepare_data()
    next((root / "Case1Pack/Sampled4D").glob("*T10*")).unlink()
    with pytest.raises(UserError, match="case 1, T10, landmarks: expected"):
        DIRLabSequence(str(root)).prepare_data()
    assert DIRLabSequence(str(root), landmarks="none", masks="none", phases=[0, 50]).sequence.points == (None, None)


def test_dirlab_landmarks_of_different_count_are_refused(write_case: Callable[..., Path]) -> None:
    root = write_case(sampled="Sampled4D/case1_4D-75_{phase}.txt")
    path = root / "Case1Pack/Sampled4D/case1_4D-75_T50.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match="as many landmarks at all times, row by row, found 75 at 0, 74 at 50"):
        DIRLabSequence(str(root), masks="none").setup()


# -- tables ----------------------------------------------------------------------------------------------------------


def write_table(folder: Path, header: str, *rows: str) -> str:
    for name in ("a", "b", "c"):
        save(folder / f"{name}.nii.gz", ord(name), shape=(8, 7, 6 + ord(name) - ord("a")))
    (folder / "series.tsv").write_text("\n".join([header, *rows]).replace(" ", "\t") + "\n")
    return str(folder / "series.tsv")


def test_dates_become_days(tmp_path: Path) -> None:
    table = write_table(tmp_path, "file date", "a.nii.gz 2024-02-27", "b.nii.gz 2024-03-01", "c.nii.gz 2025-02-27")
    data = LongitudinalSequence(table, reference="2024-03-01", held_out=[366.0])
    with pytest.raises(UserError, match="expected one of the times 0, 3, 366, found 365"):
        LongitudinalSequence(table, reference=365).prepare_data()
    sequence = data.sequence
    assert sequence.times == (0.0, 3.0, 366.0) and sequence.period is None and sequence.reference == 1
    assert not sequence.one_grid and sequence.held_out == (2,)
    assert LongitudinalSequence(table, held_out=["2024-03-01"]).sequence.held_out == (1,)


def test_times_and_further_columns(tmp_path: Path) -> None:
    table = write_table(tmp_path, "file time labels", "a.nii.gz -1.5 l.nii.gz", "b.nii.gz 2 l2.nii.gz")
    for name, depth in (("l", 6), ("l2", 7)):
        values = np.ones((8, 7, depth), np.uint8)
        nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / f"{name}.nii.gz")
    sequence = LongitudinalSequence(table).sequence
    assert sequence.times == (-1.5, 2.0) and sequence.labels[1] is not None


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("file when", ["a.nii.gz 1"], "expected a header with file and time"),
        ("file time", ["a.nii.gz 1"], "two or more times, found 1"),
        ("file time", ["a.nii.gz 1", "b.nii.gz 1"], "every time once, found 1 twice"),
        ("file time", ["a.nii.gz 2", "b.nii.gz 1"], "in ascending order, found 1 after 2"),
        ("file time", ["a.nii.gz 1", "b.nii.gz nan"], "expected finite times, found nan"),
        ("file time", ["a.nii.gz 1", "b.nii.gz two"], "row 3: expected a time as a number, found 'two'"),
        ("file date", ["a.nii.gz 2024-01-01", "b.nii.gz 31.3.2024"], "row 3: expected a date as 2024-03-31"),
        ("file time", ["a.nii.gz 1", "gone.nii.gz 2"], "gone.nii.gz: expected a file"),
        ("file time", ["a.nii.gz 1", "b.nii.gz"], "row 3: expected 2 cells, found 1"),
    ],
)
def test_wrong_tables_are_one_line(tmp_path: Path, header: str, rows: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        LongitudinalSequence(write_table(tmp_path, header, *rows)).prepare_data()
    assert "\n" not in str(raised.value)


def test_the_names_are_those_of_the_layouts() -> None:
    assert layouts.PHASE_PATTERN in layouts.PHASE_PATTERNS and len(set(layouts.PHASE_PATTERNS)) == 5
    assert Domain.of((2, 2, 2), AFFINE).spacing == (2.0, 2.0, 3.0)
