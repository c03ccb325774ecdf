"""Displacement fields: what we write is what ITK understands, on every kind of grid."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from medinr.errors import UserError
from medinr.io import read_displacement, sidecar_path, write_displacement, write_image
from medinr.sampling import interpolate
from medinr.space import Domain, transform_points
from tests.medinr import grids

LPS = np.array([-1.0, -1.0, 1.0])


def world_grid(domain: Domain) -> Tensor:
    return transform_points(domain.voxel_to_world, domain.voxels().double()).reshape(*domain.shape, 3)


def smooth_displacement(domain: Domain) -> Tensor:
    """RAS mm [X, Y, Z, 3]; a few mm, different along every axis and direction."""
    x, y, z = (world_grid(domain) / 11).unbind(-1)
    waves = torch.stack((2 * torch.sin(y) + 1, torch.cos(z + x) - 2, 3 * torch.sin(x - y) + 0.5), dim=-1)
    return waves.float()


@pytest.mark.parametrize("kind", grids.ALL)
def test_written_fields_read_back(tmp_path: Path, kind: str) -> None:
    domain = grids.domain(kind)
    u = smooth_displacement(domain)
    write_displacement(tmp_path / "u.nii.gz", u, domain)
    again, read_domain = read_displacement(tmp_path / "u.nii.gz")
    assert torch.equal(again, u) and read_domain.same_grid(domain)
    header = nib.loadsave.load(tmp_path / "u.nii.gz").header
    assert header["intent_code"] == 1007 and header.get_data_shape() == (*domain.shape, 1, 3)
    assert header.get_data_dtype() == np.float32
    assert sorted(f.name for f in tmp_path.iterdir()) == ["u.json", "u.nii.gz"]


def test_the_sidecar_says_what_the_numbers_mean(tmp_path: Path) -> None:
    domain = grids.domain("oblique")
    write_displacement(tmp_path / "a.b.nii", smooth_displacement(domain), domain)
    assert sidecar_path(tmp_path / "a.b.nii") == tmp_path / "a.b.json"
    told = json.loads((tmp_path / "a.b.json").read_text(encoding="utf-8"))
    assert (told["unit"], told["space"]) == ("mm", "LPS") and told["direction"].startswith("fixed to moving")
    assert told["grid"]["shape"] == list(domain.shape) and "1007" in told["convention"]


def itk_transform(path: Path) -> Any:
    sitk = pytest.importorskip("SimpleITK")
    return sitk, sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


@pytest.mark.parametrize(("kind", "told"), [("oblique", "reads unchanged in ITK"), ("sheared", "use transform.h5")])
def test_the_sidecar_says_who_reads_it(tmp_path: Path, kind: str, told: str) -> None:
    domain = grids.domain(kind)
    write_displacement(tmp_path / "u.nii.gz", torch.zeros(*domain.shape, 3), domain)
    assert told in json.loads((tmp_path / "u.json").read_text(encoding="utf-8"))["convention"]


@pytest.mark.parametrize("kind", grids.RIGID)
def test_itk_moves_points_as_we_do(tmp_path: Path, kind: str) -> None:
    """To 1e-3 mm, at voxel centres and between them; ITK takes left-handed grids as they are."""
    domain = grids.domain(kind)
    u = smooth_displacement(domain)
    write_displacement(tmp_path / "u.nii.gz", u, domain)
    _, transform = itk_transform(tmp_path / "u.nii.gz")
    voxels = torch.rand(200, 3).double() * (torch.tensor(domain.shape) - 1)
    voxels[:50] = voxels[:50].round()
    points = transform_points(domain.voxel_to_world, voxels)
    ours = points + interpolate(u.movedim(-1, 0).double(), voxels).T
    theirs = np.array([transform.TransformPoint((p * LPS).tolist()) for p in points.numpy()]) * LPS
    assert np.abs(ours.numpy() - theirs).max() < 1e-3
    assert (ours - points).norm(dim=1).min() > 0.1  # the identity would not pass for the field


@pytest.mark.parametrize("fixed_kind", grids.RIGID)
@pytest.mark.parametrize("moving_kind", ["oblique", "left-handed"])
def test_itk_resamples_as_we_do(tmp_path: Path, fixed_kind: str, moving_kind: str) -> None:
    """Trilinear resampling of a moving image on another grid; agrees where the moving image reaches."""
    fixed = grids.domain(fixed_kind)
    affine = grids.affine(moving_kind) @ np.diag([1.1, 1.1, 1.1, 1])
    affine[:3, 3] += world_grid(fixed).reshape(-1, 3).mean(dim=0).numpy() - (affine @ [9, 11, 8, 1])[:3]
    moving = Domain.of((19, 23, 17), affine)
    x, y, z = (world_grid(moving) / 7).unbind(-1)
    image = (100 + 40 * torch.sin(x) + 30 * torch.cos(y) * torch.sin(z)).float()
    u = smooth_displacement(fixed)
    write_displacement(tmp_path / "u.nii.gz", u, fixed)
    write_image(tmp_path / "moving.nii.gz", image, moving)
    write_image(tmp_path / "fixed.nii.gz", torch.zeros(fixed.shape), fixed)
    sitk, transform = itk_transform(tmp_path / "u.nii.gz")
    reference, source = (sitk.ReadImage(str(tmp_path / f"{n}.nii.gz")) for n in ("fixed", "moving"))
    theirs = sitk.GetArrayFromImage(sitk.Resample(source, reference, transform, sitk.sitkLinear, -1000.0)).T

    voxels = transform_points(moving.world_to_voxel, world_grid(fixed) + u.double())
    ours = interpolate(image[None].double(), voxels)[0].numpy()
    inside = moving.contains_voxels(voxels, margin=-0.01).numpy()
    assert inside.sum() > 500
    # Intensities change by at most about 10 per mm here: 0.01 is 1e-3 mm.
    assert np.abs(ours - theirs)[inside].max() < 1e-2


def save(path: Path, array: np.ndarray, intent: int) -> Path:
    image = nib.nifti1.Nifti1Image(array, np.eye(4))
    image.header["intent_code"] = intent
    image.to_filename(path)
    return path


def test_intent_1006_is_ras(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(4, 5, 6, 1, 3)).astype(np.float32)
    u, _ = read_displacement(save(tmp_path / "u.nii", array, 1006))
    assert np.array_equal(u.numpy(), array[:, :, :, 0])
    sitk = pytest.importorskip("SimpleITK")
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "u.nii"))).transpose(2, 1, 0, 3)
    assert np.array_equal(u.numpy() * LPS.astype(np.float32), theirs)


@pytest.mark.parametrize(
    ("shape", "intent", "found"),
    [
        ((4, 5, 6, 3), 1007, r"found \(4, 5, 6, 3\)"),
        ((4, 5, 6, 1, 2), 1007, r"found \(4, 5, 6, 1, 2\)"),
        ((4, 5, 6), 0, r"found \(4, 5, 6\)"),
        ((4, 5, 6, 1, 3), 0, "found 0: unit and frame"),
    ],
)
def test_other_fields_are_refused(tmp_path: Path, shape: tuple[int, ...], intent: int, found: str) -> None:
    with pytest.raises(UserError, match=found) as caught:
        read_displacement(save(tmp_path / "u.nii", np.ones(shape, np.float32), intent))
    assert "\n" not in str(caught.value)


def test_mistakes(tmp_path: Path) -> None:
    broken = np.ones((4, 5, 6, 1, 3), np.float32)
    broken[0, 0, 0] = np.nan
    with pytest.raises(UserError, match="finite"):
        read_displacement(save(tmp_path / "u.nii", broken, 1007))
    (tmp_path / "u.h5").write_text("x")
    with pytest.raises(UserError, match=r"u\.h5"):
        read_displacement(tmp_path / "u.h5")
    domain = grids.domain("identity")
    with pytest.raises(ValueError, match="expected displacements"):
        write_displacement(tmp_path / "v.nii", torch.zeros(*domain.shape, 2), domain)
