"""Losses on hand-worked numbers. No model, no Lightning."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_grpo.errors import UserError
from lit_grpo.losses import GRPO, SFT, LossInputs, TwoGRPO

LOSSES = [
    GRPO(),
    GRPO(beta=0.1),
    GRPO(scale="sample", aggregation="token_mean"),
    GRPO(scale="none", aggregation="sequence_sum"),
    TwoGRPO(),
    SFT(),
]


def inputs(rows: int = 4, width: int = 5, seed: int = 0, **fields: object) -> LossInputs:
    """Random rows in float64; row i has ``i % width + 1`` tokens."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.arange(1, rows + 1).remainder(width).clamp(min=1)[:, None]
    draw = lambda: -torch.rand(rows, width, generator=g, dtype=torch.float64) * mask  # noqa: E731
    values = {
        "logps": draw(),
        "mask": mask,
        "advantages": torch.randn(rows, generator=g, dtype=torch.float64),
        "ref_logps": draw(),
    }
    return LossInputs(**(values | fields))


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

    def test_tie_tolerance(self):
        rewards = torch.tensor([[0.50, 0.52], [0.50, 0.60]], dtype=torch.float64)
        assert TwoGRPO(tie_tolerance=0.05).select(rewards)[1].tolist() == [[0, 0], [-1, 1]]

    @pytest.mark.parametrize(("loss", "size"), [(TwoGRPO(), 3), (TwoGRPO(), 1), (GRPO(), 1)])
    def test_wrong_group_size_names_the_key(self, loss: GRPO, size: int):
        with pytest.raises(UserError, match=r"data.init_args.group_size.*group_size to 2"):
            loss.select(torch.zeros(4, size))

    @pytest.mark.parametrize("key", ["clip_low", "clip_high", "beta"])
    def test_negative_settings_are_refused(self, key: str):
        with pytest.raises(UserError, match=f"{key}: expected a number >= 0, got -1"):
            GRPO(**{key: -1})


class TestGRPO:
    def test_clipped_surrogate_by_hand(self):
        # One token each: ratio 1.5, 1.5, 0.5, 0.5 with advantages +1, -1, +1, -1 and clips 0.2 and 0.28.
        # min(r A, clip(r) A): 1.28 (clipped), -1.5 (kept), 0.5 (kept), -0.8 (clipped); mean -0.13, so the loss is +0.13.
        ratio = torch.tensor([[1.5], [1.5], [0.5], [0.5]], dtype=torch.float64)
        logps = ratio.log().requires_grad_()
        advantages = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)
        out = GRPO(clip_low=0.2, clip_high=0.28)(
            LossInputs(logps, torch.ones(4, 1).bool(), advantages, torch.zeros(4, 1))
        )
        assert out.loss.item() == pytest.approx(0.13, abs=1e-12)
        # A clipped token has no gradient, the others have -A r / N.
        gradient = torch.autograd.grad(out.loss, logps)[0].squeeze(-1)
        torch.testing.assert_close(gradient.tolist(), [0.0, 1.5 / 4, -0.5 / 4, 0.0], rtol=1e-12, atol=1e-15)
        assert out.metrics["clip_fraction_high"].item() == out.metrics["clip_fraction_low"].item() == 0.25

    def test_on_policy_the_value_is_zero_and_the_gradient_is_not(self):
        # Ratio 1 and centred advantages; d loss / d logp_it = -A_i / (N |o_i|).
        x = inputs(rows=2, advantages=torch.tensor([1.0, -1.0], dtype=torch.float64))
        x.logps.requires_grad_()
        out = TwoGRPO()(x)
        assert out.loss.item() == pytest.approx(0, abs=1e-15)
        expected = torch.tensor([[-1 / 2, 0, 0, 0, 0], [1 / 4, 1 / 4, 0, 0, 0]], dtype=torch.float64)
        torch.testing.assert_close(torch.autograd.grad(out.loss, x.logps)[0], expected, rtol=1e-12, atol=0)

    def test_kl_term_by_hand(self):
        # log ratio to the reference ln 2 on one token: k3 = 1/2 - 1 + ln 2.
        k3 = math.log(2) - 0.5
        x = LossInputs(
            torch.full((1, 1), math.log(2.0)), torch.ones(1, 1).bool(), torch.zeros(1), ref_logps=torch.zeros(1, 1)
        )
        out = GRPO(beta=0.3)(x)
        assert out.loss.item() == pytest.approx(0.3 * k3, rel=1e-6)
        assert out.metrics["kl"].item() == pytest.approx(k3, rel=1e-6)

    def test_only_a_kl_term_needs_the_reference_and_every_row(self):
        assert (GRPO().needs_reference, GRPO().drops_zero_advantages) == (False, True)
        assert (GRPO(beta=0.1).needs_reference, GRPO(beta=0.1).drops_zero_advantages) == (True, False)

    def test_objective_is_sqrt_variance_times_contrast(self):
        """Proposition 3.2 of arXiv 2510.00977: J = sqrt(p (1 - p)) (mean of winners - mean of losers), in float64."""
        g = torch.Generator().manual_seed(1)
        for _ in range(20):
            rewards = torch.randint(0, 2, (1, 8), generator=g).double()
            wins = rewards[0] == 1
            if wins.all() or not wins.any():
                continue
            mask = torch.rand(8, 6, generator=g) < 0.7
            mask[:, 0] = True
            logps = torch.randn(8, 6, generator=g, dtype=torch.float64) * 0.5
            loss = GRPO(0.2, 0.2)
            out = loss(LossInputs(logps, mask, loss.select(rewards)[1][0], torch.zeros(8, 6)))
            ratio = logps.exp()
            clipped = torch.where(wins[:, None], ratio.clamp(max=1.2), ratio.clamp(min=0.8))
            means = (clipped * mask).sum(-1) / mask.sum(-1)
            p = rewards.mean()
            contrast = (p * (1 - p)).sqrt() * (means[wins].mean() - means[~wins].mean())
            assert -out.loss.item() == pytest.approx(contrast.item(), abs=1e-12)


