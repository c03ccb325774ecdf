"""Lung masks against shapes with a known answer, in any orientation, and on a real patient."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medinr.data.lungs import dilated, eroded, lung_mask, otsu_threshold
from medinr.errors import RegistrationWarning, UserError
from medinr.io import read_image
from medinr.space import Domain, Image

SPACING = (4.0, 4.0, 5.0)
SHAPE = (80, 70, 44)


def grid() -> list[np.ndarray]:
    return [
        np.arange(n).reshape([-1 if a == i else 1 for a in range(3)]) * s - (n - 1) * s / 2
        for i, (n, s) in enumerate(zip(SHAPE, SPACING, strict=True))
    ]


def chest() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU, lungs and trachea [x, y, z]: body, lungs with vessels, trachea that forks, stomach gas, table, air around."""
    x, y, z = grid()
    hu = np.full(SHAPE, -1000.0)
    hu[np.broadcast_to((x / 145) ** 2 + (y / 105) ** 2 < 1, SHAPE)] = 40
    hu[np.broadcast_to((np.abs(y - 112) < 6) & (np.abs(x) < 130), SHAPE)] = 100  # the table touches the back
    lungs = np.zeros(SHAPE, dtype=bool)
    for side in (-68, 68):
        lungs |= ((x - side) / 48) ** 2 + (y / 70) ** 2 + ((z + 5) / 85) ** 2 < 1
    hu[lungs] = -830
    vessels = lungs & ((x % 20 < 4) & (y % 20 < 4))
    hu[vessels] = 50
    trachea = np.broadcast_to((x**2 + y**2 < 9**2) & (z > 20), SHAPE)
    bronchi = np.broadcast_to((np.abs(z - 17) < 6) & (y**2 < 36) & (np.abs(x) < 45), SHAPE)
    hu[trachea | bronchi] = -990
    gas = np.broadcast_to(((x - 80) / 30) ** 2 + (y / 40) ** 2 + ((z + 108) / 9) ** 2 < 1, SHAPE)
    hu[gas] = -1000
    above_carina = trachea & ~lungs & np.broadcast_to(z > 25, SHAPE)
    return hu + np.random.default_rng(0).normal(0, 20, SHAPE), lungs, above_carina


def image(hu: np.ndarray, affine: np.ndarray | None = None) -> Image:
    matrix = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1]) if affine is None else affine
    return Image(torch.from_numpy(np.ascontiguousarray(hu)).float()[None], Domain.of(hu.shape, matrix))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_lungs_with_their_vessels_without_trachea_gas_and_table() -> None:
    hu, lungs, trachea = chest()
    mask = lung_mask(image(hu)).numpy()
    assert dice(mask, lungs) > 0.97
    assert mask[lungs & (hu > -400)].mean() > 0.93  # vessels; those along the pleura are lost
    assert mask[trachea].mean() < 0.02
    assert not mask[..., 0].any() and (hu[..., 0] < -900)[30:].any()  # stomach gas
    assert lung_mask(image(hu), remove_trachea=False).numpy()[trachea].mean() > 0.9
    without = lung_mask(image(hu), closing_mm=0.0).numpy()
    assert without.sum() < mask.sum()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flip", [False, True])
def test_any_orientation_gives_the_same_mask(order: tuple[int, int, int], flip: bool) -> None:
    """The affine tells which way is up: permuted and flipped arrays give the permuted and flipped mask."""
    hu, _, _ = chest()
    reference = lung_mask(image(hu)).numpy()
    permutation = np.zeros((4, 4))
    permutation[3, 3] = 1
    for new, old in enumerate(order):
        permutation[old, new] = 1
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1]) @ permutation
    turned, expected = hu.transpose(order), reference.transpose(order)
    if flip:
        axis = order.index(2)
        affine[:3, 3] += affine[:3, axis] * (SHAPE[2] - 1)
        affine[:3, axis] *= -1
        turned, expected = np.flip(turned, axis), np.flip(expected, axis)
    assert np.array_equal(lung_mask(image(turned, affine)).numpy(), expected)


