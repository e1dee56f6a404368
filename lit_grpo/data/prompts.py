"""Data set rows to prompts: columns, templates, tokens."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from lit_grpo.data.templates import TEMPLATES
from lit_grpo.errors import UserError
from lit_grpo.rewards.verify import last_boxed

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class Source:
    """Where rows come from, in YAML under ``data.init_args.train``, ``val``, ``test`` or ``predict``."""

    path: str
    """Hub id of a data set, or a local .json, .jsonl, .parquet or .csv file."""

    name: str | None = None
    """Configuration of a hub data set."""

    split: str = "train"
    """Split of a data set, slices such as ``train[:1000]`` included. A local file has one split, whatever its name; a
    .csv file is always read whole."""

    prompt: str = "prompt"
    """Column of the question: text, or a list of chat messages."""

    answer: str | None = "answer"
    """Column of the gold answer, which only the reward sees. Null where there is none."""

    read_answer: Literal["plain", "boxed", "hashes"] = "plain"
    """What of that column is the answer: all of it, a solution's last ``\\boxed{}`` (MATH), or what follows the last
    ``####`` (GSM8K)."""

    id: str | None = None
    """Column of a name for each row, by which results are kept; the row's number if not given."""

    tolerance: str | None = None
    """Column of the number by which an answer may be off (OlympiadBench's ``error``); empty cells are 0."""

    deduplicate: bool = False
    """Whether of rows with the same prompt only the first is kept (DAPO-Math-17k has each a hundred times)."""

    sample: int | None = None
    """Rows drawn at random, by ``sample_seed`` alone; all if not given."""

    sample_seed: int = 0

    streaming: bool = False
    """Whether rows are read as they come, without a copy on disk."""

    def __post_init__(self) -> None:
        for name in ("name", "answer", "id", "tolerance"):
            if getattr(self, name) == "None":  # what jsonargparse makes of --data.train.answer=null
                setattr(self, name, None)


@dataclass
class Prompt:
    """One row, ready for the engine."""

    text: str
    token_ids: list[int]
    answer: str
    messages: list[dict[str, str]] | None = None
    """The chat messages that the text was made of, if it was."""

    row: int = 0
    """Its place in the source."""

    id: str = ""
    """Its name in results."""

    tolerance: float = 0.0
    """By which a number may differ from the gold answer."""


def open_data(source: Source, key: str) -> Any:
    """The data set of a source, whole.

    Args:
        source: where to look.
        key: the YAML key of the source, for messages.

    Raises:
        UserError: if it cannot be read or is empty.
    """
    from datasets import Dataset, load_dataset  # takes a second to import

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what goes wrong is said below

    path = Path(source.path)
    if path.suffix in FORMATS and not path.is_file():
        raise UserError(f"{key}.path: no file {source.path!r} (looked from {Path.cwd()}).")
    if path.is_file() and path.suffix not in FORMATS:
        raise UserError(f"{key}.path: cannot tell the format of {source.path!r}; expected one of {', '.join(FORMATS)}.")
    try:
        if path.suffix == ".csv":  # read as text: with guessed types, the answer 007 would become 7
            with open(path, newline="", encoding="utf-8-sig") as file:
                data = Dataset.from_list(list(csv.DictReader(file)))
        elif path.is_file():
            split = re.sub(r"\w+", "train", source.split, count=1)
            data = load_dataset(FORMATS[path.suffix], data_files=str(path), split=split, streaming=source.streaming)
        else:
            data = load_dataset(source.path, source.name, split=source.split, streaming=source.streaming)
        if source.streaming:
            data = Dataset.from_list(list(data))
    except Exception as error:  # the library raises many kinds, from its own to pyarrow's and the network's
        if "corresponds to no data" in str(error) or isinstance(error.__cause__ or error, StopIteration):
            raise UserError(f"{key}.path: {source.path!r} (split {source.split!r}) has no rows.") from error
        cause = error.__cause__ or error
        hint = (
            ""
            if path.is_file()
            else (
                f" Without a network, write its rows to a .jsonl or .parquet file with the same columns, here"
                f" {', '.join(repr(c) for c in source_columns(source))}, and name the file in {key}.path."
            )
        )
        raise UserError(
            f"{key}.path: cannot load {source.path!r} (name {source.name!r}, split {source.split!r}):"
            f" {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no details'}{hint}"
        ) from error
    if not len(data):
        raise UserError(f"{key}.path: {source.path!r} (split {source.split!r}) has no rows.")
    return data


