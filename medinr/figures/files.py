"""Figures as files. Built without pyplot: no window, no global state, whatever backend the user has chosen."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medinr.io import atomic_path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches, that draws with Agg."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path, dpi: float = 110) -> None:
    """Write a figure as its suffix says (.png, .pdf, .svg), whole or not at all.

    Raises:
        UserError: a folder that cannot be written to; a full disk.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
