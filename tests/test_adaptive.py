"""Groups that grow where their first two completions are tied: what it does to the expectation, and what is drawn."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import ENVIRONMENT, quiet_trainer
from lightning.pytorch.callbacks import Callback
from test_data import connect
from test_invariance import Module, ScriptedEngine, ScriptedRollout, even_first_digit, furthest
from test_theory import MASK, PASS_RATES, close, logits_of, sequence_logps, vector
from torch import Tensor

from lit_grpo.data import RolloutData, Sample, Source
from lit_grpo.engines import Sampling, full_weights
from lit_grpo.errors import UserError
from lit_grpo.losses import GRPO, RLOO, SFT, AdaptiveGRPO, Loss, LossInputs, TwoGRPO, WeightedSum
from lit_grpo.policy import load_policy
from lit_grpo.theory import adaptive_snr, informative_share, snr_per_rollout

NAN = math.nan


def drawn(values: Tensor, group_size: int) -> Tensor:
    """Every group that can be drawn, as numbers ``[N, G]`` of values; -1 where the first two differ."""
    pairs = torch.cartesian_prod(*[torch.arange(len(values))] * 2)
    differ = values[pairs[:, 0]] != values[pairs[:, 1]]
    others = torch.cartesian_prod(*[torch.arange(len(values))] * (group_size - 2)).view(-1, group_size - 2)
    short = torch.cat([pairs[differ], torch.full((int(differ.sum()), group_size - 2), -1)], -1)
    return torch.cat([short, *(torch.cat([p.expand(len(others), 2), others], -1) for p in pairs[~differ])])


def of_drawn(table: Tensor, groups: Tensor, otherwise: float) -> Tensor:
    """Look up what is said of each value, ``otherwise`` where nothing was drawn."""
    return torch.where(groups >= 0, table[groups.clamp(min=0)], otherwise)


class ResultingGroup(Loss):
    """What is biased: another loss's advantages of whatever was drawn."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        pair = torch.nn.functional.pad(self.loss.select(rewards[:, :2])[1], (0, rewards.shape[1] - 2))
        whole = self.loss.select(rewards.nan_to_num())[1]
        return self.loss.select(rewards.nan_to_num())[0], torch.where(
            rewards.isnan().any(-1, keepdim=True), pair, whole
        )

    def forward(self, inputs: LossInputs) -> Any:
        raise NotImplementedError


def slopes(loss: Loss, group_size: int) -> Tensor:
    """The c of E[sum A_i s_i] / G = c grad p, for each pass rate, by enumeration.

    The score of a completion with reward r has the expectation (r - p) grad p / p (1 - p).
    """
    groups = drawn(vector(0, 1), group_size)
    rewards = of_drawn(vector(0, 1), groups, NAN)
    advantages = torch.cat([loss.select(part)[1] for part in rewards.split(2048)])
    found = []
    for p in PASS_RATES:
        chance = of_drawn(vector(1 - p, p), groups, 1.0).prod(-1)
        assert close(chance.sum(), 1)
        found.append(chance @ (advantages * (rewards.nan_to_num() - p)).sum(-1) / (group_size * p * (1 - p)))
    return torch.stack(found)


