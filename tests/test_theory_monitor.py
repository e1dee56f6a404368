"""What TheoryMonitor measures, by hand-worked numbers, by enumeration, and against gradients of each half by itself."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from conftest import quiet_trainer
from lightning.pytorch.strategies import DDPStrategy
from test_invariance import ScriptedRollout, even_first_digit, furthest
from test_invariance import train as trained_weights
from torch import Tensor

from callbacks import TheoryMonitor
from callbacks.learning_curve import read_metrics
from lit_grpo import theory
from lit_grpo.__main__ import main
from lit_grpo.data import PreferenceData, Preferences, RolloutData, Sample, Source
from lit_grpo.data.collate import step_batches
from lit_grpo.errors import UserError
from lit_grpo.losses import DPO, GRPO, LossInputs, TwoGRPO
from lit_grpo.module import PolicyModule
from lit_grpo.policy import load_policy
from lit_grpo.sharding import FSDP2


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestEstimates:
    @pytest.mark.parametrize(("p", "n", "group_size"), [(0.3, 2, 2), (0.05, 16, 2), (0.7, 8, 4), (0.5, 6, 6)])
    def test_informative_share_is_unbiased(self, p: float, n: int, group_size: int):
        """Over all k of Binomial(n, p); the formula at k / n is not."""
        k = torch.arange(n + 1, dtype=torch.float64)
        chance = vector(*(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)))
        truth = theory.informative_share(p, group_size)
        torch.testing.assert_close(chance @ theory.estimated_informative_share(k, n, group_size), truth)
        assert chance @ theory.informative_share(k / n, group_size) < truth * 0.99
        if group_size == 2:
            torch.testing.assert_close(chance @ theory.informative_share(k / n, 2), truth * (1 - 1 / n))

    def test_informative_share_by_counting_groups(self):
        """All groups of three out of five completions, two of which are winners; and other numbers of completions."""
        groups = list(itertools.combinations([1, 1, 0, 0, 0], 3))
        mixed = sum(0 < sum(group) < 3 for group in groups) / len(groups)
        found = theory.estimated_informative_share(torch.tensor([2, 4]), torch.tensor([5, 4]), 3)
        torch.testing.assert_close(found, vector(mixed, 0))

    def test_snr_is_that_of_all_groups_that_completions_form(self):
        """Prompts with 1 and 3 winners of five, the second one twice as common: every group of three, of four."""
        weights = vector(1, 2)
        for size in (2, 3, 4):
            signal, share = 0.0, 0.0
            for weight, rewards in ((1 / 3, [1, 0, 0, 0, 0]), (2 / 3, [1, 1, 1, 0, 0])):
                groups = torch.tensor(list(itertools.combinations(rewards, size)), dtype=torch.float64)
                signal += weight * theory.contrastive_coefficient(groups).mean().item()
                share += weight * (groups.std(-1) > 0).double().mean().item()
            found = theory.estimated_snr(torch.tensor([1, 3]), 5, size, weights)
            assert [x.item() for x in found] == pytest.approx([signal**2 / share, (signal / share) ** 2])

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_snr_uses_the_whole_histogram_of_pass_rates(self, adaptive: bool):
        """Prompts of known pass rates, and all that eight completions of each may be, as often as they are."""
        p, share, k = vector(0.1, 0.6), vector(0.7, 0.3), torch.arange(9)
        ways = vector(*(math.comb(8, i) for i in range(9)))
        chance = share @ (ways * p[:, None] ** k * (1 - p[:, None]) ** (8 - k))
        exact = (
            theory.adaptive_snr if adaptive else lambda *a: (theory.snr_per_rollout(*a), theory.snr_per_trained_row(*a))
        )
        for size in (3, 4, 8):
            found = theory.estimated_snr(k, 8, size, chance, adaptive)
            torch.testing.assert_close(found, exact(p, size, share))

    def test_effective_pairs_by_pairing_up(self):
        """All ways to order six completions, two of them winners, and to cut them into three pairs."""
        orders = list(itertools.permutations([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
        mixed = sum(sum(order[i] != order[i + 1] for i in (0, 2, 4)) for order in orders) / len(orders)
        found = theory.effective_pairs(torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]))
        torch.testing.assert_close(found, vector(mixed))

    def test_effective_pairs_of_two_are_informative_groups(self):
        rewards = torch.tensor([[1.0, 0.0], [0.3, 0.7], [1.0, 1.0], [0.1 + 0.2, 0.3]], dtype=torch.float64)
        assert theory.effective_pairs(rewards).tolist() == [1, 1, 0, 0]

    @pytest.mark.parametrize("first", [1, 2])
    def test_signal_and_noise_are_unbiased(self, first: int):
        """Over all updates of four groups (so also of unequal halves), each of which is one of three gradients."""
        gradients, chance = vector(1, 0, -2, 1, 0.5, 3).view(3, 2), vector(0.5, 0.3, 0.2)
        mean = chance @ gradients
        variance = (chance @ gradients.square() - mean.square()).sum()
        total = torch.zeros(2, dtype=torch.float64)
        for groups in itertools.product(range(3), repeat=4):
            each = gradients[list(groups)] / 4
            a, b = each[:first].sum(0), each[first:].sum(0)
            total += chance[list(groups)].prod() * theory.signal_and_noise([(a[:1], b[:1]), (a[1:], b[1:])], first / 4)
        torch.testing.assert_close(total, torch.stack([mean.square().sum(), variance / 4]))

    @pytest.mark.parametrize("group_size", [2, 4])
    def test_ratio_is_that_of_theory_up_to_the_scale_of_scores(self, group_size: int):
        """Groups as theory models them: independent scores, of winners larger by a little, in many dimensions."""
        g = torch.Generator().manual_seed(0)
        p, difference, updates, groups, dimensions = 0.3, 0.5, 400, 400, 20
        rewards = (torch.rand(updates * groups, group_size, generator=g, dtype=torch.float64) < p).double()
        scores = torch.randn(updates * groups, group_size, dimensions, generator=g, dtype=torch.float64)
        scores[..., 0] += difference * rewards
        each = (GRPO().select(rewards)[1][..., None] * scores).mean(1).view(updates, 2, groups // 2, -1).sum(2) / groups
        signal, noise = torch.stack([theory.signal_and_noise([(a, b)], 0.5) for a, b in each]).mean(0)
        scale = difference**2 / dimensions
        expected = theory.snr_per_rollout(p, group_size) * scale
        assert (signal / noise / (groups * group_size)).item() == pytest.approx(expected.item(), rel=0.1)

    def test_mistakes(self):
        with pytest.raises(ValueError, match="2 <= group_size 4 <= completions"):
            theory.estimated_informative_share(torch.tensor([1]), 3, 4)
        with pytest.raises(ValueError, match="0 <= winners <= completions"):
            theory.estimated_informative_share(torch.tensor([4]), 3, 2)
        with pytest.raises(ValueError, match="3 <= group_size 2 <= completions"):
            theory.estimated_snr(torch.tensor([1]), 4, 2, adaptive=True)
        with pytest.raises(ValueError, match="2 <= group_size 8 <= completions"):
            theory.estimated_snr(torch.tensor([1]), 4, 8)
        with pytest.raises(ValueError, match=r"shape \[P, G\] with G >= 2, got \[3\]"):
            theory.effective_pairs(torch.zeros(3))
        with pytest.raises(ValueError, match=r"`share` above 0 and below 1, got 1"):
            theory.signal_and_noise([(torch.ones(1), torch.ones(1))], 1)


def a_phase(rewards: list[list[float]], rows: list[int]) -> Any:
    samples = [SimpleNamespace(reward=reward) for group in rewards for reward in group]
    prompts = [SimpleNamespace(row=row) for row in rows]
    return SimpleNamespace(draws_first=len(rewards[0]), samples=samples, phase_prompts=lambda phase: prompts)


class TestOfRewards:
    def test_by_hand(self):
        """Two groups of four; the second phase has the first one's prompts and a new one."""
        monitor = TheoryMonitor()
        first = monitor.of_rewards(a_phase([[1, 0, 0, 0], [1, 1, 1, 1]], [7, 3]), 0)
        assert first == pytest.approx(
            {
                "contrastive_coefficient": math.sqrt(3 / 16) / 2,
                "effective_pairs": 1,  # 1 x 3 / 3
                "informative_share_g2": 1 / 4,  # 3 of 6 pairs, none of 6
                "informative_share_g4": 1 / 2,
                "informative_share_at_mean": 1 - (5 / 8) ** 4 - (3 / 8) ** 4,
            }
        )
        second = monitor.of_rewards(a_phase([[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], [3, 5, 7]), 1)
        # Before: row 3 won 4 of 4, row 7 won 1 of 4, so that all its groups of four are mixed.
        assert second["informative_share_predicted"] == pytest.approx(1 / 2)
        third = monitor.of_rewards(a_phase([[0, 0, 0, 0]], [7]), 2)
        # Row 7 won 2 of 8 by now: C(6, 4) = 15 of C(8, 4) = 70 groups have no winner.
        assert third["informative_share_predicted"] == pytest.approx(1 - 15 / 70)

    def test_what_is_drawn_after_ties_does_not_count(self):
        """Replacements of them, or the rest of their groups."""
        data = a_phase([[1, 0], [1, 1]], [0, 1])
        data.samples += [SimpleNamespace(reward=1.0), SimpleNamespace(reward=0.0)]
        assert TheoryMonitor().of_rewards(data, 0)["effective_pairs"] == 1

    def test_rewards_between_0_and_1_have_no_pass_rate(self):
        found = TheoryMonitor().of_rewards(a_phase([[0.2, 0.7], [0.5, 0.5]], [0, 1]), 0)
        assert found == {"contrastive_coefficient": 0.25, "effective_pairs": 1}

    def test_visits_go_on_with_a_run(self):
        monitor, resumed = TheoryMonitor(), TheoryMonitor()
        monitor.of_rewards(a_phase([[1, 0]], [7]), 0)
        resumed.load_state_dict(monitor.state_dict())
        assert resumed.of_rewards(a_phase([[0, 0]], [7]), 1)["informative_share_predicted"] == 1


class Kept(TheoryMonitor):
    """Keeps the gradients of halves."""

    def on_train_start(self, *_: Any) -> None:
        self.kept: list[list[tuple[Tensor, Tensor]]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        whole = [p.grad.clone() for p in pl_module.policy.parameters()]
        self.kept.append([(a, g - a) for a, g in zip(self.first, whole, strict=True)])
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


def all_right(samples: list[Sample]) -> list[float]:
    return [1.0 for _ in samples]


def fit(
    model: str, prompts: str, folder: Path, monitor: TheoryMonitor, loss: Any = None, data: Any = None, **options: Any
) -> L.Trainer:
    module = PolicyModule(model, loss or GRPO(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), max_mismatch=100)
    data = data or RolloutData(Source(prompts), 12, 4, 2, reward=even_first_digit)
    settings = {"max_epochs": 1, "accumulate_grad_batches": 4} | options
    trainer = quiet_trainer(folder, callbacks=[monitor, ScriptedRollout(max_tokens=12)], **settings)
    trainer.fit(module, datamodule=data)
    return trainer


class TestRuns:
    @pytest.mark.parametrize("loss", ["2-grpo", "grpo token mean", "grpo kl", "dpo", "kto"])
    def test_the_update_is_the_same(self, model: str, many_prompts: str, tmp_path: Path, loss: str):
        without, with_it = (
            trained_weights(
                model, many_prompts, tmp_path, loss, updates=2, callbacks=more, accumulate_grad_batches=4,
                gradient_clip_val=0.01,
            )
            for more in ([], [TheoryMonitor()])
        )  # fmt: skip
        assert furthest(without, with_it) < 1e-12

    def test_halves_are_the_gradients_of_half_of_the_groups(self, model: str, many_prompts: str, tmp_path: Path):
        """Against rows put together here: the first update's first three groups, and its other three."""
        rows: list[Any] = []

        def seen(update: Any, *rest: Any) -> Any:
            rows.append(update)
            return step_batches(update, *rest)

        monitor, loss = Kept(), GRPO()
        with mock.patch("lit_grpo.data.rollouts.step_batches", seen):
            trainer = fit(model, many_prompts, tmp_path, monitor)
        policy = load_policy(model)
        for half, part in ((0, rows[0][:12]), (1, rows[0][12:])):
            (batch,) = step_batches(part, 1, loss, 24, 1, None, on_policy=True)
            policy.zero_grad()
            logps, _ = policy(batch.tokens, batch.mask)
            loss(LossInputs(logps, batch.mask, batch.advantages, total_rows=24)).loss.backward()
            alone = torch.cat([p.grad.flatten() for p in policy.parameters()])
            found = torch.cat([pair[half].flatten() for pair in monitor.kept[0]])
            assert alone.norm() > 0.01
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-6)

        metrics = trainer.callback_metrics
        signal, noise = torch.stack([theory.signal_and_noise(update, 0.5) for update in monitor.kept]).mean(0).tolist()
        assert noise > 0
        assert metrics["theory/gradient_signal"] == pytest.approx(signal, rel=1e-4, abs=1e-9)
        assert metrics["theory/gradient_noise"] == pytest.approx(noise, rel=1e-4)
        assert metrics["theory/snr_per_rollout"] == pytest.approx(signal / noise / 24, rel=1e-4)
        trained = metrics["train/trained_share"].item()
        assert metrics["theory/snr_per_trained_row"] == pytest.approx(signal / noise / 24 / trained, rel=1e-4)
        assert metrics["theory/informative_share_g4"] == pytest.approx(metrics["train/informative_share"].item())

    def test_a_phase_without_a_gradient_has_no_ratio(self, model: str, many_prompts: str, tmp_path: Path):
        data = RolloutData(Source(many_prompts), 8, reward=all_right)
        metrics = fit(model, many_prompts, tmp_path, TheoryMonitor(), TwoGRPO(), data).callback_metrics
        assert metrics["theory/gradient_signal"] == metrics["theory/gradient_noise"] == 0
        assert "theory/snr_per_rollout" not in metrics

    @pytest.mark.parametrize(
        ("options", "sizes", "message"),
        [
            ({"accumulate_grad_batches": 3}, {}, r"must be even, got 3\. Set it to 6\."),
            ({"accumulate_grad_batches": 1}, {}, r"must be even, got 1\. Set it to 2\."),
            ({"accumulate_grad_batches": 6}, {"prompts_per_phase": 3}, r"half of the 6 .* has only 2 rows"),
            ({"accumulate_grad_batches": 2}, {"prompts_per_phase": 1}, r"half of the 2 .* has only 0 rows"),
            ({}, {"group_size": 1}, r"group_size 2 or more; got RolloutData with 1"),
            ({"precision": "16-mixed"}, {}, r"got 1 processes, .*, precision 16-mixed"),
            ({"world_size": 2, "strategy": DDPStrategy()}, {}, r"got 2 processes, DDPStrategy"),
            ({"strategy": FSDP2()}, {}, r"got 1 processes, FSDP2"),
        ],
    )
    def test_what_cannot_be_halved_is_refused(self, options: dict[str, Any], sizes: dict[str, int], message: str):
        data: Any = RolloutData(Source(""), **({"prompts_per_phase": 4} | sizes))
        trainer = SimpleNamespace(
            **({"accumulate_grad_batches": 4, "world_size": 1, "strategy": None, "precision": "32-true"} | options),
            datamodule=data, global_rank=0, lightning_module=SimpleNamespace(loss=TwoGRPO(), share_prompts=False),
        )  # fmt: skip
        data.trainer, data.rows_per_prompt = trainer, data.group_size
        with pytest.raises(UserError, match=message):
            TheoryMonitor().setup(trainer, trainer.lightning_module, "fit")
        assert not data.halved

    def test_offline_data_are_refused(self):
        trainer: Any = SimpleNamespace(datamodule=PreferenceData(Preferences("")), accumulate_grad_batches=2)
        with pytest.raises(UserError, match=r"got PreferenceData\. Leave it out"):
            TheoryMonitor().setup(trainer, SimpleNamespace(loss=DPO()), "fit")

    def test_the_command_line_takes_it_by_name(self, command: list[str], tmp_path: Path):
        """Two passes over the prompts: in the second, something is known of them."""
        run = [*command, "--trainer.callbacks+=TheoryMonitor", "--trainer.accumulate_grad_batches=2"]
        run += [f"--run_dir={tmp_path / 'run'}", "--data.prompts_per_phase=64", "--trainer.max_epochs=2"]
        main(run)
        rows = [row for row in read_metrics(tmp_path / "run") if "theory/effective_pairs" in row]
        assert len(rows) == 2
        assert "theory/informative_share_predicted" not in rows[0]
        assert 0 <= rows[1]["theory/informative_share_predicted"] <= 1
        assert all(row["theory/gradient_noise"] > 0 and "theory/snr_per_rollout" in row for row in rows)
