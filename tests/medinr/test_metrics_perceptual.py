"""LPIPS against torchmetrics', whose backbone is given the same weights, as ImageNet's come with no package."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as theirs

from medinr.errors import UserError
from medinr.metrics import PerceptualDistance
from tests.medinr import alexnet


@pytest.fixture
def backbone(tmp_path: Path) -> tuple[Path, nn.Sequential]:
    network = alexnet.alexnet(0)
    return alexnet.write(tmp_path / "alexnet.pth", network), network


def volumes(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    one = torch.rand(shape, generator=g)
    return one, (one + 0.2 * torch.randn(shape, generator=g)).clamp(0, 1)


@pytest.mark.parametrize("shape", [(70, 64, 3), (40, 60, 18)])
def test_the_distance_is_that_of_torchmetrics(
    shape: tuple[int, int, int], backbone: tuple[Path, nn.Sequential], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, network = backbone
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: network)
    reference = theirs._LPIPS(net="alex")
    one, other = volumes(shape)
    slices = [v.permute(2, 0, 1)[:, None].expand(-1, 3, -1, -1) * 2 - 1 for v in (one, other)]
    if min(shape[:2]) < 64:
        slices = [nn.functional.interpolate(s, scale_factor=64 / min(shape[:2]), mode="bilinear") for s in slices]
    distance = PerceptualDistance(file)
    expected = float(reference(*slices).mean())
    assert expected > 1e-4
    assert float(distance(one, other, 1.0)) == pytest.approx(expected, rel=2e-3)  # they guard a root otherwise
    assert float(distance(100 * one, 100 * other, 100.0)) == pytest.approx(float(distance(one, other, 1.0)), rel=1e-5)
    assert float(distance(one, one, 1.0)) == 0


def test_a_file_of_something_else_is_refused(tmp_path: Path, backbone: tuple[Path, nn.Sequential]) -> None:
    with pytest.raises(UserError, match=r"none\.pth: expected AlexNet's ImageNet weights"):
        PerceptualDistance(tmp_path / "none.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: expected AlexNet's weights, found other ones"):
        PerceptualDistance(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="lpips: expected two volumes"):
        PerceptualDistance(backbone[0])(torch.zeros(8, 8, 8), torch.zeros(8, 8, 9), 1.0)
