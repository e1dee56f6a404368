"""One contract, run over every engine, on a real model with known logits."""

from __future__ import annotations

import ast
import math
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet
from test_weights import with_adapters
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config
from transformers.cache_utils import DynamicLayer

from callbacks import VLLMRollout
from lit_grpo.data.types import Completion
from lit_grpo.engines import Deadline, Engine, HFEngine, Sampling, VLLMEngine, full_weights
from lit_grpo.engines.cache import RoomyLayer
from lit_grpo.engines.vllm_engine import SUPPORTED, _completion, ranks_in_environment
from lit_grpo.errors import UserError
from lit_grpo.policy import Policy, load_config, load_policy, load_tokenizer, stop_token_ids

ROOT = Path(__file__).parent.parent
PROMPTS = [[3, 4, 12, 5, 6, 13], [7, 7, 12], [2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def policy(model: str) -> Policy:
    """A policy whose predictions are far from uniform: a new model's embeddings, doubled."""
    policy = load_policy(model)
    with torch.no_grad():
        for parameter in policy.lm.base_model.embed_tokens.parameters():
            parameter.mul_(2)
    return policy


class PlainEngine(Engine):
    """One token of one completion at a time, without a cache: what the others must agree with."""

    def __init__(self, model: str, stops: list[int]) -> None:
        super().__init__(context=64)
        self.lm, self.stops = load_policy(model).lm, stops

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.lm.load_state_dict(dict(weights))

    @torch.no_grad()
    def _generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int], deadline: Deadline
    ) -> Iterator[tuple[int, list[Completion]]]:
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            first = self.lm(torch.tensor([prompt])).logits[0, -1]
            yield i, [self.write(prompt, sampling, seed + j, first) for j in range(n)]

    def write(self, prompt: list[int], sampling: Sampling, seed: int, logits: Tensor) -> Completion:
        g, ids, logps = torch.Generator().manual_seed(seed), [], []
        while len(ids) < sampling.max_tokens:
            if ids:
                logits = self.lm(torch.tensor([prompt + ids])).logits[0, -1]
            logits = logits / (sampling.temperature or 1)
            order = logits.argsort(descending=True)
            kept = logits.softmax(-1)[order].cumsum(-1).roll(1) < sampling.top_p
            kept &= logits[order] - logits.max() >= math.log(sampling.min_p or 1e-30)
            kept[0] = True
            kept[sampling.top_k or len(kept) :] = False
            allowed = torch.full_like(logits, -torch.inf)
            allowed[order[kept]] = logits[order[kept]]
            probs = allowed.softmax(-1)
            token = probs.argmax() if sampling.temperature == 0 else torch.multinomial(probs, 1, generator=g)[0]
            ids.append(int(token))
            logps.append(probs[token].log().item())
            if ids[-1] in self.stops:
                return Completion(ids, logps)
        return Completion(ids, logps, truncated=True)


