"""Run folders as numbers."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_grpo.csv_log import read_metrics
from lit_grpo.errors import UserError
from lit_grpo.files import read_jsonl

AXES = ("seconds", "rollouts", "prompts", "tokens_trained")
"""What a curve is drawn against."""

OF_ONE_RUN = ("config", "run_dir", "ckpt_path", "seed_everything")
"""Keys of a configuration that differ between runs of the same."""


@dataclass
class Run:
    """One finished run."""

    folder: Path
    seed: int
    settings: dict[str, Any]
    """Its configuration as :func:`settings_of` has it."""

    phases: list[dict[str, float]]
    """Rows of the log, one a phase."""

    held_out: list[dict[str, float]]
    """Rows of the log, one a validation; that of the untrained policy has no ``epoch``."""

    def total(self, name: str) -> float | None:
        """Sum of ``train/NAME`` over phases, None where the log does not have it."""
        values = [row[f"train/{name}"] for row in self.phases if f"train/{name}" in row]
        return sum(values) if values else None

    def mean(self, name: str) -> float | None:
        """Mean of ``train/NAME`` over phases, None where the log does not have it."""
        total = self.total(name)
        return None if total is None else total / sum(f"train/{name}" in row for row in self.phases)

    def reached(self, axis: str) -> list[float]:
        """``[phases + 1]``, how far the run was on one of ``AXES`` before the first phase and after each.

        Seconds are those of the ledger, without validation; prompts are groups drawn.
        """
        if axis == "rollouts":
            return [0.0, *(row.get("train/rollouts", 0.0) for row in self.phases)]
        if axis == "prompts":  # replacements of ties are prompts too
            prompts = self.settings.get("data.init_args.prompts_per_phase", 0)
            steps = [prompts * row.get("train/rollouts_per_group", 1.0) for row in self.phases]
        else:
            prefix = "train/seconds_" if axis == "seconds" else f"train/{axis}"
            steps = [sum(value for key, value in row.items() if key.startswith(prefix)) for row in self.phases]
        return [0.0, *itertools.accumulate(steps)]

    def curve(self, name: str, axis: str) -> tuple[list[float], list[float]]:
        """Places on one of ``AXES`` and values there of ``train/NAME`` or ``val/NAME``."""
        reached = self.reached(axis)
        after = {row["epoch"]: place for row, place in zip(self.phases, reached[1:], strict=True)}
        rows = self.phases if name.startswith("train/") else self.held_out
        points = [(after.get(row.get("epoch", -1.0), 0.0), row[name]) for row in rows if name in row]
        return [place for place, _ in points], [value for _, value in points]

    def last_validation(self) -> list[dict[str, Any]]:
        """Its samples, one a completion; empty where none were written."""
        files = sorted((self.folder / "samples").glob("val-*.jsonl"), key=lambda path: int(path.stem[4:]))
        return read_jsonl(files[-1]) if files else []

    def gold_answers(self) -> Counter[str]:
        """Those of the held-out problems, which stay the same whatever a template makes of the problems."""
        return Counter(sample["answer"] for sample in self.last_validation())

    def mean_of_problems(self) -> dict[tuple[str, str], float]:
        """Share of right answers of each held-out problem, by prompt and gold answer, in the last validation."""
        right: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for sample in self.last_validation():
            right[sample["prompt"], sample["answer"]].append(sample["reward"] >= self.settings["model.correct_at"])
        return {problem: sum(values) / len(values) for problem, values in right.items()}


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as one dictionary, ``{"data.init_args.group_size": 2, ...}``, without what is of one run."""

    def flat(value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {key: value}
        return {k: v for name, part in value.items() for k, v in flat(part, f"{key}.{name}").items()}

    config = {key: value for key, value in config.items() if key not in OF_ONE_RUN}
    found = {k: v for name, part in config.items() for k, v in flat(part, name).items()}
    found.pop("data.init_args.seed", None)  # follows seed_everything
    return found


def config_of(folder: Path) -> dict[str, Any] | None:
    """The configuration that a run was last begun with, if any."""
    paths = [folder / "config.yaml", *sorted(folder.glob("config-*.yaml"), reverse=True)]
    latest = next((path for path in paths if path.exists()), None)
    return yaml.safe_load(latest.read_text(encoding="utf-8")) if latest else None


def phases_of(folder: Path) -> list[dict[str, float]]:
    """Rows of a run's log, one for each phase that is done."""
    return [row for row in read_metrics(folder) if "train/seconds" in row]


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end: it has its ledger and its last phase, or was ended early with its model saved."""
    config, phases = config_of(folder), phases_of(folder)
    if config is None or not phases or not (folder / "ledger.json").exists():
        return False
    return phases[-1]["epoch"] + 1 == config["trainer"]["max_epochs"] or (folder / "pretrained").is_dir()


def read_run(folder: Path) -> Run:
    """A finished run.

    Args:
        folder: of the run; nothing in it is changed.

    Raises:
        UserError: if it is none, or has not finished, or has no held-out scores.
    """
    if (config := config_of(folder)) is None:
        raise UserError(f"{str(folder)!r} is no folder of a run: it has no config.yaml.")
    if not is_finished(folder):
        raise UserError(
            f"{str(folder)!r}: this run has not finished ({len(phases_of(folder))} phases are done). Go on with it:"
            f" lit-grpo fit -c ... --run_dir {folder} --ckpt_path last."
        )
    held_out = [row for row in read_metrics(folder) if any(key.startswith("val/mean_at_") for key in row)]
    if not held_out:
        raise UserError(
            f"{str(folder)!r}: this run has no held-out scores (data.init_args.val), so nothing to compare."
        )
    if "epoch" in held_out[0]:
        raise UserError(
            f"{str(folder)!r}: this run has no held-out scores of the untrained policy, so nobody knows what it gained."
            " Leave trainer.num_sanity_val_steps at -1."
        )
    return Run(folder, config["seed_everything"], settings_of(config), phases_of(folder), held_out)


def read_runs(folder: Path) -> list[Run]:
    """The finished run in a folder, or all of those in its subfolders, in the order of their seeds.

    Raises:
        UserError: if one of them cannot be read, or they are not runs of one configuration with different seeds.
    """
    folders = [folder] if config_of(folder) else [path for path in sorted(folder.iterdir()) if config_of(path)]
    if not folders:
        raise UserError(f"{str(folder)!r} is neither the folder of a run nor one of several: nowhere is a config.yaml.")
    runs = sorted(map(read_run, folders), key=lambda run: run.seed)
    for one, other in itertools.pairwise(runs):
        if difference := first_difference(one.settings, other.settings):
            raise UserError(
                f"{str(one.folder)!r} and {str(other.folder)!r} differ in more than the seed: {difference}."
            )
        if one.seed == other.seed:
            raise UserError(f"{str(one.folder)!r} and {str(other.folder)!r} have the same seed, {one.seed}.")
    return runs


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first key in which two configurations differ, with both values; empty if they do not."""
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return f"{keys[0]} is {one.get(keys[0])!r} in one, {other.get(keys[0])!r} in the other" if keys else ""


def scores_of(runs: list[Run]) -> tuple[str, str]:
    """The names in the log of Mean@k, and of Pass@k for the largest k.

    Raises:
        UserError: if they are not the same in all runs, or the held-out problems are not, by their gold answers.
    """

    def names(run: Run) -> tuple[str, str]:
        found = [re.fullmatch(r"val/(mean|pass)_at_(\d+)", key) for key in run.held_out[-1]]
        k = {kind: max(int(one[2]) for one in found if one and one[1] == kind) for kind in ("mean", "pass")}
        return f"val/mean_at_{k['mean']}", f"val/pass_at_{k['pass']}"

    for run in runs:
        if names(run) != names(runs[0]):
            raise UserError(
                f"data.init_args.samples_per_prompt, model.pass_at: {str(runs[0].folder)!r} has"
                f" {' and '.join(names(runs[0]))}, {str(run.folder)!r} has {' and '.join(names(run))}."
                " Only runs that measure the same can be compared."
            )
    problems = [(run, found) for run in runs if (found := run.gold_answers())]
    for (one, of_one), (other, of_other) in itertools.pairwise(problems):
        if of_one != of_other:
            raise UserError(
                f"data.init_args.val: {str(one.folder)!r} and {str(other.folder)!r} were scored on different held-out"
                " problems: their gold answers are not the same. Only runs that measure the same can be compared."
            )
    return names(runs[0])
