"""`lit-grpo test`: numbers against the kept rows, interruptions, processes, mistakes."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ENVIRONMENT

import lit_grpo.module
from lit_grpo.__main__ import main
from lit_grpo.data import PromptData, Sample
from lit_grpo.module import PolicyModule
from lit_grpo.policy import load_policy
from lit_grpo.quickstart import write_benchmarks

PROBLEMS = [
    (12, 37),
    (40, 23),
    (37, 12),
    (14, 47),
    (38, 25),
    (29, 11),
    (61, 72),
    (90, 35),
    (84, 44),
    (58, 67),
    (99, 11),
]
NAMES = ["no_carry", "carry_ones", "carry_tens", "carry_both", "differences"]


def noisy(samples: list[Sample]) -> list[float]:
    """A reward with all shades of right, also of a policy that knows nothing; it finds the first character as answer."""
    if (deadly := os.environ.get("KILL_AT_PROMPT")) and any(deadly in sample.prompt for sample in samples):
        os.kill(os.getpid(), signal.SIGKILL)
    for sample in samples:
        sample.parsed = sample.completion[:1] or None
        sample.parts["length"] = float(sample.num_tokens)
    return [float(sum(map(ord, sample.completion)) % 3 == 0) for sample in samples]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder, PROBLEMS)
    return folder


@pytest.fixture
def command(model: str, benchmarks: Path) -> list[str]:
    how = {"carry_tens": "hashes", "carry_both": "boxed"}
    sources: dict[str, Any] = {
        name: {
            "path": str(benchmarks / f"{name}.jsonl"),
            "prompt": "problem",
            "id": "unique_id",
            "read_answer": how.get(name, "plain"),
        }
        for name in NAMES
    }
    return [
        "test", "--data=PromptData", f"--data.test={json.dumps(sources)}", "--data.reward=test_evaluation.noisy",
        "--data.samples_per_prompt=4", f"--model.model={model}", "--rollout.max_tokens=3", "--trainer.accelerator=cpu",
        "--rollout.evaluation={max_tokens: 3, temperature: 0.7, top_p: 0.8, top_k: 5}",
    ]  # fmt: skip


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / "results" / f"{name}.parquet").to_pylist()


def test_the_table_is_what_the_rows_say(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main([*command, f"--run_dir={tmp_path}"])
    record = json.loads((tmp_path / "results" / "table.json").read_text())
    assert [line["benchmark"] for line in record["benchmarks"]] == [*NAMES, "average"]
    means = []
    for line in record["benchmarks"][:-1]:
        rows = rows_of(tmp_path, line["benchmark"])
        assert len(rows) == line["problems"]
        rewards = [row["rewards"] for row in rows]
        values = [statistics.mean(group) for group in rewards]
        means.append(statistics.mean(values))
        assert line["mean_at_4"] == pytest.approx(means[-1], abs=1e-6)
        if len(rows) > 1:
            half_width = 1.959964 * statistics.stdev(values) / math.sqrt(len(rows))
            assert line["mean_at_4_ci"] == pytest.approx(half_width, abs=1e-6)
        for k in (2, 4):
            any_of_k = [statistics.mean(max(some) for some in combinations(group, k)) for group in rewards]
            assert line[f"pass_at_{k}"] == pytest.approx(statistics.mean(any_of_k), abs=1e-6)
        resampled = [1 - (1 - value) ** 4 for value in values]
        assert line["best_at_4"] == pytest.approx(statistics.mean(resampled), abs=1e-6)
        assert line["maj_at_4"] == pytest.approx(statistics.mean(map(majority_is_right, rows)), abs=1e-6)
        tokens = [n for row in rows for n in row["num_tokens"]]
        assert line["completion_tokens"] == pytest.approx(statistics.mean(tokens), abs=1e-6)
    assert record["benchmarks"][-1]["mean_at_4"] == pytest.approx(statistics.mean(means), abs=1e-6)
    assert len({round(mean, 6) for mean in means}) > 2
    assert all(line["reward_length"] == pytest.approx(line["completion_tokens"]) for line in record["benchmarks"][:-1])

    with open(tmp_path / "results" / "table.csv", newline="") as file:
        assert [float(line["mean_at_4"]) for line in csv.DictReader(file)][:5] == pytest.approx(means, abs=1e-6)
    said = capsys.readouterr()
    for text in (said.out, (tmp_path / "results" / "table.md").read_text()):
        for name, mean in zip(NAMES, means, strict=True):
            assert re.search(rf"\| {name} +\| \d+ +\| {100 * mean:.2f} ± ", text), text
        assert "Mean@4" in text
        assert "Pass@4" in text
    assert re.search(r"problem 22/22  differences, reward 0\.\d+, 0 s left", said.err)
    settings = record["settings"]
    assert settings["sampling"] == {"max_tokens": 3, "temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.0}
    assert settings["template"] == "none"
    assert settings["versions"].keys() >= {"torch", "transformers", "lit-grpo"}


def majority_is_right(row: dict[str, Any]) -> float:
    votes = [answer for answer in row["parsed"] if answer is not None]
    if not votes:
        return 0.0
    winner = max(votes, key=votes.count)  # the first of several
    return row["rewards"][row["parsed"].index(winner)]


def test_rows_are_named_by_their_ids(command: list[str], benchmarks: Path, tmp_path: Path):
    main([*command, f"--run_dir={tmp_path}"])
    for name in NAMES:
        source = [json.loads(line) for line in (benchmarks / f"{name}.jsonl").read_text().splitlines()]
        rows = rows_of(tmp_path, name)
        assert [(row["id"], row["prompt"]) for row in rows] == [(row["unique_id"], row["problem"]) for row in source]
        assert all(len(row["completions"]) == 4 and len(set(row["num_tokens"])) <= 3 for row in rows)
    assert [row["answer"] for row in rows_of(tmp_path, "carry_both")] == ["125", "110"]  # out of a box


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts that an engine gets in this process."""
    prompts: list[str] = []
    drawing = PromptData.drawing

    def watched(self: PromptData, *arguments: Any, **options: Any) -> Any:
        prompts.extend(prompt.text for prompt in arguments[4].values())
        return drawing(self, *arguments, **options)

    monkeypatch.setattr(PromptData, "drawing", watched)
    return prompts


