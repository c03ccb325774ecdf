"""`medinr register`: a known deformation is found, and the files agree with each other and with SimpleITK."""

import itertools
import json
import math
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

import medinr
from medinr import cli, io
from medinr.commands.presets import PRESETS, Preset
from medinr.commands.register import Result
from medinr.errors import RegistrationWarning, UserError
from medinr.methods import PairRegistration
from medinr.results import evaluate, write_results
from medinr.space import Domain, Image, transform_points
from tests.medinr import pairs


def oblique() -> Domain:
    linear = Rotation.from_euler("xyz", (10, -15, 20), degrees=True).as_matrix()
    linear = linear @ np.array([[0, 1, 0], [-1, 0, 0], [0, 0, -1]]) @ np.diag([2.6, 3.0, 2.8])
    shape = np.array([42, 38, 40])
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = [3, -2, 4] - linear @ (shape - 1) / 2
    return Domain.of(shape.tolist(), affine)


OBLIQUE = oblique()
"""Axes permuted, flipped and turned, another spacing and field of view than the fixed image's."""
WRITTEN = {
    "warped.nii.gz",
    "displacement.nii.gz",
    "displacement.json",
    "jacobian_determinant.nii.gz",
    "metrics.json",
    "files.json",
    "transform.ckpt",
    "registration.png",
    "warped_labels.nii.gz",
    "moved_points.csv",
    "inverse_displacement.nii.gz",
    "inverse_displacement.json",
}


def in_the_middle(domain: Domain, half_mm: float) -> Tensor:
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    return (world.abs().amax(1) < half_mm).reshape(domain.shape)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset ``fast`` at the size of these images."""
    monkeypatch.setitem(PRESETS, "fast", Preset((16, 16), 256, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fixed.nii.gz, moving.nii.gz on another grid, landmarks, masks and labels as files."""
    out = tmp_path_factory.mktemp("pair")
    pair = pairs.pair(moving_domain=OBLIQUE)
    for side, image in (("fixed", pair.fixed), ("moving", pair.moving)):
        io.write_image(out / f"{side}.nii.gz", image.data[0], image.domain)
        io.write_image(out / f"{side}_mask.nii.gz", in_the_middle(image.domain, 40), image.domain)
        labels = in_the_middle(image.domain, 25).int() * 3
        io.write_image(out / f"{side}_labels.nii.gz", labels, image.domain)
    assert pair.fixed_points is not None and pair.moving_points is not None
    io.write_points(out / "fixed.csv", pair.fixed_points)
    io.write_points(out / "moving.csv", pair.moving_points)
    return out


