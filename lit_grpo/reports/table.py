"""What configurations came to, as rows: for people, for spreadsheets, for programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lit_grpo.metrics import paired_bootstrap
from lit_grpo.reports.intervals import Interval, Spread, over_seeds, spread
from lit_grpo.reports.results import Run


@dataclass
class Row:
    """One configuration. Means are over its seeds; scores are those of held-out problems."""

    name: str
    seeds: list[int]
    mean_before: Spread
    """Mean@k of the untrained policy."""

    mean_after: Spread
    """Mean@k of the last validation."""

    gain: Spread
    """After less before."""

    pass_after: Spread
    seconds: Spread
    """Of training, without validation."""

    rollouts: Spread | None
    rows_trained: Spread | None
    """Completions that were forwarded."""

    tokens_trained: Spread | None
    informative_share: Spread | None
    """Of groups, mean over phases."""

    share_of_gain: Interval | None = None
    """Of the first configuration's, both over the seeds that they have in common; None where that gained nothing."""

    difference: Interval | None = None
    """Of Mean@k to the first configuration, paired by seed; chance is that of seeds."""

    difference_pass: Interval | None = None
    """The same of Pass@k."""

    over_problems: Interval | None = None
    """Of Mean@k again, paired by problem, seeds averaged; chance is that of problems."""

    p_value: float | None = None
    """Of a difference at least as large over problems if there were none, two-sided."""


def make_row(name: str, runs: list[Run], scores: tuple[str, str]) -> Row:
    """A configuration by itself.

    Args:
        name: of the configuration.
        runs: one a seed.
        scores: names of Mean@k and Pass@k in the log.
    """
    mean, passed = scores

    def all_of(value: Callable[[Run], float | None]) -> Spread | None:
        values = [found for run in runs if (found := value(run)) is not None]
        return spread(values) if len(values) == len(runs) else None

    return Row(
        name,
        [run.seed for run in runs],
        spread([run.held_out[0][mean] for run in runs]),
        spread([run.held_out[-1][mean] for run in runs]),
        spread([gain(run, mean) for run in runs]),
        spread([run.held_out[-1][passed] for run in runs]),
        spread([run.reached("seconds")[-1] for run in runs]),
        all_of(lambda run: run.phases[-1].get("train/rollouts")),
        all_of(lambda run: run.total("rows_trained")),
        all_of(lambda run: run.total("tokens_trained")),
        all_of(lambda run: run.mean("informative_share") if "train/rollouts" in run.phases[-1] else None),
    )


def gain(run: Run, score: str) -> float:
    """What training added to a held-out score."""
    return run.held_out[-1][score] - run.held_out[0][score]


def compare_rows(row: Row, runs: list[Run], first: list[Run], scores: tuple[str, str]) -> None:
    """Set what a row says of the first configuration: over the seeds that both have, and over problems.

    Where they have no seed in common, problems are compared with all seeds of each.
    """
    pairs = paired(runs, first)
    if pairs:

        def less(score: str) -> Interval | None:
            differences = [one.held_out[-1][score] - other.held_out[-1][score] for one, other in pairs]
            return over_seeds(lambda drawn: fmean(differences[i] for i in drawn), len(pairs))

        def share(drawn: Sequence[int]) -> float:
            ours, theirs = (sum(gain(pairs[i][side], scores[0]) for i in drawn) for side in (0, 1))
            return ours / theirs if theirs > 0 else math.nan

        row.difference, row.difference_pass = map(less, scores)
        row.share_of_gain = over_seeds(share, len(pairs))
    both = ([pair[side] for pair in pairs] for side in (0, 1)) if pairs else (runs, first)
    ours, theirs = map(mean_over_seeds, both)
    if ours and ours.keys() == theirs.keys():
        found = paired_bootstrap(torch.tensor(list(ours.values())), torch.tensor([theirs[key] for key in ours]))
        row.over_problems = Interval(found.difference, found.low, found.high)
        row.p_value = found.p_value


def paired(ours: list[Run], theirs: list[Run]) -> list[tuple[Run, Run]]:
    """The runs of two configurations for each seed that they have in common."""
    of_seed = {run.seed: run for run in theirs}
    return [(run, of_seed[run.seed]) for run in ours if run.seed in of_seed]


def mean_over_seeds(runs: list[Run]) -> dict[tuple[str, str], float]:
    """Share of right answers of each held-out problem, empty where runs had different problems."""
    of_runs = [run.mean_of_problems() for run in runs]
    if any(found.keys() != of_runs[0].keys() for found in of_runs):
        return {}
    return {problem: fmean(found[problem] for found in of_runs) for problem in of_runs[0]}


