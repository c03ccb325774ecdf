"""Small scans and their table, with any blemish a test asks for."""

from pathlib import Path

import numpy as np
import torch

from medinr.io import write_image
from medinr.space import Domain

SHAPE = (9, 10, 8)
AFFINE = np.diag([1.5, 1.5, 2.0, 1.0])


def write_scan(folder: Path, name: str, seed: int, age: float = 40.0, modalities: tuple[str, ...] = ("T2w",)) -> None:
    """``NAME_T2w.nii.gz`` ..., ``NAME_labels.nii.gz`` and ``NAME_mask.nii.gz``: a ball that grows with age."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1) - (np.array(SHAPE) - 1) / 2
    radius = np.linalg.norm(grid * [1.5, 1.5, 2.0], axis=-1)
    labels = np.where(radius < age / 16, 2, np.where(radius < age / 8, 1, 0)).astype(np.int16)
    domain = Domain.of(SHAPE, AFFINE)
    for number, modality in enumerate(modalities):
        values = 100.0 * labels * (1 + number) + rng.normal(0, 5, SHAPE)
        write_image(folder / f"{name}_{modality}.nii.gz", torch.from_numpy(values.astype(np.float32)), domain)
    write_image(folder / f"{name}_labels.nii.gz", torch.from_numpy(labels), domain)
    write_image(folder / f"{name}_mask.nii.gz", torch.from_numpy((labels > 0).astype(np.uint8)), domain)


def write_table(folder: Path, count: int = 6) -> Path:
    """``count`` scans of T2w and T1w, ages 30, 32, ..., alternating sex; returns the table."""
    rows = ["name\tperson\tT2w\tT1w\tlabels\tmask\tage\tsex"]
    for i in range(count):
        name = f"s{i}"
        write_scan(folder, name, i, 30.0 + 2 * i, ("T2w", "T1w"))
        files = [f"{name}_{what}.nii.gz" for what in ("T2w", "T1w", "labels", "mask")]
        rows.append("\t".join([name, f"p{i}", *files, f"{30 + 2 * i}", "MF"[i % 2]]))
    table = folder / "scans.tsv"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return table
