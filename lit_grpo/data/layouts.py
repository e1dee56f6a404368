"""Columns of preference data sets to prompts with scored completions."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lit_grpo.data.prompts import Source, check_content, checked_rows, open_data
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
    """Column of a single completion, or of the conversation that ends with it. Where there is one, the columns of pairs
    are read only if they were named."""

    label: str | None = "label"
    """Column that says whether the single completion is good. Where there is none, or null, all are: demonstrations."""


@dataclass
class Example:
    """One row: a prompt and its completions, each text or a list of chat messages."""

    prompt: Any
    completions: list[Any]
    rewards: list[float]
    where: str
    """The row, for messages."""


def read_examples(source: Preferences, key: str) -> tuple[list[Example], str]:
    """All rows of a source, and what kind they are.

    Columns ``completion`` and ``label`` make labelled completions, scored 1 or 0; ``completion`` alone makes
    demonstrations, scored 1; ``chosen`` and ``rejected`` make pairs, scored 1 and 0, or alike where their columns
    ``score_chosen`` and ``score_rejected`` are. The prompt is in its own column;
    without one, it is what the sides of a pair begin with in common. Of whole conversations it is always all but the
    last message, whether it has a column or not.

    Args:
        source: where to look.
        key: the YAML key of the source, for messages.

    Raises:
        UserError: if the columns are none of these, or a row cannot be read.
    """
    data = open_data(source, key)
    there = data.column_names
    for field in fields(Preferences):
        column = getattr(source, field.name)
        if field.name in ("prompt", "chosen", "rejected", "completion", "label") and column not in (
            None,
            field.default,
            *there,
        ):
            raise UserError(f"{key}.{field.name}: {source.path!r} has no column {column!r}; it has {', '.join(there)}.")
    label = source.label if source.label in there else None
    named = source.chosen != "chosen" or source.rejected != "rejected"
    if source.completion in there and not named:
        kind, sides = "labelled completions" if label else "demonstrations", [source.completion]
    elif source.chosen in there and source.rejected in there:
        kind, sides, label = "pairs", [source.chosen, source.rejected], None
    else:
        raise UserError(
            f"{key}: {source.path!r} has the columns {', '.join(there)}; expected {source.chosen!r} and"
            f" {source.rejected!r}, or {source.completion!r} with or without {source.label!r}. Name them in"
            f" {key}.chosen, .rejected, .completion and .label."
        )
    texts = [source.prompt] * (source.prompt in there) + sides
    scores = [name for name in ("score_chosen", "score_rejected") if kind == "pairs" and name in there]
    others = [label, *scores] if label else scores
    examples = []
    for i, row in enumerate(checked_rows(data, [*texts, *others], source, key)):
        where = f"{key}: row {i} of {source.path!r}"
        for column in texts:
            check_content(row[column], f"{where}, column {column!r},")
        prompt, completions = split(row.get(source.prompt), [row[column] for column in sides], where)
        rewards = [as_reward(row[label], where)] if label else [1.0, 0.0][: len(sides)]
        if len(scores) == 2 and row[scores[0]] == row[scores[1]]:
            rewards = [1.0, 1.0]  # no preference
        examples.append(Example(prompt, completions, rewards, where))
    return examples, kind


def split(prompt: Any, completions: list[Any], where: str) -> tuple[Any, list[Any]]:
    """The prompt and the completions of one row, taken apart where they are in one.

    Raises:
        UserError: if the sides are of different kinds, no prompt is found, or a completion is not one message of the
            assistant.
    """
    first = completions[0]
    chat = isinstance(first, list)
    if any(isinstance(completion, list) != chat for completion in completions):
        raise UserError(f"{where} has text on one side of the pair and chat messages on the other.")
    if prompt is None or (chat and any(completion[0]["role"] != "assistant" for completion in completions)):
        same = common_messages(completions) if chat else common_words(completions)
        if same == 0:
            raise UserError(
                f"{where} has no prompt: no column of its own, no messages before the last, no words or messages that"
                " both sides of a pair begin with. Name the column in .prompt."
            )
        prompt, completions = first[:same], [completion[same:] for completion in completions]
    if chat:
        for completion in completions:
            if (roles := [message["role"] for message in completion]) != ["assistant"]:
                raise UserError(
                    f"{where} has a completion with messages of {', '.join(roles)}; expected one, of the assistant."
                )
    return prompt, completions


def common_messages(conversations: list[list[Any]]) -> int:
    """How many messages all conversations begin with in common, the last of each left out."""
    before = [conversation[:-1] for conversation in conversations]
    return next((i for i, same in enumerate(zip(*before, strict=False)) if same[0] != same[-1]), min(map(len, before)))


def common_words(texts: list[str]) -> int:
    """How many characters two texts begin with in common, up to the end of a word in both; 0 for a single text."""
    if len(texts) == 1:
        return 0
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    while same > 0 and not all(text[same : same + 1].isspace() for text in texts):
        same -= 1
    return same


def as_reward(label: Any, where: str) -> float:
    """1 for a good completion, 0 for a bad one; text as a .csv file has it is understood.

    Raises:
        UserError: if the label is neither.
    """
    rewards = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}
    if (reward := rewards.get(str(label).lower())) is None:
        raise UserError(f"{where} has the label {label!r}, expected true or false, 1 or 0.")
    return reward
