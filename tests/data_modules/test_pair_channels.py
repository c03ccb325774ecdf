"""The pair data module with several channels, single slices, guides and excluded regions."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from data_modules import PairDataModule
from medinr import cli
from medinr.callbacks.results import thinned
from medinr.errors import UserError

AFFINE = np.diag([-2.0, -2.0, 2.5, 1.0])
SHAPE = (20, 18, 16)


def save(path: Path, array: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, list[str] | str]:
    values = (
        np.random.default_rng(0).random((2, 2, *SHAPE), dtype=np.float32) + np.array([0, 10])[None, :, None, None, None]
    )
    values = values.astype(np.float32)
    mask = np.zeros(SHAPE, np.uint8)
    mask[4:14, 4:12, 3:12] = 1
    out: dict[str, list[str] | str] = {}
    for side, channels in zip(("fixed", "moving"), values, strict=True):
        out[side] = [save(tmp_path / f"{side}{c}.nii.gz", v) for c, v in enumerate(channels)]
        out[f"{side}_mask"] = save(tmp_path / f"{side}_mask.nii.gz", mask)
        out[f"{side}_exclude"] = save(tmp_path / f"{side}_exclude.nii.gz", np.roll(mask, 5, axis=0))
        out[f"{side}_guides"] = str(tmp_path / f"{side}.csv")
        Path(str(out[f"{side}_guides"])).write_text("x,y,z\n6,5,4\n8,10.5,7\n", encoding="utf-8")
    return out


def test_channels_guides_and_exclusions(files: dict[str, list[str]]) -> None:
    pair = PairDataModule(**files, points_space="voxel").pair  # type: ignore[arg-type]
    assert pair.fixed.data.shape == (2, *SHAPE) == pair.moving.data.shape
    assert pair.fixed.data[0].max() < 2 and pair.fixed.data[1].min() >= 10
    assert pair.fixed_exclude is not None and pair.fixed_exclude.dtype == torch.bool and pair.fixed_exclude.any()
    assert pair.moving_exclude is not None and pair.fixed_points is None
    torch.testing.assert_close(pair.fixed_guides, torch.tensor([[-12, -10, 10], [-16, -21, 17.5]]).double())
    few = thinned(pair, 500)
    assert few.fixed_exclude is not None and few.fixed_exclude.shape == few.fixed.domain.shape


def test_they_follow_crops_and_spacings(files: dict[str, list[str]]) -> None:
    data = PairDataModule(**files, points_space="voxel", margin_mm=4.0, spacing=3.0)  # type: ignore[arg-type]
    pair = data.pair
    assert pair.fixed.domain.spacing == pytest.approx((3, 3, 3))
    assert pair.fixed.data.shape[0] == 2 and pair.fixed.data[1].min() >= 10
    for mask in (pair.fixed_mask, pair.fixed_exclude):
        assert mask is not None and mask.shape == pair.fixed.domain.shape and mask.any()
    assert any("2 channels" in line for line in data.check()) and any("not compared" in line for line in data.check())


def test_the_cache_sees_every_channel(files: dict[str, list[str]], tmp_path: Path) -> None:
    def load() -> torch.Tensor:
        return PairDataModule(files["fixed"], files["moving"], cache_dir=str(tmp_path / "cache")).pair.fixed.data

    before = load()
    save(Path(files["fixed"][1]), np.random.default_rng(3).random(SHAPE).astype(np.float32) * 1000)
    assert torch.equal(load()[0], before[0]) and not torch.equal(load()[1], before[1])


def test_a_missing_channel_is_one_line(files: dict[str, list[str]]) -> None:
    with pytest.raises(UserError, match="no_such"):
        PairDataModule([files["fixed"][0], "no_such.nii.gz"], files["moving"]).prepare_data()


def test_channels_along_the_last_axis(files: dict[str, list[str]], tmp_path: Path) -> None:
    both = {}
    for side in ("fixed", "moving"):
        stack = np.stack([np.asarray(nib.load(n).dataobj) for n in files[side]], axis=-1)
        both[side] = save(tmp_path / f"{side}4d.nii.gz", stack)
    assert torch.equal(
        PairDataModule(**both, multichannel=True).pair.fixed.data,
        PairDataModule(files["fixed"], files["moving"]).pair.fixed.data,
    )
    with pytest.raises(UserError, match="expected a 3-D image, found 4-D"):
        _ = PairDataModule(**both).pair


def test_a_slice_keeps_its_thickness(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((30, 24), dtype=np.float32)
    paths = [save(tmp_path / f"{n}.nii.gz", image) for n in ("fixed", "moving")]
    pair = PairDataModule(*paths, spacing=4.0).pair
    assert pair.fixed.domain.spacing == pytest.approx((4, 4, 2.5))
    assert pair.fixed.domain.shape[2] == 1 and pair.fixed.data.std() > 0


def test_an_experiment_of_channels_and_guides_runs(files: dict[str, list[str]], tmp_path: Path) -> None:
    """`medinr fit` and `predict` on YAML with lists of files; the guides are in the loss."""
    config = tmp_path / "two.yaml"
    config.write_text(
        "model:\n  class_path: PairRegistration\n  init_args:\n"
        "    field: {class_path: SIREN, init_args: {hidden: [8]}}\n"
        "    similarity: {class_path: LocalNCC}\n    points: 64\n    landmark_weight: 5.0\n"
        "data:\n  class_path: PairDataModule\n  init_args:\n"
        + "".join(f"    {key}: {value}\n" for key, value in files.items())
        + "    points_space: voxel\n    steps_per_epoch: 4\n"
        "trainer: {max_steps: 4, accelerator: cpu, log_every_n_steps: 1}\n"
    )
    runs = ["--config", str(config), "--runs", str(tmp_path / "runs"), "--wandb", "false"]
    assert cli.main(["fit", *runs]) == 0
    logged = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "runs").rglob("*.csv"))
    assert "loss/landmarks" in logged
    assert cli.main(["predict", *runs, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "warped_channel2.nii.gz").exists()