class TestExpectation:
    @pytest.mark.parametrize("group_size", [3, 4, 8, 16])
    def test_is_the_gradient_of_the_pass_rate(self, group_size: int):
        assert close(slopes(AdaptiveGRPO(), group_size), torch.ones(len(PASS_RATES)))

    @pytest.mark.parametrize("loss", [GRPO(), RLOO(), GRPO(scale="none")])
    @pytest.mark.parametrize("group_size", [4, 8])
    def test_normalising_within_what_was_drawn_is_biased(self, loss: Loss, group_size: int):
        """Its slope depends on the pass rate, even where that of groups that are always whole does not.

        (In groups of three any weight is right, as a whole one has one success or one failure.)
        """
        found = slopes(ResultingGroup(loss), group_size)
        assert found.max() / found.min() > 1.05

    @pytest.mark.parametrize("values", [[0, 1, 0, 1], [0, 1, 0.5, 1], [0.5, 0.5, -2, 7]])
    @pytest.mark.parametrize("aggregation", ["sequence_mean", "sequence_sum"])
    def test_is_that_of_pairs_with_a_real_policy(self, values: list[float], aggregation: Any):
        """Four sequences, three or fewer rewards, groups of four."""
        logits, rewards = logits_of(vector(0.26, 0.20, 0.10, 0.44)).requires_grad_(), vector(*values)

        def gradient(loss: Any, groups: Tensor) -> Tensor:
            """Of the expected loss: on-policy it is linear in the advantages, which take the chance of the group."""
            logps = sequence_logps(logits)
            chance = of_drawn((logps * MASK).sum(-1).exp().detach(), groups, 1.0).prod(-1)
            assert close(chance.sum(), 1)
            weights = loss.select(of_drawn(rewards, groups, NAN))[1] * chance[:, None]
            rows = groups.clamp(min=0).flatten()
            x = LossInputs(logps[rows], MASK[rows], weights.flatten(), total_rows=groups.shape[1])
            return torch.autograd.grad(loss(x).loss, logits)[0]

        pairs = torch.cartesian_prod(*[torch.arange(4)] * 2)
        expected = gradient(TwoGRPO(aggregation=aggregation), pairs)
        assert expected.abs().max() > 0.01
        assert close(gradient(AdaptiveGRPO(aggregation=aggregation), drawn(rewards, 4)), expected)

    def test_leaves_something_out_where_no_two_need_be_tied(self):
        """Three rewards in groups of three: all may differ once the first two do not come first."""
        probs, values = vector(0.2, 0.3, 0.5), vector(0, 1, 2)

        def weights(loss: Loss, groups: Tensor) -> Tensor:
            chance = of_drawn(probs, groups, 1.0).prod(-1)
            advantages = loss.select(of_drawn(values, groups, NAN))[1]
            mine = torch.stack([torch.where(groups == k, advantages, 0).sum(-1) for k in range(3)])
            return mine @ chance / groups.shape[1]

        pairs = weights(TwoGRPO(), torch.cartesian_prod(*[torch.arange(3)] * 2))
        assert not close(weights(AdaptiveGRPO(), drawn(values, 3)), pairs, 0.01)
        assert close(weights(AdaptiveGRPO(), drawn(values, 4)), pairs)


class TestAdvantages:
    def test_by_hand(self):
        """Six ordered ties among G = 4 with one success, four with two, twelve with three other equals of G = 5."""
        rewards = vector(0.2, 0.9, NAN, NAN, 0, 0, 1, 0, 1, 1, 0, 0, 5, 5, 5, 5).view(4, 4)
        expected = vector(-1, 1, 0, 0, -1 / 3, -1 / 3, 1, -1 / 3, 1, 1, -1, -1, 0, 0, 0, 0).view(4, 4)
        assert close(AdaptiveGRPO().select(rewards)[1], expected)
        five = AdaptiveGRPO().select(vector(1, 1, 0, 1, 1)[None])[1]
        assert close(five, vector(1, 1, -4, 1, 1)[None] / 4)

    def test_what_was_drawn_after_a_difference_does_not_count(self):
        assert AdaptiveGRPO().select(vector(1, 0, 0, 0)[None])[1].tolist() == [[1, -1, 0, 0]]

    def test_tolerance_is_that_of_pairs(self):
        rewards = vector(0.50, 0.52, 0.9, 0.53)[None]
        assert AdaptiveGRPO().select(rewards)[1].tolist() == [[-1, 1, 0, 0]]
        assert close(AdaptiveGRPO(tie_tolerance=0.05).select(rewards)[1], vector(-1, -1, 3, -1)[None] / 3)

    def test_groups_of_two_are_two_grpo(self):
        rewards = torch.rand(8, 2, generator=torch.Generator().manual_seed(0)).round(decimals=1)
        assert torch.equal(AdaptiveGRPO().select(rewards)[1], TwoGRPO().select(rewards)[1])

    def test_sums_and_terms_that_would_be_biased_are_refused(self):
        with pytest.raises(UserError, match="AdaptiveGRPO decides which completions are drawn"):
            WeightedSum([SFT(), AdaptiveGRPO()])
        for term in ("beta", "entropy_bonus"):
            with pytest.raises(TypeError, match=term):
                AdaptiveGRPO(**{term: 0.1})
        with pytest.raises(UserError, match="tie_tolerance: expected a number >= 0"):
            AdaptiveGRPO(tie_tolerance=-0.1)


