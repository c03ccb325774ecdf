"""A small thorax of analytic shapes, and a DIR-LAB folder made of it in either naming habit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medinr.data import layouts

SHAPE = (40, 36, 20)
SPACING = (8.0, 8.0, 10.0)


def thorax(shift: float = 0.0) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """HU [x, y, z] of two ellipsoid lungs in an elliptic body, and the lungs; ``shift`` moves them along z (mm)."""
    x, y, z = (
        np.arange(n).reshape([-1 if a == i else 1 for a in range(3)]) * s - (n - 1) * s / 2
        for i, (n, s) in enumerate(zip(SHAPE, SPACING, strict=True))
    )
    body = (x / 140) ** 2 + (y / 100) ** 2 + 0 * z < 1
    lungs = np.zeros(SHAPE, dtype=bool)
    for side in (-65, 65):
        lungs |= ((x - side) / 45) ** 2 + (y / 65) ** 2 + ((z - shift) / 75) ** 2 < 1
    table = np.broadcast_to((np.abs(y - 125) < 8) & (np.abs(x) < 100), SHAPE)
    noise = np.random.default_rng(0).normal(0, 15, SHAPE)
    hu = np.where(lungs, -820, np.where(body, 40, np.where(table, -100, -1000))) + noise
    return hu.astype(np.int16), lungs


def lung_voxels(count: int) -> NDArray[np.int64]:
    """Voxels (0-based) well inside both lungs, and their mirror images."""
    rng = np.random.default_rng(1)
    offsets = rng.integers(-2, 3, size=(count, 3))
    centre = np.array([[11, 17, 9], [28, 17, 9]])[np.arange(count) % 2]
    return np.asarray(centre + offsets)


@pytest.fixture
def write_case(tmp_path: Path) -> Callable[..., Path]:
    """Write a DIR-LAB case of the thorax: returns the root. Names are spelled out here, not taken from layouts."""

    def write(
        case: int = 1,
        folder: str = "Case1Pack",
        images: str = "Images/case1_{phase}_s.img",
        landmarks: str = "ExtremePhases/Case1_300_{phase}_xyz.txt",
        sampled: str | None = None,
        phases: tuple[str, ...] = ("T00", "T50"),
        offset: int = 1024,
        geometry: bool = True,
    ) -> Path:
        root = tmp_path / "dirlab"
        pack = root / folder
        for number, phase in enumerate(phases):
            hu, _ = thorax(-10.0 * number)
            path = pack / images.format(phase=phase)
            path.parent.mkdir(parents=True, exist_ok=True)
            (hu + offset).astype("<i2").transpose(2, 1, 0).tofile(path)
            moved = lung_voxels(300) + 1 - [0, 0, number]
            for pattern, count in ((landmarks, 300), (sampled, 75)):
                if pattern is not None:
                    file = pack / pattern.format(phase=phase)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text("".join(f"{x}\t{y}\t{z}\n" for x, y, z in moved[:count]))
        if geometry:
            facts = layouts.dirlab_case(case)
            layouts.write_geometry(root, [layouts.replace(facts, shape=SHAPE, spacing=SPACING)])
        return root

    return write
