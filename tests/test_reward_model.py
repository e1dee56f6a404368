"""Reward models: what transformers computes, in any batch, and refusals that say why."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Qwen2ForSequenceClassification

from lit_grpo.__main__ import main
from lit_grpo.cli import CLI
from lit_grpo.data import Sample
from lit_grpo.errors import UserError
from lit_grpo.rewards import LengthPenalty, RewardModel, math_reward

ROOT = Path(__file__).parent.parent
KEY = r"data\.init_args\.reward\.init_args"
PAIRS = [("1+2=", "3"), ("10+20=", "30<eos>"), ("7", "-*-*-*-*5"), ("1+2=", "3"), ("9=", "9<pad>"), ("12+34=", "")]


def samples(pairs: list[tuple[str, str]] = PAIRS) -> list[Sample]:
    return [Sample(prompt, completion, "", num_tokens=1, truncated=False) for prompt, completion in pairs]


@pytest.fixture
def save(model: str, tmp_path: Path) -> Callable[..., str]:
    """Make a random reward model with the configuration and tokenizer of ``model``; returns its folder."""

    def make(chat_template: str | None = None, **config: Any) -> str:
        folder = str(tmp_path / "reward_model")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            classifier = Qwen2ForSequenceClassification(AutoConfig.from_pretrained(model, **{"num_labels": 1} | config))
            for parameter in classifier.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        classifier.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(folder)
        return folder

    return make


def one_by_one(folder: str, texts: list[str]) -> list[float]:
    """Each text alone, without padding, as transformers scores it."""
    classifier, tokenizer = (
        Qwen2ForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        return [classifier(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


@pytest.mark.parametrize("pad_token_id", [0, 1, None], ids=["pad", "pad is eos", "no pad"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_are_those_of_transformers_in_any_batch_and_order(
    save: Callable[..., str], pad_token_id: int | None, batch_size: int
):
    folder = save(pad_token_id=pad_token_id)
    expected = one_by_one(folder, [prompt + completion for prompt, completion in PAIRS])
    assert len({round(score, 3) for score in expected}) == 5
    reward = RewardModel(folder, batch_size)
    assert reward(samples()) == pytest.approx(expected, abs=1e-5)
    assert reward(samples(PAIRS[::-1])) == pytest.approx(expected[::-1], abs=1e-5)
    assert all(type(score) is float for score in reward(samples()))


def test_where_the_score_is_read_depends_on_what_the_model_calls_padding(save: Callable[..., str]):
    pairs = [("1+2=", "3<eos>"), ("10+20=", "30<eos>")]
    before_the_end = RewardModel(save(pad_token_id=1))(samples(pairs))
    at_the_end = RewardModel(save(pad_token_id=None))(samples(pairs))
    assert min(abs(a - b) for a, b in zip(before_the_end, at_the_end, strict=True)) > 1e-3
    assert before_the_end == pytest.approx(RewardModel(save())(samples([("1+2=", "3"), ("10+20=", "30")])), abs=1e-5)


def test_equal_texts_tie(save: Callable[..., str]):
    scores = RewardModel(save(), batch_size=1)(samples([("1+2=", "3"), ("4", "5"), ("1+", "2=3")]))
    assert scores[0] == scores[2] != scores[1]


def test_chat_template(save: Callable[..., str]):
    template = "{% for m in messages %}{{ '*' if m['role'] == 'user' else '-' }}{{ m['content'] }}{% endfor %}<eos>"
    folder = save(template)
    texts = [f"*{prompt}-{completion}<eos>" for prompt, completion in PAIRS]
    assert RewardModel(folder, chat_template=True)(samples()) == pytest.approx(one_by_one(folder, texts), abs=1e-5)


def test_long_texts_keep_their_end_and_are_said_once(save: Callable[..., str], caplog: pytest.LogCaptureFixture):
    folder = save()
    reward = RewardModel(folder, max_tokens=4)
    pairs = [("10+20=", "30"), ("1+1", "=")]
    for _ in range(2):
        assert reward(samples(pairs)) == pytest.approx(one_by_one(folder, ["0=30", "1+1="]), abs=1e-5)
    assert reward.cut == 2
    assert [record.message for record in caplog.records if record.name.startswith("lit_grpo")] == [
        "1 of 2 texts are longer than the 4 tokens that the reward model reads: it reads their end (said once)"
    ]


def test_the_models_context_bounds_every_text(save: Callable[..., str]):
    reward = RewardModel(save(), max_tokens=1000)
    scores = reward(samples([("1" * 100, "2"), ("1" * 63, "2")]))
    assert reward.limit == 64
    assert scores[0] == scores[1]
    assert reward.cut == 1


def test_global_random_numbers_are_left_alone(save: Callable[..., str], model: str):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    RewardModel(save())(samples())
    with pytest.raises(UserError):
        RewardModel(model)(samples())  # transformers draws the head that it lacks
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_nothing_is_loaded_before_the_first_call():
    reward = RewardModel("nowhere/nothing")
    assert not {"tokenizer", "classifier"} & vars(reward).keys()


def test_two_labels_are_refused(save: Callable[..., str]):
    with pytest.raises(UserError, match=rf"{KEY}\.model: .*reward_model' has 2 labels; expected .* one logit"):
        RewardModel(save(num_labels=2))(samples())


def test_a_language_model_without_a_score_head_is_refused(model: str):
    with pytest.raises(UserError, match=rf"{KEY}\.model: .* no score head .*\(score.weight\)"):
        RewardModel(model)(samples())


def test_a_missing_folder_names_the_key(tmp_path: Path):
    with pytest.raises(UserError, match=rf"{KEY}\.model: cannot load the tokenizer of .*gone'; expected a folder"):
        RewardModel(str(tmp_path / "gone"))(samples())


def test_missing_and_unfit_weights_name_the_key(save: Callable[..., str]):
    folder = Path(save())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    with pytest.raises(UserError, match=rf"{KEY}\.model: cannot load the weights of .*reward_model'"):
        RewardModel(str(folder))(samples())
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"{KEY}\.model: cannot load the weights of .*reward_model'"):
        RewardModel(str(folder))(samples())


def test_messages_of_the_policy_s_chat_stand_in_its_own_template(save: Callable[..., str]):
    """Not the text that the policy's template made of them."""
    template = "{% for m in messages %}{{ '*' if m['role'] == 'user' else '-' }}{{ m['content'] }}{% endfor %}<eos>"
    folder = save(template)
    messages = [{"role": "system", "content": "12"}, {"role": "user", "content": "3+4="}]
    found = RewardModel(folder, chat_template=True)([Sample("<eos>3+4=<eos>", "7", "7", 1, False, messages=messages)])
    assert found == pytest.approx(one_by_one(folder, ["-12*3+4=-7<eos>"]), abs=1e-5)


