"""A tiny cohort of heads with a known anatomy: a ball with a hollow whose radius is the condition ``size``."""

import math
from collections.abc import Sequence

import torch

from medinr.data.cohort import Cohort, Condition, Scan
from medinr.space import Domain

SHAPE = (20, 18, 12)
SPACING = 3.0
LABELS = {1: "hollow", 2: "shell"}
LOW, HIGH = 6.0, 12.0
"""mm."""


def domain() -> Domain:
    affine = torch.diag(torch.tensor([SPACING, SPACING, SPACING, 1.0]))
    affine[:3, 3] = -SPACING * (torch.tensor(SHAPE) - 1) / 2
    return Domain.of(SHAPE, affine)


def head(name: str, size: float, wobble: float = 0.0) -> Scan:
    """A head whose hollow has a radius of ``size`` mm, drawn smoothly."""
    grid = domain()
    world = grid.voxels() * SPACING + grid.voxel_to_world[:3, 3].float()
    x, y, z = world.T
    outer = (x.square() + y.square() + (1.2 * z).square()).sqrt()
    inner = ((x - wobble).square() + y.square() + (1.2 * z).square()).sqrt()
    soft = (torch.sigmoid(24 - outer) * (0.3 + 0.7 * torch.sigmoid(inner - size))).reshape(SHAPE)
    labels = torch.where(outer > 24, 0, torch.where(inner > size, 2, 1)).reshape(SHAPE).int()
    sex = float(name[-1] in "13579")
    return Scan(name, name, grid, {"T1w": 100 * soft}, labels, None, {"size": size, "sex": sex})


def cohort(train: int = 6, val: int = 2, test: int = 2, missing: Sequence[str] = ()) -> Cohort:
    """Heads with evenly spaced sizes; those in ``missing`` have no known size."""
    scans: dict[str, Scan] = {}
    splits: dict[str, list[str]] = {}
    for split, count in (("train", train), ("val", val), ("test", test)):
        sizes = torch.linspace(LOW, HIGH, count).tolist()
        splits[split] = [f"{split}{i}" for i in range(count)]
        for i, (name, size) in enumerate(zip(splits[split], sizes, strict=True)):
            scans[name] = head(name, size, wobble=(-1.0) ** i)
    known = {n: {**s.conditions, **({"size": math.nan} if n in missing else {})} for n, s in scans.items()}
    conditions = [Condition("size", "continuous", (), LOW, HIGH), Condition("sex", "categorical", ("f", "m"))]
    return Cohort("heads", ["T1w"], LABELS, conditions, splits, scans.__getitem__, known)
