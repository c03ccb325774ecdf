"""A small folder with the names of the adult T1 slabs: ellipsoids of different sizes, with labels."""

from pathlib import Path

import torch

from medinr import io
from medinr.space import Domain

AFFINE = torch.tensor([[0.0, 0, 2, -20], [-2, 0, 0, 24], [0, 2, 0, 0], [0, 0, 0, 1]])
"""Axes P, S, R as those of the real files."""
SHAPE = (24, 12, 20)
SUBJECTS = (1, 2, 3, 29, 32, 34, 36)
"""Two of one person and another to train; two to validate; two to test."""


def write(folder: Path) -> Path:
    """Write the files; returns the folder."""
    domain = Domain.of(SHAPE, AFFINE)
    x, y, z = (torch.linspace(-1, 1, n) for n in SHAPE)
    for number in SUBJECTS:
        a, b, c = 0.5 + 0.03 * torch.tensor([number % 7, number % 5, number % 3])
        radius = ((x[:, None, None] / a) ** 2 + (y[:, None] / b) ** 2 + (z / c) ** 2).sqrt()
        image = 900 * (radius < 1) + 100 * torch.sin(9 * radius) * (radius < 1)
        io.write_image(folder / f"sub-{number:02d}_T1w.nii.gz", image.float(), domain)
        io.write_image(folder / f"sub-{number:02d}_dseg.nii.gz", (radius < 1).short() + (radius < 0.5).short(), domain)
    return folder
