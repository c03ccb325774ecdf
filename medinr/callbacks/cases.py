"""A table with one row a case, of methods whose tests are not registrations of a pair."""

import csv
import io as text
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from medinr.callbacks.logs import log_rows
from medinr.io import write_text
from medinr.results import write_metrics


class CaseTable(Callback):
    """Writes what a test step gives as ``{"row": {"case": name, metric: value, ...}}``: cases.csv and metrics.json.

    The metrics are the means over the cases that have them; W&B gets the table. Rank zero, at the end of the test.

    Args:
        out: folder of the results.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(out)
        self.rows: list[dict[str, Any]] = []

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.rows = []

    def on_test_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if isinstance(outputs, Mapping) and isinstance(outputs.get("row"), Mapping):
            self.rows.append(dict(outputs["row"]))

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self.rows or not trainer.is_global_zero:
            return
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        buffer = text.StringIO()
        table = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_text(self.out / "cases.csv", buffer.getvalue())
        means: dict[str, float] = {}
        for name in names:
            values = [row[name] for row in self.rows if isinstance(row.get(name), float)]
            means |= {name: sum(values) / len(values)} if values else {}
        write_metrics(self.out / "metrics.json", {"case": f"mean of {len(self.rows)}", **means})
        log_rows(trainer, "cases", self.rows)
