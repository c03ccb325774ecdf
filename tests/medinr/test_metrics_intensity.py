"""RMS, PSNR and SSIM against their definitions and against torchmetrics."""

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from medinr.metrics import PeakSignalToNoiseRatio, StructuralSimilarity, intensity, psnr, rms_difference, ssim


def pair(shape: tuple[int, ...] = (1, 24, 19, 15)) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.rand(shape) * 800 - 1000
    return image, image + 60 * torch.randn(shape)


def test_rms_in_the_mask() -> None:
    a, b = torch.zeros(1, 2, 2, 1), torch.tensor([3.0, 4.0, 100.0, 0.0]).reshape(1, 2, 2, 1)
    mask = torch.tensor([True, True, False, False]).reshape(2, 2, 1)
    assert rms_difference(a, b, mask) == pytest.approx(math.sqrt(12.5))
    assert rms_difference(a[0], b[0]) == pytest.approx(math.sqrt(10025 / 4))


def test_psnr_is_torchmetrics() -> None:
    a, b = pair()
    assert psnr(a, b, 1200) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1200.0).item(), abs=1e-4)
    mask = torch.zeros(a.shape[1:], dtype=torch.bool)
    mask[3:9] = True
    expected = peak_signal_noise_ratio(a[0][mask], b[0][mask], data_range=1200.0).item()
    assert psnr(a, b, 1200, mask) == pytest.approx(expected, abs=1e-4)
    assert psnr(a, a, 1200) == math.inf


@pytest.mark.parametrize("slab", [250_000, 3 * 19 * 15, 1])
def test_ssim_is_torchmetrics(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intensity, "_SLAB_VOXELS", slab)
    a, b = pair()
    expected = structural_similarity_index_measure(a[None], b[None], data_range=1200.0).item()
    assert ssim(a, b, 1200) == pytest.approx(expected, abs=2e-5)
    assert ssim(a[0], b[0], 1200) == pytest.approx(expected, abs=2e-5)
    assert ssim(a, a, 1200) == pytest.approx(1, abs=1e-6)
    assert 0.1 < expected < 0.99


def test_ssim_of_thin_volumes_and_of_other_grids() -> None:
    a, b = pair((12, 9, 2))
    assert -1 <= ssim(a, b, 1200) < 1
    with pytest.raises(ValueError, match="one grid"):
        ssim(a, b[1:], 1200)


def test_metrics_average_the_cases() -> None:
    cases = [pair() for _ in range(2)]
    signal, structure = PeakSignalToNoiseRatio(1200), StructuralSimilarity(1200)
    for a, b in cases:
        signal.update(a, b)
        structure.update(a, b)
    assert signal.compute().item() == pytest.approx(sum(psnr(a, b, 1200) for a, b in cases) / 2)
    assert structure.compute().item() == pytest.approx(sum(ssim(a, b, 1200) for a, b in cases) / 2)
