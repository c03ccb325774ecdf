"""Callbacks and loggers that every run has: its folder, its checkpoints, its progress bar, its results."""

from medinr.callbacks.checkpoints import ConfigInCheckpoint, LastCheckpoint, RandomStates
from medinr.callbacks.logs import MetricsFile
from medinr.callbacks.progress import RunProgress

__all__ = ["ConfigInCheckpoint", "LastCheckpoint", "MetricsFile", "RandomStates", "RunProgress"]
