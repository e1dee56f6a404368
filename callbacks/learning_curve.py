"""The run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_grpo.csv_log import read_metrics


class LearningCurve(L.Callback):
    """Draws ``learning_curve.png`` into the run folder when training ends, from the CSV log."""

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                draw(read_metrics(Path(logger.log_dir)), Path(trainer.default_root_dir) / "learning_curve.png")


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Reward and held-out scores against wall-clock seconds and rollouts; offline, scores and loss against seconds."""
    train = [row for row in rows if "train/seconds" in row]
    if not train:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    if "train/reward" in train[0]:
        for axis, key in zip(axes, ("seconds", "rollouts"), strict=True):
            draw_scores(axis, rows, train, "train/reward", "reward of rollouts", key)
    else:
        draw_scores(axes[0], rows, train, "train/reward_accuracy", "implicit reward, accuracy", "seconds")
        axes[1].plot([row["train/seconds"] for row in train], [row["train/loss"] for row in train])
        axes[1].set(xlabel="seconds", ylabel="loss")
    for axis in axes:
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3)
    if axes[0].has_data():
        axes[0].legend(loc="best")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_scores(
    axis: Any, rows: list[dict[str, float]], train: list[dict[str, float]], name: str, label: str, key: str
) -> None:
    """One curve of training and the held-out scores against seconds or rollouts."""
    points = [(row[f"train/{key}"], row[name]) for row in train if name in row]
    if points:
        axis.plot(*zip(*points, strict=True), lw=0.8, alpha=0.5, label=label)
    for score in sorted({name for row in rows for name in row if name.startswith(("val/mean_at_", "val/pass_at_"))}):
        held_out = [(row.get(f"val/{key}", 0.0), row[score]) for row in rows if score in row]
        axis.plot(*zip(*held_out, strict=True), marker="o", ms=3, label=f"held out, {score[4:].replace('_at_', '@')}")
    axis.set(xlabel=key, ylim=(0, 1.02) if all(0 <= value <= 1 for _, value in points) else None)