def make_rows(configs: dict[str, list[Run]], first: str, scores: tuple[str, str]) -> list[Row]:
    """All rows, compared with the first configuration where it has runs."""
    rows = []
    for name, runs in configs.items():
        rows.append(row := make_row(name, runs, scores))
        if first in configs and name != first:
            compare_rows(row, runs, configs[first], scores)
    return rows


def rounded(number: float, digits: int) -> float:
    """As a number is printed, by which it is judged too; without -0.0."""
    return round(number, digits) + 0.0


def shown(value: Spread | Interval | None, digits: int = 3, unit: float = 1.0) -> str:
    """A number with its interval, as people read it."""
    if value is None:
        return ""
    if isinstance(value, Spread):
        half = "" if value.half_width is None else f" ± {value.half_width * unit:,.{digits}f}"
        return f"{value.mean * unit:,.{digits}f}{half}"
    low, high = value.low, value.high
    numbers = [value.value] if low is None or high is None else [value.value, low, high]
    found = [f"{rounded(number * unit, digits):.{digits}f}" for number in numbers]
    return found[0] + (f" [{', '.join(found[1:])}]" if found[1:] else "")


def counted(value: Spread | None) -> str:
    """A mean count."""
    return "" if value is None else f"{value.mean:,.0f}"


def main_table(rows: list[Row], first: str, scores: tuple[str, str]) -> list[list[str]]:
    """Header and rows of what each configuration came to."""
    mean, passed = map(label, scores)
    head = ["config", "seeds", f"{mean} before", f"{mean} after", "gain", f"% of {first}'s gain", f"{passed} after"]
    head += ["seconds", "rollouts", "rows trained", "tokens trained", "informative %"]
    return [head] + [
        [
            row.name,
            ", ".join(map(str, row.seeds)),
            shown(row.mean_before),
            shown(row.mean_after),
            shown(row.gain),
            shown(row.share_of_gain, 1, 100),
            shown(row.pass_after),
            shown(row.seconds, 1),
            counted(row.rollouts),
            counted(row.rows_trained),
            counted(row.tokens_trained),
            shown(row.informative_share, 1, 100),
        ]
        for row in rows
    ]


def difference_table(rows: list[Row], first: str, scores: tuple[str, str]) -> list[list[str]]:
    """Header and rows of differences to the first configuration; the header alone if there is none."""
    mean, passed = map(label, scores)
    head = [
        f"less {first}",
        f"{mean}, over seeds",
        f"{mean}, over problems",
        "p over problems",
        f"{passed}, over seeds",
    ]
    return [head] + [
        [
            row.name,
            shown(row.difference),
            shown(row.over_problems),
            "" if row.p_value is None else f"{row.p_value:.4f}",
            shown(row.difference_pass),
        ]
        for row in rows
        if row.difference or row.over_problems
    ]


def label(score: str) -> str:
    """A score as people write it.

    >>> label("val/mean_at_4")
    'Mean@4'
    """
    return score.removeprefix("val/").replace("_at_", "@").capitalize()


NOTES = (
    "± is half of the 95 % confidence interval over seeds (Student's t). [ , ] is the 95 % interval of a bootstrap:"
    " over seeds, of which both configurations had the same, or over held-out problems with seeds averaged. Of two or"
    " three seeds the former goes from one extreme to the other.",
    "Seconds are those of training, without validation. Rows and tokens trained are of completions that were forwarded;"
    " the informative share is that of groups, mean over phases.",
)


def markdown(table: list[list[str]]) -> str:
    """A table in Markdown."""
    head, *rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows]) + "\n"


def flat(row: Row) -> dict[str, Any]:
    """A row for a spreadsheet: numbers alone, a column each."""
    cells: dict[str, Any] = {"name": row.name, "seeds": " ".join(map(str, row.seeds))}
    for field in fields(Row)[2:]:
        value = getattr(row, field.name)
        names = ("mean", "half_width") if "Spread" in str(field.type) else ("value", "low", "high")
        if field.name == "p_value":
            cells["p_value"] = value
        else:
            cells |= {f"{field.name}_{name}": value and getattr(value, name) for name in names}
    return cells


def write_tables(rows: list[Row], first: str, scores: tuple[str, str], folder: Path) -> None:
    """Write ``table.md``, ``table.csv`` and ``table.json``."""
    parts = [markdown(main_table(rows, first, scores))]
    if len(differences := difference_table(rows, first, scores)) > 1:
        parts.append(markdown(differences))
    (folder / "table.md").write_text("\n".join([*parts, *(f"{note}\n" for note in NOTES)]), encoding="utf-8")
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat(rows[0])))
        writer.writeheader()
        writer.writerows(map(flat, rows))
    found = {"first": first, "scores": list(scores), "configs": [asdict(row) for row in rows]}
    (folder / "table.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
