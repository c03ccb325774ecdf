"""Curves: quantities against a weight, and losses against steps."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from medinr.figures.files import new_figure

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps, and the values there."""
LABELS = {
    "tre": "TRE [mm]",
    "dice": "Dice",
    "folding": "folded points [%]",
    "bending": "bending energy",
    "similarity": "similarity loss",
}
_COLOURS = ("#0b5fa5", "#c8550a", "#2e7d32", "#7b3fa0", "#8a6d00", "#b3124f")
_MARKS = ("#d1232a", "#2e7d32", "#7b3fa0", "#8a6d00")


def curve_figure(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    chosen: Mapping[str, float] | None = None,
    xlabel: str = "alpha",
    log_x: bool = False,
    title: str = "",
) -> Figure:
    """Panels, two a row, of several quantities against one, e.g. TRE, Dice, folding and bending against alpha.

    Args:
        x: the horizontal values, in any order.
        series: name -> as many values; NaN leaves a gap. A positive quantity over more than two decades gets a
            logarithmic axis. Known names (tre, dice, folding, bending, similarity) are given their unit.
        chosen: name -> value of x that a criterion selected; marked in every panel.
        xlabel: name of x.
        log_x: logarithmic horizontal axis (linear below the smallest positive value, where 0 occurs).
        title: one line above the figure.
    """
    order = np.argsort(np.asarray(x, dtype=float))
    xs = np.asarray(x, dtype=float)[order]
    rows = max(1, math.ceil(len(series) / 2))
    figure = new_figure(11, 0.9 + 3.1 * rows)
    axes = _grid_of_axes(figure, len(series), columns=2, rows=rows)
    for i, (ax, (name, values)) in enumerate(zip(axes, series.items(), strict=True)):
        if len(values) != len(xs):
            raise ValueError(f"{name}: expected {len(xs)} values, one per {xlabel}, got {len(values)}")
        ys = np.asarray(values, dtype=float)[order]
        ax.plot(xs, ys, "o-", color=_COLOURS[i % len(_COLOURS)], markersize=4.5, linewidth=1.6, clip_on=False)
        ax.set_ylabel(LABELS.get(name, name), fontsize=12)
        _scale(ax, ys)
        if log_x:
            _log_x(ax, xs)
        for k, (criterion, value) in enumerate((chosen or {}).items()):
            ax.axvline(value, color=_MARKS[k % len(_MARKS)], linestyle=("--", ":", "-.")[k % 3], linewidth=1.6,
                       label=f"{criterion}: {value:.3g}")  # fmt: skip
        ax.set_xlabel(xlabel, fontsize=12)
    if chosen and axes:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", fontsize=11, ncols=len(chosen), frameon=False,
                      title=None)  # fmt: skip
    _title(figure, title)
    return figure


def loss_figure(
    history: Mapping[str, Sequence[float]], steps: Sequence[float] | None = None, title: str = ""
) -> Figure:
    """One panel per logged quantity against the step; long histories get a smoothed line over the raw values.

    Args:
        history: name -> values, one per step (or per entry of ``steps``); lengths may differ without ``steps``.
        steps: the steps of the values; None: 0, 1, 2, ...
        title: one line above the figure.
    """
    columns = min(3, max(1, len(history)))
    rows = max(1, math.ceil(len(history) / columns))
    figure = new_figure(4.5 * columns + 0.5, 0.9 + 2.9 * rows)
    for i, (ax, (name, values)) in enumerate(
        zip(_grid_of_axes(figure, len(history), columns, rows), history.items(), strict=True)
    ):
        ys = np.asarray(values, dtype=float)
        xs = np.arange(len(ys)) if steps is None else np.asarray(steps, dtype=float)
        colour = _COLOURS[i % len(_COLOURS)]
        width = len(ys) // 50
        ax.plot(xs, ys, color=colour, linewidth=0.8 if width > 1 else 1.6, alpha=0.35 if width > 1 else 1.0)
        if width > 1:
            ax.plot(xs, _running_mean(ys, width), color=colour, linewidth=1.8)
        _scale(ax, ys)
        ax.set_title(name, fontsize=12)
        ax.set_xlabel("step", fontsize=11)
    _title(figure, title)
    return figure


