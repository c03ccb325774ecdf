"""`medinr apply`: images, labels and points there and back, other alphas, and mistakes in one line."""

from pathlib import Path

import pytest
import torch

import medinr
from medinr import cli, io
from medinr.commands.apply import load_transform
from medinr.errors import RegistrationWarning, UserError
from medinr.fields.dense import evaluate_dense
from medinr.fields.stored import StoredTransform
from medinr.fields.transform import Transform
from medinr.space import Domain, transform_points
from tests.medinr import pairs

REFERENCE = Domain.of((20, 24, 22), [[-4, 0, 0, 40], [0, 3.5, 0, -40], [0, 0, 3, -30], [0, 0, 0, 1]])
"""A grid of its own: flipped, of another spacing and extent."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain and a conditioned checkpoint, a volume and labels on another grid than the fixed image's, points."""
    out = tmp_path_factory.mktemp("apply")
    torch.manual_seed(0)
    pairs.plain_method().save(out / "plain.ckpt")
    pairs.conditioned_method().save(out / "conditioned.ckpt")
    image = pairs.sampled(REFERENCE, pairs.blob)
    io.write_image(out / "image.nii.gz", image.data[0], REFERENCE)
    io.write_image(out / "labels.nii.gz", (image.data[0] > 300).int() * 2, REFERENCE)
    io.write_image(out / "half.nii.gz", image.data[0] / 7, REFERENCE)
    io.write_points(out / "points.csv", pairs.points(20, 25.0))
    (out / "bad.csv").write_text("x,y,z\n1,2,three\n")
    (out / "bad.ckpt").write_text("no checkpoint")
    dense = evaluate_dense(load_transform(out / "plain.ckpt"), pairs.CUBE, exact=True).displacement
    io.write_displacement(out / "field.nii.gz", dense, pairs.CUBE)
    io.write_learn2reg(out / "disp.nii.gz", dense, pairs.CUBE)
    io.write_itk_affine(out / "affine.tfm", torch.eye(4))
    empty = torch.full(pairs.CUBE.shape, torch.nan)
    io.write_image(out / "grid.nii.gz", empty, pairs.CUBE)
    torch.save({"state_dict": {}}, out / "foreign.ckpt")
    return out


@pytest.fixture
def transform(folder: Path) -> Transform:
    return load_transform(folder / "plain.ckpt")


def test_image_is_pulled_through_the_transform(folder: Path, tmp_path: Path, transform: Transform) -> None:
    files = medinr.apply(folder / "plain.ckpt", tmp_path, image=folder / "image.nii.gz")
    assert files == [tmp_path / "image.nii.gz"]
    found = io.read_image(files[0])
    assert found.domain.same_grid(pairs.CUBE), "the fixed grid"
    world = transform_points(pairs.CUBE.voxel_to_world, pairs.CUBE.voxels().double())
    moved = transform(world)
    inside = REFERENCE.contains_voxels(transform_points(REFERENCE.world_to_voxel, moved), margin=-0.1)
    gap = (found.data.flatten() - pairs.blob(moved).float()).abs()[inside]
    assert inside.float().mean() > 0.3
    assert gap.max() < 100, "of 1000; linear interpolation of a blob"
    still = (found.data.flatten() - pairs.blob(world).float()).abs()[inside]
    assert still.mean() > 3 * gap.mean(), "it must have moved"


def test_image_inverse(folder: Path, tmp_path: Path, transform: Transform) -> None:
    fixed = pairs.sampled(pairs.CUBE, pairs.blob)
    medinr.apply(folder / "plain.ckpt", tmp_path, image=fixed, reference=folder / "image.nii.gz", inverse=True)
    found = io.read_image(tmp_path / "image.nii.gz")
    assert found.domain.same_grid(REFERENCE)
    world = transform_points(REFERENCE.voxel_to_world, REFERENCE.voxels().double())
    back, residual = transform.inverse(world)
    inside = pairs.CUBE.contains_voxels(transform_points(pairs.CUBE.world_to_voxel, back), margin=-0.1)
    assert residual[inside].max() < 0.01
    assert (found.data.flatten() - pairs.blob(back).float()).abs()[inside].max() < 100


def test_labels_stay_labels_and_move_with_the_image(folder: Path, tmp_path: Path, transform: Transform) -> None:
    medinr.apply(folder / "plain.ckpt", tmp_path, labels=folder / "labels.nii.gz")
    found = io.read_labels(tmp_path / "labels.nii.gz", pairs.CUBE)
    assert found.unique().tolist() == [0, 2]
    world = transform_points(pairs.CUBE.voxel_to_world, pairs.CUBE.voxels().double())
    expected = (pairs.blob(transform(world)) > 300).reshape(pairs.CUBE.shape)
    dice = 2 * ((found > 0) & expected).sum() / ((found > 0).sum() + expected.sum())
    assert dice > 0.9, "nearest of voxels of 4 mm"


