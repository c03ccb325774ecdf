"""A specification as a workspace of Weights & Biases, by the package wandb-workspaces."""

import contextlib
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlparse

from medinr.dashboard.specification import STEP
from medinr.errors import UserError

INSTALL = "pip install wandb-workspaces"
SIZES = {"images": (24, 14), "table": (24, 10), "settings": (24, 10)}
"""Width and height of panels, in W&B's 24 columns; all others are as W&B has them."""


def available() -> bool:
    """Whether the package is there."""
    return find_spec("wandb_workspaces") is not None


def _package(name: str) -> Any:
    """A module of it; it says nothing of its types, whether it is there or not."""
    return import_module(f"wandb_workspaces.{name}")


def build(spec: Mapping[str, Any], entity: str) -> Any:
    """The ``wandb_workspaces.workspaces.Workspace`` of a specification; nothing is sent.

    Args:
        spec: see `medinr.dashboard.specification`.
        entity: user or team that owns it.
    """
    ws = _package("workspaces")
    sections = [
        ws.Section(name=str(section["name"]), is_open=i < 4, panels=[_panel(panel) for panel in section["panels"]])
        for i, section in enumerate(spec["sections"])
    ]
    names = ", ".join(repr(str(name)) for name in spec["experiments"])
    return ws.Workspace(
        entity=entity,
        project=str(spec["project"]),
        name=str(spec["name"]),
        sections=sections,
        runset_settings=ws.RunsetSettings(filters=f"Config('experiment') in [{names}]"),
    )


def _panel(panel: Mapping[str, Any]) -> Any:
    wr = _package("reports.v2")
    kind, title = panel["kind"], panel.get("title")
    size: dict[str, Any] = {}
    if kind in SIZES:
        width, height = SIZES[kind]
        size = {"layout": wr.Layout(w=width, h=height)}
    if kind == "line":
        return wr.LinePlot(title=title, x=STEP, y=list(panel["metrics"]), **size)
    if kind == "images":
        return wr.MediaBrowser(title=title, media_keys=list(panel["keys"]), num_columns=1, **size)
    if kind == "table":
        return wr.WeavePanelSummaryTable(table_name=panel["key"], **size)
    if kind == "curve":
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": panel["table"]}},
            chart_name="wandb/line/v0",
            chart_fields={"x": panel["x"], "y": panel["y"]},
            chart_strings={"title": title or ""},
        )
    if kind == "bars":
        return wr.BarPlot(
            title=title, metrics=[wr.Metric(panel["metric"])], groupby=wr.Config(panel["by"]),
            groupby_aggfunc="mean", groupby_rangefunc="stddev",
        )  # fmt: skip
    if kind == "scatter":
        return wr.ScatterPlot(title=title, x=wr.Config(panel["x"]), y=wr.SummaryMetric(panel["metric"]))
    return wr.RunComparer(diff_only="split", **size)


def upload(spec: Mapping[str, Any]) -> str:
    """Make the workspace, or bring the one at ``spec["url"]`` up to date.

    Returns:
        Its address.

    Raises:
        UserError: the package is missing; W&B refuses (no such project, no permission), or cannot be reached.
    """
    if not available():
        raise UserError(f"the package wandb-workspaces: expected to be installed, found nothing; {INSTALL}")
    import wandb

    ws = _package("workspaces")
    try:
        entity = spec.get("entity") or os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
        if not entity:
            raise UserError("--entity: expected a user or team of Weights & Biases, found none; name it")
        workspace = build(spec, str(entity))
        if spec.get("url"):
            # One that was deleted meanwhile, or belongs to another project, is made anew.
            with contextlib.suppress(ValueError, IndexError):
                earlier = ws.Workspace.from_url(str(spec["url"]))
                if urlparse(str(spec["url"])).path == f"/{entity}/{spec['project']}":
                    workspace._internal_name, workspace._internal_id = earlier._internal_name, earlier._internal_id
        workspace.save()
        return str(workspace.url)
    except UserError:
        raise
    except Exception as error:  # W&B's client and the package raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"Weights & Biases: expected to make the workspace, found: {reason}; try again later"
        ) from error
