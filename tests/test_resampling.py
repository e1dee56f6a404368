"""Ties are replaced by groups of fresh prompts: 2-GRPO+RS."""

from __future__ import annotations

from typing import Any

import pytest
from test_data import connect
from test_invariance import ScriptedEngine, even_first_digit

from lit_grpo.data import RolloutData, Sample, Source
from lit_grpo.data.types import Completion
from lit_grpo.engines import Sampling
from lit_grpo.errors import UserError
from lit_grpo.losses import DPO, GRPO, TwoGRPO

SAMPLING = Sampling(max_tokens=12)


class CountingEngine(ScriptedEngine):
    """Counts the completions it was asked for."""

    asked = 0

    def _generate(self, prompts: Any, n: int, *rest: Any) -> Any:
        self.asked += len(prompts) * n
        return super()._generate(prompts, n, *rest)


def collected(model: str, prompts: str, phase: int = 0, loss: Any = None, **options: Any) -> tuple[RolloutData, int]:
    defaults = {"prompts_per_phase": 8, "resample_ties": True, "reward": even_first_digit}
    data = connect(RolloutData(Source(prompts), **(defaults | options)), model, loss or TwoGRPO())
    engine = CountingEngine(64)
    data.collect(engine, SAMPLING, phase)
    return data, engine.asked


def prompts_of(data: RolloutData) -> list[str]:
    return [sample.prompt for sample in data.samples[:: data.group_size]]


@pytest.mark.parametrize("loss", [TwoGRPO, GRPO, DPO])
def test_every_group_has_an_advantage(model: str, many_prompts: str, loss: type):
    data, asked = collected(model, many_prompts, loss=loss())
    assert data.stats["informative_share"] == data.stats["trained_share"] == 1
    assert data.stats["resampled_share"] > 0
    assert asked == data.rollouts == len(data.samples) > 16
    assert data.stats["rollouts_per_group"] == data.rollouts / 16


def test_fresh_prompts_are_none_of_the_phase_and_come_once(model: str, many_prompts: str):
    data, _ = collected(model, many_prompts)
    assert len(set(prompts_of(data))) == len(prompts_of(data))
    assert prompts_of(data)[:8] == [prompt.text for prompt in data.phase_prompts(0)]


def test_groups_that_were_informative_keep_their_place(model: str, many_prompts: str):
    plain, _ = collected(model, many_prompts, resample_ties=False)
    data, _ = collected(model, many_prompts)
    kept = {tuple(row.tolist()) for batch in plain.sampled_batches() for row in batch.tokens[batch.advantages != 0]}
    rows = {tuple(row.tolist()) for batch in data.sampled_batches() for row in batch.tokens}
    unpadded = lambda rows: {tuple(t for t in row if t) for row in rows}  # noqa: E731
    assert unpadded(kept) < unpadded(rows)


def test_the_same_again_and_another_in_the_next_phase(model: str, many_prompts: str):
    first, again = collected(model, many_prompts)[0], collected(model, many_prompts)[0]
    assert first.samples == again.samples
    assert first.samples != collected(model, many_prompts, phase=1)[0].samples


def test_reward_is_that_of_the_first_draw(model: str, many_prompts: str):
    """Groups kept for their difference have a mean reward of one half, whatever the policy is worth."""
    plain = collected(model, many_prompts, 2, resample_ties=False)[0]
    data = collected(model, many_prompts, 2)[0]
    assert data.stats["reward"] == plain.stats["reward"] != 0.5


@pytest.mark.parametrize("budget", [16, 18, 22])
def test_the_budget_holds(model: str, many_prompts: str, budget: int):
    data, asked = collected(model, many_prompts, max_rollouts=budget)
    assert asked == data.rollouts == budget
    assert data.stats["informative_share"] < 1


def test_it_ends_where_there_is_nothing_to_find(model: str, many_prompts: str, few_prompts: str):
    def nothing(samples: list[Sample]) -> list[float]:
        return [0.0] * len(samples)

    data, asked = collected(model, many_prompts, reward=nothing)
    assert asked == 64 * 2  # each prompt once; the budget of 8 x 16 is the same
    assert data.stats["resampled_share"] == data.stats["informative_share"] == 0
    assert collected(model, few_prompts, reward=nothing)[1] == 16  # there are no other prompts


@pytest.mark.parametrize(
    "options", [{"max_rollouts": 15}, {"max_rollouts": 100, "resample_ties": False}, {"max_rollouts": 0}]
)
def test_a_budget_that_means_nothing_is_refused(model: str, many_prompts: str, options: dict[str, Any]):
    with pytest.raises(UserError, match=r"max_rollouts: got .* at least the 16 .* resample_ties: true"):
        collected(model, many_prompts, **options)


def test_groups_that_were_cut_off_are_replaced_too(model: str, many_prompts: str):
    """With overlong filtering their advantages do not count."""

    class CutOff(CountingEngine):
        def complete(self, seed: int) -> Completion:
            completion = super().complete(seed)
            completion.truncated = seed % 8 < 4  # mostly both of a group
            return completion

    data = connect(
        RolloutData(Source(many_prompts), prompts_per_phase=8, resample_ties=True, reward=even_first_digit),
        model,
        TwoGRPO(mask_truncated=True),
    )
    data.collect(CutOff(64), SAMPLING, 0)
    assert data.stats["informative_share"] == 1
    plain, _ = collected(model, many_prompts)
    assert data.stats["rollouts_per_group"] > plain.stats["rollouts_per_group"]