@pytest.fixture(scope="module", params=["plain", "hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest, model: str, policy: Policy) -> Iterator[Engine]:
    stops = stop_token_ids(model, load_tokenizer(model))
    if request.param == "plain":
        engine: Engine = PlainEngine(model, stops)
    elif request.param == "hf":
        engine = HFEngine(load_config(model), stops, context=64, max_batch_size=7)
    else:
        engine = VLLMEngine(model, stops, context=64)
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


def test_merged_adapters_are_followed(engine: Engine, policy: Policy, model: str):
    adapted = with_adapters(load_policy(model))
    try:
        engine.load_weights(full_weights(adapted))
        completion = engine.generate(PROMPTS[:1], 1, Sampling(max_tokens=8), [5])[0][0]
        expected = trainer_logps(adapted, PROMPTS[0], completion.token_ids, 1.0)
        assert completion.logps == pytest.approx(expected, abs=1e-4)
        base = trainer_logps(load_policy(model), PROMPTS[0], completion.token_ids, 1.0)
        assert max(abs(a - b) for a, b in zip(expected, base, strict=True)) > 0.1
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
    """All samples of a prompt are the likeliest tokens, one after the other."""
    groups = engine.generate(PROMPTS, 3, Sampling(max_tokens=4, temperature=0), [1, 2, 3])
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 3
        assert group[0] == group[1] == group[2]
        for t, token in enumerate(group[0].token_ids):
            with torch.no_grad():
                logits = policy.lm(torch.tensor([prompt + group[0].token_ids[:t]])).logits[0, -1]
            assert token == logits.argmax()


def test_top_k_top_p_and_min_p_keep_the_likeliest(engine: Engine, policy: Policy):
    with torch.no_grad():
        likeliest = policy.lm(torch.tensor(PROMPTS[:1])).logits[0, -1].softmax(-1).sort(descending=True)
    for sampling, kept in (
        (Sampling(1, top_k=2), 2),
        (Sampling(1, top_p=likeliest.values[:3].sum().item() - 1e-3), 3),
        (Sampling(1, min_p=(likeliest.values[2:4].mean() / likeliest.values[0]).item()), 3),
    ):
        drawn = {c.token_ids[0]: c.logps[0] for c in engine.generate(PROMPTS[:1], 200, sampling, [1])[0]}
        of_those_kept = (likeliest.values[:kept] / likeliest.values[:kept].sum()).log().tolist()
        expected = dict(zip(likeliest.indices[:kept].tolist(), of_those_kept, strict=True))
        assert drawn == pytest.approx(expected, abs=1e-4)


def test_engine_leaves_the_trainers_random_numbers_alone(engine: Engine):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    engine.generate(PROMPTS, 2, Sampling(max_tokens=4), [1, 2, 3])
    assert torch.equal(torch.rand(4), expected)


def test_prompts_that_do_not_fit_are_refused_alike(engine: Engine):
    with pytest.raises(UserError, match=r"got an empty prompt \(number 1 of 2\)"):
        engine.generate([[3], []], 1, Sampling(max_tokens=4), [1, 2])
    with pytest.raises(UserError, match=r"prompt of 61 tokens \(number 0 of 1\).*max_tokens 4 is beyond the 64"):
        engine.generate([[3] * 61], 1, Sampling(max_tokens=4), [1])
    assert len(engine.generate([[3] * 60], 1, Sampling(max_tokens=4), [1])[0]) == 1
    assert engine.generate([], 1, Sampling(max_tokens=4), []) == []
    for seeds, n in (([1], 1), ([1, 2, 3], 1), ([1, 2], 0)):
        with pytest.raises(ValueError, match="a seed per prompt and n >= 1"):
            engine.generate([[3], [4]], n, Sampling(max_tokens=4), seeds)


def test_more_prompt_tokens_than_one_pass_reads(engine: Engine, policy: Policy):
    """Three hundred prompts of forty tokens, each with random numbers of its own."""
    prompts = [[3 + (i + j) % 10 for j in range(40)] for i in range(300)]
    groups = engine.generate(prompts, 1, Sampling(max_tokens=2), list(range(300)))
    for i in (0, 150, 204, 205, 299):
        assert groups[i][0].logps == pytest.approx(
            trainer_logps(policy, prompts[i], groups[i][0].token_ids, 1.0), abs=1e-4
        )


def test_sleep_and_wake_change_nothing(engine: Engine, policy: Policy):
    before = engine.generate(PROMPTS, 2, Sampling(max_tokens=4), [1, 2, 3])
    engine.sleep()
    engine.wake("weights")
    engine.load_weights(full_weights(policy.lm))
    engine.wake("cache")
    assert engine.generate(PROMPTS, 2, Sampling(max_tokens=4), [1, 2, 3]) == before


def test_threads_of_the_trainer_are_left_alone(engine: Engine):
    assert torch.get_num_threads() == 1  # as conftest set them


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True)
def test_a_generation_that_does_not_come_back_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """The second prompt's completion ends at once, the third's does not, and time is over after five tokens."""
    sampling, checks = Sampling(max_tokens=40, temperature=1.9), []
    seed = next(s for s in range(1000) if engine.generate([[7, 7]], 1, sampling, [s])[0][0].token_ids == [1])
    other = next(s for s in range(1000) if len(engine.generate([[3, 4]], 1, sampling, [s])[0][0].token_ids) > 20)
    check = Deadline.check

    def late(deadline: Deadline, what: Callable[[], str]) -> None:
        checks.append(what)
        deadline.end += 0 if len(checks) < 5 else -1e6
        check(deadline, what)

    monkeypatch.setattr(Deadline, "check", late)
    with pytest.raises(UserError, match=r"did not finish within .* \(rollout.init_args.timeout\): .*\[3, 4\]"):
        engine.generate([[7, 7], [3, 4]], 1, sampling, [seed, other])
    monkeypatch.undo()
    assert len(engine.generate(PROMPTS, 2, Sampling(max_tokens=4), [1, 2, 3])) == 3  # and goes on


def test_a_call_that_never_returns_ends_the_process(model: str):
    script = f"""
import time
from lit_grpo.engines import Deadline, HFEngine, Sampling
from lit_grpo.policy import load_config
Deadline.grace = 0.1
engine = HFEngine(load_config({model!r}), [1], 64, timeout=0.1)
engine.model.forward = lambda *_, **__: time.sleep(10**6)
engine.generate([[3, 4]], 1, Sampling(4), [1])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    assert "did not finish within 0.1 s (rollout.init_args.timeout): token 0 of prompt [3, 4]" in run.stderr
    assert "in _write" in run.stderr


def test_hf_engine_holds_no_copy_of_the_weights(model: str, policy: Policy):
    engine = HFEngine(load_config(model), [1], context=64)
    engine.load_weights(full_weights(policy.lm))
    ours = {p.data_ptr() for p in policy.lm.parameters()}
    assert {p.data_ptr() for p in engine.model.parameters()} == ours


def test_hf_engine_reads_a_prompt_once_and_writes_nothing_after_an_end(
    monkeypatch: pytest.MonkeyPatch, model: str, policy: Policy
):
    engine = HFEngine(load_config(model), [1, 4, 5, 6, 7, 8], context=64)
    engine.load_weights(full_weights(policy))
    forward, seen = engine.model.forward, []

    def counted(tokens: Tensor, **options: Any) -> Any:
        seen.append(tuple(tokens.shape))
        return forward(tokens, **options)

    monkeypatch.setattr(engine.model, "forward", counted)
    answers = engine.generate(PROMPTS, 16, Sampling(12), [100, 200, 300])
    lengths = [len(completion.token_ids) for group in answers for completion in group]
    assert len(set(lengths)) > 3
    assert seen[0] == (3, 8)
    assert seen[1:] == [(sum(length > t for length in lengths), 1) for t in range(1, max(lengths))]


@pytest.mark.parametrize("windows", [False, True])
def test_hf_engine_reads_prompts_of_similar_length_together(windows: bool, monkeypatch: pytest.MonkeyPatch, model: str):
    """In parts of at most 24 tokens, unless the model's layers remember in their own way."""
    size = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
    config = Gemma2Config(**size, num_hidden_layers=2, num_key_value_heads=2, sliding_window=4, pad_token_id=0)
    engine = HFEngine(config if windows else load_config(model), [1], context=64)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(engine.model.config)
    engine.load_weights(lm.state_dict().items())
    prompts = [[3 + (i + j) % 10 for j in range(length)] for i, length in enumerate((3, 8, 4, 12, 5, 30))]
    at_once = engine.generate(prompts, 3, Sampling(6), list(range(6)))
    read: list[tuple[int, ...]] = []
    engine.model.register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape)))
    monkeypatch.setattr("lit_grpo.engines.hf_engine.TOKENS_AT_ONCE", 24)
    in_parts = engine.generate(prompts, 3, Sampling(6), list(range(6)))
    assert [shape for shape in read if shape[1] > 1] == ([(6, 30)] if windows else [(3, 5), (2, 12), (1, 30)])
    for a, b in zip([c for group in at_once for c in group], [c for group in in_parts for c in group], strict=True):
        assert a.token_ids == b.token_ids
        assert a.logps == pytest.approx(b.logps, abs=1e-5)


