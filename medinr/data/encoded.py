"""Conditions as numbers for a network, and back; what is missing stays NaN."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medinr.data.cohort import Condition


def encoded_size(condition: Condition) -> int:
    """Numbers for one condition: one for a continuous one or two levels, else one for each level."""
    return 1 if len(condition.levels) <= 2 else len(condition.levels)


def encode(conditions: Sequence[Condition], values: Mapping[str, float]) -> Tensor:
    """[q]: a continuous condition's trained range as [-1, 1] (values beyond go on linearly), a level as -1 or 1.

    Of two levels the first is -1 and the second 1; of more, the one that holds is 1 and the others are -1. A missing
    value is NaN in all its numbers.
    """
    found: list[float] = []
    for condition in conditions:
        value, n = values.get(condition.name, math.nan), encoded_size(condition)
        if math.isnan(value):
            found += [math.nan] * n
        elif condition.kind == "continuous":
            half = (condition.high - condition.low) / 2
            found.append((value - (condition.low + condition.high) / 2) / half if half > 0 else 0.0)
        elif n == 1:
            found.append(2 * value - 1 if len(condition.levels) == 2 else 0.0)
        else:
            found += [1.0 if level == round(value) else -1.0 for level in range(n)]
    return torch.tensor(found, dtype=torch.float32)


def decode(conditions: Sequence[Condition], code: Tensor) -> dict[str, float]:
    """The opposite of `encode`: a number, or the index of the likeliest level."""
    found, numbers, at = {}, code.tolist(), 0
    for condition in conditions:
        part = numbers[at : at + encoded_size(condition)]
        at += len(part)
        if condition.kind == "continuous":
            half = (condition.high - condition.low) / 2
            found[condition.name] = (condition.low + condition.high) / 2 + half * part[0]
        elif len(part) == 1:
            found[condition.name] = float(len(condition.levels) == 2 and part[0] > 0)
        else:
            found[condition.name] = float(max(range(len(part)), key=part.__getitem__))
    return found


def told(conditions: Sequence[Condition], condition: Mapping[str, float]) -> str:
    """Conditions as a person reads them: ``week=29, sex=female``."""
    return ", ".join(f"{c.name}={c.text(condition[c.name])}" for c in conditions if c.name in condition)


def as_plain(condition: Condition) -> dict[str, object]:
    """A condition as plain values, for a checkpoint."""
    return {
        "name": condition.name, "kind": condition.kind, "levels": list(condition.levels),
        "low": condition.low, "high": condition.high,
    }  # fmt: skip


def from_plain(values: Mapping[str, object]) -> Condition:
    """The opposite of `as_plain`."""
    kept = dict(values)
    return Condition(**{**kept, "levels": tuple(kept["levels"])})  # type: ignore[arg-type]