class TestSignalToNoise:
    @pytest.mark.parametrize("group_size", [3, 4, 8])
    def test_is_that_of_the_loss(self, group_size: int):
        """Over all groups that are drawn: winners against losers, the squares, and the completions."""
        groups = drawn(vector(0, 1), group_size)
        rewards = of_drawn(vector(0, 1), groups, NAN)
        advantages = AdaptiveGRPO().select(rewards)[1] / group_size
        winners = (advantages * rewards.nan_to_num()).sum(-1)
        for p in PASS_RATES:
            chance = of_drawn(vector(1 - p, p), groups, 1.0).prod(-1)
            ratio = (chance @ winners) ** 2 / (chance @ advantages.square().sum(-1))
            rollouts, trained = (chance @ which.double().sum(-1) for which in (groups >= 0, advantages != 0))
            per_rollout, per_row = adaptive_snr(p, group_size)
            assert close(per_rollout, ratio / rollouts)
            assert close(per_row, ratio / trained)

    def test_lies_between_pairs_and_whole_groups(self):
        p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
        for group_size in (3, 4, 8, 16):
            found, whole = adaptive_snr(p, group_size)[0], (1 - 1 / group_size) * p * (1 - p)
            assert (snr_per_rollout(p, 2) < found).all()
            assert (found < whole).all()

    def test_numbers_of_the_documentation(self):
        p = 0.18
        assert close(snr_per_rollout(p, 2), 0.074, 5e-4)
        assert close(torch.stack(adaptive_snr(p, 4)), vector(0.098, 0.209), 6e-4)
        whole = 0.75 * p * (1 - p)
        assert close(vector(whole, whole / informative_share(p, 4)), vector(0.111, 0.202), 6e-4)

    def test_some_group_size_without_ado_is_as_good(self):
        """Whatever a trained row costs in rollouts, on one pass rate as on a mixture."""
        for p, weights in ((vector(0.05), vector(1)), (vector(0.5), vector(1)), (vector(0.02, 0.5), vector(3, 1))):
            variance = (weights @ (p * (1 - p)) / weights.sum()).item()
            sizes = range(2, 17)
            informative = [informative_share(p, size, weights).item() for size in sizes]
            adaptive = [[x.item() for x in adaptive_snr(p, size, weights)] for size in sizes[1:]]
            for cost in (0, 0.5, 1, 2, 4, 8, 16, 100):
                fixed = [
                    (1 - 1 / n) * variance / (1 + cost * share) for n, share in zip(sizes, informative, strict=True)
                ]
                assert max(1 / (1 / rollout + cost / row) for rollout, row in adaptive) < 1.01 * max(fixed)

    def test_of_nothing_and_of_histograms(self):
        per_rollout, per_row = adaptive_snr(vector(0, 0.5), 4)
        assert per_rollout[0] == 0
        assert per_row[0].isnan()
        one = adaptive_snr(0.3, 4)
        several = adaptive_snr(vector(0.3, 0.3), 4, vector(1, 3))
        assert close(torch.stack(several), torch.stack(one))

    @pytest.mark.parametrize("group_size", [2, 3.5, math.inf])
    def test_group_sizes_that_cannot_be(self, group_size: float):
        with pytest.raises(ValueError, match="`group_size` to be a whole number >= "):
            adaptive_snr(0.5, group_size)  # type: ignore[arg-type]


class RecordingEngine(ScriptedEngine):
    """Remembers what it was asked for: numbers of prompts and completions, and seeds."""

    def __init__(self, context: int) -> None:
        super().__init__(context)
        self.calls: list[tuple[int, int, list[int]]] = []

    def _generate(self, prompts: Any, n: int, sampling: Any, seeds: Any, deadline: Any) -> Any:
        self.calls.append((len(prompts), n, seeds))
        return super()._generate(prompts, n, sampling, seeds, deadline)


