"""Similarities and regularizers."""

from medinr.losses.regularizers import (
    Barrier,
    Bending,
    Diffusion,
    Hyperelastic,
    Jacobian,
    Regularizer,
    SymmetricJacobian,
)
from medinr.losses.similarities import MSE, NCC, LocalNCC, Similarity

__all__ = [
    "MSE",
    "NCC",
    "Barrier",
    "Bending",
    "Diffusion",
    "Hyperelastic",
    "Jacobian",
    "LocalNCC",
    "Regularizer",
    "Similarity",
    "SymmetricJacobian",
]
