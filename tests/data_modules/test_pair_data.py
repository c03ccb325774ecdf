"""Any two files, and the loaders, crops, spacings and caches that all data modules share."""

from pathlib import Path

import lightning
import nibabel as nib
import numpy as np
import pytest
import torch

from data_modules import PairDataModule
from medinr.errors import RegistrationWarning, UserError
from medinr.space import transform_points

OBLIQUE = np.array([[0.0, 2.0, 0.0, -7.0], [-1.5, 0.0, 0.3, 4.0], [0.1, 0.0, 3.0, 9.0], [0, 0, 0, 1]])


def plane(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """x + 2y - 3z in world mm: resampled linearly without loss, so values tell where a voxel truly is."""
    i, j, k = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    world = np.stack([i, j, k], -1) @ affine[:3, :3].T + affine[:3, 3]
    return (world @ np.array([1.0, 2.0, -3.0])).astype(np.float32)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    grids = {"fixed": (np.diag([-2.0, -2.0, 2.5, 1.0]), (20, 18, 16)), "moving": (OBLIQUE, (14, 22, 12))}
    out: dict[str, str] = {}
    for side, (affine, shape) in grids.items():
        mask = np.zeros(shape, np.uint8)
        mask[5:9, 4:12, 3:8] = 1
        for key, values in ((side, plane(affine, shape)), (f"{side}_mask", mask), (f"{side}_labels", mask * 7)):
            out[key] = str(tmp_path / f"{key}.nii.gz")
            nib.save(nib.Nifti1Image(values, affine), out[key])
        out[f"{side}_points"] = str(tmp_path / f"{side}.csv")
        Path(out[f"{side}_points"]).write_text("x,y,z\n6,5,4\n8,10.5,7\n", encoding="utf-8")
    return out


def values_at_voxels(data: PairDataModule, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    image = getattr(data.pair, side)
    world = transform_points(image.domain.voxel_to_world, image.domain.voxels().double())
    return image.data.flatten().double(), world @ torch.tensor([1.0, 2.0, -3.0]).double()


def test_two_grids_masks_points_labels(files: dict[str, str]) -> None:
    pair = PairDataModule(**files, points_space="voxel").pair
    assert pair.fixed.domain.shape == (20, 18, 16) and pair.moving.domain.shape == (14, 22, 12)
    assert pair.fixed_mask is not None and pair.fixed_mask.sum() == 4 * 8 * 5
    assert pair.moving_labels is not None and set(pair.moving_labels.unique().tolist()) == {0, 7}
    assert not pair.moving_labels.is_floating_point()
    expected = torch.tensor([[0 - 7 + 10, -9 + 1.2 + 4, 0.6 + 12 + 9]]).double()
    torch.testing.assert_close(pair.moving_points[:1], expected)  # type: ignore[index]
    assert torch.equal(pair.start, torch.eye(4).double())


def test_only_the_images_are_needed(files: dict[str, str]) -> None:
    pair = PairDataModule(files["fixed"], files["moving"]).pair
    assert pair.fixed_mask is None and pair.moving_labels is None and pair.fixed_points is None


def test_crop_keeps_world_positions(files: dict[str, str]) -> None:
    data = PairDataModule(**files, points_space="voxel", margin_mm=4.0)
    assert data.domain.shape == (4 + 4, 8 + 4, 5 + 4)  # 2 voxels of 2 mm and 2 of 2.5 mm at either end
    for side in ("fixed", "moving"):
        values, expected = values_at_voxels(data, side)
        torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)
    assert data.pair.fixed_mask is not None and data.pair.fixed_mask.sum() == 4 * 8 * 5
    whole = PairDataModule(**files, points_space="voxel")
    assert torch.equal(data.pair.moving_points, whole.pair.moving_points)  # type: ignore[arg-type]


@pytest.mark.parametrize("spacing", [1.2, 4.0])
def test_resampling_keeps_world_positions(files: dict[str, str], spacing: float) -> None:
    data = PairDataModule(**files, points_space="voxel", spacing=spacing)
    assert data.domain.spacing == pytest.approx((spacing,) * 3, abs=1e-4)
    assert data.pair.fixed_mask is not None and data.pair.fixed_mask.shape == data.domain.shape
    litres = data.pair.fixed_mask.sum().item() * spacing**3
    assert litres == pytest.approx(4 * 8 * 5 * 10.0, rel=0.35)
    image = data.pair.fixed
    # Coarser images are smoothed, which bends the plane near the border and nowhere else.
    values, expected = (v.reshape(image.domain.shape)[2:-2, 2:-2, 2:-2] for v in values_at_voxels(data, "fixed"))
    assert values.numel() > 0
    torch.testing.assert_close(values, expected, atol=2e-3, rtol=0)


def test_coarser_images_do_not_alias(tmp_path: Path) -> None:
    """A checkerboard of single voxels averages out instead of turning into a coarse pattern."""
    checkers = (np.indices((24, 24, 24)).sum(0) % 2).astype(np.float32)
    nib.save(nib.Nifti1Image(checkers, np.eye(4)), tmp_path / "c.nii.gz")
    coarse = PairDataModule(str(tmp_path / "c.nii.gz"), str(tmp_path / "c.nii.gz"), spacing=4.0).pair.fixed.data
    assert (coarse[0, 1:-1, 1:-1, 1:-1] - 0.5).abs().max() < 1e-3


def test_a_crop_needs_masks(files: dict[str, str]) -> None:
    with pytest.raises(UserError, match="mask of the fixed image"):
        PairDataModule(files["fixed"], files["moving"], margin_mm=5.0).setup()


def test_cache_follows_files_and_settings(files: dict[str, str], tmp_path: Path) -> None:
    def load(**settings: float) -> torch.Tensor:
        data = PairDataModule(**files, points_space="voxel", cache_dir=str(tmp_path / "cache"), **settings)  # type: ignore[arg-type]
        data.setup()
        return data.pair.fixed.data

    first = load()
    assert torch.equal(first, load())
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 1
    assert load(margin_mm=2.0).shape != first.shape
    nib.save(nib.Nifti1Image(first[0].numpy() + 1, np.diag([-2.0, -2.0, 2.5, 1.0])), files["fixed"])
    torch.testing.assert_close(load(), first + 1)


def test_counts_and_sides_of_points(files: dict[str, str]) -> None:
    Path(files["moving_points"]).write_text("x,y,z\n6,5,4\n", encoding="utf-8")
    with pytest.raises(UserError, match="found 2 and 1"):
        PairDataModule(**files, points_space="voxel").setup()
    del files["moving_points"]
    with pytest.raises(UserError, match="found 2 and 0"):
        PairDataModule(**files, points_space="voxel").setup()


def test_points_outside_the_mask_are_reported(files: dict[str, str]) -> None:
    Path(files["fixed_points"]).write_text("x,y,z\n6,5,4\n15,10.5,7\n", encoding="utf-8")
    with pytest.warns(RegistrationWarning, match=r"50\.0% of the fixed landmarks"):
        PairDataModule(**files, points_space="voxel").setup()


def test_missing_files_are_named_before_anything_is_read(files: dict[str, str]) -> None:
    files["moving_labels"] = "nowhere.nii.gz"
    with pytest.raises(UserError, match=r"nowhere\.nii\.gz"):
        PairDataModule(**files).prepare_data()


def test_start_matrix_from_a_file(files: dict[str, str], tmp_path: Path) -> None:
    matrix = np.eye(4)
    matrix[:3, 3] = [1.5, -2.0, 3.0]
    np.savetxt(tmp_path / "start.txt", matrix)
    pair = PairDataModule(files["fixed"], files["moving"], start=str(tmp_path / "start.txt")).pair
    torch.testing.assert_close(pair.start, torch.from_numpy(matrix))
    np.savetxt(tmp_path / "bad.txt", matrix[:3])
    with pytest.raises(UserError, match="4 x 4"):
        PairDataModule(files["fixed"], files["moving"], start=str(tmp_path / "bad.txt")).setup()


class CountSteps(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[object] = []

    def training_step(self, batch: int, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight**2

    def validation_step(self, batch: int, batch_idx: int) -> None:
        self.seen.append(f"validate {batch}")

    def predict_step(self, batch: int, batch_idx: int) -> int:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_loaders_count_steps_through_lightning(files: dict[str, str]) -> None:
    data = PairDataModule(files["fixed"], files["moving"], steps_per_epoch=3)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    method = CountSteps()
    trainer.fit(method, datamodule=data)
    assert method.seen == [0, 1, 2, "validate 0", 0, 1, 2, "validate 0"]
    assert trainer.predict(method, datamodule=data) == [0]


def test_auto_masks_are_lungs_and_label_counts_are_reported(files: dict[str, str], shared: Path) -> None:
    scan = str(shared / "data/popi_4dct/popi_T60.nii.gz")
    data = PairDataModule(scan, scan, fixed_mask="auto")
    assert data.pair.fixed_mask is not None and data.pair.moving_mask is None
    assert data.pair.fixed.data[0][data.pair.fixed_mask].mean() < -700
    assert "moving labels: 1 structures" in PairDataModule(**files, points_space="voxel").check()
