"""Work that goes on side by side: rewards beside the engine, the engine beside the updates."""

from __future__ import annotations

import asyncio
import csv
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import ENVIRONMENT, quiet_trainer
from test_invariance import ScriptedEngine, ScriptedRollout, even_first_digit

from callbacks import HFRollout, VLLMRollout
from callbacks.rollout import Rollout
from lit_grpo.__main__ import main
from lit_grpo.data import PromptData, RolloutData, Sample, Source
from lit_grpo.data.prompts import Prompt
from lit_grpo.data.scoring import SCORED_AT_ONCE, Scoring
from lit_grpo.data.types import Completion
from lit_grpo.errors import UserError
from lit_grpo.losses import GRPO
from lit_grpo.module import PolicyModule
from lit_grpo.rewards import MathReward, RewardSum, exact_match, overlaps


async def judged_elsewhere(samples: list[Sample]) -> list[float]:
    return even_first_digit(samples)


class TestRewards:
    def test_which_may_be_called_beside_the_engine(self):
        assert overlaps(MathReward())
        assert overlaps(judged_elsewhere)
        assert overlaps(RewardSum({"a": MathReward(), "b": MathReward(timeout=1.0)}))
        assert not overlaps(exact_match)  # it may need the main thread, for all we know
        assert not overlaps(RewardSum({"a": MathReward(), "b": exact_match}))

    def scoring(self, prompts: int, reward: Any) -> Scoring:
        asked = [Prompt(f"{i}", [i], str(i)) for i in range(prompts)]
        return Scoring(asked, 2, lambda ids: [str(one) for one in ids], reward)

    def test_parts_are_cut_by_number_and_put_back_in_order(self):
        """Never by the time that something takes, so that a run repeats itself."""
        called: list[tuple[str, int]] = []

        class Reward:
            def __init__(self, overlaps: bool) -> None:
                self.overlaps = overlaps

            def __call__(self, samples: list[Sample]) -> list[float]:
                called.append((threading.current_thread().name, len(samples)))
                return [float(sample.answer) for sample in samples]

        prompts = SCORED_AT_ONCE + 10
        order = torch.randperm(prompts, generator=torch.Generator().manual_seed(0)).tolist()
        found = []
        for beside in (True, False):
            scoring = self.scoring(prompts, Reward(beside))
            for i in order:
                scoring.finished(i, [Completion([i, 0]), Completion([i, 1])])
            found.append(scoring.samples())
        assert [sample.reward for sample in found[0]] == [i // 2 for i in range(2 * prompts)]
        assert found[0] == found[1]
        assert [size for _, size in called] == [SCORED_AT_ONCE, SCORED_AT_ONCE, 20, 2 * prompts]
        main = threading.main_thread().name
        assert [name == main for name, _ in called] == [False, False, False, True]

    def test_coroutines_wait_together(self):
        """Here none comes back before all were called."""
        called = asyncio.Semaphore(0)

        async def judge(samples: list[Sample]) -> list[float]:
            called.release()
            while called._value < 4:
                await asyncio.sleep(0.001)
            return [1.0] * len(samples)

        scoring = self.scoring(2 * SCORED_AT_ONCE, judge)
        for i in range(2 * SCORED_AT_ONCE):
            scoring.finished(i, [Completion([i]), Completion([i])])
        assert [sample.reward for sample in scoring.samples()] == [1.0] * 4 * SCORED_AT_ONCE

    def test_what_goes_wrong_there_is_said_here_and_nothing_more_is_called(self):
        calls = []

        class Fails:
            overlaps = True

            def __call__(self, samples: list[Sample]) -> list[float]:
                calls.append(len(samples))
                raise ValueError("too warm")

        scoring, threads = self.scoring(3 * SCORED_AT_ONCE, Fails()), threading.active_count()
        for i in range(3 * SCORED_AT_ONCE):
            scoring.finished(i, [Completion([i]), Completion([i])])
        with pytest.raises(UserError, match=r"Fails raised ValueError: too warm .* on 128 samples"):
            scoring.samples()
        assert threading.active_count() <= threads + 1  # the one that all share

    def test_it_scores_while_the_engine_writes(self, model: str, many_prompts: str, tmp_path: Path):
        """The engine here does not come to its end before the first part is scored."""
        scored = threading.Event()

        async def reward(samples: list[Sample]) -> list[float]:
            if len(samples) >= SCORED_AT_ONCE:
                scored.set()
            return even_first_digit(samples)

        class Waiting(ScriptedEngine):
            def _generate(self, prompts: Any, *rest: Any) -> Any:
                for i, completions in super()._generate(prompts, *rest):
                    assert i < len(prompts) - 1 or scored.wait(60)
                    yield i, completions

        class Rollouts(ScriptedRollout):
            def make_engine(self, module: Any, context: int) -> Any:
                return Waiting(context)

        data = RolloutData(Source(many_prompts), reward=reward, prompts_per_phase=64, group_size=4)
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[Rollouts(max_tokens=12)]).fit(
            PolicyModule(model, GRPO(), max_mismatch=100), data
        )
        assert scored.is_set()
        assert len(data.samples) == 256
        assert [sample.reward for sample in data.samples] == even_first_digit(data.samples)


