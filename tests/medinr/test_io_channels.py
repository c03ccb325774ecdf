"""Several channels and 2-D images from files: what is read, and what is refused."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medinr import io
from medinr.errors import UserError
from medinr.space import Domain
from tests.medinr.grids import affine

AFFINE = affine("oblique")


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def save(path: Path, array: np.ndarray, matrix: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(array, matrix), path)
    return path


def test_channels_from_several_files(tmp_path: Path) -> None:
    array = values(5, 4, 3, 2)
    paths = [save(tmp_path / f"{c}.nii.gz", array[..., c]) for c in range(2)]
    image = io.as_channels(paths)
    assert torch.equal(image.data, torch.from_numpy(array).movedim(-1, 0))
    assert image.domain.same_grid(Domain.of((5, 4, 3), AFFINE), 1e-3) and image.source == str(paths[0])


@pytest.mark.parametrize("axes", [4, 5])
def test_channels_of_one_file_must_be_asked_for(axes: int, tmp_path: Path) -> None:
    array = values(5, 4, 3, 2)
    path = save(tmp_path / "both.nii.gz", array if axes == 4 else array[:, :, :, None])
    image = io.as_channels(path, multichannel=True)
    assert torch.equal(image.data, torch.from_numpy(array).movedim(-1, 0))
    with pytest.raises(UserError, match=r"expected a 3-D image, found .-D.*--multichannel"):
        io.as_channels(path)


def test_channels_of_a_vector_image_of_itk(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    array = values(5, 4, 3, 2)
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0, 3), isVector=True)
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(tmp_path / "vector.mha"))
    for source in (image, tmp_path / "vector.mha"):
        found = io.as_channels(source, multichannel=True)
        assert torch.equal(found.data, torch.from_numpy(array).movedim(-1, 0))
        assert found.domain.spacing == pytest.approx((1, 2, 3))


def test_channels_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    first, other = save(tmp_path / "a.nii.gz", values(5, 4, 3)), save(tmp_path / "b.nii.gz", values(5, 4, 4))
    moved = save(tmp_path / "c.nii.gz", values(5, 4, 3), AFFINE + np.eye(4)[3] * [[0], [0], [9], [0]])
    for wrong in (other, moved):
        with pytest.raises(UserError, match=f"{wrong.name}: expected the grid of the first channel .*a.nii.gz"):
            io.as_channels([first, wrong])
    with pytest.raises(UserError, match="leave --multichannel out"):
        io.as_channels(first, multichannel=True)
    with pytest.raises(UserError, match="at least one channel"):
        io.as_channels([])
    flat = values(5, 4, 3, 2)
    flat[..., 1] = 7
    with pytest.raises(UserError, match="channel 2: expected an image with contrast, found the constant 7"):
        io.as_channels(save(tmp_path / "flat.nii.gz", flat), multichannel=True)


def test_a_2d_image_is_a_single_slice(tmp_path: Path) -> None:
    array = values(6, 5)
    path = save(tmp_path / "slice.nii.gz", array)
    image = io.read_image(path)
    assert torch.equal(image.data, torch.from_numpy(array)[None, :, :, None])
    assert image.domain.shape == (6, 5, 1) and image.domain.flat_axis == 2
    assert torch.equal(io.as_image(nib.load(path)).data, image.data)
    assert torch.equal(io.read_mask(path, image.domain), image.data[0] > 0.5)