def collected(model: str, prompts: str, loss: Loss, **options: Any) -> tuple[RolloutData, RecordingEngine]:
    defaults = {"prompts_per_phase": 8, "group_size": 4, "reward": even_first_digit}
    data = connect(RolloutData(Source(prompts), **(defaults | options)), model, loss)
    engine = RecordingEngine(64)
    data.collect(engine, Sampling(max_tokens=12), 0)
    return data, engine


def rewards_of(samples: list[Sample]) -> list[float]:
    return [0.0 if s.reward is None else s.reward for s in samples]


class TestDrawing:
    def test_only_ties_are_drawn_whole(self, model: str, many_prompts: str):
        data, engine = collected(model, many_prompts, AdaptiveGRPO())
        (prompts, n, seeds), (tied, others, rest) = engine.calls
        first = torch.tensor(rewards_of(data.samples[:16])).view(8, 2)
        ties = (first[:, 0] == first[:, 1]).nonzero().flatten().tolist()
        assert (prompts, n, others) == (8, 2, 2)
        assert 0 < tied == len(ties) < 8
        assert rest == [seeds[i] + 2 for i in ties]
        assert data.rollouts == len(data.samples) == 16 + 2 * tied
        assert data.stats["extended_share"] == tied / 8
        assert data.stats["reward"] == pytest.approx(first.mean().item())  # ties are no random choice of prompts
        assert data.stats["tokens"] == sum(s.num_tokens for s in data.samples)

    def test_a_whole_group_is_what_would_have_been_drawn_at_once(self, model: str, many_prompts: str):
        adaptive, _ = collected(model, many_prompts, AdaptiveGRPO())
        whole, _ = collected(model, many_prompts, GRPO())
        groups = [whole.samples[i : i + 4] for i in range(0, 32, 4)]
        tied = [g for g in groups if g[0].reward == g[1].reward]
        assert adaptive.samples == [s for g in groups for s in g[:2]] + [s for g in tied for s in g[2:]]

    def test_what_trains_was_drawn_and_has_its_advantage(self, model: str, many_prompts: str):
        """Each row with an advantage is a completion of the groups above; the rest is not forwarded."""
        data, _ = collected(model, many_prompts, AdaptiveGRPO())
        (batch,) = data.sampled_batches()
        whole, _ = collected(model, many_prompts, GRPO())
        rewards = torch.tensor(rewards_of(whole.samples), dtype=torch.float64).view(8, 4)
        advantages = AdaptiveGRPO().select(rewards)[1]
        assert (batch.advantages != 0).all()
        assert batch.total_rows == 32
        assert sorted(batch.advantages.tolist()) == pytest.approx(sorted(advantages[advantages != 0].tolist()))
        lengths = [w.num_tokens for w, a in zip(whole.samples, advantages.flatten(), strict=True) if a != 0]
        assert sorted(batch.mask.sum(-1).tolist()) == sorted(lengths)
        assert data.stats["informative_share"] == (advantages != 0).any(-1).double().mean().item()

    def test_what_was_not_drawn_counts_as_long_as_what_was(self, model: str, many_prompts: str):
        data, _ = collected(model, many_prompts, AdaptiveGRPO(aggregation="token_mean"))
        first, rest = data.samples[:16], data.samples[16:]
        total = sum(s.num_tokens for s in first) + sum(s.num_tokens for s in rest)
        total += sum(
            a.num_tokens + b.num_tokens for a, b in zip(first[::2], first[1::2], strict=True) if a.reward != b.reward
        )
        assert data.sampled_batches()[0].total_tokens == total

    def test_a_tie_may_be_a_small_difference(self, model: str, many_prompts: str):
        def noisy(samples: list[Sample]) -> list[float]:
            return [0.5 + 1e-3 * s.num_tokens for s in samples]

        assert len(collected(model, many_prompts, AdaptiveGRPO(), reward=noisy)[0].samples) < 20
        data, engine = collected(model, many_prompts, AdaptiveGRPO(tie_tolerance=0.1), reward=noisy)
        assert engine.calls[1][0] == 8
        assert data.rollouts == 32

    def test_nothing_but_ties_and_micro_batches_to_fill(self, model: str, many_prompts: str):
        data = connect(
            RolloutData(
                Source(many_prompts), prompts_per_phase=2, group_size=3, reward=lambda samples: [0.0] * len(samples)
            ),
            model,
            AdaptiveGRPO(),
            accumulate=3,
        )
        data.collect(ScriptedEngine(64), Sampling(max_tokens=12), 0)
        assert [len(batch.tokens) for batch in data.sampled_batches()] == [1, 1, 1]
        assert not any(batch.advantages.any() for batch in data.sampled_batches())
        assert data.rollouts == 6
        assert data.stats["extended_share"] == 1