@pytest.fixture(scope="module")
def fitted(folder: Path) -> Result:
    """The one real fit: everything that `register` can be given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "fast", Preset((64, 64), 1024, 80))
        return medinr.register(
            folder / "fixed.nii.gz",
            folder / "moving.nii.gz",
            folder / "out",
            fixed_mask=folder / "fixed_mask.nii.gz",
            fixed_points=folder / "fixed.csv",
            moving_points=folder / "moving.csv",
            fixed_labels=folder / "fixed_labels.nii.gz",
            moving_labels=folder / "moving_labels.nii.gz",
            preset="fast",
            inverse=True,
        )


def test_known_deformation_is_found(fitted: Result) -> None:
    assert fitted.metrics["tre/initial_mean"] > 4
    assert fitted.metrics["tre/mean"] < 0.5 * fitted.metrics["tre/initial_mean"]
    assert fitted.metrics["image/rms"] < 0.5 * fitted.metrics["image/rms_before"]
    assert fitted.metrics["folding/percent"] == 0
    inner = pairs.points(300, 30.0)
    error = (fitted.transform(inner) - pairs.warp(inner)).norm(dim=1)
    assert error.mean() < 2, "points that are no landmarks"


def test_files(fitted: Result, folder: Path) -> None:
    out = folder / "out"
    assert {f.name for f in out.rglob("*") if f.is_file()} == WRITTEN
    assert all(f.is_file() for f in fitted.files)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["case"] == "fixed" and metrics["seed"] == 0 and metrics["seconds/fit"] > 0
    assert metrics["tre/mean"] == fitted.metrics["tre/mean"]
    det = io.read_image(out / "jacobian_determinant.nii.gz")
    assert det.domain.same_grid(pairs.CUBE)
    assert det.data.min().item() == pytest.approx(metrics["folding/det_min"], abs=0.2)


def test_displacement_file_is_the_transform(fitted: Result, folder: Path) -> None:
    displacement, domain = io.read_displacement(folder / "out" / "displacement.nii.gz")
    assert domain.same_grid(pairs.CUBE)
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    moved = fitted.transform(world)
    gap = (world + displacement.reshape(-1, 3).double() - moved).norm(dim=1)
    assert gap.max() < 0.05
    assert (moved - world).norm(dim=1).mean() > 2, "a displacement of nothing would pass"


def test_warped_is_what_simpleitk_makes_of_the_displacement(fitted: Result, folder: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    fixed, moving = (sitk.ReadImage(str(folder / f"{s}.nii.gz"), sitk.sitkFloat64) for s in ("fixed", "moving"))
    field = sitk.ReadImage(str(folder / "out" / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    lowest = float(sitk.GetArrayViewFromImage(moving).min())
    warp = sitk.DisplacementFieldTransform(field)
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, warp, sitk.sitkLinear, lowest)).T
    found = io.read_image(folder / "out" / "warped.nii.gz").data[0].numpy()
    inside = found != np.float32(lowest)
    assert inside.mean() > 0.9
    assert np.abs(found - expected)[inside].max() < 0.005 * np.ptp(expected)


def test_checkpoint_reloads_by_itself(fitted: Result, folder: Path) -> None:
    file = folder / "out" / "transform.ckpt"
    assert "medinr" in torch.load(file, weights_only=True)
    again = PairRegistration.load_from_checkpoint(file).transform()
    points = pairs.points()
    assert (again(points) - fitted.transform(points)).norm(dim=1).max() < 1e-4


def test_carried_points_and_labels(fitted: Result, folder: Path) -> None:
    moved = io.read_points(folder / "out" / "moved_points.csv")
    fixed = io.read_points(folder / "fixed.csv")
    assert (moved - fitted.transform(fixed)).abs().max() < 1e-5
    labels = io.read_labels(folder / "out" / "warped_labels.nii.gz", pairs.CUBE)
    assert labels.unique().tolist() == [0, 3]
    world = transform_points(pairs.CUBE.voxel_to_world, pairs.CUBE.voxels().double())
    expected = fitted.transform(world).abs().amax(1).reshape(pairs.CUBE.shape) < 25
    assert ((labels > 0) == expected).float().mean() > 0.97, "nearest neighbour: half a voxel at the edge"
    assert 0 < fitted.metrics["dsc/mean"] <= 1 and "dsc/label_3" in fitted.metrics


def test_inverse_file_is_the_inverse(fitted: Result, folder: Path) -> None:
    inverse, domain = io.read_displacement(folder / "out" / "inverse_displacement.nii.gz")
    assert domain.same_grid(OBLIQUE, 1e-2)
    world = transform_points(domain.voxel_to_world, domain.voxels().double())
    inner = world.abs().amax(1) < 35
    back = fitted.transform(world[inner] + inverse.reshape(-1, 3).double()[inner])
    assert (back - world[inner]).norm(dim=1).max() < 0.01


def run(pair: tuple[Image, Image], **options: object) -> Result:
    return medinr.register(*pair, preset="fast", **{"init": "none", **options})


def test_same_seed_same_result_and_another_seed_another(tiny: None) -> None:
    pair = pairs.pair()
    one, two, other = (run((pair.fixed, pair.moving), seed=s).evaluation.displacement for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_orientation_of_the_moving_array_does_not_matter(tiny: None) -> None:
    pair = pairs.pair()
    nifti = nib.nifti1.Nifti1Image(pair.moving.data[0].numpy(), pair.moving.domain.voxel_to_world.numpy())
    turned = nifti.as_reoriented(nib.orientations.axcodes2ornt(("P", "I", "R")))
    assert not np.allclose(turned.affine, nifti.affine)
    one, two = (run((pair.fixed, m), init="rigid") for m in (nifti, turned))
    assert (one.evaluation.displacement - two.evaluation.displacement).abs().max() < 1e-2
    assert one.evaluation.displacement.abs().max() > 0.5
    # In the outermost half voxel of the moving image a hundredth of a mm decides what is inside.
    world = transform_points(pair.fixed.domain.voxel_to_world, pair.fixed.domain.voxels().double())
    reached = transform_points(
        pair.moving.domain.world_to_voxel, world + one.evaluation.displacement.reshape(-1, 3).double()
    )
    inside = ((reached >= 0) & (reached <= torch.tensor(pair.moving.domain.shape) - 1)).all(1)
    assert inside.float().mean() > 0.7
    gap = (one.evaluation.warped - two.evaluation.warped).abs().flatten()
    assert gap[inside].max() < 1e-2 * pair.fixed.data.std()


def test_simpleitk_and_nibabel_images_and_files_are_the_same(tiny: None, folder: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    files = [folder / f"{s}.nii.gz" for s in ("fixed", "moving")]
    results = [run(tuple(read(str(f)) for f in files)) for read in (sitk.ReadImage, nib.loadsave.load, str)]
    for a, b in itertools.pairwise(results):
        assert (a.evaluation.warped - b.evaluation.warped).abs().max() < 1e-3 * a.pair.fixed.data.std()


@pytest.mark.parametrize("init", ["none", "rigid", "affine", "file"])
def test_starts(tiny: None, init: str, tmp_path: Path) -> None:
    shift = torch.eye(4).double()
    shift[:3, 3] = torch.tensor([9.0, -6.0, 3.0])
    pair = pairs.pair(pairs.affine_warp(shift))
    if init == "file":
        np.savetxt(tmp_path / "start.txt", shift.numpy())
    found = run((pair.fixed, pair.moving), init=str(tmp_path / "start.txt") if init == "file" else init).transform.start
    if init == "none":
        assert torch.equal(found, torch.eye(4).double())
    elif init == "file":
        assert torch.allclose(found, shift)
    else:
        points = pairs.points()
        assert (transform_points(found, points) - transform_points(shift, points)).norm(dim=1).mean() < 1
        rigid = torch.linalg.det(found[:3, :3]).sub(1).abs() < 1e-9
        assert bool(rigid) or init == "affine"


def test_masks_change_what_is_fitted(tiny: None) -> None:
    pair = pairs.pair()
    mask = in_the_middle(pairs.CUBE, 20)
    images = (pair.fixed, pair.moving)
    plain, fixed, moving = (run(images, **m) for m in ({}, {"fixed_mask": mask}, {"moving_mask": mask}))
    assert not torch.equal(plain.evaluation.displacement, fixed.evaluation.displacement)
    assert not torch.equal(plain.evaluation.displacement, moving.evaluation.displacement)
    assert fixed.pair.fixed_mask is not None and fixed.pair.fixed_mask.sum() == mask.sum()


def test_points_in_every_frame_are_the_same(tiny: None, folder: Path, tmp_path: Path) -> None:
    pair = pairs.pair(moving_domain=OBLIQUE)
    found = []
    for space in ("ras", "lps", "voxel"):
        files = [tmp_path / f"{space}_{side}.csv" for side in ("fixed", "moving")]
        for file, points, image in zip(
            files, (pair.fixed_points, pair.moving_points), (pair.fixed, pair.moving), strict=True
        ):
            io.write_points(file, points, space, image.domain)
        result = run(
            (pair.fixed, pair.moving), fixed_points=files[0], moving_points=files[1], points_space=space, seed=4
        )
        found.append(result.metrics["tre/mean"])
    assert found == pytest.approx([found[0]] * 3, abs=1e-4)


def test_little_overlap_is_said_and_none_is_refused(tiny: None) -> None:
    pair = pairs.pair()
    for shift, expectation in ((80.0, pytest.warns(RegistrationWarning, match="% of the fixed points")),
                               (300.0, pytest.raises(UserError, match="expected images that overlap"))):  # fmt: skip
        affine = pair.moving.domain.voxel_to_world.clone()
        affine[0, 3] += shift
        with expectation:
            run((pair.fixed, Image(pair.moving.data, Domain.of(pairs.CUBE.shape, affine))))


def test_masks_that_do_not_meet_are_refused(tiny: None) -> None:
    pair = pairs.pair()
    masks = [torch.zeros(pairs.CUBE.shape, dtype=torch.bool) for _ in range(2)]
    masks[0][:8], masks[1][-8:] = True, True
    with pytest.raises(UserError, match="maps no fixed point into the moving mask"):
        run((pair.fixed, pair.moving), fixed_mask=masks[0], moving_mask=masks[1])


def test_a_mask_of_one_voxel_is_enough_for_the_metrics(tiny: None) -> None:
    pair = pairs.pair()
    mask = torch.zeros(pairs.CUBE.shape, dtype=torch.bool)
    mask[16, 16, 16] = True
    assert run((pair.fixed, pair.moving), fixed_mask=mask).metrics["folding/sdlogj"] == 0


def test_fixed_labels_alone_are_reported_as_unused(tiny: None) -> None:
    pair = pairs.pair()
    with pytest.warns(RegistrationWarning, match="--fixed-labels: not used"):
        run((pair.fixed, pair.moving), fixed_labels=in_the_middle(pairs.CUBE, 20).int())


def test_metrics_of_equal_images_are_strict_json(tmp_path: Path) -> None:
    method, pair = pairs.plain_method(), pairs.pair()
    evaluation = evaluate(method.transform(), pair)
    numbers = {**evaluation.metrics, "image/psnr": math.inf, "folding/sdlogj": math.nan}
    write_results(tmp_path, method, pair, replace(evaluation, metrics=numbers))

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    assert (
        json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)["image/psnr"] is None
    )


# -- the command: a mistake is one line, and leaves nothing behind ----------------------------------------------------

FILES = "fixed.nii.gz moving.nii.gz"
MISTAKES = {
    "nothing given": ("", "fixed, moving, out: missing"),
    "no out": (FILES, "out: missing"),
    "missing file": ("fixed.nii.gz no.nii.gz --out x", "no.nii.gz: expected a file"),
    "truncated": ("fixed.nii.gz truncated.nii.gz --out x", "truncated.nii.gz: expected a whole NIfTI"),
    "text": ("text.nii.gz moving.nii.gz --out x", "text.nii.gz: expected a whole NIfTI"),
    "4-D": ("fixed.nii.gz series.nii.gz --out x", "expected a 3-D image, found 4-D"),
    "NaN": ("fixed.nii.gz nan.nii.gz --out x", "1 of 29791"),
    "constant": ("fixed.nii.gz constant.nii.gz --out x", "the constant 5"),
    "empty mask": (f"{FILES} --out x --fixed-mask empty.nii.gz", "empty.nii.gz: expected a mask with voxels"),
    "mask of another shape": (f"{FILES} --out x --fixed-mask moving_mask.nii.gz", "expected the grid of its image"),
    "labels of another shape": (f"{FILES} --out x --moving-labels fixed_labels.nii.gz", "resample the labels"),
    "landmarks differ": (f"{FILES} --out x --fixed-points fixed.csv --moving-points short.csv", "found 50 and 3"),
    "landmarks of one": (f"{FILES} --out x --fixed-points fixed.csv", "found 50 and 0"),
    "landmark outside": (f"{FILES} --out x --fixed-points far.csv --moving-points short.csv", "at index 1: (500.00"),
    "points space": (f"{FILES} --out x --points-space mm", "choose from 'ras', 'lps', 'voxel'"),
    "option": (f"{FILES} --out x --presett fast", "--presett: no such option"),
    "preset": (f"{FILES} --out x --preset slow", "choose from 'fast', 'accurate'"),
    "similarity": (f"{FILES} --out x --similarity mi", "choose from 'lncc', 'ncc', 'mse', 'multimodal', 'nmi', 'mind'"),
    "init": (f"{FILES} --out x --init afine", "--init: expected none, rigid, affine or a file"),
    "init file": (f"{FILES} --out x --init fixed.csv", "expected a text file with a 4 x 4 matrix"),
    "seed": (f"{FILES} --out x --seed -1", "--seed: expected a whole number"),
    "device": (f"{FILES} --out x --device gpu", "choose from 'auto', 'cpu', 'cuda', 'mps'"),
    "absent device": (f"{FILES} --out x --device mps", "PyTorch finds no such device"),
    "out below a file": (f"{FILES} --out fixed.csv/x", "expected a folder that can be written to"),
    "out is a file": (f"{FILES} --out fixed.csv", "expected a folder that can be written to"),
}


@pytest.fixture(scope="module")
def mistaken(folder: Path) -> Path:
    """Files that cannot be used, beside those that can."""
    values = np.random.default_rng(0).normal(size=(31, 31, 31)).astype(np.float32)
    whole = (folder / "fixed.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "text.nii.gz").write_text("no image\n" * 50)
    affine = np.diag([3.0, 3, 3, 1])
    for name, array in (
        ("series", np.stack((values, values), axis=-1)),
        ("constant", np.full_like(values, 5)),
        ("nan", np.where(np.arange(values.size).reshape(values.shape) == 7, np.nan, values)),
    ):
        nib.loadsave.save(nib.nifti1.Nifti1Image(array.astype(np.float32), affine), folder / f"{name}.nii.gz")
    io.write_image(folder / "empty.nii.gz", torch.zeros(pairs.CUBE.shape, dtype=torch.bool), pairs.CUBE)
    io.write_points(folder / "short.csv", pairs.points(3))
    (folder / "far.csv").write_text("x,y,z\n1,2,3\n500,0,0\n0,0,0\n")
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    mistaken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "absent device" and torch.backends.mps.is_available():
        pytest.skip("the device is there")
    monkeypatch.chdir(mistaken)
    before = sorted(mistaken.rglob("*"))
    line, expected = MISTAKES[name]
    assert cli.main(["register", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("medinr: error: ")
    assert expected in err
    assert sorted(mistaken.rglob("*")) == before, "something was left behind"


def test_an_empty_out_is_refused(mistaken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mistaken)
    assert cli.main(["register", *FILES.split(), "--out", ""]) == 2


def test_ctrl_c_writes_nothing_and_says_so(
    tiny: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PairRegistration, "training_step", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    files = [str(folder / f"{side}.nii.gz") for side in ("fixed", "moving")]
    assert cli.main(["register", *files, "--out", str(tmp_path / "out"), "--preset", "fast", "--init", "none"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "medinr: interrupted"
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_normal_run_is_quiet(tiny: None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as outside of pytest
        code = cli.main(
            ["register", str(folder / "fixed.nii.gz"), str(folder / "moving.nii.gz"), "--out", str(tmp_path / "out"),
             "--preset", "fast", "--init", "rigid"]
        )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["RMS", "folding", "motion", "time", "results"]
    bars = [piece for piece in err.replace("\r", "\n").splitlines() if piece.strip()]
    assert bars and all(bar.startswith("fit: ") for bar in bars)