@pytest.mark.parametrize("space", ["ras", "lps", "voxel"])
def test_points_forward_and_back(folder: Path, tmp_path: Path, transform: Transform, space: io.PointsSpace) -> None:
    points = pairs.points(20, 25.0)
    io.write_points(tmp_path / "given.csv", points, space, REFERENCE)
    common = {"points_space": space, "reference": folder / "image.nii.gz"}
    medinr.apply(folder / "plain.ckpt", tmp_path / "there", points=tmp_path / "given.csv", **common)
    there = io.read_points(tmp_path / "there" / "points.csv", space, REFERENCE)
    assert (there - transform(points)).norm(dim=1).max() < 1e-4
    assert (there - points).norm(dim=1).min() > 0.5, "they must move"
    medinr.apply(
        folder / "plain.ckpt", tmp_path / "back", points=tmp_path / "there" / "points.csv", inverse=True, **common
    )
    back = io.read_points(tmp_path / "back" / "points.csv", space, REFERENCE)
    assert (back - points).norm(dim=1).max() < 0.01


def test_points_without_an_inverse_are_counted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_inverse(self: Transform, world: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return world, torch.linspace(0, 0.19, len(world))

    monkeypatch.setattr(Transform, "inverse", no_inverse)
    with pytest.warns(RegistrationWarning, match=r"9 of 20 points have no inverse within 0\.1 mm"):
        medinr.apply(folder / "plain.ckpt", tmp_path, points=folder / "points.csv", inverse=True)


def test_alpha_changes_the_result_of_a_conditioned_transform(folder: Path, tmp_path: Path) -> None:
    found = {}
    for name, option in (("default", []), ("plain number", ["--alpha", "0.9"]), ("list", ["--alpha", "[0.9]"])):
        line = ["apply", folder / "conditioned.ckpt", "--points", folder / "points.csv", "--out", tmp_path / name]
        assert cli.main([str(word) for word in [*line, *option]]) == 0
        found[name] = io.read_points(tmp_path / name / "points.csv")
    assert torch.equal(found["plain number"], found["list"])
    assert (found["default"] - found["list"]).norm(dim=1).max() > 0.01


def test_exact_and_lattice_agree(folder: Path, tmp_path: Path) -> None:
    images = []
    for exact in (False, True):
        medinr.apply(folder / "plain.ckpt", tmp_path, image=folder / "image.nii.gz", exact=exact)
        images.append(io.read_image(tmp_path / "image.nii.gz").data)
    near = (images[0] - images[1]).abs() < 10
    assert near.float().mean() > 0.999, "less than 0.05 mm of a blob; at the border of the image a voxel may drop out"


MISTAKES = {
    "nothing to do": ("plain.ckpt --out x", "nothing to carry; give --image, --labels or --points"),
    "no out": ("plain.ckpt --points points.csv", "out: missing"),
    "no reference": ("plain.ckpt --out x --image image.nii.gz --inverse", "--reference: the inverse needs an image"),
    "voxels of what": ("plain.ckpt --out x --points points.csv --points-space voxel", "needs --reference"),
    "missing checkpoint": ("no.ckpt --out x --points points.csv", "no.ckpt: no such checkpoint"),
    "foreign checkpoint": ("foreign.ckpt --out x --points points.csv", "foreign.ckpt: a checkpoint of another program"),
    "no checkpoint": ("bad.ckpt --out x --points points.csv", "bad.ckpt: not a readable checkpoint"),
    "no field": ("image.nii.gz --out x --points points.csv", "image.nii.gz: expected a displacement of shape"),
    "alpha of a field": ("field.nii.gz --out x --points points.csv --alpha [0.1]", "field.nii.gz holds one transform"),
    "affine without a grid": ("affine.tfm --out x --image image.nii.gz", "--reference: affine.tfm has no grid"),
    "Learn2Reg without a grid": ("disp.nii.gz --out x --points points.csv", "disp.nii.gz: a Learn2Reg displacement"),
    "alpha of a plain one": ("plain.ckpt --out x --points points.csv --alpha [0.1]", "plain.ckpt is not conditioned"),
    "two alphas": ("conditioned.ckpt --out x --points points.csv --alpha [0.1,0.2]", "alpha: expected 1 value"),
    "alpha too large": ("conditioned.ckpt --out x --points points.csv --alpha 2", "alpha: expected 1 value(s) in [0,"),
    "bad labels after a good image": ("plain.ckpt --out x --image image.nii.gz --labels half.nii.gz", "whole numbers"),
    "bad points after a good image": ("plain.ckpt --out x --image image.nii.gz --points bad.csv", "found 'three'"),
    "absent device": ("plain.ckpt --out x --points points.csv --device mps", "PyTorch finds no such device"),
    "out is a file": ("plain.ckpt --out bad.csv --points points.csv", "expected a folder that can be written to"),
    "option": ("plain.ckpt --out x --point points.csv", "--point: no such option"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "absent device" and torch.backends.mps.is_available():
        pytest.skip("the device is there")
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    line, expected = MISTAKES[name]
    assert cli.main(["apply", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("medinr: error: ")
    assert expected in err
    assert sorted(folder.rglob("*")) == before, "something was left behind"


def test_python_raises_what_the_command_prints(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to carry"):
        medinr.apply(folder / "plain.ckpt", tmp_path / "x")
    with pytest.raises(UserError, match="--device: expected one of"):
        medinr.apply(folder / "plain.ckpt", tmp_path / "x", points=str(folder / "points.csv"), device="gpu")
    assert not (tmp_path / "x").exists()


def written_by_itk(folder: Path) -> Path:
    """The plain checkpoint's transform as a composite of ITK."""
    pytest.importorskip("SimpleITK")
    transform = load_transform(folder / "plain.ckpt")
    field, domain = io.read_displacement(folder / "field.nii.gz")
    residual = io.residual_displacement(field, transform.start, domain)
    io.write_composite(folder / "transform.h5", transform.start, residual, domain)
    return folder / "transform.h5"


@pytest.mark.parametrize("form", ["field.nii.gz", "disp.nii.gz", "transform.h5"])
def test_files_of_all_forms_do_what_the_checkpoint_does(folder: Path, tmp_path: Path, form: str) -> None:
    """Image, labels and points, forward; the reference holds no voxels that could be used (NaN)."""
    if form.endswith("h5"):
        written_by_itk(folder)
    given = {"image": folder / "image.nii.gz", "labels": folder / "labels.nii.gz", "points": folder / "points.csv"}
    given["reference"] = folder / "grid.nii.gz"
    medinr.apply(folder / "plain.ckpt", tmp_path / "ours", exact=True, **given)
    files = medinr.apply(folder / form, tmp_path / "theirs", **given)
    assert [f.name for f in files] == ["image.nii.gz", "labels.nii.gz", "points.csv"]
    ours, theirs = (io.read_image(tmp_path / n / "image.nii.gz").data for n in ("ours", "theirs"))
    assert ((ours - theirs).abs() < 1).float().mean() > 0.999, "of 1000"
    a, b = (io.read_labels(tmp_path / n / "labels.nii.gz", pairs.CUBE) for n in ("ours", "theirs"))
    assert (a == b).float().mean() > 0.999
    a, b = (io.read_points(tmp_path / n / "points.csv") for n in ("ours", "theirs"))
    assert (a - b).norm(dim=1).max() < 0.2, "trilinear between voxels of 4 mm"


@pytest.mark.parametrize("form", ["field.nii.gz", "transform.h5"])
def test_inverse_of_a_file(folder: Path, tmp_path: Path, form: str) -> None:
    if form.endswith("h5"):
        written_by_itk(folder)
    io.write_points(tmp_path / "p.mrk.json", pairs.points(20, 25.0))
    medinr.apply(folder / form, tmp_path / "there", points=tmp_path / "p.mrk.json")
    [back] = medinr.apply(folder / form, tmp_path / "back", points=tmp_path / "there" / "points.mrk.json", inverse=True)
    assert back.name == "points.mrk.json", "in the form that it was given"
    assert (io.read_points(back) - pairs.points(20, 25.0)).norm(dim=1).max() < 0.01


def test_a_matrix_in_text(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1 0 0 5\n0 1 0 0\n0 0 1 -2\n0 0 0 1\n")
    medinr.apply(tmp_path / "a.txt", tmp_path, points=folder / "points.csv")
    gap = io.read_points(tmp_path / "points.csv") - io.read_points(folder / "points.csv")
    assert (gap - torch.tensor([5.0, 0, -2])).abs().max() < 1e-5


def test_inverse_of_a_field_of_a_micrometre(tmp_path: Path) -> None:
    """To a hundredth of a voxel, however small it is."""
    domain = Domain.of((24, 24, 24), torch.diag(torch.tensor([1e-3, 1e-3, 1e-3, 1.0])).numpy())
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    field = (3e-3 * torch.sin(world / 6e-3)).reshape(*domain.shape, 3)
    io.write_displacement(tmp_path / "d.nii.gz", field, domain)
    transform = StoredTransform(tmp_path / "d.nii.gz")
    points = 1e-3 * (8 + 8 * torch.rand(100, 3, generator=torch.Generator().manual_seed(0)).double())
    found, _ = transform.inverse(points)
    assert (transform(found) - points).norm(dim=1).max() < 1.01e-5
    assert (found - points).norm(dim=1).mean() > 1e-3, "it must move"
