"""Columns of preference data sets to prompts with scored completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_grpo.data.prompts import Source, checked_rows, open_data
from lit_grpo.errors import UserError


@dataclass
class Preferences(Source):
    """A source whose rows also hold completions. Which columns there are says what kind of data it is."""

    answer: str | None = None
    """Not used in training."""

    chosen: str = "chosen"
    """Column of the better completion of a pair, or of the conversation that ends with it."""

    rejected: str = "rejected"
    """Column of the worse one."""

    completion: str = "completion"
    """Column of a single completion: text, or a list of chat messages."""

    label: str = "label"
    """Column that says whether the single completion is good. Where there is none, all are: demonstrations."""


@dataclass
class Example:
    """One row: a prompt and its completions, each text or a list of chat messages."""

    prompt: Any
    completions: list[Any]
    rewards: list[float]


def read_examples(source: Preferences, key: str) -> tuple[list[Example], str]:
    """All rows of a source, and what kind they are.

    Columns ``chosen`` and ``rejected`` make pairs, scored 1 and 0; ``completion`` and ``label`` make labelled
    completions, scored 1 or 0; ``completion`` alone makes demonstrations, scored 1. The prompt is in its own column, or
    else it is what the completions of a pair begin with in common, or all messages of a conversation but the last.

    Args:
        source: where to look.
        key: the YAML key of the source, for messages.

    Raises:
        UserError: if the columns are none of these, or a row cannot be read.
    """
    data = open_data(source, key)
    there = data.column_names
    if source.chosen in there and source.rejected in there:
        kind, columns = "pairs", [source.chosen, source.rejected]
    elif source.completion in there:
        labelled = source.label in there
        kind = "labelled completions" if labelled else "demonstrations"
        columns = [source.completion, source.label] if labelled else [source.completion]
    else:
        raise UserError(
            f"{key}: {source.path!r} has the columns {', '.join(there)}; expected {source.chosen!r} and"
            f" {source.rejected!r}, or {source.completion!r} with or without {source.label!r}. Name them in"
            f" {key}.chosen, .rejected, .completion and .label."
        )
    explicit = source.prompt in there
    rows = checked_rows(data, [source.prompt] * explicit + columns, source, key)
    examples = []
    for i, row in enumerate(rows):
        where = f"{key}: row {i} of {source.path!r}"
        prompt = row[source.prompt] if explicit else None
        if kind == "pairs":
            example = read_pair(prompt, row[source.chosen], row[source.rejected], where)
        else:
            reward = as_reward(row[source.label], where) if kind == "labelled completions" else 1.0
            example = Example(*split_conversation(prompt, row[source.completion], where), [reward])
        examples.append(example)
    return examples, kind


def read_pair(prompt: Any, chosen: Any, rejected: Any, where: str) -> Example:
    """A pair, whose prompt may be in its own column, or repeated at the beginning of both conversations, or only there.

    Raises:
        UserError: if the sides are of different kinds, or no prompt is found.
    """
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise UserError(f"{where} has text on one side of the pair and chat messages on the other.")
    if prompt is not None and not (isinstance(chosen, list) and chosen[0]["role"] != "assistant"):
        return Example(prompt, [chosen, rejected], [1.0, 0.0])
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    same = min(len(chosen), len(rejected)) if same is None else same
    if isinstance(chosen, str):
        while same > 0 and not (same < len(chosen) and chosen[same].isspace()):  # answers begin with whole words
            same -= 1
    else:
        same = min(same, len(chosen) - 1, len(rejected) - 1)
    if same == 0:
        raise UserError(
            f"{where} has no column for the prompt, and its two sides do not begin alike. Name the column in .prompt."
        )
    return Example(chosen[:same], [chosen[same:], rejected[same:]], [1.0, 0.0])


def split_conversation(prompt: Any, completion: Any, where: str) -> tuple[Any, list[Any]]:
    """A prompt and one completion; without a prompt, the last message is the completion of those before.

    Raises:
        UserError: if there is no prompt.
    """
    if prompt is not None:
        return prompt, [completion]
    if not isinstance(completion, list) or len(completion) < 2:
        raise UserError(
            f"{where} has no column for the prompt and no conversation to take it from. Name it in .prompt."
        )
    return completion[:-1], [completion[-1:]]


def as_reward(label: Any, where: str) -> float:
    """1 for a good completion, 0 for a bad one; text as a .csv file has it is understood.

    Raises:
        UserError: if the label is neither.
    """
    rewards = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}
    if (reward := rewards.get(str(label).lower())) is None:
        raise UserError(f"{where} has the label {label!r}, expected true or false, 1 or 0.")
    return reward
