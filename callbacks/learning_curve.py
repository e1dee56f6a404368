"""The run as a picture."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only


class LearningCurve(L.Callback):
    """Draws ``learning_curve.png`` into the run folder when training ends, from the CSV log."""

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                draw(read_metrics(Path(logger.log_dir)), Path(trainer.default_root_dir) / "learning_curve.png")


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """All rows of a run's CSV logs, empty cells left out; of parts before a resume only what came before its start."""
    rows: list[dict[str, float]] = []
    for path in [*sorted(run_dir.glob("metrics-*.csv")), *run_dir.glob("metrics.csv")]:
        with open(path, newline="", encoding="utf-8") as file:
            part = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
        first = min((row["step"] for row in part), default=float("inf"))
        rows = [row for row in rows if row["step"] < first] + part
    return rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Reward and held-out scores against wall-clock seconds and against rollouts; nothing if there were no rollouts."""
    train = [row for row in rows if "train/reward" in row]
    if not train:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    held_out = sorted({name for row in rows for name in row if name.startswith(("val/mean_at_", "val/pass_at_"))})
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, key in zip(axes, ("seconds", "rollouts"), strict=True):
        axis.plot(
            [row[f"train/{key}"] for row in train],
            [row["train/reward"] for row in train],
            lw=0.8,
            alpha=0.5,
            label="reward of rollouts",
        )
        for name in held_out:
            points = [(row.get(f"val/{key}", 0.0), row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=f"held out, {name[4:].replace('_at_', '@')}")
        axis.set(xlabel=key, ylim=(0, 1.02) if all(0 <= row["train/reward"] <= 1 for row in train) else None)
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="best")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