class TestSFT:
    def test_is_the_mean_negative_log_likelihood_of_what_was_good(self):
        x = inputs(rows=2, advantages=torch.tensor([1.0, 0.0], dtype=torch.float64), total_tokens=10)
        assert SFT()(x).loss.item() == pytest.approx(-x.logps[0].sum().item() / 10)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
class TestContract:
    """What every loss promises."""

    def test_finite_scalar_in_the_dtype_it_was_given(self, loss):
        out = loss(inputs())
        assert out.loss.shape == ()
        assert out.loss.dtype == torch.float64
        assert out.loss.isfinite()

    def test_metrics_are_detached(self, loss):
        x = inputs(old_logps=inputs(seed=1).logps)
        x.logps.requires_grad_()
        assert not any(value.requires_grad for value in loss(x).metrics.values())

    def test_backward_works_without_any_signal(self, loss):
        x = inputs(advantages=torch.zeros(4, dtype=torch.float64))
        x.logps.requires_grad_()
        gradient = torch.autograd.grad(loss(x).loss, x.logps)[0]
        assert gradient.isfinite().all()
        assert loss.drops_zero_advantages == (not gradient.any())

    def test_gradcheck(self, loss):
        x = inputs(old_logps=inputs(seed=3).logps)
        x.logps.requires_grad_()

        def f(logps):
            return loss(LossInputs(logps, x.mask, x.advantages, x.old_logps, x.ref_logps)).loss

        assert torch.autograd.gradcheck(f, x.logps)

    def test_padding_and_row_order_change_nothing(self, loss):
        x = inputs(old_logps=inputs(seed=2).logps)
        order = torch.tensor([2, 0, 3, 1])
        wide = torch.nn.functional.pad
        padded = LossInputs(
            wide(x.logps, (0, 3), value=-7.0)[order],
            wide(x.mask, (0, 3))[order],
            x.advantages[order],
            wide(x.old_logps, (0, 3), value=5.0)[order],
            wide(x.ref_logps, (0, 3), value=9.0)[order],
        )
        assert loss(padded).loss.item() == pytest.approx(loss(x).loss.item(), abs=1e-14)

    @pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 2)])
    def test_shares_of_micro_batches_add_up(self, loss, sizes):
        x = inputs(old_logps=inputs(seed=2).logps)
        whole = loss(x)
        parts = []
        for part in torch.arange(4).split(sizes):
            fields = {
                name: getattr(x, name)[part] for name in ("logps", "mask", "advantages", "old_logps", "ref_logps")
            }
            parts.append(loss(LossInputs(**fields, total_rows=4, total_tokens=int(x.mask.sum()))))
        assert sum(part.loss for part in parts).item() == pytest.approx(whole.loss.item(), abs=1e-14)
        for name, value in whole.metrics.items():
            assert sum(part.metrics[name] for part in parts).item() == pytest.approx(value.item(), abs=1e-14)

    def test_select_takes_as_many_rows_whatever_the_rewards(self, loss):
        shapes = {
            tuple(loss.select(rewards)[0].shape) for rewards in (torch.zeros(5, 2), torch.ones(5, 2), torch.rand(5, 2))
        }
        assert len(shapes) == 1
        index, advantages = loss.select(torch.rand(5, 2))
        assert index.shape == advantages.shape
        assert ((index >= 0) & (index < 2)).all()
