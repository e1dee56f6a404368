"""What a run logs about its loss, through the real Trainer: every metric is checked against its own computation."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import quiet_trainer
from test_invariance import even_first_digit

from callbacks import HFRollout
from lit_grpo.data import PreferenceData, Preferences, RolloutData, Source
from lit_grpo.data.collate import Row, checked_select, collate, make_rows, mismatched_rows
from lit_grpo.data.types import Completion, Group
from lit_grpo.errors import UserError
from lit_grpo.losses import (
    DAPO,
    DPO,
    GRPO,
    KL,
    KTO,
    SFT,
    LinearSchedule,
    Loss,
    LossInputs,
    LossOutput,
    TwoGRPO,
    WeightedSum,
    mean_over,
)
from lit_grpo.module import PolicyModule
from lit_grpo.policy import load_policy, load_reference


def run(model: str, prompts: str, folder: Path, loss: Loss, rollout: dict | None = None, **options) -> dict[str, float]:
    """Metrics of one phase of eight prompts."""
    module = PolicyModule(model, loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), **options.pop("module", {}))
    data = {"group_size": 4, "prompts_per_phase": 8, **options.pop("data", {})}
    trainer = quiet_trainer(
        folder, max_epochs=1, callbacks=[HFRollout(**{"max_tokens": 6, **(rollout or {})})], **options
    )
    trainer.fit(module, datamodule=RolloutData(Source(prompts), reward=even_first_digit, **data))
    return {name.removeprefix("train/"): value.item() for name, value in trainer.callback_metrics.items()}


class Recorder(GRPO):
    """Keeps what it was given."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.seen: list[LossInputs] = []

    def forward(self, inputs: LossInputs) -> LossOutput:
        self.seen.append(inputs)
        return super().forward(inputs)


