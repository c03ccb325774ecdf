"""The table of a cohort as one run of Weights & Biases, offline where need be."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medinr.callbacks.logs import PROJECT, why_offline
from medinr.cohorts.table import FITS, PAGE, SUMMARY


def log_cohort(out: Path, title: str, config: Mapping[str, Any], summary: Sequence[Mapping[str, Any]]) -> str | None:
    """Log the tables, and each metric's mean and spread as the run's summary.

    Args:
        out: folder of the cohort, where its tables and the offline run are.
        title: of the run.
        config: what the cohort was asked to do.
        summary: rows of `medinr.cohorts.table.summary_rows`.

    Returns:
        Why it was offline, None where it was not.
    """
    import wandb

    offline = why_offline()
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=title,
        job_type="cohort",
        dir=out,
        config=dict(config),
        mode="offline" if offline else "online",
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        for key, file in (("cohort/fits", FITS), ("cohort/summary", SUMMARY)):
            with (out / file).open(encoding="utf-8") as stream:
                columns, *rows = csv.reader(stream)
            run.log({key: wandb.Table(columns=list(columns), data=[[_value(v) for v in row] for row in rows])})
        for row in summary:
            for column in ("mean", "sd_seeds", "p50"):
                if column in row and row.get("n"):
                    where = f"{row['setting']}/" if row["setting"] else ""
                    run.summary[f"cohort/{where}{row['metric']}/{column}"] = row[column]
        folder = Path(run.dir)
        for file in (FITS, SUMMARY, PAGE):  # copies: W&B would link to the files, and say so
            (folder / file).write_bytes((out / file).read_bytes())
            run.save(str(folder / file), base_path=str(folder), policy="now")
    finally:
        run.finish()
    return offline


def _value(text: str) -> float | str | None:
    try:
        return float(text)
    except ValueError:
        return text or None
