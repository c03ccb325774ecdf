"""What latents tell of their brains: ages, classes, neighbours."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medinr.latents import Latent


def features(latents: Sequence[Latent], shapes: bool = True) -> Tensor:
    """Latents as rows [S, F] in float64: codes, and what the poses say of the shape."""
    parts = [torch.cat((x.code.flatten(), x.pose[6:] if shapes else x.pose[:0])) for x in latents]
    return torch.stack(parts).double()


def ridge_predict(x: Tensor, y: Tensor, new: Tensor, penalties: Sequence[float] = ()) -> Tensor:
    """Predictions [M] at ``new`` [M, F] of ridge regression of y [S] on x [S, F], in its dual form.

    Columns are centred and scaled as a whole; of the penalties (relative to the mean eigenvalue) the one with the least
    leave-one-out error of the training rows is taken, which the hat matrix gives without fitting anew.
    """
    mean, centre = x.mean(0), y.double().mean()
    a, b = x - mean, new - mean
    gram, t = a @ a.T, y.double() - centre
    scale = gram.diagonal().mean().clamp(min=1e-12)
    values, vectors = torch.linalg.eigh(gram / scale)
    rotated = vectors.T @ t
    best, chosen = torch.inf, 1.0
    for penalty in penalties or [10.0**k for k in range(-5, 3)]:
        shrink = values.clamp(min=0) / (values.clamp(min=0) + penalty)
        fitted = vectors @ (shrink * rotated)
        leverage = (vectors.square() * shrink).sum(1) + 1 / len(t)
        error = float(((t - fitted) / (1 - leverage).clamp(min=1e-6)).square().mean())
        if error < best:
            best, chosen = error, penalty
    weights = vectors @ (rotated / (values.clamp(min=0) + chosen))
    predicted: Tensor = (b @ a.T / scale) @ weights + centre
    return predicted


def nearest(x: Tensor, new: Tensor, most: int = 5) -> tuple[Tensor, Tensor]:
    """Numbers [M, k] of the nearest rows of x [S, F] to each row of ``new`` [M, F], and their distances."""
    distance, order = torch.cdist(new, x).sort(dim=1)
    return order[:, :most], distance[:, :most]


def folds(count: int, parts: int, seed: int = 0) -> list[Tensor]:
    """Rows of each part of a cross-validation, shuffled."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(min(parts, count)))


def cross_validated(x: Tensor, y: Tensor, parts: int = 10, seed: int = 0) -> Tensor:
    """Predictions [S] of y by `ridge_predict`, each by a fit that has not seen its row."""
    found = torch.zeros(len(y), dtype=torch.float64)
    for part in folds(len(y), parts, seed):
        rest = torch.ones(len(y), dtype=torch.bool)
        rest[part] = False
        found[part] = ridge_predict(x[rest], y[rest], x[part])
    return found


def mean_absolute_errors(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """MAE, and that of both rounded to whole units, as CINeMA's code reports it."""
    exact = (predicted - true).abs().double().mean()
    rounded = (predicted.round() - true.round()).abs().double().mean()
    return float(exact), float(rounded)


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the share of pairs in which the positive one has the higher score (ties count half).

    NaN where one of the classes is empty.
    """
    high, low = scores[positive.bool()], scores[~positive.bool()]
    if not len(high) or not len(low):
        return float("nan")
    gap = high[:, None] - low
    return float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean())
