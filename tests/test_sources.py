"""Rows of data sets as prompts with gold answers: the quirks of the benchmarks, in rows written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_layouts import write
from test_structure import parsed

from lit_grpo.data import Source
from lit_grpo.data.prompts import Prompt, gold_answer, load_prompts
from lit_grpo.data.templates import TEMPLATES
from lit_grpo.errors import UserError
from lit_grpo.policy import load_tokenizer
from lit_grpo.rewards.verify import judge


def load(model: str, path: str, template: str = "none", **source: Any) -> list[Prompt]:
    return load_prompts(
        Source(path, **source), "data.init_args.train", load_tokenizer(model), TEMPLATES[template], False
    )


SETS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[str]]] = {
    "MATH": (
        {"prompt": "problem", "answer": "solution", "read_answer": "boxed"},
        [
            {"problem": "1+1", "level": "Level 1", "type": "Algebra", "solution": r"First \boxed{3}. No: $\boxed{2}$."},
            {"problem": "1+2", "level": "Level 5", "type": "Algebra", "solution": r"So $x=\boxed{\frac{\sqrt{2}}{2}}.$"},
            {"problem": "1+3", "level": "Level ?", "type": "Geometry", "solution": r"It is $\fbox{4}$."},
            {"problem": "1+4", "level": "Level 2", "type": "Algebra", "solution": r"Hence $\boxed 5$."},
        ],
        ["2", r"\frac{\sqrt{2}}{2}", "4", "5"],
    ),
    "MATH-500": (
        {"prompt": "problem"},
        [
            {"problem": "1+1", "solution": r"\boxed{2}", "answer": "2", "subject": "Algebra", "level": 1, "unique_id": "a"},
            {"problem": "1+2", "solution": r"\boxed{(3,0)}", "answer": r"\left( 3, \frac{\pi}{2} \right)", "subject": "P", "level": 2, "unique_id": "b"},
        ],
        ["2", r"\left( 3, \frac{\pi}{2} \right)"],
    ),
    "GSM8K": (
        {"prompt": "question", "read_answer": "hashes"},
        [
            {"question": "1+1", "answer": "He sold 48/2 = <<48/2=24>>24 clips.\n#### 72"},
            {"question": "1+2", "answer": "It cost #1.\n#### 1,234"},
            {"question": "1+3", "answer": "Below.\n#### -5"},
        ],
        ["72", "1234", "-5"],
    ),
    "DAPO-Math-17k-Processed": (
        {"answer": "solution", "deduplicate": True},
        [
            {"prompt": "1+1", "solution": "2", "data_source": "math_dapo"},
            {"prompt": "1+1", "solution": "2", "data_source": "math_dapo"},
            {"prompt": "1+2", "solution": "3", "data_source": "math_dapo"},
        ],
        ["2", "3"],
    ),
    "DAPO-Math-17k, nested columns": (
        {"prompt": "extra_info.question", "answer": "reward_model.ground_truth"},
        [
            {"extra_info": {"question": "1+1"}, "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}},
            {"extra_info": {"question": "1+2"}, "reward_model": {"ground_truth": "3", "style": "rule-lighteval/MATH_v2"}},
        ],
        ["34", "3"],
    ),
    "AMC 2023": (
        {"prompt": "question"},
        [{"id": 0, "question": "1+1", "answer": 27.0, "url": ""}, {"id": 1, "question": "1+2", "answer": 0.5, "url": ""}],
        ["27", "0.5"],
    ),
    "Minerva Math": (
        {"prompt": "question"},
        [{"question": "1+1", "answer": "8.7 \\times 10^{8}\n"}, {"question": "1+2", "answer": "  4.5e33 "}],
        [r"8.7 \times 10^{8}", "4.5e33"],
    ),
    "AIME 2024 and 2025": (
        {"prompt": "problem"},
        [{"id": 60, "problem": "1+1", "answer": "025", "url": "", "year": "2024"}, {"id": 61, "problem": "1+2", "answer": "204", "url": "", "year": "2024"}],
        ["025", "204"],
    ),
    "OlympiadBench": (
        {"prompt": "question", "answer": "final_answer", "tolerance": "error"},
        [
            {"question": "1+1", "final_answer": ["$2$"], "unit": None, "is_multiple_answer": False, "error": None},
            {"question": "1+2", "final_answer": ["$-1$", "$2$"], "unit": None, "is_multiple_answer": True, "error": ""},
            {"question": "1+3", "final_answer": ["3.14"], "unit": "cm", "is_multiple_answer": False, "error": "1e-1"},
        ],
        ["$2$", "-1, 2", "3.14"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", SETS)
def test_gold_answers_of_the_benchmarks(name: str, form: str, model: str, tmp_path: Path):
    source, rows, expected = SETS[name]
    prompts = load(model, write(tmp_path / f"rows.{form}", rows), **source)
    answers = [prompt.answer for prompt in prompts]
    assert [answer.strip("$") for answer in answers] == [answer.strip("$") for answer in expected]
    for answer in answers:
        assert judge(answer, rf"\boxed{{{answer.strip('$')}}}").correct
    assert [prompt.row for prompt in prompts] == ([0, 2] if source.get("deduplicate") else list(range(len(rows))))
    if "tolerance" in source:
        assert [prompt.tolerance for prompt in prompts] == [0, 0, 0.1]


SHIPPED = {
    ("MATH", "fit", "data/math.yaml", "train"),
    ("GSM8K", "fit", "data/gsm8k.yaml", "train"),
    ("DAPO-Math-17k-Processed", "fit", "data/dapo_math_sub.yaml", "train"),
    ("MATH-500", "test", "eval/math.yaml", "math_500"),
    ("AMC 2023", "test", "eval/math.yaml", "amc_2023"),
    ("Minerva Math", "test", "eval/math.yaml", "minerva_math"),
    ("AIME 2024 and 2025", "test", "eval/math.yaml", "aime_2025"),
    ("AIME 2024 and 2025", "test", "eval/aime_2024.yaml", "aime_2024"),
    ("OlympiadBench", "test", "eval/math.yaml", "olympiad_bench"),
}


@pytest.mark.parametrize(("name", "command", "config", "key"), sorted(SHIPPED))
def test_shipped_configs_read_local_rows_of_the_same_columns(
    name: str, command: str, config: str, key: str, model: str, tmp_path: Path
):
    """As somebody without a network would have them: the path alone is another."""
    settings = parsed(command, config)["data"]["init_args"]
    source = settings["train"] if key == "train" else settings["test"][key]
    _, rows, expected = SETS[name]
    path = write(tmp_path / "rows.jsonl", rows)
    prompts = load(model, **(source | {"path": path, "sample": None}))
    assert [prompt.answer.strip("$") for prompt in prompts] == [answer.strip("$") for answer in expected]


def test_a_sample_is_drawn_by_its_seed_alone(model: str, tmp_path: Path):
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(50)]
    path = write(tmp_path / "rows.jsonl", rows)
    first, again, other = (load(model, path, sample=10, sample_seed=seed) for seed in (0, 0, 1))
    assert [p.row for p in first] == [p.row for p in again] != [p.row for p in other]
    assert [p.row for p in first] == sorted({p.row for p in first})
    assert len(first) == 10
    assert [p.answer for p in first] == [str(2 * p.row) for p in first]


@pytest.mark.parametrize(
    ("row", "source", "message"),
    [
        ({"answer": "so it is 3"}, {"read_answer": "boxed"}, r"train.answer: row 1 of .*'so it is 3'; expected a closed .*boxed"),
        ({"answer": r"so \boxed{3"}, {"read_answer": "boxed"}, r"train.answer: row 1 of .*expected a closed .*boxed"),
        ({"answer": "3"}, {"read_answer": "hashes"}, r"train.answer: row 1 of .*expected an answer after ####"),
        ({"answer": "3 ####"}, {"read_answer": "hashes"}, r"train.answer: row 1 of .*expected an answer after ####"),
        ({"answer": " "}, {}, r"train.answer: row 1 of .*holds ' '; expected text"),
        ({"answer": "3", "error": "little"}, {"tolerance": "error"}, r"train.tolerance: row 1 of .*'little'; expected a number >= 0"),
        ({"answer": "3", "error": "-1"}, {"tolerance": "error"}, r"train.tolerance: row 1 of .*'-1'; expected a number >= 0"),
        ({"answer": "3"}, {"sample": 3}, r"train.sample: expected from 1 to the 2 rows there are, got 3"),
        ({"answer": "3"}, {"sample": 0}, r"train.sample: expected from 1 to the 2 rows there are, got 0"),
        ({"answer": [None, "2"]}, {}, r"train.answer: row 1 of .* holds None; expected an answer"),
        ({"answer": float("nan")}, {}, r"row 1 of .* has nothing in column 'answer'"),
        ({"answer": "3"}, {"answer": "gold.text"}, r"has no column 'gold.text'; it has prompt, answer"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read_are_named(
    row: dict[str, Any], source: dict[str, Any], message: str, model: str, tmp_path: Path
):
    fine = {"prompt": "1+1=", "answer": r"\boxed{2} #### 2"} | ({"error": ""} if "error" in row else {})
    path = write(tmp_path / "rows.jsonl", [fine, {"prompt": "1+2="} | row])
    with pytest.raises(UserError, match=message):
        load(model, path, **source)


def test_mixed_types_in_a_column_are_read_alike(model: str, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": 3}])
    assert [prompt.answer for prompt in load(model, path)] == ["2", "3"]


def test_a_data_set_out_of_reach_says_what_to_put_in_its_place(model: str):
    with pytest.raises(
        UserError, match=r"cannot load 'nobody/nothing'.*file with the same columns, here 'q', 'a', and"
    ):
        load(model, "nobody/nothing", prompt="q", answer="a")


class TestTemplates:
    @pytest.mark.parametrize("name", TEMPLATES)
    def test_each_has_a_place_for_the_prompt(self, name: str):
        assert TEMPLATES[name].count("{prompt}") == 1

    def test_by_name(self, model: str):
        from lit_grpo.data import RolloutData

        assert RolloutData(Source("x"), template="boxed").template.endswith(r"within \boxed{}.")
        assert RolloutData(Source("x"), template="Q: {prompt}").template == "Q: {prompt}"

    def test_names_there_are_are_told(self, model: str, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "answer": "2"}])
        with pytest.raises(UserError, match=r"one of none, boxed, qwen_math, dapo, r1; got 'qwen'"):
            load_prompts(Source(path), "data.init_args.train", load_tokenizer(model), "qwen", False)

    def test_tokens_the_tokenizer_lacks_are_named(self, model: str, tmp_path: Path):
        path = write(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "answer": "2"}])
        with pytest.raises(
            UserError, match=r"template: it uses <\|im_end\|>, which the model's tokenizer does not have"
        ):
            load(model, path, template="qwen_math")


def test_numbers_and_lists():
    assert gold_answer(27, "plain", "") == "27"
    assert gold_answer(0.25, "plain", "") == "0.25"
    assert gold_answer([3.0], "plain", "") == "3"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_streamed_rows_are_the_same(form: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked = []
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **options: asked.append(options["streaming"]) or load_dataset(*a, **options),
    )
    rows = [{"prompt": f"{i}+1=", "answer": [str(i + 1)], "error": None} for i in range(5)]
    path = write(tmp_path / f"rows.{form}", rows)
    whole, streamed = (load(model, path, streaming=streaming, tolerance="error") for streaming in (False, True))
    assert asked == [False, True]
    assert whole == streamed
    assert len(whole) == 5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer": 5}, {"answer": "six"}], None),  # numbers and text are both answers
        ([{"answer": "5"}, {"answer": {"value": 5}}], r"row 1 of .* holds a dict in column 'answer'"),
        ([{"prompt": "1+1="}, {"prompt": 7}], r"train.prompt: row 1 of .* holds 7, expected text or a list of chat"),
        ([{}, {"answer": None}], r"row 1 of .* has nothing in column 'answer'. Fill or drop the row"),
    ],
)
def test_a_column_of_several_types(rows: list[dict[str, Any]], message: str | None, model: str, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "answer": "2"} | row for row in rows])
    if message is None:
        assert [prompt.answer for prompt in load(model, path)] == ["5", "six"]
    else:
        with pytest.raises(UserError, match=message):
            load(model, path)


def test_ids_are_names(model: str, tmp_path: Path):
    rows = [{"prompt": "1+1=", "answer": "2", "n": 7}, {"prompt": "1+1=", "answer": "2", "n": 7}]
    rows.append({"prompt": "1+2=", "answer": "3", "n": 8})
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"train.id: rows 0 and 1 of .* both have '7' in column 'n'"):
        load(model, path, id="n")
    assert [prompt.id for prompt in load(model, path, id="n", deduplicate=True)] == ["7", "8"]
    assert [prompt.id for prompt in load(model, path)] == ["0", "1", "2"]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_an_empty_file(form: str, model: str, tmp_path: Path):
    path = tmp_path / f"rows.{form}"
    path.write_text("")
    with pytest.raises(UserError, match=r"train.path: .* has no rows"):
        load(model, str(path))


def test_of_several_tolerances_the_smallest_counts(model: str, tmp_path: Path):
    rows = [{"prompt": "1+1=", "answer": "2", "error": "1e-1,1e-2"}]
    assert load(model, write(tmp_path / "rows.jsonl", rows), tolerance="error")[0].tolerance == 0.01
