"""Metrics as a table that a kill leaves whole."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lit_grpo.files import whole


class Writer(ExperimentWriter):
    """Writes the table with a new column beside the old one, in whose place it comes when it is there."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        with whole(path) as unfinished, open(unfinished, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames)
            writer.writeheader()
            writer.writerows(rows)


class CSVLog(CSVLogger):
    """Lightning's logger, but for the moment in which there is a new column."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        self._experiment: ExperimentWriter | None
        if self._experiment is None:
            self._experiment = Writer(self.log_dir)
        return self._experiment


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """All rows of a run's CSV logs, empty cells left out; of parts before a resume only what came before its start."""
    rows: list[dict[str, float]] = []
    for path in [*sorted(run_dir.glob("metrics-*.csv")), *run_dir.glob("metrics.csv")]:
        with open(path, newline="", encoding="utf-8") as file:
            part = [row for row in map(numbers, csv.DictReader(file)) if "step" in row]
        first = min((row["step"] for row in part), default=float("inf"))
        rows = [row for row in rows if row["step"] < first] + part
    return rows


def numbers(row: dict[str, str]) -> dict[str, float]:
    """What a row of the log says; nothing where a kill cut it off."""
    try:
        return {key: float(value) for key, value in row.items() if value}
    except (ValueError, TypeError):
        return {}
