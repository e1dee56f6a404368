"""Columns of preference data sets, in the formats in which they are found."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lit_grpo.data import Preferences
from lit_grpo.data.layouts import read_examples


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows in a file whose name says the format."""
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


QUESTION, OTHER = [user("2+2?")], [system("Be kind."), user("hi"), assistant("ho"), user("hm?")]

LAYOUTS: dict[str, tuple[list[dict[str, Any]], dict[str, str], str, list[Any]]] = {
    "explicit pairs, text": (
        [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}],
        {},
        "pairs",
        [("The sky is", [" blue.", " green."])],
    ),
    "implicit pairs, text": (
        [
            {"chosen": "Human: 2+2? Assistant: 40 of", "rejected": "Human: 2+2? Assistant: 44"},
            {"chosen": "The sky is blue", "rejected": "The sky isn't"},
            {"chosen": "The sky is", "rejected": "The sky is blue"},
            {"chosen": "The sky is blue", "rejected": "The sky is"},
            {"chosen": "One:\n\nyes", "rejected": "One:\nno"},
        ],
        {},
        "pairs",
        [
            ("Human: 2+2? Assistant:", [" 40 of", " 44"]),
            ("The sky", [" is blue", " isn't"]),
            ("The sky", [" is", " is blue"]),
            ("The sky", [" is blue", " is"]),
            ("One:", ["\n\nyes", "\nno"]),
        ],
    ),
    "explicit pairs, chat": (
        [
            {"prompt": QUESTION, "chosen": [assistant("4")], "rejected": [assistant("5")]},
            {"prompt": OTHER, "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        ],
        {},
        "pairs",
        [(QUESTION, [[assistant("4")], [assistant("5")]]), (OTHER, [[assistant("yes")], [assistant("no")]])],
    ),
    "implicit pairs, chat (trl-lib/ultrafeedback_binarized)": (
        [
            {
                "chosen": [*prompt, assistant("4")],
                "rejected": [*prompt, assistant("5")],
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            }
            for prompt in (QUESTION, OTHER)
        ],
        {},
        "pairs",
        [(prompt, [[assistant("4")], [assistant("5")]]) for prompt in (QUESTION, OTHER)],
    ),
    "prompt as text and whole conversations (HuggingFaceH4/ultrafeedback_binarized)": (
        [
            {
                "prompt": "2+2?",
                "prompt_id": "f0e1",
                "chosen": [*QUESTION, assistant("4")],
                "rejected": [*QUESTION, assistant("")],
                "messages": [*QUESTION, assistant("4")],
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            }
        ],
        {},
        "pairs",
        [(QUESTION, [[assistant("4")], [assistant("")]])],
    ),
    "the same as demonstrations": (
        [
            {
                "prompt": "2+2?",
                "chosen": [*QUESTION, assistant("4")],
                "rejected": [*QUESTION, assistant("5")],
                "messages": [*QUESTION, assistant("4")],
            }
        ],
        {"completion": "messages"},
        "demonstrations",
        [(QUESTION, [[assistant("4")]])],
    ),
    "labelled chat (trl-lib/kto-mix-14k)": (
        [
            {"prompt": QUESTION, "completion": [assistant("4")], "label": True},
            {"prompt": OTHER, "completion": [assistant("no")], "label": False},
        ],
        {},
        "labelled completions",
        [(QUESTION, [[assistant("4")]]), (OTHER, [[assistant("no")]])],
    ),
    "labelled completions, text": (
        [{"question": "2+2=", "reply": "4", "good": 1}, {"question": "2+2=", "reply": "5", "good": 0}],
        {"prompt": "question", "completion": "reply", "label": "good"},
        "labelled completions",
        [("2+2=", ["4"]), ("2+2=", ["5"])],
    ),
    "demonstrations, text": (
        [{"prompt": "2+2=", "completion": "4"}],
        {},
        "demonstrations",
        [("2+2=", ["4"])],
    ),
    "demonstrations, conversations alone": (
        [{"messages": [*QUESTION, assistant("4")]}, {"messages": [*OTHER, assistant("yes")]}],
        {"completion": "messages"},
        "demonstrations",
        [(QUESTION, [[assistant("4")]]), (OTHER, [[assistant("yes")]])],
    ),
    "text as prompt, a message as completion": (
        [{"prompt": "2+2?", "chosen": [assistant("4")], "rejected": [assistant("5")]}],
        {},
        "pairs",
        [("2+2?", [[assistant("4")], [assistant("5")]])],
    ),
}


class TestLayouts:
    @pytest.mark.parametrize(
        ("layout", "form"),
        [
            *((layout, form) for layout in LAYOUTS for form in ("jsonl", "parquet")),
            *((layout, "csv") for layout in LAYOUTS if layout.endswith(", text")),
        ],
    )
    def test_rows_become_prompts_with_completions(self, layout: str, form: str, tmp_path: Path):
        rows, columns, kind, expected = LAYOUTS[layout]
        examples, found = read_examples(Preferences(write(tmp_path / f"rows.{form}", rows), **columns), "train")
        assert found == kind
        assert [(e.prompt, e.completions) for e in examples] == expected
        if kind == "pairs":
            assert all(e.rewards == [1.0, 0.0] for e in examples)
        elif kind == "demonstrations":
            assert all(e.rewards == [1.0] for e in examples)
        else:
            assert [e.rewards for e in examples] == [[1.0], [0.0]]

    def test_labels_of_a_csv_file_are_text(self, tmp_path: Path):
        labels = ["True", "0", "1", "false", "1.0", "FALSE"]
        rows = [{"prompt": "1+1=", "completion": "2", "label": label} for label in labels]
        examples, kind = read_examples(Preferences(write(tmp_path / "rows.csv", rows)), "train")
        assert kind == "labelled completions"
        assert [e.rewards for e in examples] == [[1.0], [0.0], [1.0], [0.0], [1.0], [0.0]]

    def test_further_keys_of_messages_go_to_the_chat_template(self, tmp_path: Path):
        rows = [
            {"messages": [user("a") | {"name": "Ann"}, assistant("b")]},
            {"messages": [user("a"), assistant("b") | {"weight": 1}]},
        ]
        path = write(tmp_path / "rows.jsonl", rows)
        examples, _ = read_examples(Preferences(path, completion="messages"), "train")
        assert [example.prompt[0].get("name") for example in examples] == ["Ann", None]


def test_columns_that_were_named_come_first(tmp_path: Path):
    row = {"prompt": "a", "completion": "b", "label": True, "better": "c", "worse": "d"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    path = str(tmp_path / "rows.jsonl")
    (example,), kind = read_examples(Preferences(path, chosen="better", rejected="worse"), "train")
    assert (example.completions, kind) == (["c", "d"], "pairs")
    assert read_examples(Preferences(path), "train")[1] == "labelled completions"
    assert read_examples(Preferences(path, label=None), "train")[1] == "demonstrations"
