"""DICOM series: the real ones equal their NIfTI files, and a stack that is no grid is refused."""

import locale
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medinr
from data_modules.fourdct import FourDCT
from data_modules.pair import PairDataModule
from medinr.commands.presets import PRESETS, Preset
from medinr.data.base import fingerprint
from medinr.errors import RegistrationWarning, UserError
from medinr.io import read_image
from medinr.io.images import read_domain
from medinr.space import Domain
from tests.medinr import grids

SIZE = (9, 7, 5)


@pytest.mark.parametrize("phase", [0, 50])
def test_popi_is_the_same_as_dicom_and_as_nifti(shared: Path, phase: int) -> None:
    pytest.importorskip("SimpleITK")
    folder = shared / "data" / "popi_4dct"
    dicom = read_image(folder / "dicom" / f"{phase:02d}")
    nifti = read_image(folder / f"popi_T{phase:02d}.nii.gz")
    assert torch.equal(dicom.data, nifti.data)
    assert dicom.domain == nifti.domain, "to the last bit, so that a seed gives the same displacement"
    assert read_domain(folder / "dicom" / f"{phase:02d}") == nifti.domain


def write_series(
    folder: Path,
    domain: Domain,
    values: np.ndarray,
    uid: str = "1.2.826.0.1.1",
    slopes: Sequence[float] = (1.0,),
    description: str = "a scan",
    name: str = "b",
) -> list[Path]:
    """Values [x, y, z], one file a slice, named against their order in space; slope k of stored values for slice k."""
    sitk: Any = pytest.importorskip("SimpleITK")
    locale_before = locale.setlocale(locale.LC_ALL)
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ domain.voxel_to_world.numpy()
    axes = lps[:3, :3] / np.array(domain.spacing)
    files = []
    for k in range(values.shape[2]):
        slope = slopes[k % len(slopes)]
        image = sitk.GetImageFromArray(values[:, :, k].T.astype(np.int16 if slope == 1 else np.float32)[None])
        image.SetSpacing(domain.spacing)
        place = lps[:3, :3] @ [0, 0, k] + lps[:3, 3]
        tags = {
            "0008|0060": "CT", "0008|103e": description, "0020|000d": "1.2.826.0.1", "0020|000e": uid,
            "0020|0013": str(k), "0008|0008": "DERIVED\\SECONDARY", "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{k + 1}", "0020|0032": "\\".join(f"{v:.8g}" for v in place),
            "0020|0037": "\\".join(f"{v:.8f}" for v in axes[:, :2].T.ravel()),
            "0028|1052": "-1024", "0028|1053": str(slope),
            "0028|0100": "16", "0028|0101": "16", "0028|0102": "15", "0028|0103": "1",
        }  # fmt: skip
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        files.append(folder / f"{name}{99 - k}.dcm")
        writer.SetFileName(str(files[-1]))
        writer.Execute(image)
    locale.setlocale(locale.LC_ALL, locale_before)  # GDCM's writer leaves "C" behind, where text is ASCII
    return files


def scan() -> np.ndarray:
    """Multiples of all slopes above -1024."""
    return np.random.default_rng(0).integers(0, 500, SIZE) * 0.5 - 1024


@pytest.mark.parametrize("kind", ["oblique", "flipped"])
def test_a_series_is_sorted_placed_and_scaled(tmp_path: Path, kind: str) -> None:
    """Every slice by its own slope, though the first holds whole numbers and the others do not."""
    domain = grids.domain(kind, SIZE)
    values = scan()
    values[:, :, ::3] = values[:, :, ::3].round()
    write_series(tmp_path / "s", domain, values, slopes=(1.0, 0.5, 0.25))
    image = read_image(tmp_path / "s")
    assert image.domain.same_grid(domain, tolerance_mm=1e-3)
    assert read_domain(tmp_path / "s") == image.domain
    assert np.array_equal(image.data[0].numpy(), values)


def test_one_slice_names_its_series(tmp_path: Path) -> None:
    domain = grids.domain("flipped", SIZE)
    values = scan().round()
    write_series(tmp_path, domain, values, "1.2.826.0.1.1", description="inhale")
    files = write_series(tmp_path, domain, values + 7, "1.2.826.0.1.2", description="exhale", name="c")
    with pytest.raises(UserError, match=r"found 2: (inhale|exhale) \(5 slices, .*name one slice") as caught:
        read_image(tmp_path)
    assert "\n" not in str(caught.value) and "exhale (5 slices" in str(caught.value)
    assert np.array_equal(read_image(files[2]).data[0].numpy(), values + 7)
    files[0].rename(tmp_path / "no_suffix")
    assert np.array_equal(read_image(tmp_path / "no_suffix").data[0].numpy(), values + 7)