def test_missing_tokenizer_and_chat_template_name_the_key(save: Callable[..., str]):
    folder = Path(save())
    with pytest.raises(UserError, match=rf"{KEY}\.chat_template: is true, but .* has no chat template"):
        RewardModel(str(folder), chat_template=True)(samples())
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=rf"{KEY}\.model: .*tokenizer"):
        RewardModel(str(folder))(samples())


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"max_tokens": 0}])
def test_impossible_settings_name_the_key(setting: dict[str, int]):
    with pytest.raises(UserError, match=rf"{KEY}\.{next(iter(setting))}: expected a whole number >= 1, got 0"):
        RewardModel("model", **setting)


@pytest.fixture
def fit(task: Path, model: str, tmp_path: Path) -> list[str]:
    """One phase of four prompts."""
    return [
        "fit",
        f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
        f"--run_dir={tmp_path / 'run'}",
        f"--model.model={model}",
        f"--data.train.path={task / 'train.jsonl'}",
        "--data.val=null",
        "--data.prompts_per_phase=4",
        "--trainer.max_epochs=1",
    ]


def test_a_run_on_a_reward_model_with_a_penalty(save: Callable[..., str], fit: list[str], tmp_path: Path):
    """A sum in YAML: its parts are logged, and the run's config makes it again."""
    folder = save()
    rewards = (
        f"{{quality: {{class_path: lit_grpo.rewards.RewardModel, init_args: {{model: {folder}}}}},"
        " length: {class_path: lit_grpo.rewards.LengthPenalty, init_args: {max_tokens: 5, buffer: 2}},"
        " right: lit_grpo.rewards.math_reward}"
    )
    options = f"{{rewards: {rewards}, weights: {{right: 0.5}}}}"
    main([*fit, f"--data.reward={{class_path: lit_grpo.rewards.RewardSum, init_args: {options}}}"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples" / "train-00000.jsonl").read_text().splitlines()]
    found = [Sample(**row) for row in rows]
    assert len(found) == 8
    parts = {
        "quality": RewardModel(folder)(found),
        "length": LengthPenalty(max_tokens=5, buffer=2)(found),
        "right": math_reward(found),
    }
    expected = [a + b + 0.5 * c for a, b, c in zip(*parts.values(), strict=True)]
    assert [sample.reward for sample in found] == pytest.approx(expected, abs=1e-4)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        logged = next(row for row in csv.DictReader(file) if row.get("train/reward"))
    for name, scores in parts.items():
        assert float(logged[f"train/reward_{name}"]) == pytest.approx(sum(scores) / 8, abs=1e-4)
    assert float(logged["train/reward_timeout_rate"]) == 0
    again = CLI(["fit", f"--config={tmp_path / 'run' / 'config.yaml'}", f"--run_dir={tmp_path / 'again'}", "--trainer.max_epochs=0"])  # fmt: skip
    assert again.datamodule.reward.rewards["quality"].model == folder
    assert again.datamodule.reward.rewards["right"] is math_reward
    assert again.datamodule.reward.weights == {"right": 0.5}


def test_mistakes_show_before_the_policy_is_loaded(
    fit: list[str], model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lit_grpo.module.load_policy", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit):
        main([*fit, f"--data.reward={{class_path: lit_grpo.rewards.RewardModel, init_args: {{model: {model}}}}}"])
    assert "data.init_args.reward.init_args.model: " in capsys.readouterr().err
