"""Signal to noise of the gradient for several group sizes at one policy: measured, and predicted by theory."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_grpo.files import read_jsonl
from lit_grpo.reports.intervals import Interval
from lit_grpo.reports.results import Run
from lit_grpo.reports.table import shown
from lit_grpo.theory import estimated_snr

UNITS = ("rollout", "trained row")
RESAMPLES = 1_000


@dataclass
class Ratio:
    """Signal to noise of one configuration over that of the first."""

    name: str
    unit: str
    """Of ``UNITS``: signal to noise is per rollout or per trained row."""

    measured: Interval | None
    """None where the first has no signal that chance leaves above 0."""

    predicted: Interval | None
    """None where no group was informative."""


class SignalToNoise:
    """What runs at a fixed policy say; empty until :meth:`read`.

    All ratios are to the first configuration: what theory does not know of scores is the same for all, so it cancels.
    Intervals are those of a percentile bootstrap, 95 %: of the measured over phases, of the predicted over prompts.
    Phases of all seeds are pooled: as the policy stays, a seed only says which prompts and completions are drawn.
    """

    def __init__(self) -> None:
        self.ratios: list[Ratio] = []
        self.first, self.phases = "", 0
        self.groups, self.completions = 0, 0
        """From which was predicted, and of how many each is."""

    def read(self, configs: dict[str, list[Run]], first: str, out: Path) -> None:
        """Measure and predict, and write ``signal_to_noise.json``; nothing where the first configuration failed.

        Args:
            configs: runs of each, one a seed; predicted is from those with the largest groups.
            first: name of the configuration that others are compared with.
            out: folder of the file.
        """
        self.first = first
        if first not in configs:
            return
        draw = np.random.default_rng(0)
        measured = ratios_to(first, {name: measured_snr(runs, draw) for name, runs in configs.items()})
        sizes = {name: runs[0].settings["data.init_args.group_size"] for name, runs in configs.items()}
        largest = max((name for name in configs if not adaptive(configs[name])), key=lambda name: sizes[name])
        winners = winners_in(configs[largest])
        predicted = ratios_to(
            first, predicted_snr(winners, sizes, {name for name, runs in configs.items() if adaptive(runs)})
        )
        self.ratios = [
            Ratio(name, unit, measured[name][i], predicted[name][i])
            for i, unit in enumerate(UNITS)
            for name in configs
            if name != first
        ]
        self.completions, self.groups = sizes[largest], int(winners.sum())
        self.phases = sum(len(run.phases) for run in configs[first])
        found = {"first": first, "ratios": [asdict(ratio) for ratio in self.ratios]}
        (out / "signal_to_noise.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def table(self) -> list[list[str]]:
        """Header and rows for people."""
        head = ["signal to noise", "per", "measured", "predicted"]
        return [head] + [[r.name, r.unit, shown(r.measured, 2), shown(r.predicted, 2)] for r in self.ratios]

    def draw(self, path: Path) -> None:
        """Bars with intervals, measured beside predicted, as a PNG."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(1, len(UNITS), figsize=(10, 3.6), sharey=True, layout="constrained")
        for panel, unit in zip(panels, UNITS, strict=True):
            found = [ratio for ratio in self.ratios if ratio.unit == unit]
            for side, (kind, colour) in enumerate((("measured", "#0072B2"), ("predicted", "#E69F00"))):
                draw_bars(panel, [getattr(ratio, kind) for ratio in found], (side - 0.5) * 0.38, colour, kind)
            panel.axhline(1, color="#5c5c5c", lw=0.8)
            panel.set_xticks(range(len(found)), [ratio.name for ratio in found])
            panel.set_title(f"per {unit}", fontsize="medium")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"signal to noise, {self.first} = 1")
        panels[-1].legend(frameon=False)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def draw_bars(panel: Any, found: list[Interval | None], shift: float, colour: str, label: str) -> None:
    """Bars beside the ticks 0, 1, ..., and the interval of each; nothing where there is no number."""
    places = [(i + shift, x) for i, x in enumerate(found) if x is not None]
    panel.bar([i for i, _ in places], [x.value for _, x in places], width=0.36, color=colour, label=label)
    for i, x in places:
        if x.low is not None and x.high is not None:
            panel.plot([i, i], [x.low, x.high], color="#1c1c1c", lw=1.4)


def adaptive(runs: list[Run]) -> bool:
    """Whether the loss draws the rest of a group only in ties."""
    return str(runs[0].settings["model.loss.class_path"]).endswith(".AdaptiveGRPO")


def measured_snr(runs: list[Run], draw: np.random.Generator) -> np.ndarray:
    """``[1 + RESAMPLES, 2]``: signal over noise per rollout and per trained row, of all phases and of resampled ones.

    Means over phases are taken before dividing; each phase has one update.
    """
    found = np.array([
        (row["theory/gradient_signal"], row["theory/gradient_noise"], drawn, row["train/rows_trained"])
        for run in runs
        for row, drawn in zip(run.phases, np.diff(run.reached("rollouts")), strict=True)
        if "theory/gradient_signal" in row  # not where all updates were left out
    ])  # fmt: skip
    resampled = found[draw.integers(len(found), size=(RESAMPLES, len(found)))].mean(1)
    signal, noise, *counts = np.concatenate([found.mean(0)[None], resampled]).T
    return np.stack([signal / noise / count for count in counts], -1)


def winners_in(runs: list[Run]) -> torch.Tensor:
    """``[G + 1]``: how many prompts had 0 to G winners, by the rollouts that runs wrote down."""
    size, found = runs[0].settings["data.init_args.group_size"], Counter[int]()
    for run in runs:
        for path in sorted((run.folder / "samples").glob("train-*.jsonl")):
            won = [row["reward"] == 1 for row in read_jsonl(path)]
            found.update(sum(won[i : i + size]) for i in range(0, len(won), size))
    return torch.tensor([found[k] for k in range(size + 1)], dtype=torch.float64)


def predicted_snr(winners: torch.Tensor, sizes: dict[str, int], adaptive: set[str]) -> dict[str, np.ndarray]:
    """``[1 + RESAMPLES, 2]`` of each configuration: the same as theory has it, of all prompts and of resampled ones.

    Args:
        winners: ``[n + 1]`` as of :func:`winners_in`.
        sizes: group size of each configuration.
        adaptive: which of them draw the rest of a group only in ties.
    """
    k, completions, prompts = torch.arange(len(winners)), len(winners) - 1, int(winners.sum())
    resampled = np.random.default_rng(0).multinomial(prompts, winners.numpy() / prompts, size=RESAMPLES)
    of_all = [winners, *map(torch.from_numpy, resampled)]
    return {
        name: np.array([[x.item() for x in estimated_snr(k, completions, size, of, name in adaptive)] for of in of_all])
        for name, size in sizes.items()
    }


def ratios_to(first: str, found: dict[str, np.ndarray]) -> dict[str, list[Interval | None]]:
    """For each configuration and each of ``UNITS`` the ratio to the first, with the interval of all resamples."""
    return {
        name: [interval(*pair) for pair in zip(each.T, found[first].T, strict=True)] for name, each in found.items()
    }


def interval(ours: np.ndarray, theirs: np.ndarray) -> Interval | None:
    """A ratio and its percentile interval; None if what is divided by is not above 0 in all resamples."""
    if not ((theirs > 0).all() and np.isfinite(ours).all()):
        return None
    value, *resampled = ours / theirs
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(float(value), float(low), float(high))
