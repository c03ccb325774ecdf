"""What is said about a pair."""

import pytest
import torch

from medinr.data.pair import Pair
from medinr.data.report import check_pair, describe_domain, pair_report, share_inside
from medinr.errors import UserError
from medinr.space import Domain, Image

DOMAIN = Domain.of((4, 5, 6), [[-1.0, 0, 0, 0], [0, -2, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1]])
IMAGE = Image(torch.arange(120.0).reshape(1, 4, 5, 6), DOMAIN, "scan.nii.gz")


def test_share_inside_counts_nearest_voxels() -> None:
    mask = torch.zeros(DOMAIN.shape, dtype=torch.bool)
    mask[1, 2, 3] = True
    points = torch.tensor([[-1.0, -4.0, 7.5], [-1.4, -3.1, 8.7], [-2.0, -4.0, 7.5], [50.0, 0.0, 0.0]])
    assert share_inside(points, mask, DOMAIN) == 0.5


def test_report_names_sizes_masks_and_motion() -> None:
    mask = torch.ones(DOMAIN.shape, dtype=torch.bool)
    points = torch.zeros(1, 3)
    pair = Pair("p", IMAGE, IMAGE, mask, None, points, points + torch.tensor([-3.0, 0, 0]))
    check_pair(pair)
    report = pair_report(pair)
    assert describe_domain(DOMAIN) == "4x5x6 at 1x2x2.5 mm"
    assert "fixed image: 4x5x6 at 1x2x2.5 mm, values 0 to 119 (scan.nii.gz)" in report
    assert any(line.startswith("fixed mask: 0.0006 litres") and "100.0% of the landmarks" in line for line in report)
    assert "moving mask: none" in report
    assert "landmarks: 1, motion mean 3.00 mm, sd 0.00, max 3.00" in report


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(UserError, match="empty mask"):
        check_pair(Pair("p", IMAGE, IMAGE, torch.zeros(DOMAIN.shape, dtype=torch.bool)))
