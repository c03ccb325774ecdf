"""What registrations are judged by: pure functions, and torchmetrics classes that gather them over cases."""

from medinr.metrics.centrality import centrality_mm, jacobian_gradient
from medinr.metrics.consistency import InverseConsistencyError, PointMap, displaced, inverse_consistency
from medinr.metrics.intensity import PeakSignalToNoiseRatio, StructuralSimilarity, psnr, rms_difference, ssim
from medinr.metrics.jacobian import (
    FoldingPercentage,
    StdLogJacobian,
    finite_difference_jacobian,
    folding_percent,
    sdlogj,
)
from medinr.metrics.learn2reg import (
    HausdorffDistance95Learn2Reg,
    StdLogJacobianLearn2Reg,
    common_labels,
    hd95_learn2reg,
    sdlogj_learn2reg,
    tre_learn2reg,
)
from medinr.metrics.mean import CaseMean
from medinr.metrics.overlap import Dice, HausdorffDistance95, dice, hd95
from medinr.metrics.perceptual import PerceptualDistance
from medinr.metrics.temporal import bracket, nearest_image, scores, weighted_image
from medinr.metrics.tre import TargetRegistrationError, snapped_tre, tre

__all__ = [
    "CaseMean",
    "Dice",
    "FoldingPercentage",
    "HausdorffDistance95",
    "HausdorffDistance95Learn2Reg",
    "InverseConsistencyError",
    "PeakSignalToNoiseRatio",
    "PerceptualDistance",
    "PointMap",
    "StdLogJacobian",
    "StdLogJacobianLearn2Reg",
    "StructuralSimilarity",
    "TargetRegistrationError",
    "bracket",
    "centrality_mm",
    "common_labels",
    "dice",
    "displaced",
    "finite_difference_jacobian",
    "folding_percent",
    "hd95",
    "hd95_learn2reg",
    "inverse_consistency",
    "jacobian_gradient",
    "nearest_image",
    "psnr",
    "rms_difference",
    "scores",
    "sdlogj",
    "sdlogj_learn2reg",
    "snapped_tre",
    "ssim",
    "tre",
    "tre_learn2reg",
    "weighted_image",
]