async def slow(samples: list[Sample]) -> list[float]:
    await asyncio.sleep(0.3)
    return even_first_digit(samples)


class Watch(L.Callback):
    """Takes the weights at the start of each phase, and its batches."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.batches: list[list[Any]] = []
        self.staleness: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.weights.append({name: x.detach().clone() for name, x in pl_module.policy.state_dict().items()})
        self.batches.append([])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches[-1].append(batch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if "train/staleness" in trainer.callback_metrics:
            self.staleness.append(float(trainer.callback_metrics["train/staleness"]))


class TestOnePhaseAhead:
    def fit(self, model: str, prompts: str, folder: Path, rollout: Rollout, lr: float = 1e-3, **options: Any) -> Watch:
        module = PolicyModule(model, GRPO(), optimizer=lambda p: torch.optim.Adam(p, lr=lr))
        data = RolloutData(
            Source(prompts),
            val=Source(prompts),
            reward=even_first_digit,
            prompts_per_phase=8,
            updates_per_phase=2,
            **options,
        )
        watch = Watch()
        quiet_trainer(folder, max_epochs=4, check_val_every_n_epoch=2, callbacks=[rollout, watch]).fit(module, data)
        self.module = module
        return watch

    @pytest.mark.parametrize("engine", [HFRollout, pytest.param(VLLMRollout, marks=pytest.mark.vllm)])
    @pytest.mark.parametrize("resample", [False, True])
    def test_its_rollouts_are_of_the_policy_before(
        self, engine: type[Rollout], resample: bool, model: str, many_prompts: str, tmp_path: Path
    ):
        """Their log-probs are the ones that the ratio is taken to, and those of the weights of one phase ago."""
        rollout = engine(max_tokens=4, one_phase_ahead=True)
        watch = self.fit(model, many_prompts, tmp_path, rollout, resample_ties=resample)
        assert watch.staleness == [0, 2, 2, 2]
        policy = self.module.policy
        for phase, batches in enumerate(watch.batches):
            assert [batch.on_policy for batch in batches] == [phase == 0, False]
            differences = []
            for weights in (watch.weights[max(0, phase - 1)], watch.weights[phase]):
                policy.load_state_dict(weights)
                with torch.no_grad():
                    found = [policy(batch.tokens, batch.mask)[0] - batch.sampler_logps for batch in batches]
                differences.append(max(float(x.abs().max()) for x in found))
            if not resample:  # replacements are of the latest policy
                assert differences[0] < 1e-4
            assert phase == 0 or differences[1] > 1e-3

    def test_where_nothing_moves_it_changes_nothing(self, model: str, many_prompts: str, tmp_path: Path):
        found = [
            self.fit(model, many_prompts, tmp_path, HFRollout(max_tokens=4, one_phase_ahead=ahead), lr=0.0)
            for ahead in (False, True)
        ]
        for plain, ahead in zip(*(watch.batches for watch in found), strict=True):
            assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(plain, ahead, strict=True))
            assert all(torch.equal(a.advantages, b.advantages) for a, b in zip(plain, ahead, strict=True))

    def test_the_engine_draws_while_the_policy_trains(self, model: str, many_prompts: str, tmp_path: Path):
        """Here it does not come to its end before an update of the phase before was made."""
        updated = threading.Event()

        class Waiting(ScriptedEngine):
            calls = 0

            def _generate(self, prompts: Any, *rest: Any) -> Any:
                self.calls += 1
                assert self.calls != 2 or updated.wait(60)
                yield from super()._generate(prompts, *rest)

        class Rollouts(ScriptedRollout):
            def make_engine(self, module: Any, context: int) -> Any:
                return Waiting(context)

            def on_train_batch_end(self, *_: Any) -> None:
                updated.set()

        module = PolicyModule(model, max_mismatch=100)
        data = RolloutData(Source(many_prompts), reward=even_first_digit, prompts_per_phase=8)
        rollout = Rollouts(max_tokens=12, one_phase_ahead=True)
        quiet_trainer(tmp_path, max_epochs=2, callbacks=[rollout]).fit(module, data)
        assert updated.is_set()

    @pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 4}])
    def test_no_phase_is_drawn_that_nobody_trains_on(
        self, end: dict[str, int], model: str, many_prompts: str, tmp_path: Path
    ):
        asked: list[int] = []

        class Counting(ScriptedEngine):
            def _generate(self, prompts: Any, *rest: Any) -> Any:
                asked.append(len(prompts))
                yield from super()._generate(prompts, *rest)

        class Rollouts(ScriptedRollout):
            def make_engine(self, module: Any, context: int) -> Any:
                return Counting(context)

        module = PolicyModule(model, max_mismatch=100)
        data = RolloutData(Source(many_prompts), reward=even_first_digit, prompts_per_phase=8, updates_per_phase=2)
        rollout = Rollouts(max_tokens=12, one_phase_ahead=True)
        quiet_trainer(tmp_path, callbacks=[rollout], **end).fit(module, data)
        assert asked == [8, 8]

    def test_an_engine_at_work_is_stopped_before_it_is_closed(self, model: str, many_prompts: str, tmp_path: Path):
        events = []

        class Endless(ScriptedEngine):
            calls = 0

            def _generate(self, prompts: Any, n: int, sampling: Any, seeds: Any, deadline: Any) -> Any:
                self.calls += 1
                try:
                    while self.calls == 2:
                        deadline.check(lambda: "a prompt")
                finally:
                    events.append("stopped")
                yield from super()._generate(prompts, n, sampling, seeds, deadline)

            def close(self) -> None:
                events.append("closed")

        class Rollouts(ScriptedRollout):
            def make_engine(self, module: Any, context: int) -> Any:
                return Endless(context)

            def on_train_batch_end(self, *_: Any) -> None:
                raise RuntimeError("the update fails")

        module = PolicyModule(model, max_mismatch=100)
        data = RolloutData(Source(many_prompts), reward=even_first_digit, prompts_per_phase=8)
        with pytest.raises(RuntimeError, match="the update fails"):
            quiet_trainer(tmp_path, max_epochs=2, callbacks=[Rollouts(max_tokens=12, one_phase_ahead=True)]).fit(
                module, data
            )
        assert events == ["stopped", "stopped", "closed"]

    @pytest.mark.parametrize("resample", [False, True])
    def test_nobody_disturbs_an_engine_at_work(self, resample: bool, model: str, many_prompts: str, tmp_path: Path):
        """Neither the next weights, nor the canary, nor validation."""

        class Single(ScriptedEngine):
            busy = False

            def load_weights(self, weights: Any) -> None:
                assert not self.busy
                super().load_weights(weights)

            def _generate(self, *arguments: Any) -> Any:
                assert not self.busy
                self.busy = True
                time.sleep(0.2)
                yield from super()._generate(*arguments)
                self.busy = False

        class Rollouts(ScriptedRollout):
            def make_engine(self, module: Any, context: int) -> Any:
                return Single(context)

            def canary(self, trainer: Any, pl_module: Any, engine: Any) -> None:
                engine.generate([[3]], 1, self.sampling, [0])

        module = PolicyModule(model, GRPO(), max_mismatch=100)
        data = RolloutData(
            Source(many_prompts),
            val=Source(many_prompts),
            reward=even_first_digit,
            prompts_per_phase=8,
            resample_ties=resample,
        )
        rollout = Rollouts(max_tokens=12, one_phase_ahead=True)
        quiet_trainer(tmp_path, max_epochs=3, callbacks=[rollout]).fit(module, data)

    def test_its_ledger_adds_up_and_its_rewards_come_ahead(self, model: str, many_prompts: str, tmp_path: Path):
        """Also where validation waits for the engine: no second is counted twice."""
        command = [
            "fit", f"--model.model={model}", "--data=RolloutData", f"--data.train.path={many_prompts}",
            f"--data.val.path={many_prompts}", "--data.reward=test_overlap.slow", "--data.prompts_per_phase=8",
            "--rollout.max_tokens=4", "--rollout.one_phase_ahead=true", "--trainer.max_epochs=3",
            "--trainer.accelerator=cpu", "--trainer.check_val_every_n_epoch=1", f"--run_dir={tmp_path}",
        ]  # fmt: skip
        main(command)
        with open(tmp_path / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/seconds_other")]
        assert len(rows) == 3
        assert all(float(row["train/seconds_other"]) >= 0 for row in rows)
        rewards = [float(row["train/seconds_reward"]) for row in rows]
        assert rewards[0] >= 0.3 > max(rewards[1:])

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_two_processes_draw_what_one_does(self, strategy: str, model: str, many_prompts: str, tmp_path: Path):
        command = [
            "fit", f"--model.model={model}", "--data=RolloutData", f"--data.train.path={many_prompts}",
            "--data.reward=test_invariance.even_first_digit", "--data.prompts_per_phase=8", "--rollout.max_tokens=4",
            "--rollout.one_phase_ahead=true", "--trainer.max_epochs=3", "--trainer.accelerator=cpu",
            "--samples.every_n_phases=1", "--model.optimizer=AdamW", "--model.optimizer.lr=1e-2",
        ]  # fmt: skip
        main([*command, f"--run_dir={tmp_path / 'one'}"])
        main([*command, f"--run_dir={tmp_path / 'still'}", "--model.optimizer.lr=0"])
        command += [f"--run_dir={tmp_path / 'two'}", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
        subprocess.run([sys.executable, "-m", "lit_grpo", *command], check=True, env=ENVIRONMENT, timeout=200)
        for phase in range(3):
            ours, theirs = (
                sorted((tmp_path / run / "samples" / f"train-{phase:05d}.jsonl").read_text().splitlines())
                for run in ("one", "two")
            )
            assert len(ours) == 16
            assert ours == theirs
        drawn = [(tmp_path / run / "samples" / "train-00002.jsonl").read_text() for run in ("one", "still")]
        assert drawn[0] != drawn[1]  # so it would be seen if two had not trained, or the engine had not been told

    def test_there_must_be_rollouts(self, model: str, many_prompts: str, tmp_path: Path):
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[HFRollout(max_tokens=4, one_phase_ahead=True)])
        with pytest.raises(UserError, match="one_phase_ahead: there are no rollouts to draw"):
            trainer.validate(PolicyModule(model), PromptData(val=Source(many_prompts), reward=even_first_digit))

    def test_it_wants_the_ratio_to_the_sampler(self, model: str, many_prompts: str, tmp_path: Path):
        data = RolloutData(Source(many_prompts), reward=even_first_digit)
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[HFRollout(max_tokens=4, one_phase_ahead=True)])
        with pytest.raises(UserError, match=r"one_phase_ahead: .* so the ratio must be to the sampler"):
            trainer.fit(PolicyModule(model, old_policy="trainer"), data)

    @pytest.mark.usefixtures("told_to_end")
    def test_told_to_end_it_saves_and_goes_on(
        self, model: str, many_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        command = [
            "fit", f"--model.model={model}", "--data=RolloutData", f"--data.train.path={many_prompts}",
            "--data.reward=test_invariance.even_first_digit", "--data.prompts_per_phase=8", "--rollout.max_tokens=4",
            "--rollout.one_phase_ahead=true", "--trainer.max_epochs=4", "--trainer.accelerator=cpu",
            "--samples.every_n_phases=1", f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last",
        ]  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 143
        monkeypatch.undo()
        main(command)
        samples = sorted((tmp_path / "run" / "samples").glob("train-*"))
        assert [len(path.read_text().splitlines()) for path in samples] == [16] * 4
        assert (tmp_path / "run" / "checkpoints" / "phase-00004.ckpt").exists()
