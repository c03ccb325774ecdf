"""Callbacks and loggers that every run has: its folder, its checkpoints, its progress bar, its results."""

from medinr.callbacks.artifacts import Artifacts
from medinr.callbacks.cases import CaseTable
from medinr.callbacks.checkpoints import ConfigInCheckpoint, LastCheckpoint, RandomStates
from medinr.callbacks.folding import FoldingBound
from medinr.callbacks.interrupt import BestState, StopOnInterrupt
from medinr.callbacks.logs import KeepFiles, MetricsFile
from medinr.callbacks.progress import Costs, RunProgress
from medinr.callbacks.results import Preview, ResultWriter
from medinr.callbacks.stages import EndStages

__all__ = [
    "Artifacts",
    "BestState",
    "CaseTable",
    "ConfigInCheckpoint",
    "Costs",
    "EndStages",
    "FoldingBound",
    "KeepFiles",
    "LastCheckpoint",
    "MetricsFile",
    "Preview",
    "RandomStates",
    "ResultWriter",
    "RunProgress",
    "StopOnInterrupt",
]