def test_stacks_that_are_no_grid(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    domain, values = grids.domain("flipped", SIZE), scan().round()
    missing = write_series(tmp_path / "missing", domain, values)
    missing[2].unlink()
    double = write_series(tmp_path / "double", domain, values)
    shutil.copy(double[1], tmp_path / "double" / "again.dcm")
    affine = domain.voxel_to_world.numpy().copy()
    affine[:3, 2] += [0, 1.0, 0]
    tilted = Domain.of(SIZE, affine)
    write_series(tmp_path / "tilted", tilted, values)
    write_series(tmp_path / "sizes", domain, values)
    write_series(tmp_path / "sizes", Domain.of((6, 7, 1), domain.affine), values[:6, :, :1], name="scout")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.dcm").write_text("no image")
    for name, found in {
        "missing": r"expected slices 2.5 mm apart, found 5 mm between b\d\d.dcm and b\d\d.dcm",
        "double": "one slice at each position",
        "tilted": r"sideways by 4.0 mm over the stack \(gantry tilt\)",
        "sizes": "slices of one size",
        "empty": "a DICOM series, found none",
        "text": "a DICOM series, found none",
    }.items():
        with pytest.raises(UserError, match=found) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value), name
    with pytest.raises(UserError, match="is it a DICOM image"):
        read_image(tmp_path / "text" / "a.dcm")
    assert capfd.readouterr() == ("", ""), "ITK's own warnings are not shown"


def test_damaged_slices_are_told_of(tmp_path: Path) -> None:
    """GDCM passes over them; at the end of a stack nothing else would tell."""
    files = write_series(tmp_path, grids.domain("flipped", SIZE), scan().round())
    (tmp_path / "DICOMDIR").write_bytes(files[0].read_bytes()[:140])
    assert read_image(tmp_path).domain.shape == SIZE
    files[4].write_bytes(files[4].read_bytes()[:-60])
    with pytest.warns(RegistrationWarning, match=r"1 DICOM file\(s\) are not read, b95.dcm first"):
        assert read_image(tmp_path).domain.shape == (9, 7, 4)


@pytest.mark.slow
def test_popi_registers_the_same_from_dicom_and_from_nifti(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed, one displacement, to the last bit."""
    pytest.importorskip("SimpleITK")
    monkeypatch.setitem(PRESETS, "fast", Preset((16, 16), 256, 3))
    folder = shared / "data" / "popi_4dct"
    found = []
    for files in (("dicom/00", "dicom/50"), ("popi_T00.nii.gz", "popi_T50.nii.gz")):
        images = [folder / name for name in files]
        found.append(medinr.register(*images, preset="fast", init="none", seed=3).evaluation)
    assert torch.equal(found[0].displacement, found[1].displacement) and found[0].displacement.abs().max() > 0
    assert found[0].metrics == found[1].metrics


def test_data_modules_take_series(shared: Path, tmp_path: Path) -> None:
    """The folder of a phase in place of its file, and one slice in place of the folder."""
    pytest.importorskip("SimpleITK")
    folder = shared / "data" / "popi_4dct"
    phases = FourDCT(str(folder / "dicom"), 0, 50, pattern="{phase:02d}", masks="none").pair
    files = PairDataModule(str(folder / "dicom" / "00" / "00-slice001.dcm"), str(folder / "popi_T50.nii.gz")).pair
    for side in ("fixed", "moving"):
        assert torch.equal(getattr(phases, side).data, getattr(files, side).data)
        assert getattr(phases, side).domain.same_grid(getattr(files, side).domain)


def test_a_cached_series_is_read_again_when_a_slice_changes(tmp_path: Path) -> None:
    files = write_series(tmp_path / "s", grids.domain("flipped", SIZE), scan().round())
    names = set()
    for item in ({"fixed": str(tmp_path / "s")}, {"fixed": str(files[1])}):
        names.add(fingerprint(item, []))
        os.utime(files[0], ns=(1, len(names)))
        names.add(fingerprint(item, []))
    assert len(names) == 4