def test_tight_crop_to_the_body() -> None:
    hu, lungs, _ = chest()
    box = np.s_[6:-6, 12:-10, :]
    assert dice(lung_mask(image(hu[box])).numpy(), lungs[box]) > 0.97


def test_joined_lungs_are_told_apart() -> None:
    """Lungs that meet in front of the heart, with a leak in the septum: closing must not turn the septum into lung."""
    hu, lungs, _ = chest()
    x, y, z = grid()
    fronts = np.broadcast_to((np.abs(x) < 40) & (np.abs(y + 40) < 12) & (np.abs(z + 30) < 40), SHAPE)
    septum = fronts & (np.abs(x) < 5)
    leak = septum & (np.abs(z + 30) < 6) & (np.abs(y + 40) < 5)
    hu[fronts], hu[septum], hu[leak] = -830, 40, -830
    mask = lung_mask(image(hu)).numpy()
    assert mask[septum & ~leak].mean() < 0.1
    assert dice(mask, lungs | (fronts & ~septum)) > 0.97


def test_a_ring_of_lung_does_not_fill_the_heart() -> None:
    """In a slice where joined lungs run around the heart, the heart is a hole too large to be a vessel."""
    hu, _, _ = chest()
    x, y, z = grid()
    ring = np.broadcast_to((np.abs(x) < 60) & (np.abs(y) < 40) & (np.abs(z + 30) < 8), SHAPE)
    heart = ring & (np.abs(x) < 48) & (np.abs(y) < 28)
    hu[ring], hu[heart] = -830, 40
    mask = lung_mask(image(hu), closing_mm=0.0).numpy()
    assert mask[heart].mean() < 0.05


def test_dilation_is_in_millimetres() -> None:
    point = np.zeros((21, 21, 21), dtype=bool)
    point[10, 10, 10] = True
    grown = dilated(point, (1.0, 2.0, 2.5), 5.0)
    assert [int(np.ptp(axis)) // 2 for axis in np.nonzero(grown)] == [5, 2, 2]
    assert eroded(grown, (1.0, 2.0, 2.5), 4.9).sum() >= 1
    assert eroded(np.ones((3, 3, 3), bool), (1.0, 1.0, 1.0), 5.0).all()
    hu, _, _ = chest()
    plain, wide = lung_mask(image(hu)), lung_mask(image(hu), dilate_mm=5.0)
    assert bool((wide | ~plain).all()) and wide.sum() > 1.1 * plain.sum()


def test_other_units_fall_back_on_otsu_and_say_so() -> None:
    hu, lungs, _ = chest()
    with pytest.warns(RegistrationWarning, match="Otsu"):
        mask = lung_mask(image((hu + 1024) * 0.5))
    assert dice(mask.numpy(), lungs) > 0.95


def test_otsu_lies_between_two_classes() -> None:
    rng = np.random.default_rng(0)
    assert 20 < otsu_threshold(np.concatenate([rng.normal(0, 5, 3000), rng.normal(100, 5, 1000)])) < 80


def test_a_chest_without_lungs() -> None:
    hu, lungs, _ = chest()
    hu[lungs] = 40
    with pytest.raises(UserError, match="lungs"):
        lung_mask(image(hu))


@pytest.mark.parametrize(("phase", "litres"), [("T10", 5.47), ("T60", 5.01)])
def test_real_patient(shared: Path, phase: str, litres: float) -> None:
    """Volumes of the masks that were looked at; two lungs; the air in them."""
    scan = read_image(shared / f"data/popi_4dct/popi_{phase}.nii.gz")
    mask = lung_mask(scan)
    assert mask.sum().item() * 150 / 1e6 == pytest.approx(litres, rel=0.03)
    assert scan.data[0][mask].mean() < -700
    halves = mask[:50].sum() / mask.sum()
    assert 0.35 < halves < 0.65
    assert not bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