def test_hf_engine_stops_at_every_id(model: str, policy: Policy):
    engine = HFEngine(load_config(model), [1, 5, 6], context=64)
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
        ({"min_p": 1.5}, "min_p"),
    ],
)
def test_impossible_sampling_names_the_key(setting: dict[str, float], message: str):
    with pytest.raises(UserError, match=f"rollout.init_args.{message}, .* expected"):
        Sampling(**setting)


@pytest.mark.vllm
class TestVLLMFailures:
    def test_a_start_that_fails_says_what_to_lower(self, monkeypatch: pytest.MonkeyPatch, model: str):
        import vllm

        def no_memory(**_: object) -> None:
            raise ValueError("No available memory for the cache blocks")

        monkeypatch.setattr(vllm, "LLM", no_memory)
        with pytest.raises(
            UserError, match=r"(?s)could not start on .*No available memory.*lower.*cpu_cache_gib.*HFRollout"
        ):
            VLLMEngine(model, [1], context=64)

    def test_a_release_that_is_not_supported_is_named(self, monkeypatch: pytest.MonkeyPatch, model: str):
        import vllm

        monkeypatch.setattr(vllm, "LLM", lambda **_: None)
        for version in ("0.99.0", "0.34.0rc1", "dev"):
            monkeypatch.setattr(vllm, "__version__", version)
            with pytest.warns(UserWarning, match=rf"vLLM {version} is not among .*\(<0.34,>=0.22\)"):
                VLLMEngine(model, [1], context=64)

    def test_what_it_does_to_random_numbers_and_threads_at_the_start_is_undone(
        self, monkeypatch: pytest.MonkeyPatch, model: str
    ):
        import vllm

        def start(**_: object) -> None:
            torch.manual_seed(99)
            torch.set_num_threads(2)

        monkeypatch.setattr(vllm, "LLM", start)
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        VLLMEngine(model, [1], context=64)
        assert torch.get_num_threads() == 1
        assert torch.equal(torch.rand(4), expected)

    def test_a_model_it_does_not_know(self, tmp_path: Path):
        (tmp_path / "config.json").write_text('{"model_type": "nonesuch", "architectures": ["NoneSuch"]}')
        with pytest.raises(UserError, match=r"(?s)vLLM could not start on .*does not know the model.*HFRollout"):
            VLLMEngine(str(tmp_path), [1], context=64)

    def test_the_extra_takes_the_supported_releases(self):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {SpecifierSet(line.removeprefix("vllm")) for line in extras["vllm"]} == {SUPPORTED}

    def test_it_is_told_the_device_of_its_process(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("LOCAL_RANK", "7")
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
        with ranks_in_environment(torch.device("cuda:1")):
            assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("5", "1")
        assert os.environ["LOCAL_RANK"] == "7"
        assert "RANK" not in os.environ

    def test_an_aborted_completion_is_no_completion(self):
        """Training on it would teach the policy that it ended there."""
        with pytest.raises(RuntimeError, match="a completion ended with 'abort'"):
            _completion(SimpleNamespace(finish_reason="abort", token_ids=[3], logprobs=[{}]))

    def test_another_gpu_than_the_first_is_asked_for_in_another_way(self, model: str):
        with pytest.raises(UserError, match=r"take the first GPU, not cuda:1. Set CUDA_VISIBLE_DEVICES=1"):
            VLLMEngine(model, [1], context=64, device=torch.device("cuda:1"))

    @pytest.mark.parametrize("temperature", [0.001, 2.5])
    def test_temperatures_it_does_not_sample_at(self, temperature: float):
        with pytest.raises(UserError, match=rf"init_args.temperature: .*from 0.01 to 2, got {temperature}"):
            VLLMRollout(temperature=temperature)
        with pytest.raises(UserError, match=rf"evaluation.temperature: .*from 0.01 to 2, got {temperature}"):
            VLLMRollout(evaluation=Sampling(temperature=temperature))
        VLLMRollout(evaluation=Sampling(temperature=0))

    def test_an_engine_that_dies_names_the_way_on(self, monkeypatch: pytest.MonkeyPatch, model: str):
        import vllm

        def dead() -> None:
            raise RuntimeError("engine core died")

        core = SimpleNamespace(add_request=lambda *_: None, has_unfinished_requests=lambda: True, step=dead)
        monkeypatch.setattr(vllm, "LLM", lambda **_: SimpleNamespace(llm_engine=core))
        with pytest.raises(
            UserError, match=r"vLLM failed while generating: RuntimeError: engine core died.*ckpt_path last"
        ):
            VLLMEngine(model, [1], context=64).generate(PROMPTS, 1, Sampling(max_tokens=4), [1, 2, 3])

    def test_on_a_gpu_it_sleeps_at_level_one_and_wakes_weights_first(self, monkeypatch: pytest.MonkeyPatch, model: str):
        """The calls alone: there is no GPU here."""
        import vllm

        calls: list[object] = []
        llm = SimpleNamespace(
            sleep=lambda level: calls.append(level),
            wake_up=lambda tags: calls.append(tags),
            collective_rpc=lambda name, kwargs: calls.append(name),
            reset_prefix_cache=lambda: calls.append("reset") or True,
        )
        made: dict[str, object] = {}
        monkeypatch.setattr(vllm, "LLM", lambda **options: made.update(options) or llm)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
        gpu = torch.device("cuda:0")
        engine = VLLMEngine(model, [1], context=64, gpu_memory=0.4, device=gpu)
        assert calls.pop() == gpu  # vLLM may have moved it
        assert made["gpu_memory_utilization"] == 0.4
        assert made["enable_sleep_mode"] is True
        assert made["enforce_eager"] is False  # CUDA graphs
        assert made["dtype"] == "bfloat16"
        engine.wake("weights")  # awake: nothing to do
        for _ in range(2):
            engine.sleep()
            engine.wake("weights")
            engine.load_weights([])
            engine.wake("cache")
        assert calls == [1, ["weights"], "reload_weights", "reset", ["kv_cache"]] * 2


def test_nothing_else_imports_vllm():
    def imports(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}

    files = (*ROOT.glob("lit_grpo/**/*.py"), *ROOT.glob("callbacks/*.py"))
    assert [path.name for path in files if any(name.split(".")[0] == "vllm" for name in imports(path))] == [
        "vllm_engine.py"
    ]


def test_vllm_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch, model: str):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"VLLMRollout needs vLLM.*pip install -e '.\[vllm\]'.*HFRollout"):
        VLLMEngine(model, [1], context=64)