def test_a_killed_evaluation_goes_on_where_it_was(command: list[str], asked: list[str], tmp_path: Path):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    main([*command, f"--run_dir={whole}"])
    deadly = rows_of(whole, "carry_tens")[0]["prompt"]  # of the third benchmark
    run = subprocess.run(
        [sys.executable, "-m", "lit_grpo", *command, f"--run_dir={halved}"],
        env=ENVIRONMENT | {"KILL_AT_PROMPT": deadly},
        capture_output=True,
        timeout=200,
    )
    assert run.returncode == -signal.SIGKILL
    parts = sorted((halved / "results" / "unfinished").rglob("*.parquet"))
    assert [path.parent.name for path in parts] == ["carry_ones", "no_carry"]

    asked.clear()
    main([*command, f"--run_dir={halved}"])
    answered = {row["prompt"] for name in NAMES[:2] for row in rows_of(whole, name)}
    assert set(asked) == {row["prompt"] for name in NAMES for row in rows_of(whole, name)} - answered
    for name in ["table.json", *(f"{name}.parquet" for name in NAMES)]:
        assert (halved / "results" / name).read_bytes() == (whole / "results" / name).read_bytes()
    assert not (halved / "results" / "unfinished").exists()


@pytest.fixture
def finished(command: list[str], tmp_path: Path) -> Path:
    main([*command, f"--run_dir={tmp_path / 'finished'}"])
    return tmp_path / "finished"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--rollout.evaluation.temperature=1", "sampling.temperature was 0.7; now it is 1.0"),
        ("--data.samples_per_prompt=2", "samples_per_prompt was 4; now it is 2"),
        ("--data.template=boxed", "template was 'none'; now it is 'boxed'"),
        (
            "--data.reward=test_evaluation.other",
            "reward was 'test_evaluation.noisy'; now it is 'test_evaluation.other'",
        ),
        ("--data.test.no_carry.path={copy}", "benchmarks.no_carry.path was"),
        ("--ckpt_path={ckpt}", "ckpt_path was None; now it is"),
        ("--seed_everything=1", "seed was 0; now it is 1"),
    ],
)
def test_results_of_another_evaluation_are_not_gone_on_with(
    finished: Path, command: list[str], benchmarks: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and "tfevents" not in path.name}
    if "{ckpt}" in change:
        module = PolicyModule(command[5].removeprefix("--model.model="))
        module.policy = load_policy(module.model_name)
        torch.save(
            {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}, finished.parent / "x.ckpt"
        )
    copied = shutil.copy(benchmarks / "no_carry.jsonl", finished.parent)
    change = change.replace("{copy}", str(copied)).replace("{ckpt}", str(finished.parent / "x.ckpt"))
    with pytest.raises(SystemExit):
        main([*command, f"--run_dir={finished}", change])
    said = capsys.readouterr().err
    assert "holds results of another evaluation" in said
    assert message in said
    assert {path: path.read_bytes() for path in before} == before