def source_columns(source: Any) -> list[str]:
    """The columns that a source names."""
    names = (getattr(source, name, None) for name in ("prompt", "answer", "id", "tolerance"))
    return [name for name in names if name]


def checked_rows(
    data: Any, columns: list[str], source: Source, key: str, optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The wanted columns of all rows of a data set; cells of ``optional`` ones may be empty.

    Raises:
        UserError: if it lacks one of the columns, or has an empty cell there.
    """
    wanted = [*columns, *optional]
    if any("." in column for column in wanted):
        data = data.flatten()  # fields of a nested column get dotted names
    if missing := [column for column in wanted if column not in data.column_names]:
        raise UserError(
            f"{key}: {source.path!r} has no column {missing[0]!r}; it has {', '.join(data.column_names)}. Name the"
            f" right one in {key}."
        )
    rows = data.select_columns(wanted).to_list()
    for i, row in enumerate(rows):
        for column in columns:
            if not isinstance(row[column], str | int | float | list | None):
                raise UserError(
                    f"{key}: row {i} of {source.path!r} holds a {type(row[column]).__name__} in column {column!r},"
                    " expected text, a number or chat messages. Store it as text, in a .csv or .parquet file."
                )
            if row[column] is None or row[column] == "" or row[column] == []:
                raise UserError(
                    f"{key}: row {i} of {source.path!r} has nothing in column {column!r}. Fill or drop the row."
                )
    return rows


def check_content(content: Any, where: str) -> None:
    """Refuse what is neither text nor a list of chat messages.

    Raises:
        UserError: naming the row and the column.
    """
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise UserError(f"{where} holds {content!r}, expected text or a list of chat messages.")
    for message in content:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise UserError(f"{where} holds the chat message {message!r}, expected a role and a content, both text.")


def encode_prompt(
    content: Any, where: str, tokenizer: Any, template: str, chat_template: bool
) -> tuple[str, list[int], list[dict[str, str]] | None]:
    """The text of a prompt, its token ids, and the chat messages that the text was made of.

    Args:
        content: text, put into the template; or a list of chat messages.
        where: the row, for messages.
        tokenizer: of the policy.
        template: text in which ``{prompt}`` is replaced by the row's text.
        chat_template: whether to wrap the prompt in the tokenizer's chat template.

    Raises:
        UserError: if it is neither, the chat template is off or refuses it, or it has no tokens.
    """
    check_content(content, where)
    if isinstance(content, list) and not chat_template:
        raise UserError(f"{where} holds chat messages. Set data.init_args.chat_template to true.")
    if isinstance(content, str):
        content = template.replace("{prompt}", content)
    messages = as_messages(content, "user") if chat_template else None
    text = render_chat(messages, where, tokenizer, add_generation_prompt=True) if messages else content
    token_ids = tokenizer(text, add_special_tokens=not chat_template)["input_ids"]
    if not token_ids:
        raise UserError(f"{where} has no tokens: {text!r}.")
    return text, token_ids, messages


def as_messages(content: Any, role: str) -> list[dict[str, str]]:
    """Text as one chat message of a role; messages as they are."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def render_chat(messages: list[dict[str, str]], where: str, tokenizer: Any, add_generation_prompt: bool) -> str:
    """Chat messages as the text that the chat template makes of them.

    Raises:
        UserError: if the template refuses them.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise UserError(f"{where}: the chat template refuses its messages: {error}.") from error
    return text


def check_vocabulary(last: int, size: int, where: str) -> None:
    """Refuse a tokenizer that makes tokens which the model does not have.

    Raises:
        UserError: if the largest token id is not below the model's number of tokens.
    """
    if last >= size:
        raise UserError(
            f"model.model: its tokenizer makes the token {last} of {where}, but the model has only {size} tokens. The"
            " two do not belong together."
        )


def check_templates(template: str, chat_template: bool, tokenizer: Any) -> None:
    """Refuse a template without a place for the prompt, and a chat template that is not there."""
    if "{prompt}" not in template:
        raise UserError(
            f"data.init_args.template: expected a text that contains {{prompt}}, or one of {', '.join(TEMPLATES)}; got"
            f" {template!r}."
        )
    if chat_template and not tokenizer.chat_template:
        raise UserError(
            "data.init_args.chat_template: is true, but the model's tokenizer has no chat template. Set it to false."
        )
    if missing := set(re.findall(r"<\|\w+\|>", template)) - tokenizer.get_vocab().keys():
        raise UserError(
            f"data.init_args.template: it uses {min(missing)}, which the model's tokenizer does not have as a token."
            " Choose another template."
        )


def load_prompts(source: Source, key: str, tokenizer: Any, template: str, chat_template: bool) -> list[Prompt]:
    """All prompts of a source as token ids.

    Args:
        source: where to look.
        key: the YAML key of the source, for messages.
        tokenizer: of the policy.
        template: text in which ``{prompt}`` is replaced by the row's text.
        chat_template: whether to wrap the prompt in the tokenizer's chat template.

    Raises:
        UserError: as :func:`open_data`, :func:`checked_rows`, :func:`check_templates` and :func:`encode_prompt`.
    """
    check_templates(template, chat_template, tokenizer)
    columns = [column for column in (source.prompt, source.answer, source.id) if column]
    optional = [source.tolerance] if source.tolerance else []
    prompts, seen, ids = [], set(), dict[str, int]()
    for i, row in enumerate(checked_rows(open_data(source, key), columns, source, key, optional)):
        where = f"{key}.prompt: row {i} of {source.path!r}, column {source.prompt!r},"
        text, token_ids, messages = encode_prompt(row[source.prompt], where, tokenizer, template, chat_template)
        if source.deduplicate and text in seen:
            continue
        seen.add(text)
        prompt = Prompt(text, token_ids, "", messages, i, str(row[source.id]) if source.id else str(i))
        if (first := ids.setdefault(prompt.id, i)) != i:
            raise UserError(
                f"{key}.id: rows {first} and {i} of {source.path!r} both have {prompt.id!r} in column {source.id!r}."
                " Mend or drop one, or name another column."
            )
        if source.answer:
            where = f"{key}.answer: row {i} of {source.path!r}, column {source.answer!r},"
            prompt.answer = gold_answer(row[source.answer], source.read_answer, where)
        if source.tolerance:
            where = f"{key}.tolerance: row {i} of {source.path!r}, column {source.tolerance!r},"
            prompt.tolerance = read_tolerance(row[source.tolerance], where)
        prompts.append(prompt)
    if source.sample is None:
        return prompts
    if not 1 <= source.sample <= len(prompts):
        raise UserError(f"{key}.sample: expected from 1 to the {len(prompts)} rows there are, got {source.sample}.")
    chosen = np.random.default_rng(source.sample_seed).permutation(len(prompts))[: source.sample]
    return [prompts[i] for i in sorted(chosen)]


def gold_answer(value: Any, how: str, where: str) -> str:
    r"""The gold answer in a cell, see ``Source.read_answer``. Lists are joined by commas, 27.0 is 27.

    >>> gold_answer("... so 600 + 634.\n#### 1,234", "hashes", "")
    '1234'
    >>> gold_answer(["$-1$", "$2$"], "plain", "")
    '-1, 2'

    Raises:
        UserError: if it holds no answer of the kind.
    """
    if value is None or value != value:
        raise UserError(f"{where} holds {value!r}; expected an answer. Mend or drop the row.")
    if isinstance(value, list):
        return ", ".join(gold_answer(part, how, where).strip("$") for part in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text: str | None = str(value).strip()
    if how == "boxed":  # MATH has a few of the second and third form
        text = last_boxed(str(value).replace("\\fbox{", "\\boxed{"))
        if text is None and (unbraced := re.findall(r"\\boxed\s+([^\s$]+)", str(value))):
            text = unbraced[-1].rstrip(".,")
    elif how == "hashes":
        text = str(value).rpartition("####")[2].strip().replace(",", "") if "####" in str(value) else None
    if not text:
        mark = {"boxed": "a closed \\boxed{...}", "hashes": "an answer after ####"}.get(how, "text")
        raise UserError(f"{where} holds {value!r}; expected {mark}. Mend or drop the row, or change read_answer.")
    return text


def read_tolerance(value: Any, where: str) -> float:
    """The number in a cell, 0 where it is empty; the smallest of several between commas.

    Raises:
        UserError: if it holds anything else.
    """
    try:
        number = min(map(float, str(value).split(","))) if value not in (None, "") else 0.0
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise UserError(f"{where} holds {value!r}; expected a number >= 0 or nothing.")
    return number