def test_ratios_and_clips_are_those_of_all_tokens(model: str, few_prompts: str, tmp_path: Path):
    loss = Recorder(clip_low=0.02, clip_high=0.02)
    found = run(model, few_prompts, tmp_path, loss, data={"updates_per_phase": 2}, accumulate_grad_batches=2)
    later = [x for x in loss.seen if x.old_logps is not None]
    assert len(later) == 2
    ratio = torch.cat([(x.logps - x.old_logps)[x.mask].exp().detach() for x in later])
    advantages = torch.cat([x.advantages[:, None].expand_as(x.mask)[x.mask] for x in later])
    assert found["ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-6)
    assert found["ratio_min"] == ratio.min().item() < 1
    assert found["ratio_max"] == ratio.max().item() > 1
    clipped = (ratio > 1.02) & (advantages > 0), (ratio < 0.98) & (advantages < 0)
    assert found["clip_fraction_high"] == pytest.approx(clipped[0].float().mean().item(), rel=1e-6)
    assert found["clip_fraction_low"] == pytest.approx(clipped[1].float().mean().item(), rel=1e-6)
    assert found["clip_fraction_high"] + found["clip_fraction_low"] > 0
    assert found["clamped_share"] == 0


def test_dropped_rows_do_not_dilute_a_mean(model: str, few_prompts: str, tmp_path: Path):
    """The ratio of the first update is 1 on every row that was forwarded, few though they are."""

    class Ones(TwoGRPO):
        def forward(self, inputs: LossInputs) -> LossOutput:
            out = super().forward(inputs)
            out.metrics["one"] = mean_over(torch.ones_like(inputs.logps), inputs.mask)
            out.metrics["micro_batch_max"] = torch.tensor(float(len(inputs.mask)))
            return out

    found = run(model, few_prompts, tmp_path, Ones(), data={"group_size": 2}, accumulate_grad_batches=2)
    assert found["trained_share"] < 1
    assert found["one"] == 1
    assert found["micro_batch_max"] >= 16 * found["trained_share"] / 2


def test_advantages_and_lengths(model: str, few_prompts: str, tmp_path: Path):
    loss = Recorder(scale="none")
    loss.drops_zero_advantages = False
    found = run(model, few_prompts, tmp_path, loss)
    (x,) = loss.seen
    assert found["advantage_mean"] == pytest.approx(0, abs=1e-12)
    assert found["advantage_std"] == pytest.approx(x.advantages.std(correction=0).item(), rel=1e-6)
    assert found["completion_tokens"] == pytest.approx(x.mask.sum().item() / 32)
    assert 0 < found["truncated_share"] < 1
    share = (x.advantages != 0).float().mean().item()  # of binary rewards all in a group or none
    assert found["informative_share"] == pytest.approx(share, abs=1e-6)


def test_entropy_is_logged_when_asked(model: str, few_prompts: str, tmp_path: Path):
    """A random model of 16 tokens is near the uniform distribution, whose entropy is ln 16."""
    assert "entropy" not in run(model, few_prompts, tmp_path, GRPO())
    found = run(model, few_prompts, tmp_path, GRPO(), module={"log_entropy": True})
    assert 0.8 * math.log(16) < found["entropy"] < math.log(16)
    bonus = run(model, few_prompts, tmp_path, GRPO(entropy_bonus=0.1))  # every row is forwarded, tied ones too
    assert bonus["entropy"] == pytest.approx(found["entropy"], rel=0.01)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_the_tempered_distribution(model: str, temperature: float):
    policy = load_policy(model).double()
    tokens, mask = torch.randint(2, 12, (3, 7)), torch.rand(3, 6) < 0.6
    _, entropy = policy(tokens, mask, temperature, entropy=True)
    logits = policy.lm(tokens).logits[:, :-1] / temperature
    plain = torch.distributions.Categorical(logits=logits).entropy() * mask
    torch.testing.assert_close(entropy, plain, rtol=0, atol=1e-12)
    entropy.sum().backward()
    found = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    plain.sum().backward()
    for a, b in zip(found, [p.grad for p in policy.parameters()], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_sampler_logps_reach_the_mismatch_weight(model: str, few_prompts: str, tmp_path: Path):
    """HFEngine runs the policy itself: the weights are 1."""
    found = run(model, few_prompts, tmp_path, GRPO(tis_clip=2.0))
    assert found["tis_weight"] == pytest.approx(1, abs=1e-4)
    assert found["tis_clip_fraction"] == 0


def test_a_sum_logs_its_losses(model: str, few_prompts: str, tmp_path: Path):
    loss = WeightedSum([TwoGRPO(), SFT(), KL()], [1.0, LinearSchedule(0.5, 0.0, 10), 0.1])
    found = run(model, few_prompts, tmp_path, loss, data={"group_size": 2}, accumulate_grad_batches=2)
    parts = found["loss_TwoGRPO"] + 0.5 * found["loss_SFT"] + 0.1 * found["loss_KL"]
    assert found["loss"] == pytest.approx(parts, rel=1e-5)
    assert found["loss_KL"] == found["kl"] == 0  # the policy is the reference still
    assert found["nll"] > 0


def test_statistics_of_a_sum_are_those_of_its_first_loss(model: str, few_prompts: str, tmp_path: Path):
    both = run(model, few_prompts, tmp_path, WeightedSum([GRPO(), KL()]))
    alone = run(model, few_prompts, tmp_path, GRPO())
    for name in ("informative_share", "advantage_mean", "advantage_std"):
        assert both[name] == alone[name]
    assert 0 < both["informative_share"] < 1


def test_a_loss_that_is_no_scalar_is_said(model: str, few_prompts: str, tmp_path: Path):
    class Wide(GRPO):
        def forward(self, inputs: LossInputs) -> LossOutput:
            return LossOutput(inputs.logps.sum(-1))

    loss = Wide()
    loss.drops_zero_advantages = False
    with pytest.raises(UserError, match=r"Wide.forward returned a loss of shape \[32\], expected a scalar"):
        run(model, few_prompts, tmp_path, loss)


def test_schedules_read_the_optimizer_step(model: str, few_prompts: str, tmp_path: Path):
    loss = Recorder()
    run(model, few_prompts, tmp_path, loss, data={"updates_per_phase": 4}, accumulate_grad_batches=2)
    assert [x.step for x in loss.seen] == [0, 0, 1, 1, 2, 2, 3, 3]


class TestTruncated:
    def test_have_no_advantage(self):
        group = Group([1], [Completion([2, 3], truncated=True), Completion([4, 0])], [0.0, 1.0])
        for loss, expected in (
            (DAPO(), [0, 1]),
            (DAPO(mask_truncated=False), [-1, 1]),
            (WeightedSum([DAPO(), SFT()]), [[0, 0], [1, 1]]),
        ):
            rows = make_rows([group], *checked_select(loss, torch.tensor([group.rewards])), loss)
            assert [row.advantage for row in rows] == expected
            assert [row.silent for row in rows] == [loss.masks_truncated, False]

    def test_of_a_pair_leave_no_pair(self):
        loss = WeightedSum([DPO(), DAPO()])
        for cut in range(2):
            completions = [Completion([2, 3], truncated=cut == 0), Completion([4, 0], truncated=cut == 1)]
            rows = make_rows(
                [Group([1], completions, [1.0, 0.0])], *checked_select(loss, torch.tensor([[1.0, 0.0]])), loss
            )
            advantages = torch.tensor([row.advantage for row in rows])
            x = LossInputs(-torch.rand(2, 2), torch.ones(2, 2).bool(), advantages, ref_logps=torch.zeros(2, 2))
            assert loss(x).metrics["loss_DPO"] == 0

    def test_carry_no_signal(self, model: str, few_prompts: str, tmp_path: Path):
        found = run(model, few_prompts, tmp_path, DAPO(), {"max_tokens": 1})
        assert found["truncated_share"] > 0.9
        assert found["informative_share"] < 0.2

    def test_are_not_forwarded(self, model: str, few_prompts: str, tmp_path: Path):
        cut = run(model, few_prompts, tmp_path, DAPO(), {"max_tokens": 3})
        kept = run(model, few_prompts, tmp_path, DAPO(mask_truncated=False), {"max_tokens": 3})
        assert cut["truncated_share"] == kept["truncated_share"] > 0.5
        assert cut["trained_share"] < kept["trained_share"] - 0.3


class TestKLBaseline:
    ROWS = tuple(Row([i], Completion([5 + i, j]), 1.0) for i in (2, 3, 3, 4) for j in (1, 0))

    def test_mismatched_rows_by_hand(self):
        # Groups of two, the second and third with one prompt: each takes the next group with another, row by row.
        found = [(row.prompt_ids[0], row.completion.token_ids) for row in mismatched_rows(self.ROWS, 2)]
        assert found == [(2, [8, 1]), (2, [8, 0]), *2 * [(3, [9, 1]), (3, [9, 0])], (4, [7, 1]), (4, [7, 0])]

    def test_one_prompt_alone_is_refused(self):
        with pytest.raises(
            UserError, match=r"needs completions of other prompts.*Raise data.init_args.prompts_per_phase"
        ):
            mismatched_rows(self.ROWS[:2], 1)

    def test_is_the_mean_log_ratio_of_mismatched_completions(self, model: str):
        """Claim C22: and matched ones would give another number."""
        module = PolicyModule(model, KTO())
        module.policy, module.reference = load_policy(model), load_reference(model)
        module._trainer = SimpleNamespace(
            strategy=SimpleNamespace(
                reduce=lambda x, reduce_op: x, precision_plugin=SimpleNamespace(forward_context=nullcontext)
            )
        )
        rows = mismatched_rows(self.ROWS, 2)
        batches = [collate(rows[i : i + 4], 8, 16) for i in (0, 4)]
        assert module.estimate_kl_baseline(batches).item() == 0  # the policy is the reference

        with torch.no_grad():
            for p in module.policy.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))

        def log_ratio(row: Row) -> float:
            ids = torch.tensor([row.prompt_ids + row.completion.token_ids])
            total = 0.0
            for lm, sign in ((module.policy.lm, 1), (module.reference.lm, -1)):
                logps = lm(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
                total += sign * logps[len(row.prompt_ids) - 1 :].sum().item()
            return total

        expected = sum(map(log_ratio, rows)) / 8
        assert module.estimate_kl_baseline(batches).item() == pytest.approx(expected, abs=1e-5)
        assert sum(map(log_ratio, self.ROWS)) / 8 != pytest.approx(expected, abs=1e-3)

    def test_a_process_with_one_prompt_is_refused(self, model: str, few_prompts: str, tmp_path: Path):
        with pytest.raises(UserError, match="one step has a single prompt on this process"):
            run(model, few_prompts, tmp_path, KTO(), data={"prompts_per_phase": 1})

    def test_is_logged(self, model: str, few_prompts: str, tmp_path: Path):
        assert run(model, few_prompts, tmp_path, KTO())["kl_baseline"] == 0


def test_offline_data_has_no_old_policy_to_score(model: str, tmp_path: Path):
    row = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    module = PolicyModule(model, DPO(), old_policy="trainer")
    data = PreferenceData(Preferences(str(tmp_path / "pairs.jsonl")), batch_size=1)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 1


@pytest.mark.parametrize("loss", [DPO(), KTO(), SFT()])
def test_offline_runs_log_their_data(model: str, tmp_path: Path, loss: Loss):
    rows = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(i)} for i in range(1, 5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[HFRollout(max_tokens=4)])
    trainer.fit(PolicyModule(model, loss), datamodule=PreferenceData(Preferences(str(tmp_path / "pairs.jsonl")), 4))
    found = trainer.callback_metrics
    assert found["train/completion_tokens"] == 2
    assert found["train/truncated_share"] == 0
    assert found["train/informative_share"] == 1
    assert found["train/advantage_mean"] == (0.5 if isinstance(loss, SFT) else 0)
    assert found["train/seconds"] > 0