def test_the_cache_of_hf_engine_writes_in_place(model: str, policy: Policy, monkeypatch: pytest.MonkeyPatch):
    """What transformers' own holds after any updates and changes of rows, without a copy for every token."""
    plain, roomy = DynamicLayer(), RoomyLayer(most=64)
    g, rows, places = torch.Generator().manual_seed(0), 3, set()
    for length, kept in [(4, [0, 0, 1, 2, 2]), (1, [0, 4, 2]), (1, [2, 1]), (1, [1, 0]), (30, [0]), (1, [0])]:
        new = [torch.randn(rows, 2, length, 8, generator=g) for _ in range(2)]
        for ours, theirs in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        for layer in (roomy, plain):
            layer.reorder_cache(torch.tensor(kept))
        assert torch.equal(roomy.keys, plain.keys)
        assert torch.equal(roomy.values, plain.values)
        rows = len(kept)
        places.add(roomy.keys.untyped_storage().data_ptr())
    assert len(places) <= 3  # made, made for more rows, made for 30 tokens
    monkeypatch.setattr(DynamicLayer, "update", lambda *_: pytest.fail("a cache that copies"))
    engine = HFEngine(load_config(model), [1], context=64)
    engine.load_weights(full_weights(policy.lm))
    assert len(engine.generate(PROMPTS, 2, Sampling(max_tokens=4), [1, 2, 3])) == 3
