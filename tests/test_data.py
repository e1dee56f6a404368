"""Prompts, phases and seeds: what a phase needs is a function of (seed, phase), whatever the number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_invariance import ScriptedEngine, even_first_digit

from lit_grpo.data import RolloutData, Sample, Source
from lit_grpo.data.prompts import load_prompts
from lit_grpo.engines import Sampling
from lit_grpo.errors import UserError
from lit_grpo.losses import GRPO, TwoGRPO
from lit_grpo.policy import load_tokenizer


def connect(data: Any, model: str, loss: Any, rank: int = 0, world: int = 1, accumulate: int = 1) -> Any:
    """Give a data module what it reads of a trainer, as one of ``world`` processes."""
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(
            loss=loss,
            tokenizer=load_tokenizer(model),
            context=64,
            correct_at=1.0,
            vocab_size=16,
            stop_token_ids=[1],
            share_prompts=False,
        ),
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=accumulate,
        limit_train_batches=1.0,
        overfit_batches=0.0,
        current_epoch=0,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
    )
    data.setup("fit")
    return data


def rollout_data(model: str, prompts: str, rank: int = 0, world: int = 1, **options: Any) -> RolloutData:
    defaults = {"prompts_per_phase": 4, "group_size": 2}
    data = RolloutData(Source(prompts), reward=even_first_digit, **(defaults | options))
    return connect(data, model, TwoGRPO() if data.group_size == 2 else GRPO(), rank, world)


class TestPhases:
    def test_every_prompt_comes_once_before_any_comes_twice(self, model: str, few_prompts: str):
        data = rollout_data(model, few_prompts)
        phases = [[p.text for p in data.phase_prompts(i)] for i in range(6)]
        for first in (0, 2, 4):
            assert len({*phases[first], *phases[first + 1]}) == 8
        assert phases[0] + phases[1] != phases[2] + phases[3]  # a new order each time

    def test_a_phase_may_be_longer_than_the_data(self, model: str, few_prompts: str):
        data = rollout_data(model, few_prompts, prompts_per_phase=20)
        texts = [p.text for p in data.phase_prompts(0)]
        assert len(texts) == 20
        assert len(set(texts[:8])) == len(set(texts[8:16])) == 8

    def test_ranks_share_a_phase_out_between_them(self, model: str, few_prompts: str, monkeypatch: pytest.MonkeyPatch):
        for module in ("base", "rollouts"):
            monkeypatch.setattr(
                f"lit_grpo.data.{module}.gather_objects", lambda mine, trainer: [mine] * trainer.world_size
            )
        engine, sampling = ScriptedEngine(64), Sampling(max_tokens=12)
        whole = rollout_data(model, few_prompts)
        whole.collect(engine, sampling, phase=3)
        parts = [rollout_data(model, few_prompts, rank, world=2) for rank in range(2)]
        for part in parts:
            part.collect(engine, sampling, phase=3)
        # The same prompts with the same completions, whoever sampled them.
        assert [whole.samples[i : i + 2] for i in (0, 4)] == [parts[0].samples[i : i + 2] for i in (0, 2)]
        assert [whole.samples[i : i + 2] for i in (2, 6)] == [parts[1].samples[i : i + 2] for i in (0, 2)]

    def test_seeds_differ_between_phases_places_splits_and_runs(self, model: str, few_prompts: str):
        data, other = rollout_data(model, few_prompts), rollout_data(model, few_prompts, seed=1)
        seeds = [
            *data.seeds("train", 0, range(100)),
            *data.seeds("train", 1, range(100)),
            *data.seeds("val", 0, range(100)),
            *other.seeds("train", 0, range(100)),
        ]
        assert len(set(seeds)) == 400
        assert data.seeds("train", 0, [7]) == [seeds[7]]
        assert max(seeds) < 2**62

    def test_batches_carry_the_counts_of_the_whole_step(self, model: str, few_prompts: str):
        data = rollout_data(model, few_prompts, updates_per_phase=2)
        data.collect(ScriptedEngine(64), Sampling(max_tokens=12), phase=0)
        stats = data.stats
        batches = list(data.train_dataloader())
        assert [b.on_policy for b in batches] == [True, False]
        assert [b.total_rows for b in batches] == [4, 4]
        assert sum(b.total_tokens for b in batches) == stats["tokens"] == sum(s.num_tokens for s in data.samples)
        assert stats["reward"] == pytest.approx(sum(s.reward for s in data.samples) / 8)

    def test_a_number_of_rows_that_depends_on_rewards_is_refused(self, model: str, few_prompts: str):
        data = rollout_data(model, few_prompts)
        loss = data.trainer.lightning_module.loss
        loss.select = lambda rewards: (torch.zeros(len(rewards), 1).long(), torch.ones(len(rewards), 1))
        with pytest.raises(UserError, match="chose 1 rows of each group, but 2 before"):
            data.collect(ScriptedEngine(64), Sampling(max_tokens=12), phase=0)

    def test_informative_share_counts_groups_with_a_difference(self, model: str, few_prompts: str):
        data = rollout_data(model, few_prompts, prompts_per_phase=8)
        data.collect(ScriptedEngine(64), Sampling(max_tokens=12), phase=0)
        stats = data.stats
        rewards = [s.reward for s in data.samples]
        mixed = sum(a != b for a, b in zip(rewards[::2], rewards[1::2], strict=True))
        assert 0 < mixed < 8
        assert stats["informative_share"] == mixed / 8
        assert stats["trained_share"] == mixed / 8  # tied rows are not forwarded


class TestPrompts:
    @pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
    def test_formats_and_column_names(self, form: str, tmp_path: Path, model: str):
        from datasets import Dataset

        rows = Dataset.from_dict({"question": ["1+2=", "3+4="], "gold": [3, 7]})
        path = tmp_path / f"data.{form}"
        getattr(rows, {"jsonl": "to_json", "json": "to_json"}.get(form, f"to_{form}"))(str(path))
        source = Source(str(path), prompt="question", answer="gold")
        prompts = load_prompts(source, "data.train", load_tokenizer(model), "{prompt}", chat_template=False)
        assert [(p.text, p.answer) for p in prompts] == [("1+2=", "3"), ("3+4=", "7")]
        assert prompts[0].token_ids == load_tokenizer(model)("1+2=")["input_ids"]

    def test_cells_of_a_csv_file_stay_as_they_are_written(self, tmp_path: Path, model: str):
        answers = ["007", "0.10", "1e5", "None"]
        rows = "".join(f"{i},1,{a}\n" for i, a in enumerate(answers))
        (tmp_path / "data.csv").write_text(",prompt,answer\n" + rows, encoding="utf-8-sig")  # as spreadsheets write it
        prompts = load_prompts(
            Source(str(tmp_path / "data.csv")), "data.train", load_tokenizer(model), "{prompt}", False
        )
        assert [p.answer for p in prompts] == answers

    def test_a_folder_with_a_data_set(self, tmp_path: Path, model: str):
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "test.jsonl").write_text(json.dumps({"prompt": "1+2=", "answer": "3"}))
        source = Source(str(tmp_path / "set"), split="test")
        assert load_prompts(source, "data.train", load_tokenizer(model), "{prompt}", False)[0].text == "1+2="

    def test_template_and_chat_template(self, tmp_path: Path, model: str):
        tokenizer = load_tokenizer(model)
        tokenizer.chat_template = (
            "{% for m in messages %}({{ m.content }}){% endfor %}{% if add_generation_prompt %}={% endif %}"
        )
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps({"prompt": "1+2", "answer": "3"}))
        prompt = load_prompts(Source(str(path)), "data.train", tokenizer, "0+{prompt}", chat_template=True)[0]
        assert prompt.messages == [{"role": "user", "content": "0+1+2"}]
        assert prompt.text == "(0+1+2)="
        path.write_text(
            json.dumps(
                {"prompt": [{"role": "user", "content": "7"}, {"role": "assistant", "content": "8"}], "answer": "3"}
            )
        )
        prompt = load_prompts(Source(str(path)), "data.train", tokenizer, "{prompt}", chat_template=True)[0]
        assert prompt.text == "(7)(8)="

    def test_long_prompts_are_left_out_and_counted(
        self, model: str, few_prompts: str, caplog: pytest.LogCaptureFixture
    ):
        with caplog.at_level("INFO"):
            data = rollout_data(model, few_prompts, max_prompt_tokens=6)
        assert len(data.prompts["train"]) == 3
        assert "left out 5 of 8 prompts" in caplog.text


def answered(path: Path, answers: list[str]) -> str:
    rows = [{"prompt": f"{i}+{i}=", "answer": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gold_answers_that_the_reward_cannot_read_are_named_and_left_out(model: str, tmp_path: Path):
    path = answered(tmp_path / "rows.jsonl", ["0", r"\text{}", "4", r"\boxed{}"])
    with pytest.warns(
        UserWarning, match=r"train: left out 2 of 4 prompts of .*rows.jsonl.*row 1: .*text.*row 3: .*boxed.*Mend"
    ):
        data = connect(RolloutData(Source(path), prompts_per_phase=2), model, TwoGRPO())
    assert [prompt.answer for prompt in data.prompts["train"]] == ["0", "4"]
    path = answered(tmp_path / "rows.jsonl", [r"\text{}"] * 3)
    with pytest.raises(UserError, match=r"train.answer: the reward can read no gold answer in column 'answer' of"):
        connect(RolloutData(Source(path), prompts_per_phase=2), model, TwoGRPO())


def test_prompts_to_predict_need_no_answer_that_can_be_read(model: str, tmp_path: Path):
    path = answered(tmp_path / "rows.jsonl", ["0", r"\text{}"])
    data = RolloutData(Source(path), predict=Source(path), prompts_per_phase=2)
    data.trainer = connect(
        RolloutData(Source(answered(tmp_path / "fine.jsonl", ["0", "2"])), prompts_per_phase=2), model, TwoGRPO()
    ).trainer
    data.setup("predict")
    assert len(data.prompts["predict"]) == 2


def test_a_reward_may_be_a_coroutine(model: str, few_prompts: str):
    async def always(samples: list[Sample]) -> list[float]:
        return [1.0] * len(samples)

    data = connect(RolloutData(Source(few_prompts), prompts_per_phase=8, reward=always), model, TwoGRPO())
    data.collect(ScriptedEngine(64), Sampling(max_tokens=12), 0)
    assert {sample.reward for sample in data.samples} == {1.0}
