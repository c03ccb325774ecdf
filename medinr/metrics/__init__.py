"""What registrations are judged by: pure functions, and torchmetrics classes that gather them over cases."""

from medinr.metrics.intensity import PeakSignalToNoiseRatio, StructuralSimilarity, psnr, rms_difference, ssim
from medinr.metrics.jacobian import (
    FoldingPercentage,
    StdLogJacobian,
    finite_difference_jacobian,
    folding_percent,
    sdlogj,
)
from medinr.metrics.mean import CaseMean
from medinr.metrics.overlap import Dice, HausdorffDistance95, dice, hd95
from medinr.metrics.tre import TargetRegistrationError, snapped_tre, tre

__all__ = [
    "CaseMean",
    "Dice",
    "FoldingPercentage",
    "HausdorffDistance95",
    "PeakSignalToNoiseRatio",
    "StdLogJacobian",
    "StructuralSimilarity",
    "TargetRegistrationError",
    "dice",
    "finite_difference_jacobian",
    "folding_percent",
    "hd95",
    "psnr",
    "rms_difference",
    "sdlogj",
    "snapped_tre",
    "ssim",
    "tre",
]
