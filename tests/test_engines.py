"""One contract, run over every engine, on a real model with known logits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lit_grpo.engines import Engine, HFEngine, Sampling, VLLMEngine, full_weights
from lit_grpo.errors import UserError
from lit_grpo.policy import Policy, load_config, load_policy, load_tokenizer, stop_token_ids

PROMPTS = [[3, 4, 12, 5, 6, 13], [7, 7, 12], [2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def policy(model: str) -> Policy:
    """A policy whose predictions are far from uniform: a new model's embeddings, doubled."""
    policy = load_policy(model)
    with torch.no_grad():
        for parameter in policy.lm.base_model.embed_tokens.parameters():
            parameter.mul_(2)
    return policy


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest, model: str, policy: Policy) -> Iterator[Engine]:
    stops = stop_token_ids(model, load_tokenizer(model))
    if request.param == "hf":
        engine: Engine = HFEngine(load_config(model), stops, max_batch_size=7)
    else:
        engine = VLLMEngine(model, stops, max_model_len=64)
    engine.load_weights(full_weights(policy.lm))
    yield engine
    engine.close()


def trainer_logps(policy: Policy, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    tokens = torch.tensor([prompt + completion])
    mask = torch.zeros(1, tokens.shape[1] - 1, dtype=torch.bool)
    mask[0, len(prompt) - 1 :] = True
    with torch.no_grad():
        return policy(tokens, mask, temperature)[0][mask].tolist()


def test_logps_are_those_of_the_policy_at_the_sampling_temperature(engine: Engine, policy: Policy):
    for temperature in (0.7, 1.0):
        groups = engine.generate(PROMPTS, 4, Sampling(max_tokens=10, temperature=temperature), [1, 2, 3])
        for prompt, completions in zip(PROMPTS, groups, strict=True):
            for completion in completions:
                expected = trainer_logps(policy, prompt, completion.token_ids, temperature)
                assert completion.logps == pytest.approx(expected, abs=1e-4)


def test_a_new_policy_is_followed_head_included(engine: Engine, policy: Policy, model: str):
    """The head is tied to the embeddings; an engine that keeps the old head would be off by far more than 1e-4."""
    other = load_policy(model)
    try:
        engine.load_weights(full_weights(other.lm))
        completion = engine.generate(PROMPTS[:1], 1, Sampling(max_tokens=8), [5])[0][0]
        assert completion.logps == pytest.approx(trainer_logps(other, PROMPTS[0], completion.token_ids, 1.0), abs=1e-4)
        stale = trainer_logps(policy, PROMPTS[0], completion.token_ids, 1.0)
        assert max(abs(a - b) for a, b in zip(completion.logps, stale, strict=True)) > 0.1
    finally:
        engine.load_weights(full_weights(policy.lm))


def test_first_tokens_are_distributed_like_the_policy(engine: Engine, policy: Policy):
    """Pearson's chi-square over 4,000 draws; with a right sampler it fails once in 10,000 such tests."""
    draws, prompt = 4000, PROMPTS[0]
    completions = engine.generate([prompt], draws, Sampling(max_tokens=1, temperature=1.3), [11])[0]
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=16).double()
    with torch.no_grad():
        expected = (policy.lm(torch.tensor([prompt])).logits[0, -1].double() / 1.3).softmax(-1) * draws
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None].clamp(min=1e-9)])
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = len(counts) - 1
    chance = 1 - torch.special.gammainc(torch.tensor(degrees / 2.0), statistic.float() / 2)
    assert chance > 1e-4
    assert counts.max() < 0.95 * draws  # the test would say little about a policy that is almost sure


def test_n_samples_for_each_prompt_in_order(engine: Engine, policy: Policy):
    groups = engine.generate(PROMPTS, 5, Sampling(max_tokens=3), [1, 2, 3])
    assert [len(group) for group in groups] == [5, 5, 5]
    for prompt, group in zip(PROMPTS, groups, strict=True):  # the log-probs fit this prompt and no other
        assert group[4].logps == pytest.approx(trainer_logps(policy, prompt, group[4].token_ids, 1.0), abs=1e-4)


