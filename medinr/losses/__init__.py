"""Similarities and regularizers."""

from medinr.losses.information import NMI
from medinr.losses.mind import MINDSSC
from medinr.losses.own import OwnCoordinates
from medinr.losses.regularizers import (
    Barrier,
    Bending,
    Diffusion,
    Hyperelastic,
    Jacobian,
    Regularizer,
    SymmetricJacobian,
    TotalVariation,
)
from medinr.losses.similarities import MSE, NCC, LocalNCC, Similarity
from medinr.losses.temporal import TemporalSmoothness
from medinr.losses.volumes import ForwardDiffusion

__all__ = [
    "MINDSSC",
    "MSE",
    "NCC",
    "NMI",
    "Barrier",
    "Bending",
    "Diffusion",
    "ForwardDiffusion",
    "Hyperelastic",
    "Jacobian",
    "LocalNCC",
    "OwnCoordinates",
    "Regularizer",
    "Similarity",
    "SymmetricJacobian",
    "TemporalSmoothness",
    "TotalVariation",
]
