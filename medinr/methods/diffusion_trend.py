"""The mean latent as a linear function of the conditions, so that a diffusion has only the rest to generate.

Few scans teach a denoiser late, if at all, to listen to a condition; a least-squares line needs a handful of them. As
in residual diffusion (Mardani et al., CorrDiff, arXiv 2309.15214), where a regression gives the mean and the diffusion
what it leaves; theirs is a network, ours is linear and found in closed form.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medinr.fields.conditions import ConditionEmbedding

RIDGE = 1e-3
"""Penalty of the slopes, relative to the mean variance of the columns."""


def columns(embedding: ConditionEmbedding, values: Tensor) -> Tensor:
    """Conditions [B, c] as numbers [B, q]: a continuous one in [-1, 1], one column for each level of another; NaN."""
    found = []
    for column, levels in zip(embedding.scaled(values).T, embedding.levels, strict=True):
        if not levels:
            found.append(column[:, None])
            continue
        known = ~column.isnan()
        one = F.one_hot(column.nan_to_num().round().long(), levels).to(column)
        found.append(torch.where(known[:, None], one, torch.nan))
    return torch.cat(found, 1) if found else values.new_zeros(len(values), 0)


def fit_trend(latents: Tensor, told: Tensor) -> dict[str, Any]:
    """Least-squares plane of latents [S, C, x, y, z] over columns [S, q]; what is missing counts as the mean.

    Returns:
        mean [C, x, y, z], slopes [q, C, x, y, z], centre [q] and covariance [q, q] of the columns, on the CPU.
    """
    latents, told = latents.cpu().double(), told.cpu().double()
    centre = told.nanmean(0).nan_to_num()
    c = (told - centre).nan_to_num()
    mean = latents.mean(0)
    covariance = c.mT @ c / max(1, len(c) - 1)
    ridge = RIDGE * covariance.diagonal().mean() + 1e-9 if c.shape[1] else 0.0
    penalty = ridge * torch.eye(c.shape[1], dtype=c.dtype)
    with_latents = c.mT @ (latents - mean).flatten(1) / max(1, len(c) - 1)
    slopes = torch.linalg.solve(covariance + penalty, with_latents).view(-1, *mean.shape)
    found = {"mean": mean, "slopes": slopes, "centre": centre, "covariance": covariance + penalty}
    return {k: v.float() for k, v in found.items()}


def expected(trend: Mapping[str, Tensor], told: Tensor) -> Tensor:
    """Mean latents [B, C, x, y, z] of columns [B, q]; a missing one has the mean that the known ones let expect.

    That mean is the normal distribution's: S_mk S_kk^-1 (c_k - centre_k).
    """
    mean, slopes, centre, covariance = (trend[k].to(told.device) for k in ("mean", "slopes", "centre", "covariance"))
    found = []
    for row in told - centre:
        known = ~row.isnan()
        filled = row.nan_to_num()
        if bool(known.any()) and not bool(known.all()):
            share = torch.linalg.solve(covariance[known][:, known], filled[known])
            filled = torch.where(known, filled, covariance[:, known] @ share)
        found.append(mean + torch.tensordot(filled, slopes, 1))
    return torch.stack(found)