class TestMistakes:
    def test_of_sizes(self, model: str, many_prompts: str):
        with pytest.raises(UserError, match=r"group_size: AdaptiveGRPO draws 2 .* groups of 2\. Set group_size to 3"):
            collected(model, many_prompts, AdaptiveGRPO(), group_size=2)

    def test_of_resampling(self, model: str, many_prompts: str):
        with pytest.raises(UserError, match="resample_ties: AdaptiveGRPO draws more of the prompts that are tied"):
            collected(model, many_prompts, AdaptiveGRPO(), resample_ties=True)

    def test_of_drawing_ahead(self, model: str, many_prompts: str, tmp_path: Path):
        with pytest.raises(UserError, match="one_phase_ahead: AdaptiveGRPO draws the rest of a group once"):
            train(model, many_prompts, tmp_path, one_phase_ahead=True)


class Keep(Callback):
    """Takes what every phase sampled, and the weights in the end."""

    def __init__(self) -> None:
        self.samples: list[list[tuple[str, str]]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.samples.append([(s.prompt, s.completion) for s in trainer.datamodule.samples])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in full_weights(pl_module.policy)}


def train(model: str, prompts: str, folder: Path, processes: int = 1, **rollout: Any) -> tuple[Keep, dict[str, float]]:
    """Three phases of eight prompts, in groups of up to five, in float64."""
    module = Module(model, AdaptiveGRPO(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), max_mismatch=100)
    data = RolloutData(Source(prompts), reward=even_first_digit, prompts_per_phase=8, group_size=5, updates_per_phase=2)
    keep = Keep()
    trainer = quiet_trainer(
        folder,
        max_epochs=3,
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        accumulate_grad_batches=2,
        callbacks=[ScriptedRollout(max_tokens=12, **rollout), keep],
    )
    trainer.fit(module, datamodule=data)
    return keep, {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_a_run_again_and_one_in_two_processes_are_the_same(model: str, many_prompts: str, tmp_path: Path):
    (alone, metrics), (again, _) = (train(model, many_prompts, tmp_path) for _ in range(2))
    assert alone.samples == again.samples
    assert furthest(alone.weights, again.weights) == 0
    start = dict(full_weights(load_policy(model)))
    assert furthest(start, alone.weights) > 1e-3
    assert metrics["train/rollouts"] == sum(map(len, alone.samples))
    assert 3 * 16 < metrics["train/rollouts"] < 3 * 40

    job = json.dumps([model, many_prompts, str(tmp_path)])
    subprocess.run([sys.executable, __file__, job], check=True, timeout=300, env=ENVIRONMENT)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for phase, samples in enumerate(alone.samples):
        assert sorted(parts[0][0][phase] + parts[1][0][phase]) == sorted(samples)
    for _, weights, found in parts:
        assert furthest(weights, alone.weights) < 1e-12
        assert found["train/rollouts"] == metrics["train/rollouts"]
        assert found["train/extended_share"] == pytest.approx(metrics["train/extended_share"])


if __name__ == "__main__":
    model, prompts, folder = json.loads(sys.argv[1])
    keep, metrics = train(model, prompts, Path(folder), processes=2)
    rank = torch.distributed.get_rank()
    torch.save((keep.samples, keep.weights, metrics), Path(folder) / f"{rank}.pt")