def overlay_figure(panels: Mapping[str, Mapping[str, Curve]], colours: Sequence[str], title: str = "") -> Figure:
    """One panel a quantity, in each the curve of every run that logged it, against the step.

    Args:
        panels: name of the quantity -> name of the run -> its steps and values.
        colours: names; runs whose name begins with the same one share a colour, and the legend has these.
        title: one line above the figure.
    """
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = new_figure(4.5 * columns + 0.5, 1.0 + 2.9 * rows)
    shown: dict[str, Line2D] = {}
    many = len({run for curves in panels.values() for run in curves}) > len(colours)
    axes = _grid_of_axes(figure, len(panels), columns, rows)
    for ax, (name, curves) in zip(axes, panels.items(), strict=True):
        for run, (steps, values) in curves.items():
            i = max((i for i, c in enumerate(colours) if run.startswith(c)), key=lambda i: len(colours[i]), default=0)
            width = len(values) // 50
            alpha, style = (0.6 if many else 1.0), "-" if len(values) > 12 else "o-"
            colour = _COLOURS[i % len(_COLOURS)]
            if width > 1:
                ax.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
            smooth = _running_mean(np.asarray(values, dtype=float), width) if width > 1 else values
            [line] = ax.plot(steps, smooth, style, color=colour, linewidth=1.5, markersize=3.5, alpha=alpha)
            shown.setdefault(colours[i], line)
        _scale(ax, np.concatenate([np.asarray(values, dtype=float) for _, values in curves.values()] or [np.zeros(0)]))
        ax.set_title(name, fontsize=12)
        ax.set_xlabel("step", fontsize=11)
    if len(colours) > 1 and shown:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", fontsize=10, frameon=False,
                      ncols=max(1, 3 * columns // 4))  # fmt: skip
    _title(figure, title)
    return figure


def spread_figure(panels: Mapping[str, Mapping[str, Sequence[float]]], title: str = "") -> Figure:
    """One panel a quantity: for each group the values as points, their quartiles and median as a box.

    Args:
        panels: name of the quantity -> name of the group -> one value a case and run.
        title: one line above the figure.
    """
    names = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = new_figure(4.5 * columns + 0.5, 0.9 + rows * (1.5 + 0.35 * len(names)))
    random = np.random.default_rng(0)  # only so that equal values do not hide each other
    for i, (ax, (name, groups)) in enumerate(
        zip(_grid_of_axes(figure, len(panels), columns, rows), panels.items(), strict=True)
    ):
        for k, group in enumerate(names):
            values = np.asarray(groups.get(group, ()), dtype=float)
            if len(values) > 1:
                low, middle, high = np.percentile(values, [25, 50, 75])
                ax.barh(k, high - low, 0.55, left=low, fill=False, edgecolor="#888888")
                ax.plot([middle, middle], [k - 0.275, k + 0.275], color="black")
            ax.plot(values, k + random.uniform(-0.15, 0.15, len(values)), "o", markersize=4, alpha=0.7,
                    color=_COLOURS[k % len(_COLOURS)], clip_on=False)  # fmt: skip
        ax.set_yticks(range(len(names)), names if i % columns == 0 else [""] * len(names), fontsize=10)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_title(name, fontsize=12)
    _title(figure, title)
    return figure


def _grid_of_axes(figure: Figure, n: int, columns: int, rows: int) -> list[Axes]:
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(n)]
    for ax in axes:
        ax.grid(True, color="#dddddd", linewidth=0.7)
        ax.tick_params(labelsize=11)
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def _scale(ax: Axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if len(finite) and finite.min() > 0 and finite.max() > 100 * finite.min():
        ax.set_yscale("log")
    elif len(finite) and finite.min() >= 0 and finite.max() > 3 * finite.min():
        ax.set_ylim(bottom=0)


def _log_x(ax: Axes, xs: np.ndarray) -> None:
    positive = xs[xs > 0]
    if len(positive) == len(xs):
        ax.set_xscale("log")
        ax.set_xlim(xs.min() / 1.4, xs.max() * 1.4)
    elif len(positive):
        ax.set_xscale("symlog", linthresh=float(positive.min()), linscale=0.4)
        ax.set_xlim(-0.3 * positive.min(), xs.max() * 1.4)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over ``width`` values about each; fewer at the ends, and none that are not finite."""
    finite = np.isfinite(values)
    window = np.ones(width)
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    count = np.convolve(finite.astype(float), window, mode="same")
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: np.ndarray = total / count
    return mean


def _title(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=13, x=0.02, ha="left")