def test_sample_depends_on_its_seed_alone(engine: Engine):
    sampling = Sampling(max_tokens=8)
    together = engine.generate(PROMPTS, 3, sampling, [100, 200, 300])
    again = engine.generate(PROMPTS, 3, sampling, [100, 200, 300])
    alone = engine.generate(PROMPTS[1:2], 3, sampling, [200])
    shifted = engine.generate(PROMPTS[1:2], 2, sampling, [201])
    ids = [[c.token_ids for c in group] for group in together]
    assert ids == [[c.token_ids for c in group] for group in again]
    assert ids[1] == [c.token_ids for c in alone[0]]
    assert ids[1][1:] == [c.token_ids for c in shifted[0]]  # sample j has the seed plus j
    assert len({tuple(c) for group in ids for c in group}) > 3


def test_end_of_sequence_and_truncation_are_told_apart(engine: Engine):
    completions = [
        c for group in engine.generate(PROMPTS, 40, Sampling(max_tokens=6, temperature=2.0), [1, 2, 3]) for c in group
    ]
    assert {c.truncated for c in completions} == {True, False}
    for c in completions:
        assert 1 <= len(c.token_ids) <= 6
        assert len(c.token_ids) == len(c.logps)
        assert 1 not in c.token_ids[:-1]  # the end-of-sequence id ends a completion and belongs to it
        assert c.truncated == (c.token_ids[-1] != 1)


def test_greedy(engine: Engine, policy: Policy):
    completion = engine.generate(PROMPTS[:1], 1, Sampling(max_tokens=1, temperature=0), [1])[0][0]
    with torch.no_grad():
        assert completion.token_ids == [policy.lm(torch.tensor(PROMPTS[:1])).logits[0, -1].argmax().item()]


def test_top_k_and_top_p_keep_the_likeliest(engine: Engine, policy: Policy):
    with torch.no_grad():
        likeliest = policy.lm(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1).sort(descending=True)
    for sampling, kept in (
        (Sampling(1, top_k=2), 2),
        (Sampling(1, top_p=likeliest.values[:3].sum().item() - 1e-3), 3),
    ):
        drawn = {c.token_ids[0] for c in engine.generate(PROMPTS[:1], 200, sampling, [1])[0]}
        assert drawn <= set(likeliest.indices[:kept].tolist())


def test_engine_leaves_the_trainers_random_numbers_alone(engine: Engine):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    engine.generate(PROMPTS, 2, Sampling(max_tokens=4), [1, 2, 3])
    assert torch.equal(torch.rand(4), expected)


def test_hf_engine_holds_no_copy_of_the_weights(model: str, policy: Policy):
    engine = HFEngine(load_config(model), [1])
    engine.load_weights(full_weights(policy.lm))
    ours = {p.data_ptr() for p in policy.lm.parameters()}
    assert {p.data_ptr() for p in engine.model.parameters()} == ours


def test_hf_engine_stops_at_every_id(model: str, policy: Policy):
    engine = HFEngine(load_config(model), [1, 5, 6])
    engine.load_weights(full_weights(policy.lm))
    for c in engine.generate(PROMPTS[:1], 50, Sampling(max_tokens=20, temperature=2.0), [1])[0]:
        assert not {1, 5, 6} & set(c.token_ids[:-1])
        assert c.truncated == (c.token_ids[-1] not in (1, 5, 6))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_impossible_sampling_names_the_key(setting: dict[str, float], message: str):
    with pytest.raises(UserError, match=f"rollout.init_args.{message}, .* expected"):
        Sampling(**setting)


def test_vllm_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch, model: str):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(UserError, match=r"VLLMRollout needs vLLM.*pip install -e '.\[vllm\]'.*HFRollout"):
        VLLMEngine(model, [1], max_model_len=64)
