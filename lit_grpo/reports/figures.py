"""Curves of several configurations in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_grpo.reports.results import AXES, Run
from lit_grpo.reports.table import label

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8B8000")
"""Told apart by the colour-blind (Okabe and Ito 2008); yellow, which is too light for a line, is olive here."""

STYLES = ("-", "--", ":")
"""Of lines; the next when colours are used up."""

POINTS = 50
"""Rewards of training are noisy: more phases are averaged to so many points."""


def draw(configs: dict[str, list[Run]], score: str, path: Path, cut: Sequence[str] = ()) -> None:
    """Reward of training and a held-out score against each of ``AXES``; lines are means, bands all seeds.

    Args:
        configs: runs of each, one a seed.
        score: name in the log of the held-out score.
        path: of the PNG.
        cut: configurations that are drawn as far as the others go.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(AXES), figsize=(15, 7), sharex="col", sharey="row", layout="constrained")
    for i, (name, runs) in enumerate(configs.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i // len(COLOURS) % len(STYLES)], "label": name}
        for column, axis in zip(axes.T, AXES, strict=True):
            for panel, value in zip(column, ("train/reward", score), strict=True):
                draw_band(panel, [run.curve(value, axis) for run in runs], style)
    for panel, text in zip(axes[:, 0], ("reward of rollouts", f"held out, {label(score)}"), strict=True):
        panel.set_ylabel(text)
    names = {"seconds": "seconds of training", "tokens_trained": "tokens trained"}
    for panel, axis in zip(axes[1], AXES, strict=True):
        panel.set_xlabel(names.get(axis, axis))
        panel.locator_params(axis="x", nbins=5)
        if cut:
            whole = [run for name, runs in configs.items() if name not in cut for run in runs]
            end = max(run.reached(axis)[-1] for run in whole)
            panel.set_xlim(-0.02 * end, 1.02 * end)
        panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    drawn = {text: line for panel in axes.flat for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=min(len(configs), 6), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_band(panel: Any, curves: list[tuple[list[float], list[float]]], style: dict[str, Any]) -> None:
    """The mean of curves as a line and from the lowest to the highest as a band, where all of them are."""
    points = [(thinned(places), thinned(values)) for places, values in curves if len(places) > 1 and places[-1] > 0]
    if not points:
        return
    start, end = max(places[0] for places, _ in points), min(places[-1] for places, _ in points)
    places = np.linspace(start, end, 200)
    values = np.stack([np.interp(places, *point) for point in points])
    panel.plot(places, values.mean(0), lw=1.6, **style)
    panel.fill_between(places, values.min(0), values.max(0), color=style["color"], alpha=0.15, lw=0)


def thinned(values: list[float]) -> np.ndarray:
    """At most ``POINTS`` values, each the mean of as many neighbours."""
    return np.array([part.mean() for part in np.array_split(values, min(len(values), POINTS))])
