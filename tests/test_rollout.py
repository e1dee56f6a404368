"""The rollout callback: in which order it uses an engine, and what becomes of the engine when a run fails."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT, quiet_trainer
from lightning.pytorch.strategies import DDPStrategy
from test_invariance import ScriptedEngine, ScriptedRollout, even_first_digit
from torch import Tensor

from callbacks import HFRollout
from lit_grpo.data import RolloutData, Source
from lit_grpo.data.types import Completion
from lit_grpo.engines import Deadline, HFEngine, Sampling, full_weights
from lit_grpo.errors import UserError
from lit_grpo.losses import TwoGRPO
from lit_grpo.module import PolicyModule
from lit_grpo.policy import load_config, load_policy


class SpyEngine(ScriptedEngine):
    def __init__(self, context: int) -> None:
        super().__init__(context)
        self.calls: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        super().load_weights(weights)
        self.calls.append("load")

    def agreeing(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self.calls.append("compare")
        return set()

    def _generate(self, *args: Any) -> Any:
        self.calls.append("generate")
        return super()._generate(*args)

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self, part: str) -> None:
        self.calls.append(f"wake {part}")

    def close(self) -> None:
        self.calls.append("close")


class SpyRollout(ScriptedRollout):
    """Keeps all engines it ever made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.made: list[SpyEngine] = []

    def make_engine(self, module: Any, context: int) -> SpyEngine:
        self.made.append(SpyEngine(context))
        return self.made[-1]


def fit(model: str, prompts: str, folder: Path, rollout: Any, **options: Any) -> None:
    data = RolloutData(
        Source(prompts),
        val=Source(prompts) if options.pop("val", False) else None,
        reward=even_first_digit,
        prompts_per_phase=8,
    )
    quiet_trainer(folder, callbacks=[rollout], **options).fit(
        PolicyModule(model, TwoGRPO(), max_mismatch=100), datamodule=data
    )


SYNC = ["wake weights", "load", "compare", "wake cache"]


def test_an_engine_is_awake_for_as_long_as_it_must_be(model: str, few_prompts: str, tmp_path: Path):
    rollout = SpyRollout(max_tokens=12)
    fit(model, few_prompts, tmp_path, rollout, max_epochs=2, val=True)
    phase = validation = [*SYNC, "generate", "sleep"]
    (engine,) = rollout.made
    assert engine.calls == [*phase, *validation, *phase, *validation, "close"]


def test_a_run_that_fails_closes_its_engine_and_the_next_makes_another(model: str, few_prompts: str, tmp_path: Path):
    class Failing(SpyRollout):
        def make_engine(self, module: Any, context: int) -> SpyEngine:
            engine = super().make_engine(module, context)
            if len(self.made) == 1:
                engine._generate = lambda *_: 1 / 0  # type: ignore[method-assign]
            return engine

    rollout = Failing(max_tokens=12)
    with pytest.raises(ZeroDivisionError):
        fit(model, few_prompts, tmp_path, rollout, max_epochs=1)
    assert rollout.made[0].calls == [*SYNC, "close"]
    fit(model, few_prompts, tmp_path, rollout, max_epochs=1)
    assert len(rollout.made) == 2


@pytest.mark.parametrize("timeout", [0, float("inf"), float("nan"), -1])
def test_times_that_are_none(timeout: float):
    with pytest.raises(UserError, match="timeout: expected a number above 0 and below 1e8"):
        HFRollout(timeout=timeout)


def test_processes_must_wait_longer_for_each_other_than_for_an_engine(model: str, few_prompts: str, tmp_path: Path):
    rollout = HFRollout(timeout=100)
    module, data = PolicyModule(model, TwoGRPO()), RolloutData(Source(few_prompts))
    for seconds, fine in ((160, False), (161, True)):
        trainer = quiet_trainer(tmp_path, devices=2, strategy=DDPStrategy(timeout=timedelta(seconds=seconds)))
        trainer.strategy._lightning_module = trainer.strategy.connect(module) or module
        trainer.datamodule, data.trainer, module._trainer = data, trainer, trainer
        data.prompts["train"] = []
        if fine:
            data.check_lengths = lambda *_: 64
            rollout.setup(trainer, module, "fit")
        else:
            with pytest.raises(UserError, match=r"timeout: 100 s and 60 more are not below the 160 s after which"):
                rollout.setup(trainer, module, "fit")


def test_a_sharded_policy_s_copy_is_let_go(model: str):
    """What HFEngine was given is what it holds; asleep it holds nothing, and awake again it generates the same."""
    engine, policy = HFEngine(load_config(model), [1], context=64), load_policy(model)
    ask = ([[3, 4, 5]], 4, Sampling(max_tokens=8), [1])
    engine.load_weights(full_weights(policy))
    before = engine.generate(*ask)
    engine.sleep()
    assert all(parameter.device.type == "meta" for parameter in engine.model.parameters())
    engine.load_weights(full_weights(policy))
    assert engine.generate(*ask) == before


@pytest.mark.parametrize("fault", ["slow", "stuck"])
def test_no_process_waits_for_one_whose_engine_does_not_come_back(
    model: str, few_prompts: str, tmp_path: Path, fault: str
):
    run = subprocess.run(
        [sys.executable, __file__, model, few_prompts, str(tmp_path), fault],
        capture_output=True,
        text=True,
        timeout=200,
        env=ENVIRONMENT,
    )
    assert run.returncode != 0
    assert "did not finish within 2 s (rollout.init_args.timeout): " in run.stderr


@pytest.mark.parametrize(("logps", "came"), [(None, "no"), ([-0.5], "1")])
def test_an_engine_that_gives_no_log_probs_is_named(logps: list[float] | None, came: str):
    """Without them later updates would take their ratio to themselves."""

    class Silent(ScriptedEngine):
        def complete(self, seed: int) -> Completion:
            return Completion([3, 1], logps)

    with pytest.raises(UserError, match=rf"rollout: Silent drew a completion of 2 tokens .* with {came} log-probs"):
        Silent(32).generate([[2]], 2, Sampling(max_tokens=4), [0])


if __name__ == "__main__":
    *where, fault = sys.argv[1:]
    Deadline.grace = 1.0

    class Hanging(ScriptedEngine):
        def _generate(self, *args: Any) -> Any:
            for _ in range(10**6):
                time.sleep(0.1 if fault == "slow" else 10**6)
                args[-1].check(lambda: "prompt 0")

    class OneHangs(ScriptedRollout):
        def make_engine(self, module: Any, context: int) -> Any:
            mine = Hanging if torch.distributed.get_rank() == 1 else ScriptedEngine
            return mine(context, self.timeout)

    fit(where[0], where[1], Path(where[2]), OneHangs(max_tokens=12, timeout=2), max_epochs=1, devices=2, strategy="ddp")