def other(samples: list[Sample]) -> list[float]:
    return [0.0 for _ in samples]


def test_one_bit_of_one_weight_makes_another_evaluation(
    command: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copied = shutil.copytree(model, tmp_path / "model")
    command = [*command, f"--model.model={copied}", f"--run_dir={tmp_path / 'run'}"]
    main(command)
    policy = load_policy(str(copied)).lm
    with torch.no_grad():
        weight = next(policy.parameters()).view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    policy.save_pretrained(copied)
    with pytest.raises(SystemExit):
        main(command)
    assert "where weights was" in capsys.readouterr().err


def test_two_processes_come_to_the_same_also_where_one_was_killed(
    command: list[str], finished: Path, few_prompts: str, tmp_path: Path
):
    """The benchmark of a single problem leaves one of them without any, unless both have the same problems."""
    single = Path(few_prompts).with_name("single.jsonl")
    single.write_text(Path(few_prompts).read_text().splitlines()[0])
    command = [*command, f"--data.test.differences.path={single}", "--data.test.differences.prompt=prompt"]
    command += ["--data.test.differences.id=null"]
    alone, both, halved, tensor = (tmp_path / name for name in ("alone", "both", "halved", "tensor"))
    main([*command, f"--run_dir={alone}"])
    deadly = rows_of(finished, "carry_tens")[0]["prompt"]
    split = "{class_path: ModelParallelStrategy, init_args: {data_parallel_size: 1, tensor_parallel_size: 2}}"
    for folder, strategy, environment in (
        (both, "ddp", {}),
        (halved, "ddp", {"KILL_AT_PROMPT": deadly}),
        (tensor, split, {}),
    ):
        arguments = [*command, f"--run_dir={folder}", f"--trainer.strategy={strategy}", "--trainer.devices=2"]
        run = subprocess.run([sys.executable, "-m", "lit_grpo", *arguments], env=ENVIRONMENT | environment, timeout=200)
        assert (run.returncode == 0) == (folder != halved)
    assert (halved / "results" / "unfinished" / "no_carry").is_dir()
    main([*command, f"--run_dir={halved}"])  # alone
    for folder in (both, halved, tensor):
        for name in NAMES:
            assert rows_of(folder, name) == rows_of(alone, name)
        assert (folder / "results" / "table.json").read_bytes() == (alone / "results" / "table.json").read_bytes()
    record = json.loads((alone / "results" / "table.json").read_text())
    assert record["benchmarks"][4]["mean_at_4_ci"] is None
    assert record["benchmarks"][5]["mean_at_4_ci"] is None
    assert "nan" not in (alone / "results" / "table.md").read_text()


def test_a_finished_evaluation_is_not_done_again(finished: Path, command: list[str], asked: list[str]):
    before = {path: path.read_bytes() for path in (finished / "results").iterdir()}
    part = finished / "results" / "unfinished" / "no_carry" / "000000.parquet"  # as if killed right before the end
    part.parent.mkdir(parents=True)
    shutil.copy(finished / "results" / "no_carry.parquet", part)
    main([*command, f"--run_dir={finished}"])
    assert not asked
    assert {path: path.read_bytes() for path in (finished / "results").iterdir()} == before


def test_a_ruined_file_is_named(finished: Path, command: list[str], capsys: pytest.CaptureFixture[str]):
    (finished / "results" / "carry_ones.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit):
        main([*command, f"--run_dir={finished}"])
    assert re.search(r"cannot read the results in '.*carry_ones.parquet'.*Remove the file", capsys.readouterr().err)


def test_a_command_that_was_killed_before_the_first_answer_may_be_repeated(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = [*command, f"--run_dir={tmp_path / 'run'}"]
    load_policy = lit_grpo.module.load_policy
    monkeypatch.setattr("lit_grpo.module.load_policy", interrupt)
    with pytest.raises(SystemExit):
        main(command)
    monkeypatch.setattr("lit_grpo.module.load_policy", load_policy)
    main(command)
    assert (tmp_path / "run" / "config.yaml").exists()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("limit", ["--trainer.limit_test_batches=1", "--trainer.fast_dev_run=true"])
def test_a_part_is_not_scored_as_the_whole(
    limit: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main([*command, f"--run_dir={tmp_path}", limit])
    assert "limit_test_batches 1 " in capsys.readouterr().err


class Weighted:
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, samples: list[Sample]) -> list[float]:
        return [self.weight for _ in samples]


def test_settings_of_the_reward_belong_to_the_evaluation(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    reward = "--data.reward={class_path: test_evaluation.Weighted, init_args: {weight: %d}}"
    main([*command, f"--run_dir={tmp_path}", reward % 1])
    record = json.loads((tmp_path / "results" / "table.json").read_text())
    assert "maj_at_4" not in record["benchmarks"][0]  # this reward reads no answers
    with pytest.raises(SystemExit):
        main([*command, f"--run_dir={tmp_path}", reward % 0])
    assert "reward.weight was 1.0; now it is 0.0" in capsys.readouterr().err


def test_parts_are_sampled_one_after_the_other(
    command: list[str], finished: Path, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lit_grpo.data.base.COMPLETIONS_AT_ONCE", 8)  # two prompts
    main([*command, f"--run_dir={tmp_path / 'parts'}"])
    for name in NAMES:
        assert rows_of(tmp_path / "parts", name) == rows_of(finished, name)


def test_without_benchmarks_the_validation_prompts_are_one(
    command: list[str], few_prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main([*command, "--data.test=null", f"--data.val.path={few_prompts}", f"--run_dir={tmp_path / 'run'}"])
    assert len(rows_of(tmp_path / "run", "val")) == 8
    said = capsys.readouterr().out
    assert "| val " in said
    assert "average" not in said


def test_predictions_are_written_part_by_part(
    command: list[str], few_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lit_grpo.data.base.COMPLETIONS_AT_ONCE", 8)
    monkeypatch.setenv("KILL_AT_PROMPT", "never scored")
    main(["predict", *command[1:], f"--data.predict.path={few_prompts}", f"--run_dir={tmp_path / 'run'}"])
    lines = (tmp_path / "run" / "samples" / "predict.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert prompts == [f"{10**i}+{i}=" for i in range(8) for _ in range(4)]
    assert [json.loads(line)["id"] for line in lines] == [str(i) for i in range(8) for _ in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.pass_at=[1, 8]"], "model.pass_at: Pass@8 needs from 1 to data.init_args.samples_per_prompt, 4"),
        (["--data.test.no_carry.id=problem_type"], "data.init_args.test.no_carry: .* has no column 'problem_type'"),
        (["--data.test.no_carry.id=answer"], r"data.init_args.test.no_carry.id: rows 0 and 2 of .* both have '49' in"),
        (["--rollout.max_tokens=62", "--rollout.evaluation.max_tokens=62"], r"longest prompt of data.init_args.test.no_carry \(row 0 of '.*no_carry.jsonl'\)"),
        (["--data.template=qwen_math"], r"data.init_args.template: it uses <\|im_end\|>, which the model's tokenizer"),
        (["--data.chat_template=true"], "data.init_args.chat_template: is true, but the model's tokenizer has no chat"),
        (["--data.test.carry_both.read_answer=hashes"], r"data.init_args.test.carry_both.answer: row 0 of .* expected an answer after ####"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_sampled(
    options: list[str],
    message: str,
    command: list[str],
    asked: list[str],
    benchmarks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("lit_grpo.module.load_policy", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stop:
        main([*command, f"--run_dir={tmp_path / 'run'}", *options])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not asked


@pytest.mark.vllm
def test_vllm_evaluates_too(command: list[str], tmp_path: Path):
    """Greedily, where both engines must find the same."""
    greedy = "--rollout.evaluation={max_tokens: 3, temperature: 0}"
    main([*command, greedy, f"--run_dir={tmp_path / 'hf'}"])
    main([*command, "--rollout=VLLMRollout", greedy, f"--run_dir={tmp_path / 'vllm'}"])
    for name in NAMES:
        assert rows_of(tmp_path / "hf", name) == rows_of(tmp_path / "vllm", name)
    settings = json.loads((tmp_path / "vllm" / "results" / "settings.json").read_text())
    assert settings["engine"] == "VLLMRollout"


def test_an_interrupted_evaluation_says_how_to_go_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    drawing = PromptData.drawing

    def interrupted(self: PromptData, *arguments: Any, **options: Any) -> Any:
        if "-" in next(iter(arguments[4].values())).text:  # the last benchmark
            raise KeyboardInterrupt
        return drawing(self, *arguments, **options)

    monkeypatch.setattr(PromptData, "drawing", interrupted)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        main([*command, f"--run_dir={tmp_path}"])
    assert f"To go on, repeat the command with --run_dir {tmp_path}" in caplog.text
