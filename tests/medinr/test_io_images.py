"""Reading and writing images: values, affines, and one line for every mistake."""

import gzip
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medinr.errors import RegistrationWarning, UserError
from medinr.io import as_image, read_image, read_labels, read_mask, write_image
from medinr.space import Domain, Image
from tests.medinr import grids

AFFINE = grids.affine("oblique")
DOMAIN = grids.domain("oblique")
FLAT = np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def values(shape: tuple[int, ...] = grids.SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)


def save(path: Path, array: Any, affine: np.ndarray | None = None) -> Path:
    nib.nifti1.Nifti1Image(array, AFFINE if affine is None else affine).to_filename(path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", grids.ALL)
def test_written_images_read_back(tmp_path: Path, kind: str, suffix: str) -> None:
    data, domain = torch.from_numpy(values())[None], grids.domain(kind)
    write_image(tmp_path / f"a{suffix}", data, domain)
    image = read_image(tmp_path / f"a{suffix}")
    assert torch.equal(image.data, data)
    assert image.domain.same_grid(domain)
    header = nib.loadsave.load(tmp_path / f"a{suffix}").header
    assert header["sform_code"] == 1 and header.get_xyzt_units()[0] == "mm"
    assert header["qform_code"] == (0 if kind == "sheared" else 1)
    assert [f.name for f in tmp_path.iterdir()] == [f"a{suffix}"]  # nothing temporary is left


def test_scaling_is_applied(tmp_path: Path) -> None:
    image = nib.nifti1.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(2.0, -1024)
    image.to_filename(tmp_path / "a.nii")
    assert torch.equal(read_image(tmp_path / "a.nii").data, torch.arange(24).reshape(1, 2, 3, 4) * 2.0 - 1024)


def test_a_trailing_axis_of_one_is_dropped(tmp_path: Path) -> None:
    assert read_image(save(tmp_path / "a.nii", values((4, 5, 6, 1)))).data.shape == (1, 4, 5, 6)


def test_qform_counts_without_sform(tmp_path: Path) -> None:
    image = nib.nifti1.Nifti1Image(values(), None)
    image.set_qform(AFFINE, code=1)
    image.set_sform(None, code=0)
    image.to_filename(tmp_path / "a.nii")
    assert read_image(tmp_path / "a.nii").domain.same_grid(DOMAIN)


@pytest.mark.parametrize(
    ("given", "stored"),
    [(torch.bool, "uint8"), (torch.float64, "float32"), (torch.int64, "int32"), (torch.int16, "int16")],
)
def test_stored_types(tmp_path: Path, given: torch.dtype, stored: str) -> None:
    write_image(tmp_path / "a.nii.gz", torch.ones(DOMAIN.shape).to(given), DOMAIN)
    assert nib.loadsave.load(tmp_path / "a.nii.gz").get_data_dtype() == np.dtype(stored)
    write_image(tmp_path / "a.nii.gz", torch.ones(DOMAIN.shape).to(given), DOMAIN, dtype=np.uint8)
    assert nib.loadsave.load(tmp_path / "a.nii.gz").get_data_dtype() == np.uint8


def test_same_data_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_image(tmp_path / name, torch.from_numpy(values()), DOMAIN)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("kind", grids.RIGID)
@pytest.mark.parametrize("suffix", ["mha", "nrrd"])
def test_itk_formats_agree_with_nifti(tmp_path: Path, kind: str, suffix: str) -> None:
    """The same grid through ITK's own conversion from NIfTI; the left-handed one too."""
    sitk = pytest.importorskip("SimpleITK")
    save(tmp_path / "a.nii", values(), grids.affine(kind))
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii")), str(tmp_path / f"a.{suffix}"))
    ours, theirs = read_image(tmp_path / "a.nii"), read_image(tmp_path / f"a.{suffix}")
    assert torch.equal(ours.data, theirs.data)
    assert ours.domain.same_grid(theirs.domain)


def test_as_image_takes_what_people_hold(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    path = save(tmp_path / "a.nii", values())
    expected = read_image(path)
    for held in (str(path), path, nib.loadsave.load(path), sitk.ReadImage(str(path)), expected):
        image = as_image(held)
        assert torch.equal(image.data, expected.data) and image.domain.same_grid(expected.domain)
    with pytest.raises(UserError, match="no affine"):
        as_image(values())
    with pytest.raises(UserError, match="list"):
        as_image([1, 2])


def with_nan(array: np.ndarray) -> np.ndarray:
    array[1, 2, 3] = np.nan
    return array


def rgb(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


MISTAKES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("a.nii", lambda p: None, "nothing of that name"),
    "folder": ("a.nii", lambda p: p.mkdir(), "folder"),
    "empty": ("a.nii", lambda p: p.touch(), "0 bytes"),
    "text": ("a.nii.gz", lambda p: p.write_text("version https://git-lfs\n" * 40), "cannot be read"),
    "gzipped text": ("a.nii.gz", lambda p: p.write_bytes(gzip.compress(b"hello " * 200)), "cannot be read"),
    "truncated": ("a.nii", lambda p: half(save(p, values())), "cannot be read"),
    "truncated gz": ("a.nii.gz", lambda p: half(save(p, values())), "cannot be read"),
    "format": ("a.png", lambda p: p.write_text("x"), r"found \.png"),
    "no suffix": ("scan", lambda p: p.write_text("x"), "no suffix"),
    "truncated mha": ("a.mha", lambda p: p.write_text("ObjectType = Image\n"), "cannot be read"),
    "4-D": ("a.nii", lambda p: save(p, values((4, 5, 6, 2))), r"4-D of shape \(4, 5, 6, 2\)"),
    "NaN": ("a.nii", lambda p: save(p, with_nan(values())), "1 of 5940 that are NaN"),
    "constant": ("a.nii", lambda p: save(p, np.full((4, 5, 6), 7.0, np.float32)), "constant 7"),
    "colour": ("a.nii", lambda p: save(p, rgb((4, 5, 6))), "one real number"),
    "singular": ("a.nii", lambda p: save(p, values(), FLAT), "invertible affine"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    if name.endswith("mha"):
        pytest.importorskip("SimpleITK")
    file, make, found = MISTAKES[name]
    make(tmp_path / file)
    with pytest.raises(UserError, match=found) as caught:
        read_image(tmp_path / file)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(tmp_path / file)) and "expected" in message and ";" in message


def test_without_simpleitk_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mha").write_text("ObjectType = Image\n")
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    with pytest.raises(UserError, match=r"pip install medinr\[itk\]"):
        read_image(tmp_path / "a.mha")


def test_masks(tmp_path: Path) -> None:
    mask = values() > 100
    for array in (mask.astype(np.uint8), mask.astype(np.uint8) * 255, mask.astype(np.float32)):
        read = read_mask(save(tmp_path / "m.nii.gz", array), DOMAIN)
        assert read.dtype == torch.bool and np.array_equal(read.numpy(), mask)
    assert torch.equal(read_mask(torch.from_numpy(mask), DOMAIN), torch.from_numpy(mask))
    assert torch.equal(read_mask(Image(torch.from_numpy(mask)[None].float(), DOMAIN), DOMAIN), torch.from_numpy(mask))


def test_labels_keep_their_numbers(tmp_path: Path) -> None:
    labels = np.zeros(grids.SHAPE, np.int32)
    labels[3:6] = 17
    read = read_labels(save(tmp_path / "l.nii.gz", labels.astype(np.float32)), DOMAIN)
    assert read.dtype == torch.int16 and np.array_equal(read.numpy(), labels)
    labels[8:9] = 2**24 + 1  # the first whole number that float32 does not have
    read = read_labels(save(tmp_path / "l.nii.gz", labels), DOMAIN)
    assert read.dtype == torch.int32 and np.array_equal(read.numpy(), labels)


@pytest.mark.parametrize("read", [read_mask, read_labels])
def test_masks_and_labels_must_lie_on_their_image(tmp_path: Path, read: Callable[[Any, Domain], Any]) -> None:
    ones = np.ones(grids.SHAPE, np.uint8)
    with pytest.raises(UserError, match=r"shape \(18, 22, 15\), found \(18, 22, 14\)"):
        read(save(tmp_path / "m.nii", ones[:, :, :14]), DOMAIN)
    shifted = AFFINE.copy()
    shifted[:3, 3] += (0, 3, 0)
    with pytest.raises(UserError, match="3 mm in the origin"):
        read(save(tmp_path / "m.nii", ones, shifted), DOMAIN)
    with pytest.raises(UserError, match="shape"):
        read(ones[:, :, :14], DOMAIN)
    with pytest.raises(UserError, match=r"found (none|background)"):
        read(save(tmp_path / "m.nii", 0 * ones), DOMAIN)
    with pytest.raises(UserError, match="NaN"):
        read(save(tmp_path / "m.nii", with_nan(ones.astype(np.float32))), DOMAIN)


def test_labels_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nearest neighbour"):
        read_labels(save(tmp_path / "l.nii", values()), DOMAIN)


def test_a_mask_may_differ_by_rounding(tmp_path: Path) -> None:
    nearly = AFFINE.copy()
    nearly[:3, 3] += 2e-3
    assert read_mask(save(tmp_path / "m.nii", np.ones(grids.SHAPE, np.uint8), nearly), DOMAIN).all()


def test_a_surface_is_no_volume(tmp_path: Path) -> None:
    brain = nib.cifti2.BrainModelAxis.from_mask(np.ones((2, 2, 2)), affine=np.eye(4), name="thalamus_left")
    axes = nib.cifti2.ScalarAxis(["one"]), brain
    nib.cifti2.Cifti2Image(np.ones((1, 8)), header=axes).to_filename(tmp_path / "a.dscalar.nii")
    with pytest.raises(UserError, match="expected a NIfTI volume, found a Cifti2Image"):
        read_image(tmp_path / "a.dscalar.nii")


def test_where_it_lies_is_asked_in_voxels(tmp_path: Path) -> None:
    """Of voxels of a micrometre, half of one is no rounding."""
    small, moved = np.diag([1e-3, 1e-3, 1e-3, 1.0]), np.diag([1e-3, 1e-3, 1e-3, 1.0])
    moved[0, 3] = 5e-4
    domain = Domain.of(grids.SHAPE, small)
    assert read_mask(save(tmp_path / "m.nii", np.ones(grids.SHAPE, np.uint8), small), domain).all()
    with pytest.raises(UserError, match="affine of its image"):
        read_mask(save(tmp_path / "m.nii", np.ones(grids.SHAPE, np.uint8), moved), domain)


def header_of(sform: int, qform: int, unit: str, flip: bool) -> nib.nifti1.Nifti1Image:
    image = nib.nifti1.Nifti1Image(values(), np.eye(4))
    image.set_sform(np.eye(4), code=sform)
    image.set_qform(np.diag([-1.0, 1, 1, 1]) if flip else np.eye(4), code=qform)
    image.header.set_xyzt_units(unit)
    return image


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ((0, 0, "mm", False), "neither sform nor qform"),
        ((1, 1, "mm", True), "different orientations; the sform counts"),
        ((1, 1, "micron", False), "lengths in microns; they are taken as mm"),
        ((1, 0, "meter", False), "lengths in meters"),
    ],
)
def test_a_doubtful_header_is_told(tmp_path: Path, header: tuple[int, int, str, bool], said: str) -> None:
    header_of(*header).to_filename(tmp_path / "a.nii.gz")
    with pytest.warns(RegistrationWarning, match=said) as told:
        read_image(tmp_path / "a.nii.gz")
    assert len(told) == 1 and "a.nii.gz" in str(told[0].message)


@pytest.mark.parametrize("header", [(1, 1, "mm", False), (0, 1, "mm", True), (2, 0, "unknown", True)])
def test_a_usual_header_is_not(tmp_path: Path, header: tuple[int, int, str, bool]) -> None:
    header_of(*header).to_filename(tmp_path / "a.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "a.nii.gz")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    data = torch.from_numpy(values())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="writable"):
        write_image(tmp_path / "file" / "a.nii.gz", data, DOMAIN)
    with pytest.raises(UserError, match=r"\.nii or \.nii\.gz"):
        write_image(tmp_path / "a.tif", data, DOMAIN)
    with pytest.raises(ValueError, match="expected values"):
        write_image(tmp_path / "a.nii", data[1:], DOMAIN)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    write_image(path, torch.from_numpy(values()), DOMAIN)
    before = path.read_bytes()

    def full(self: Any, name: Path) -> None:
        Path(name).write_bytes(before[:100])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(nib.nifti1.Nifti1Image, "to_filename", full)
    with pytest.raises(UserError, match="No space left"):
        write_image(path, torch.zeros(DOMAIN.shape), DOMAIN)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["a.nii.gz"]


def test_a_real_ct(shared: Path) -> None:
    path = shared / "data/popi_4dct/popi_T10.nii.gz"
    image, reference = read_image(path), nib.loadsave.load(path)
    assert image.data.shape == (1, 100, 100, 47) and image.domain.spacing == (5.0, 5.0, 6.0)
    assert np.array_equal(image.data[0].numpy(), np.asarray(reference.dataobj, dtype=np.float32))
