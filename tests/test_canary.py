"""Faults put into a real vLLM are caught in the first phase in which they matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_invariance import even_first_digit, furthest
from torch import Tensor

from callbacks import HFRollout, VLLMRollout
from lit_grpo.data import RolloutData, Source
from lit_grpo.engines import Engine, Sampling, VLLMEngine
from lit_grpo.errors import UserError
from lit_grpo.losses import GRPO
from lit_grpo.module import PolicyModule
from lit_grpo.policy import load_tokenizer
from lit_grpo.quickstart import small_qwen

Weights = Iterable[tuple[str, Tensor]]


def without(*parts: str) -> Callable[[Engine], None]:
    """Weights with these in their names never arrive."""

    def fault(engine: Engine) -> None:
        load = engine.load_weights
        engine.load_weights = lambda weights: load((n, w) for n, w in weights if not any(p in n for p in parts))  # type: ignore[method-assign]

    return fault


def skipped_sync(engine: Engine) -> None:
    engine.load_weights = lambda weights: list(weights) and None  # type: ignore[method-assign]


def from_the_second_time(fault: Callable[[Engine], None]) -> Callable[[Engine], None]:
    """A fault that the first sync is spared."""

    def later(engine: Engine) -> None:
        load = engine.load_weights

        def once(weights: Weights) -> None:
            load(weights)
            del engine.load_weights
            fault(engine)

        engine.load_weights = once  # type: ignore[method-assign]

    return later


def wrong_temperature(engine: Engine) -> None:
    generate = engine._generate

    def cooler(prompts: Any, n: int, sampling: Any, seeds: Any, deadline: Any) -> Any:
        return generate(prompts, n, replace(sampling, temperature=0.8 * sampling.temperature), seeds, deadline)

    engine._generate = cooler  # type: ignore[method-assign]


FAULTS = {
    "a stale layer": without("layers.1."),
    "a stale tied head": without("lm_head"),
    "a skipped sync": skipped_sync,
    "a wrong temperature": wrong_temperature,
}


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory, model: str) -> str:
    """A small model with room for prompts that fill blocks of a prefix cache, and with large embeddings."""
    folder = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    lm = small_qwen(vocab_size=16, max_position_embeddings=1024, eos_token_id=1, initializer_range=0.1)
    lm.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return str(folder)


def fit(
    model: str,
    folder: Path,
    fault: Callable[[Engine], None] | None,
    digits: int = 4,
    phases: int = 1,
    optimizer: Any = lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    **sampling: Any,
) -> tuple[dict[str, float], int]:
    """Metrics of a run with a fault, and how many updates it made."""

    class Faulty(VLLMRollout):
        def make_engine(self, module: Any, context: int) -> Engine:
            engine = super().make_engine(module, context)
            if fault is not None:
                fault(engine)
            return engine

    (folder / "prompts.jsonl").write_text(
        "".join(f'{{"prompt": "{str(i) * digits}+{i}=", "answer": "{i}"}}\n' for i in range(1, 9))
    )
    module = PolicyModule(model, GRPO(), optimizer=optimizer)
    trainer = quiet_trainer(folder, max_epochs=phases, callbacks=[Faulty(max_tokens=6, **sampling)])
    data = RolloutData(
        Source(str(folder / "prompts.jsonl")), reward=even_first_digit, prompts_per_phase=8, group_size=4
    )
    try:
        trainer.fit(module, datamodule=data)
    finally:
        steps = trainer.global_step
    return {name: value.item() for name, value in trainer.callback_metrics.items()}, steps


@pytest.mark.vllm
class TestVLLM:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_fault_is_caught_before_the_first_update(self, fault: str, long_model: str, tmp_path: Path):
        steps = []

        def count(*_: object) -> None:
            steps.append(1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PolicyModule, "on_before_optimizer_step", count)
            with pytest.raises(
                UserError, match=r"The engine does not run the current policy.*more than model.max_mismatch"
            ):
                fit(long_model, tmp_path, FAULTS[fault])
        assert not steps

    @pytest.mark.parametrize("fault", ["a stale layer", "a skipped sync"])
    def test_weights_that_are_not_replaced_later_are_caught_at_any_learning_rate(
        self, fault: str, long_model: str, tmp_path: Path
    ):
        """At 1e-6 log-probs say nothing: they move less than they differ by rounding."""
        steps = []

        class Counting(torch.optim.AdamW):
            def step(self, *args: Any, **options: Any) -> Any:
                steps.append(1)
                return super().step(*args, **options)

        with pytest.raises(UserError, match=r"weights that can be compared were not replaced, model"):
            fit(
                long_model,
                tmp_path,
                from_the_second_time(FAULTS[fault]),
                phases=3,
                optimizer=lambda parameters: Counting(parameters, lr=1e-6),
            )
        assert len(steps) == 1

    def test_log_probs_before_temperature_are_caught(self, long_model: str, tmp_path: Path):
        import vllm

        with pytest.MonkeyPatch.context() as patch:
            make = vllm.LLM
            patch.setattr(vllm, "LLM", lambda **options: make(**(options | {"logprobs_mode": "raw_logprobs"})))
            with pytest.raises(UserError, match=r"The engine does not run the current policy.*max_mismatch"):
                fit(long_model, tmp_path, None, temperature=0.7)

    def test_a_stale_prefix_cache_is_caught_in_the_first_phase_after_an_update(self, long_model: str, tmp_path: Path):
        """Prompts of 260 tokens, the same in both phases: what is left of the old policy's cache is used again."""

        def never_reset(engine: Engine) -> None:
            assert isinstance(engine, VLLMEngine)
            engine.llm.reset_prefix_cache = lambda: True

        with pytest.raises(UserError, match="The engine does not run the current policy"):
            fit(long_model, tmp_path, never_reset, digits=260, phases=2)
        _, steps = fit(long_model, tmp_path, None, digits=260, phases=2)
        assert steps == 2

    def test_what_normal_looks_like(self, long_model: str, tmp_path: Path):
        found, _ = fit(long_model, tmp_path, None, phases=3)
        assert found["train/sampler_mismatch"] < 1e-4
        assert 1 <= found["train/sampler_prob_ratio"] < 1.0001
        assert abs(found["train/sampler_kl"]) < 1e-6


