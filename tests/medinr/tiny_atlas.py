"""A cohort of growing heads: an ellipsoid of two tissues whose size follows the age, in two modalities."""

import torch

from medinr.data.cohort import Cohort, Condition, Scan
from medinr.fields.modulated import ModulatedSIREN
from medinr.methods import ConditionalAtlas
from medinr.space import Domain

SHAPE, SPACING = (14, 16, 12), 4.0
AGES = (24.0, 26.0, 28.0, 30.0, 32.0, 34.0)
NO_T1W, NO_LABELS, NO_AGE = 1, 2, 4
"""Scans that lack something, where a test asks for blemishes."""


def radius(age: float) -> float:
    """Of the outer tissue, mm."""
    return 12.0 + 0.8 * (age - 24.0)


def scan(i: int, age: float, shift: float = 0.0, blemished: bool = False, finer: int = 1) -> Scan:
    """A head at ``age``, moved by ``shift`` mm along x; its world lies 100 mm off the origin."""
    shape, spacing = [finer * n for n in SHAPE], SPACING / finer
    affine = torch.diag(torch.tensor([spacing] * 3 + [1.0], dtype=torch.float64))
    affine[:3, 3] = 100.0
    domain = Domain.of(shape, affine)
    at = domain.voxels() * spacing - spacing * (torch.tensor(shape) - 1) / 2 - torch.tensor([shift, 0.0, 0.0])
    distance = (at / torch.tensor([1.0, 1.25, 0.9])).norm(dim=1).view(*shape)
    labels = (distance < radius(age)).int() + (distance < 0.6 * radius(age)).int()
    images = {"T2w": 100.0 * labels.float(), "T1w": 50.0 * (3 - labels).float() * (labels > 0)}
    known = {"age": age, "sex": float(i % 2)}
    if blemished:
        if i == NO_T1W:
            del images["T1w"]
        if i == NO_AGE:
            known["age"] = float("nan")
    without = blemished and i == NO_LABELS
    return Scan(f"s{i}", f"p{i}", domain, images, None if without else labels, labels > 0, known)


def cohort(ages: tuple[float, ...] = AGES, test: tuple[float, ...] = (29.0,), blemished: bool = False) -> Cohort:
    """Training scans at ``ages``, test scans after them."""
    scans = [scan(i, age, shift=3.0 * (-1) ** i, blemished=blemished) for i, age in enumerate((*ages, *test))]
    by_name = {s.name: s for s in scans}
    names = list(by_name)
    conditions = [
        Condition("age", "continuous", low=min(ages), high=max(ages)),
        Condition("sex", "categorical", ("F", "M")),
    ]
    return Cohort(
        "heads", ["T2w", "T1w"], {1: "outer", 2: "inner"}, conditions,
        {"train": names[: len(ages)], "test": names[len(ages) :]}, by_name.__getitem__,
        {s.name: s.conditions for s in scans},
    )  # fmt: skip


def decoder(**options: object) -> ModulatedSIREN:
    """A small one."""
    return ModulatedSIREN(**{"width": 24, "layers": 2, "modulated": (1, 2), "code": 8, "omega": 10.0, **options})  # type: ignore[arg-type]


def atlas(**options: object) -> ConditionalAtlas:
    """Small, with learning rates for a few hundred steps; the age is told to the decoder."""
    torch.manual_seed(0)
    settings = {
        "points": 600, "scans": 6, "explicit": ["age"], "condition_scale": 1.0, "lr": 5e-3, "code_lr": 5e-3,
        "pose_lr": 2e-3, "code_weight": 0.1, "sigma": 1.0, **options,
    }  # fmt: skip
    return ConditionalAtlas(settings.pop("decoder", None) or decoder(), **settings)  # type: ignore[arg-type]
