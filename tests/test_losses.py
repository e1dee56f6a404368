"""Losses on hand-worked numbers. No model, no Lightning."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_grpo.errors import UserError
from lit_grpo.losses import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    KL,
    RLOO,
    SFT,
    CosineSchedule,
    DrGRPO,
    LinearSchedule,
    Loss,
    LossInputs,
    PolicyGradient,
    Reinforce,
    TwoGRPO,
)


def tokens(ratios: list[list[float]], advantages: list[float], **fields: object) -> LossInputs:
    """Completions whose tokens have these ratios to the old policy, in float64; 0 pads."""
    ratio = torch.tensor(ratios, dtype=torch.float64)
    logps = torch.where(ratio > 0, ratio, 1).log().requires_grad_()
    a = torch.tensor(advantages, dtype=torch.float64)
    return LossInputs(logps, ratio > 0, a, torch.zeros_like(ratio), **fields)  # type: ignore[arg-type]


def gradient(loss: Loss, x: LossInputs) -> list[list[float]]:
    return torch.autograd.grad(loss(x).loss, x.logps)[0].tolist()


def metric(loss: Loss, x: LossInputs, name: str) -> float:
    total, count = loss(x).metrics[name]
    return (total / count).item()


class TestAdvantages:
    def test_scales_by_hand(self):
        # Rewards 1, 0, 0, 0: mean 1/4; population variance 3/16, sample variance 1/4.
        rewards = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
        for scale, std in (("population", math.sqrt(3) / 4), ("sample", 1 / 2), ("none", 1.0)):
            expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]], dtype=torch.float64) / std
            torch.testing.assert_close(GRPO(scale=scale).select(rewards)[1], expected, rtol=1e-12, atol=0)

    def test_group_of_two_under_every_convention(self):
        # +-1, +-1/sqrt(2), +-1/2 for rewards 1 and 0: what frameworks differ by.
        rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        for loss, value in (
            (GRPO(), 1),
            (GRPO(scale="sample"), math.sqrt(0.5)),
            (GRPO(scale="none"), 0.5),
            (TwoGRPO(), 1),
        ):
            assert loss.select(rewards)[1][0].tolist() == pytest.approx([value, -value], rel=1e-12)

    @pytest.mark.parametrize("loss", [GRPO(), GRPO(scale="sample"), GRPO(scale="none")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @given(reward=st.floats(-1e3, 1e3), group_size=st.integers(2, 64))
    def test_equal_rewards_carry_exactly_no_signal(
        self, loss: GRPO, dtype: torch.dtype, reward: float, group_size: int
    ):
        # In float32 a group of equal 0.1s has a standard deviation that is not 0.
        assert not loss.select(torch.full((3, group_size), reward, dtype=dtype))[1].any()

    @given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=2))
    def test_two_grpo_is_the_sign_of_the_difference(self, rewards: list[float]):
        first, second = TwoGRPO().select(torch.tensor([rewards], dtype=torch.float64))[1][0].tolist()
        a, b = rewards
        assert first == (0 if abs(a - b) <= 1e-6 * max(abs(a), abs(b)) else 1 if a > b else -1)
        assert second == -first

    def test_two_grpo_is_grpo_at_two(self):
        rewards = torch.rand(100, 2, dtype=torch.float64)
        torch.testing.assert_close(TwoGRPO().select(rewards)[1], GRPO().select(rewards)[1], rtol=1e-9, atol=0)

    @pytest.mark.parametrize("loss", [GRPO(), GRPO(scale="sample")])
    @pytest.mark.parametrize("size", [1e-200, 1e-5, 1.0, 1e200])
    def test_rewards_of_any_size_are_told_apart(self, loss: GRPO, size: float):
        advantages = loss.select(torch.tensor([[0.0, size]], dtype=torch.float64))[1]
        torch.testing.assert_close(advantages, loss.select(torch.tensor([[0.0, 1.0]], dtype=torch.float64))[1])

    @pytest.mark.parametrize("scale", ["population", "sample", "none"])
    def test_rounding_is_no_difference(self, scale: str):
        assert not GRPO(scale=scale).select(torch.tensor([[0.3, 0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64))[1].any()
        assert not TwoGRPO().select(torch.tensor([[0.3, 0.1 + 0.2]], dtype=torch.float64))[1].any()
        sums = torch.stack([torch.tensor(0.1) + torch.tensor(0.6), torch.tensor(0.7)])  # float32, as reward models give
        assert not TwoGRPO().select(sums.double()[None])[1].any()

    def test_a_difference_beyond_rounding_is_one(self):
        assert TwoGRPO().select(torch.tensor([[1.0, 1.0 + 1e-5]], dtype=torch.float64))[1].tolist() == [[-1, 1]]

    def test_tie_tolerance(self):
        rewards = torch.tensor([[0.50, 0.52], [0.50, 0.60]], dtype=torch.float64)
        assert TwoGRPO(tie_tolerance=0.05).select(rewards)[1].tolist() == [[0, 0], [-1, 1]]

    @pytest.mark.parametrize(("loss", "size"), [(TwoGRPO(), 3), (TwoGRPO(), 1), (GRPO(), 1), (RLOO(), 1), (CISPO(), 1)])
    def test_wrong_group_size_names_the_key(self, loss: GRPO, size: int):
        with pytest.raises(UserError, match=r"data.init_args.group_size.*group_size to 2"):
            loss.select(torch.zeros(4, size))

    def test_batch_scale_by_hand(self):
        # Rewards 1, 0 | 4, 0: group means 0.5 and 2; sample variance of 1, 0, 4, 0 is (1 + 0 + 16 + 0 - 4 * 1.25^2) / 3.
        rewards = torch.tensor([[1.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
        expected = torch.tensor([[0.5, -0.5], [2.0, -2.0]], dtype=torch.float64) / math.sqrt((17 - 6.25) / 3)
        torch.testing.assert_close(GRPO(scale="batch").select(rewards)[1], expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize(("epsilon", "scale"), [(1e-4, "sample"), (1e-6, "sample"), (0.1, "population")])
    def test_epsilon_is_added_to_the_standard_deviation(self, epsilon: float, scale: str):
        rewards = torch.tensor([[0.3, 0.1, 0.7]], dtype=torch.float64)
        std = rewards.std(correction=int(scale == "sample"))
        expected = (rewards - rewards.mean()) / (std + epsilon)
        found = GRPO(scale=scale, epsilon=epsilon).select(rewards)[1]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


class TestClippedSurrogate:
    def test_by_hand(self):
        # One token each: ratio 1.5, 1.5, 0.5, 0.5 with advantages +1, -1, +1, -1 and clips 0.2 and 0.28.
        # min(r A, clip(r) A): 1.28 (clipped), -1.5 (kept), 0.5 (kept), -0.8 (clipped); mean -0.13, so the loss is +0.13.
        x = tokens([[1.5], [1.5], [0.5], [0.5]], [1, -1, 1, -1])
        loss = GRPO(clip_low=0.2, clip_high=0.28)
        assert loss(x).loss.item() == pytest.approx(0.13, abs=1e-12)
        # A clipped token has no gradient, the others have -A r / N.
        expected = [[0.0], [1.5 / 4], [-0.5 / 4], [0.0]]
        torch.testing.assert_close(gradient(loss, x), expected, rtol=1e-12, atol=1e-15)
        assert metric(loss, x, "clip_fraction_high") == metric(loss, x, "clip_fraction_low") == 0.25

    def test_dual_clip_by_hand(self):
        # Ratio 5 at advantage -1 costs 5; a dual clip at 3 caps it at 3, without gradient. Advantage +1 is not touched.
        x = tokens([[5.0], [1.1]], [-1, 1])
        assert GRPO()(x).loss.item() == pytest.approx((5 - 1.1) / 2, rel=1e-12)
        assert GRPO(dual_clip=3)(x).loss.item() == pytest.approx((3 - 1.1) / 2, rel=1e-12)
        assert gradient(GRPO(dual_clip=3), x) == [[0.0], [pytest.approx(-1.1 / 2)]]
        assert metric(GRPO(dual_clip=3), x, "clip_fraction_dual") == 0.5

    def test_on_policy_the_value_is_zero_and_the_gradient_is_not(self):
        """Claim C19. Ratio 1 and centred advantages; d loss / d logp_it = -A_i / (N |o_i|)."""
        x = tokens([[1, 0], [1, 1]], [1, -1])
        x.old_logps = None
        assert TwoGRPO()(x).loss.item() == pytest.approx(0, abs=1e-15)
        assert gradient(TwoGRPO(), x) == [[-1 / 2, 0], [1 / 4, 1 / 4]]


class TestAggregation:
    # Completions of one and three tokens, ratio 1, advantages 1 and 2: token values -1; -2 -2 -2.
    @pytest.mark.parametrize(
        ("loss", "value"),
        [
            (GRPO(), -(1 + 2) / 2),
            (GRPO(aggregation="token_mean"), -(1 + 6) / 4),
            (GRPO(aggregation="sequence_sum"), -(1 + 6) / 2),
            (GRPO(aggregation="constant", length=10), -(1 + 6) / 20),
            (DrGRPO(length=10), -(1 + 6) / 20),
            (DAPO(), -(1 + 6) / 4),
            (RLOO(), -(1 + 2) / 2),
            (GSPO(), -(1 + 2) / 2),
        ],
    )
    def test_by_hand(self, loss: Loss, value: float):
        assert loss(tokens([[1, 0, 0], [1, 1, 1]], [1, 2])).loss.item() == pytest.approx(value, rel=1e-12)

    def test_dropped_rows_stay_in_the_denominator(self):
        x = tokens([[1, 1]], [1], total_rows=4, total_tokens=10)
        assert GRPO()(x).loss.item() == -1 / 4
        assert GRPO(aggregation="token_mean")(x).loss.item() == pytest.approx(-2 / 10)

    @pytest.mark.parametrize(("aggregation", "length"), [("constant", None), ("token_mean", 5)])
    @pytest.mark.parametrize("kind", [GRPO, KL, SFT])
    def test_a_length_goes_with_constant_and_nothing_else(self, kind: type, aggregation: str, length: int | None):
        with pytest.raises(UserError, match=r"length: got .* Give the longest completion"):
            kind(aggregation=aggregation, length=length)


class TestSequenceRatios:
    def test_rloo_by_hand(self):
        # Token ratios 2 and 0.55: the completion's is 1.1, not clipped, although both tokens would be. d/dlogp = -A r / N.
        x = tokens([[2.0, 0.55], [1.0, 1.3]], [1, 1])
        assert RLOO()(x).loss.item() == pytest.approx(-(1.1 + 1.2) / 2, rel=1e-12)  # 1.3 is clipped at 1.2
        torch.testing.assert_close(gradient(RLOO(), x), [[-0.55, -0.55], [0.0, 0.0]], rtol=1e-12, atol=1e-15)
        assert metric(RLOO(), x, "clip_fraction_high") == 0.5

    @pytest.mark.parametrize("sign", [1, -1])
    def test_long_completions_stay_finite(self, sign: int):
        # A hundred tokens whose log-ratio is 20 each: the completion's would be e^2000.
        x = tokens([[math.exp(20)] * 100], [sign])
        assert metric(RLOO(), x, "clamped_sequences") == 1
        for loss in (RLOO(), GSPO(), GRPO(), CISPO()):
            assert loss(x).loss.isfinite()
            assert torch.tensor(gradient(loss, x)).isfinite().all()

    def test_rloo_advantages(self):
        # Rewards 3, 0, 0: the others' means are 0, 1.5, 1.5.
        assert RLOO().select(torch.tensor([[3.0, 0.0, 0.0]]))[1].tolist() == [[3.0, -1.5, -1.5]]

    def test_gspo_by_hand(self):
        # Geometric mean of 4 and 1/4 is 1; of 1.21 and 1.0, 1.1, clipped at 1.0004.
        x = tokens([[4.0, 0.25], [1.21, 1.0]], [1, 1])
        assert GSPO()(x).loss.item() == pytest.approx(-(1 + 1.0004) / 2, rel=1e-12)
        torch.testing.assert_close(gradient(GSPO(), x), [[-0.25, -0.25], [0.0, 0.0]], rtol=1e-12, atol=1e-15)


class TestUnclipped:
    def test_reinforce_by_hand(self):
        # -A times the sum of log-probs: -(ln 2 + ln 3) and + ln 2; the ratio plays no part.
        x = tokens([[2.0, 3.0], [2.0, 0]], [1, -1])
        assert Reinforce()(x).loss.item() == pytest.approx((-math.log(6) + math.log(2)) / 2, rel=1e-12)
        assert gradient(Reinforce(), x) == [[-0.5, -0.5], [0.5, 0]]

    def test_reinforce_has_the_gradient_of_the_surrogate_on_policy(self):
        x = tokens([[1, 1, 0], [1, 1, 1]], [0.7, -0.7])
        x.old_logps = None
        for aggregation in ("sequence_mean", "token_mean", "sequence_sum"):
            plain = Reinforce(aggregation=aggregation)
            torch.testing.assert_close(
                gradient(plain, x), gradient(GRPO(aggregation=aggregation), x), rtol=1e-12, atol=0
            )

    def test_cispo_by_hand(self):
        # Ratios 8 and 0.5 with weights min(8, 5) and 0.5: every token keeps a gradient, -w A / tokens.
        x = tokens([[8.0], [0.5]], [1, -1])
        assert CISPO()(x).loss.item() == pytest.approx((-5 * math.log(8) + 0.5 * math.log(0.5)) / 2, rel=1e-12)
        assert gradient(CISPO(), x) == [[-2.5], [0.25]]
        assert metric(CISPO(), x, "weight_clip_fraction") == 0.5


class TestSharedOptions:
    def test_kl_terms_by_hand(self):
        # log ratio to the reference ln 2 on one token: k2 = (ln 2)^2 / 2, k3 = 1/2 - 1 + ln 2; ratio to the old policy 2.
        x = tokens([[2.0]], [0], ref_logps=torch.zeros(1, 1, dtype=torch.float64))
        k2, k3 = math.log(2) ** 2 / 2, math.log(2) - 0.5
        for estimator, value in (("k2", k2), ("k3", k3), ("k3_ratio", 2 * k3)):
            assert GRPO(beta=0.3, kl=estimator)(x).loss.item() == pytest.approx(0.3 * value, rel=1e-12)
            assert KL(estimator)(tokens([[2.0]], [1], ref_logps=x.ref_logps)).loss.item() == pytest.approx(value)

    @pytest.mark.parametrize("make", [lambda: GRPO(kl="k1"), lambda: DAPO(beta=0.1, kl="k1"), lambda: KL("k1")])
    def test_k1_is_refused_with_the_reason(self, make):
        with pytest.raises(UserError, match=r"k1 .* cannot be a loss term: its gradient.*is 0 in the mean.*Use k2"):
            make()

    def test_entropy_bonus_by_hand(self):
        # Advantages 0: what is left is minus 0.1 times the mean entropy of each completion, (1 + 3) / 2 and 5.
        entropy = torch.tensor([[1.0, 3.0], [5.0, 99.0]], dtype=torch.float64, requires_grad=True)
        loss = GRPO(entropy_bonus=0.1)
        out = loss(tokens([[1, 1], [1, 0]], [0, 0], entropy=entropy)).loss
        assert out.item() == pytest.approx(-0.1 * (2 + 5) / 2, rel=1e-12)
        assert torch.autograd.grad(out, entropy)[0].tolist() == [[-0.025, -0.025], [-0.05, 0]]

    def test_truncated_importance_weights_by_hand(self):
        # On-policy; the sampler gave the tokens 1/2, 1/4 and 2 times the trainer's probability: weights 2, 4 -> 3, 1/2.
        sampler = torch.tensor([[0.5, 0.25, 2.0]], dtype=torch.float64).log()
        x = tokens([[1, 1, 1]], [1], sampler_logps=sampler)
        x.old_logps = None
        loss = GRPO(tis_clip=3)
        assert loss(x).loss.item() == pytest.approx(-(2 + 3 + 0.5) / 3, rel=1e-12)
        torch.testing.assert_close(gradient(loss, x), [[-2 / 3, -1.0, -0.5 / 3]], rtol=1e-12, atol=0)
        assert metric(loss, x, "tis_clip_fraction") == pytest.approx(1 / 3)
        assert metric(loss, x, "tis_weight") == pytest.approx(5.5 / 3)
        # Of the sequence: 2 x 4 x 1/2 = 4 -> 3.
        assert GRPO(tis_clip=3, tis_level="sequence")(x).loss.item() == pytest.approx(-3, rel=1e-12)

    def test_the_sampler_as_old_policy_needs_no_weight(self):
        x = tokens([[1.1, 0.9]], [1])
        x.sampler_logps = x.old_logps
        assert GRPO(tis_clip=2)(x).loss.item() == GRPO()(x).loss.item()

    def test_every_member_of_the_family_has_them(self):
        shared = {"beta": 0.1, "kl": "k2", "entropy_bonus": 0.1, "tis_clip": 2.0, "tis_level": "sequence"}
        for kind in (GRPO, TwoGRPO, DAPO, RLOO, Reinforce, GSPO, CISPO, lambda **o: DrGRPO(length=5, **o)):
            loss = kind(**shared, mask_truncated=True)
            assert isinstance(loss, PolicyGradient)
            assert loss.needs_reference
            assert loss.needs_entropy
            assert loss.masks_truncated
            assert not loss.drops_zero_advantages

    def test_only_a_kl_or_entropy_term_needs_every_row(self):
        assert (GRPO().needs_reference, GRPO().drops_zero_advantages) == (False, True)
        assert (GRPO(beta=0.1).needs_reference, GRPO(beta=0.1).drops_zero_advantages) == (True, False)
        assert (GRPO(entropy_bonus=0.1).needs_reference, GRPO(entropy_bonus=0.1).drops_zero_advantages) == (
            False,
            False,
        )

    def test_dapo_is_grpo_with_its_settings(self):
        loss, x = DAPO(), tokens([[1.27, 1.5], [0.9, 0]], [1, -1])
        same = GRPO(clip_low=0.2, clip_high=0.28, aggregation="token_mean")
        assert loss(x).loss.item() == same(x).loss.item()
        assert loss.masks_truncated
        assert not same.masks_truncated

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: GRPO(clip_low=-1), "clip_low: expected a number >= 0, got -1"),
            (lambda: GRPO(clip_high=-1), "clip_high: expected a number >= 0, got -1"),
            (lambda: GRPO(beta=-1), "beta: expected a number >= 0, got -1"),
            (lambda: GRPO(beta=math.nan), "beta: expected a number >= 0, got nan"),
            (lambda: GRPO(entropy_bonus=-1), "entropy_bonus: expected a number >= 0"),
            (lambda: GRPO(epsilon=-1), "epsilon: expected a number >= 0"),
            (lambda: GRPO(dual_clip=0.5), "dual_clip: expected a number >= 1"),
            (lambda: GRPO(tis_clip=0.5), "tis_clip: expected a number >= 1"),
            (lambda: CISPO(max_ratio=0.5), "max_ratio: expected a number >= 1"),
            (lambda: TwoGRPO(tie_tolerance=-0.1), "tie_tolerance: expected a number >= 0"),
            (lambda: DrGRPO(length=0), "length: expected a number >= 1"),
            (lambda: GRPO(beta=LinearSchedule(0.1, -1, 3)), r"beta: expected a number >= 0, got LinearSchedule"),
            (lambda: GRPO(aggregation="mean"), "aggregation: expected one of sequence_mean, .*, got 'mean'"),
            (lambda: SFT(aggregation="mean"), "aggregation: expected one of"),
            (lambda: GRPO(scale="std"), "scale: expected one of population, .*, got 'std'"),
            (lambda: CISPO(scale="std"), "scale: expected one of"),
            (lambda: Reinforce(scale="std"), "scale: expected one of"),
            (lambda: GRPO(kl="K2"), "kl: expected one of k1, k2, k3, k3_ratio, got 'K2'"),
            (lambda: KL("K2"), "estimator: expected one of"),
            (lambda: GRPO(tis_level="seq"), "tis_level: expected one of token, sequence"),
            (lambda: LinearSchedule(1, 0, steps=0), "LinearSchedule.steps: expected a whole number >= 1, got 0"),
        ],
    )
    def test_settings_without_a_meaning_are_refused(self, make, message: str):
        with pytest.raises(UserError, match=message):
            make()


class TestSchedules:
    def test_a_coefficient_follows_the_step(self):
        loss = GRPO(beta=LinearSchedule(0.4, 0.0, steps=4), kl="k2")
        half = tokens([[2.0]], [0], ref_logps=torch.zeros(1, 1, dtype=torch.float64))
        values = []
        for half.step in (0, 1, 4, 100):
            values.append(loss(half).loss.item() / (math.log(2) ** 2 / 2))
        assert values == pytest.approx([0.4, 0.3, 0, 0])

    def test_a_schedule_that_starts_at_zero_needs_the_reference_all_the_same(self):
        assert GRPO(beta=LinearSchedule(0.0, 0.1, steps=10)).needs_reference

    def test_cosine_is_slow_at_both_ends(self):
        schedule = CosineSchedule(0.0, 1.0, steps=8)
        steps = [schedule(i + 1) - schedule(i) for i in range(8)]
        assert steps[:4] == pytest.approx(steps[:3:-1])
        assert steps[0] < steps[1] < steps[2] < steps[3]


class TestSFT:
    def test_is_the_mean_negative_log_likelihood_of_what_was_good(self):
        x = tokens([[0.5, 0.25], [0.1, 0]], [1, 0], total_tokens=10)
        assert SFT()(x).loss.item() == pytest.approx(math.log(8) / 10)
        assert metric(SFT(), x, "nll") == pytest.approx(math.log(8) / 2)  # of the imitated tokens alone