def test_an_evaluation_is_checked_too(model: str, few_prompts: str, tmp_path: Path):
    """`lit-grpo test` has no training step that would notice."""

    class Cooler(HFRollout):
        def make_engine(self, module: Any, context: int) -> Engine:
            engine = super().make_engine(module, context)
            wrong_temperature(engine)
            return engine

    module = PolicyModule(model, GRPO(), max_mismatch=1e-5)
    data = RolloutData(Source(few_prompts), val=Source(few_prompts), reward=even_first_digit, prompts_per_phase=8)
    with pytest.raises(UserError, match="The engine does not run the current policy"):
        quiet_trainer(tmp_path, callbacks=[Cooler(max_tokens=4)]).validate(module, datamodule=data, verbose=False)
    module.max_mismatch = 100
    shorter = Cooler(max_tokens=20, evaluation=Sampling(max_tokens=3))  # there is room for three tokens and no more
    assert quiet_trainer(tmp_path, callbacks=[shorter]).validate(module, datamodule=data, verbose=False)


@pytest.mark.vllm
def test_after_an_engine_died_in_a_phase_the_run_goes_on_from_the_one_before(
    model: str, many_prompts: str, tmp_path: Path
):
    """And ends with the weights of a run in which nothing died."""

    class Mortal(VLLMRollout):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                steps = iter(range(3))
                step = self.engine.llm.llm_engine.step
                self.engine.llm.llm_engine.step = lambda: (next(steps), step())[1]
            super().on_train_epoch_start(trainer, pl_module)

    def run(rollout: VLLMRollout, ckpt_path: str | None = None) -> dict[str, Tensor]:
        module = PolicyModule(model, GRPO(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        data = RolloutData(Source(many_prompts), reward=even_first_digit, prompts_per_phase=8, group_size=4)
        checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1, save_on_train_epoch_end=True)
        options = {"max_epochs": 3, "callbacks": [rollout, checkpoint], "enable_checkpointing": True}
        quiet_trainer(tmp_path, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
        return {name: tensor.detach() for name, tensor in module.policy.state_dict().items()}

    with pytest.raises(UserError, match="vLLM failed while generating: StopIteration"):
        run(Mortal(max_tokens=6))
    resumed = run(VLLMRollout(max_tokens=6), ckpt_path=str(tmp_path / "last.ckpt"))
    (tmp_path / "last.ckpt").unlink()
    assert furthest(resumed, run(VLLMRollout(max_tokens=6))) == 0
