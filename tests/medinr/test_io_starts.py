"""Transforms of other programs in, and ours out: SimpleITK moves points as we do."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from medinr import io
from medinr.errors import UserError
from medinr.io.starts import least_squares_affine, split
from medinr.space import Domain, transform_points
from tests.medinr import grids

LPS = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
A = torch.tensor(
    [[1.05, 0.1, -0.02, 8.0], [-0.12, 0.95, 0.07, -5.0], [0.0, -0.06, 1.1, 12.0], [0, 0, 0, 1]], dtype=torch.float64
)


def centres(domain: Domain) -> Tensor:
    return transform_points(domain.voxel_to_world, domain.voxels().double())


def bump(domain: Domain) -> Tensor:
    """A smooth residual of a few mm [X, Y, Z, 3] with no affine part to speak of."""
    x, y, z = ((centres(domain) - centres(domain).mean(0)) / 6).unbind(-1)
    return torch.stack((2 * torch.sin(y), 1.5 * torch.cos(2 * z), torch.sin(x + z)), -1).reshape(*domain.shape, 3)


def through(start: tuple[Tensor, Tensor | None], domain: Domain) -> Tensor:
    """phi_0 at the voxel centres [n, 3]."""
    matrix, residual = start
    p = centres(domain)
    return transform_points(matrix, p if residual is None else p + residual.reshape(-1, 3).double())


def itk_affine(sitk: Any, matrix: Tensor) -> Any:
    flip = torch.diag(torch.cat((LPS, torch.ones(1).double())))
    lps = flip @ matrix @ flip
    affine = sitk.AffineTransform(3)
    affine.SetMatrix(lps[:3, :3].flatten().tolist())
    affine.SetTranslation(lps[:3, 3].tolist())
    return affine


@pytest.mark.parametrize("name", ["a.tfm", "a.txt", "a.mat", "a.h5"])
def test_linear_transforms_of_itk_are_exact(tmp_path: Path, name: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    rigid = sitk.Euler3DTransform((10.0, -20.0, 5.0), 0.1, -0.2, 0.3, (3.0, 4.0, 5.0))
    transform = sitk.CompositeTransform([itk_affine(sitk, A), rigid])
    sitk.WriteTransform(itk_affine(sitk, A) if name.endswith("mat") else transform, str(tmp_path / name))
    matrix, residual = io.read_start(tmp_path / name, grids.domain("oblique"))
    assert residual is None and matrix.dtype == torch.float64
    points = torch.randn(20, 3).double() * 100
    read = sitk.ReadTransform(str(tmp_path / name))
    theirs = torch.tensor([read.TransformPoint(p) for p in (points * LPS).tolist()], dtype=torch.float64) * LPS
    assert (transform_points(matrix, points) - theirs).abs().max() < 1e-9
    assert (matrix - A).abs().max() > 1 or name.endswith("mat")


def test_written_affine_reads_back_without_and_with_itk(tmp_path: Path) -> None:
    io.write_itk_affine(tmp_path / "affine.tfm", A)
    pytest.importorskip("SimpleITK")
    matrix, _ = io.read_start(tmp_path / "affine.tfm", grids.domain("identity"))
    assert (matrix - A).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [*grids.RIGID, "sheared"])
def test_a_written_composite_is_the_same_map_in_itk_and_read_back(tmp_path: Path, kind: str) -> None:
    """Points at voxel centres and between them: A is last, the field first, and both are in the right frame."""
    sitk = pytest.importorskip("SimpleITK")
    domain, residual = grids.domain(kind), bump(grids.domain(kind))
    io.write_composite(tmp_path / "t.h5", A, residual, domain)
    read = sitk.ReadTransform(str(tmp_path / "t.h5"))
    points = centres(domain)[::97]
    ours = transform_points(A, points + residual.reshape(-1, 3)[::97])
    theirs = torch.tensor([read.TransformPoint(p) for p in (points * LPS).tolist()], dtype=torch.float64) * LPS
    assert (ours - theirs).norm(dim=1).max() < 1e-3
    other_order = transform_points(A, points) + residual.reshape(-1, 3)[::97]
    assert (ours - other_order).norm(dim=1).max() > 0.1, "the order must matter here"

    again = io.read_start(tmp_path / "t.h5", domain)
    assert (through(again, domain) - transform_points(A, centres(domain) + residual.reshape(-1, 3))).abs().max() < 1e-3
    assert again[1] is not None and again[1].dtype == torch.float32 and again[1].abs().max() < 5
    assert [f.name for f in tmp_path.iterdir()] == ["t.h5"]


def test_points_through_itk(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK")
    domain, residual = grids.domain("flipped"), bump(grids.domain("flipped"))
    io.write_composite(tmp_path / "t.h5", A, residual, domain)
    transform = io.ItkTransform(tmp_path / "t.h5")
    points = centres(domain)[5:25]
    expected = transform_points(A, points + residual.reshape(-1, 3)[5:25])
    assert transform.matrix is None and (transform(points) - expected).abs().max() < 1e-3
    assert transform(points[:0]).shape == (0, 3)


@pytest.mark.parametrize("kind", ["oblique", "left-handed"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_displacements_of_any_grid(tmp_path: Path, kind: str, suffix: str) -> None:
    """A field on a grid of its own, larger and coarser: linear ones come back exactly, others to its sampling."""
    domain = grids.domain(kind)
    linear = domain.voxel_to_world.clone()
    linear[:3, :3] *= 0.9
    linear[:3, 3] -= domain.voxel_to_world[:3, :3] @ torch.ones(3).double()
    own = Domain.of((25, 27, 21), linear)
    u = (transform_points(A, centres(own)) - centres(own)).reshape(*own.shape, 3)
    io.write_displacement(tmp_path / "u.nii.gz", u, own)
    if suffix == ".mha":
        sitk = pytest.importorskip("SimpleITK")
        sitk.WriteImage(sitk.ReadImage(str(tmp_path / "u.nii.gz")), str(tmp_path / "u.mha"))
    matrix, residual = io.read_start(tmp_path / f"u{suffix}", domain)
    assert residual is None and (matrix - A).abs().max() < 1e-3
    io.write_displacement(tmp_path / "v.nii.gz", bump(domain), domain)
    start = io.read_start(tmp_path / "v.nii.gz", domain)
    assert (through(start, domain) - centres(domain) - bump(domain).reshape(-1, 3)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", grids.ALL)
def test_the_affine_part_is_taken_out(kind: str) -> None:
    domain = grids.domain(kind)
    u = (through((A, bump(domain)), domain) - centres(domain)).reshape(*domain.shape, 3)
    matrix, residual = split(u.float(), domain, "u")
    assert residual is not None
    assert (through((matrix, residual), domain) - centres(domain) - u.reshape(-1, 3)).abs().max() < 1e-3
    assert residual.norm(dim=-1).mean() < 0.4 * u.norm(dim=-1).mean(), "d is what is left beside A"
    only = (transform_points(A, centres(domain)) - centres(domain)).reshape(*domain.shape, 3)
    assert (least_squares_affine(only, domain) - A).abs().max() < 1e-9


def test_a_single_slice_has_an_affine_too() -> None:
    domain = Domain.of((9, 1, 12), grids.affine("oblique"))
    u = torch.tensor([1.0, 2.0, -3.0]).expand(*domain.shape, 3)
    matrix, residual = split(u, domain, "u")
    shift = torch.eye(4).double()
    shift[:3, 3] = u[0, 0, 0]
    assert residual is None and (matrix - shift).abs().max() < 1e-9


@pytest.mark.parametrize("kind", grids.ALL)
def test_learn2reg(tmp_path: Path, kind: str) -> None:
    """The file holds voxels: moved(v) = moving(v + disp(v)) on the array, whatever the affine."""
    domain, u = grids.domain(kind), bump(grids.domain(kind)).float()
    io.write_learn2reg(tmp_path / "disp_0001_0002.nii.gz", u, domain)
    array = nib.loadsave.load(tmp_path / "disp_0001_0002.nii.gz").get_fdata()
    assert array.shape == (*domain.shape, 3)
    voxels = domain.voxels().double() + torch.from_numpy(array).reshape(-1, 3)
    assert (transform_points(domain.voxel_to_world, voxels) - centres(domain) - u.reshape(-1, 3)).abs().max() < 1e-4
    assert (io.read_learn2reg(tmp_path / "disp_0001_0002.nii.gz", domain) - u).abs().max() < 1e-4
    start = io.read_start(tmp_path / "disp_0001_0002.nii.gz", domain)
    assert (through(start, domain) - centres(domain) - u.reshape(-1, 3)).abs().max() < 1e-3


def test_mistakes(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    domain = grids.domain("flipped")
    (tmp_path / "text.h5").write_text("no transform")
    (tmp_path / "text.tfm").write_text("no transform")
    (tmp_path / "text.txt").write_text("no transform")
    sitk.WriteTransform(sitk.Euler2DTransform(), str(tmp_path / "flat.tfm"))
    flat = itk_affine(sitk, A)
    flat.SetParameters([1.0, 0, 0, 0, 1, 0, 0, 0, 1e-12, 0, 0, 0])
    (tmp_path / "singular.tfm").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        "Parameters: 1 0 0 0 1 0 0 0 1e-12 0 0 0\nFixedParameters: 0 0 0\n"
    )
    io.write_learn2reg(tmp_path / "disp.nii.gz", bump(domain), domain)
    for name, grid, found in (
        ("missing.h5", domain, "found nothing of that name"),
        ("text.h5", domain, "transform of ITK"),
        ("text.tfm", domain, "transform of ITK"),
        ("text.txt", domain, "text file with a 4 x 4 matrix"),
        ("flat.tfm", domain, "found 2-D"),
        ("singular.tfm", domain, "determinant 0"),
        ("disp.nii.gz", grids.domain("flipped", (4, 5, 6)), "Learn2Reg displacements of shape"),
    ):
        with pytest.raises(UserError, match=found) as caught:
            io.read_start(tmp_path / name, grid)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(UserError, match="linear start here, found a displacement of up to"):
        io.linear_only(io.read_start(tmp_path / "disp.nii.gz", domain), "disp.nii.gz")
    with pytest.raises(UserError, match=r"no_folder"):
        (tmp_path / "no_folder").write_text("")
        io.write_composite(tmp_path / "no_folder" / "t.h5", A, bump(domain), domain)


def test_a_matrix_in_text(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "a.txt", A.numpy())
    matrix, residual = io.read_start(tmp_path / "a.txt", grids.domain("identity"))
    assert residual is None and torch.equal(matrix, A)
