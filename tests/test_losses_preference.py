"""Losses on pairs and on labels, and sums of losses, on hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

from lit_grpo.errors import UserError
from lit_grpo.losses import (
    DPO,
    GRPO,
    IPO,
    KL,
    KTO,
    ORPO,
    SFT,
    APOZero,
    Hinge,
    LinearSchedule,
    Loss,
    LossInputs,
    SimPO,
    TwoGRPO,
    WeightedSum,
)

PAIRWISE = [DPO, IPO, Hinge, SimPO, ORPO]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair(chosen: list[float], rejected: list[float], preferred: bool = True, **fields: object) -> LossInputs:
    """One pair with these log-probs, and a reference whose log-probs are 0: log-probs are log-ratios. NaN pads."""
    width = max(len(chosen), len(rejected))
    rows = torch.tensor([x + [math.nan] * (width - len(x)) for x in (chosen, rejected)], dtype=torch.float64)
    logps = rows.nan_to_num(0).requires_grad_()
    advantages = torch.tensor([1.0, -1.0] if preferred else [0.0, 0.0], dtype=torch.float64)
    values = {"ref_logps": torch.zeros_like(rows)} | fields
    return LossInputs(logps, ~rows.isnan(), advantages, **values)  # type: ignore[arg-type]


def value(loss: Loss, x: LossInputs) -> float:
    return loss(x).loss.item()


# Log-ratios -1 and -1 (sum -2, mean -1) of the chosen completion; -6, 0, 0 (sum -6, mean -2) of the rejected one.
X = ([-1.0, -1.0], [-6.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPO(beta=0.5), -math.log(sigmoid(0.5 * 4))),
        (DPO(beta=0.5, log_ratios="mean"), -math.log(sigmoid(0.5 * 1))),
        (DPO(beta=0.5, label_smoothing=0.2), -0.8 * math.log(sigmoid(2)) - 0.2 * math.log(sigmoid(-2))),
        (
            DPO(beta=0.5, label_smoothing=0.2, smoothing="robust"),
            (-0.8 * math.log(sigmoid(2)) + 0.2 * math.log(sigmoid(-2))) / 0.6,
        ),
        (IPO(beta=0.5), (1 - 1) ** 2),  # means: -1 - (-2) = 1, target 1 / (2 * 0.5) = 1
        (IPO(beta=0.5, log_ratios="sum"), (4 - 1) ** 2),
        (Hinge(beta=0.1), 1 - 0.4),
        (Hinge(beta=0.5), 0),
        (SimPO(beta=2.0, gamma=0.5), -math.log(sigmoid(2 * 1 - 0.5))),
        (  # P = 1/e and 1/e^2: odds 1 / (e - 1) and 1 / (e^2 - 1), whose ratio is e + 1
            ORPO(beta=0.1),
            1 - 0.1 * math.log((math.e + 1) / (math.e + 2)),
        ),
        (KTO(beta=0.5), (sigmoid(-0.5 * (-2 - 1)) + sigmoid(-0.5 * (1 + 6))) / 2),  # baseline 1
        (APOZero(beta=0.5), (sigmoid(0.5 * 2) + sigmoid(-0.5 * 6)) / 2),
    ],
)
def test_values_by_hand(loss: Loss, expected: float):
    x = pair(*X, kl_baseline=torch.tensor(1.0, dtype=torch.float64))
    assert value(loss, x) == pytest.approx(expected, rel=1e-9, abs=1e-12)


class TestPairs:
    @pytest.mark.parametrize("kind", PAIRWISE)
    def test_best_against_worst(self, kind: type):
        rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.2, 0.9], [1.0, 1.0]])
        index, advantages = kind().select(rewards)
        assert index.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
        assert advantages.tolist() == [[1, -1], [1, -1], [1, -1], [0, 0]]

    def test_of_larger_groups(self):
        index, advantages = DPO().select(torch.tensor([[0.5, 1.0, 0.0, 1.0, 0.0], [0.0] * 5]))
        assert index.tolist() == [[1, 4], [0, 4]]  # of equals, the first best and the last worst
        assert advantages.tolist() == [[1, -1], [0, 0]]

    @pytest.mark.parametrize("kind", PAIRWISE)
    def test_ties_are_dropped_and_never_become_preferences(self, kind: type):
        tied = pair(*X, preferred=False)
        out = kind()(tied)
        assert out.loss.item() == 0
        assert not torch.autograd.grad(out.loss, tied.logps)[0].any()
        assert {name: count.item() for name, (_, count) in out.metrics.items()} == dict.fromkeys(out.metrics, 0)
        assert not kind().select(torch.tensor([[0.1 + 0.2, 0.3]], dtype=torch.float64))[1].any()

    @pytest.mark.parametrize("kind", PAIRWISE)
    def test_tie_tolerance(self, kind: type):
        rewards = torch.tensor([[0.50, 0.52], [0.50, 0.60]], dtype=torch.float64)
        assert kind(tie_tolerance=0.05).select(rewards)[1].abs().sum(-1).tolist() == [0, 2]

    @pytest.mark.parametrize("kind", PAIRWISE)
    def test_dropped_pairs_stay_in_the_denominator(self, kind: type):
        assert value(kind(), pair(*X, total_rows=8)) == pytest.approx(value(kind(), pair(*X)) / 4)

    @pytest.mark.parametrize("kind", PAIRWISE)
    def test_single_completions_are_refused(self, kind: type):
        with pytest.raises(UserError, match=f"{kind.__name__} compares two completions .*got groups of 1.*chosen and"):
            kind().select(torch.ones(3, 1))

    def test_metrics_by_hand(self):
        # beta 0.5: rewards -1 and -3, margin 2, and the chosen one wins.
        found = {k: (s / n).item() for k, (s, n) in DPO(beta=0.5)(pair(*X)).metrics.items()}
        assert found == {"reward_chosen": -1, "reward_rejected": -3, "margin": 2, "reward_accuracy": 1}

    @pytest.mark.parametrize("kind", PAIRWISE)
    def test_a_pair_of_one_likelihood_is_not_counted_as_right(self, kind: type):
        total, count = kind()(pair([-1.0], [-1.0])).metrics["reward_accuracy"]
        assert (total.item(), count.item()) == (0, 1)

    def test_certain_completions_are_counted(self):
        total, count = ORPO()(pair([0.0], [-1.0])).metrics["clamped_odds"]
        assert (total.item(), count.item()) == (1, 2)

    def test_only_losses_with_a_reference_load_one(self):
        needs = {kind.__name__: kind().needs_reference for kind in PAIRWISE}
        assert needs == {"DPO": True, "IPO": True, "Hinge": True, "SimPO": False, "ORPO": False}


class TestSmoothing:
    def test_conservative_has_its_optimum_at_a_finite_margin(self):
        # d/dh = 0 at sigma(beta h) = 1 - e: h = ln((1 - e) / e) / beta.
        best = math.log(0.9 / 0.1) / 0.1
        x = pair([best], [0.0])
        gradient = torch.autograd.grad(DPO(label_smoothing=0.1)(x).loss, x.logps)[0]
        assert gradient.abs().max() < 1e-15
        assert torch.autograd.grad(DPO()(x).loss, x.logps)[0].abs().max() > 1e-3

    def test_robust_is_unbiased_under_wrong_labels(self):
        # A share e of labels is flipped: the mean of the robust loss over the flips is the loss on the right labels.
        robust, e = DPO(label_smoothing=0.3, smoothing="robust"), 0.3
        right, wrong = value(robust, pair([1.0], [-2.0])), value(robust, pair([-2.0], [1.0]))
        assert (1 - e) * right + e * wrong == pytest.approx(value(DPO(), pair([1.0], [-2.0])), rel=1e-12)

    @pytest.mark.parametrize(
        "make", [lambda: DPO(log_ratios="avg"), lambda: DPO(smoothing="Robust"), lambda: IPO(log_ratios="avg")]
    )
    def test_settings_that_do_not_exist_are_refused(self, make):
        with pytest.raises(UserError, match="expected one of"):
            make()

    @pytest.mark.parametrize("smoothing", [-0.1, 0.5, math.nan])
    def test_a_share_of_one_half_or_more_is_refused(self, smoothing: float):
        with pytest.raises(UserError, match=r"label_smoothing: expected a probability below 0.5"):
            DPO(label_smoothing=smoothing)


class TestORPO:
    def test_odds_are_exact_up_to_near_certainty(self):
        x = pair([math.log(0.9999)], [math.log(0.5)])
        expected = -math.log(0.9999) - 0.1 * math.log(sigmoid(math.log(0.9999 / 0.0001)))
        assert value(ORPO(), x) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("logp", [0.0, -1e-12, -1e4])
    def test_certain_and_impossible_completions_stay_finite(self, logp: float):
        x = pair([logp], [-1.0])
        out = ORPO()(x).loss
        assert out.isfinite()
        assert torch.autograd.grad(out, x.logps)[0].isfinite().all()


class TestKTO:
    def inputs(self, baseline: float, labels: tuple[float, float] = (1.0, -1.0)) -> LossInputs:
        x = pair(*X, kl_baseline=torch.tensor(baseline, dtype=torch.float64, requires_grad=True))
        x.advantages = torch.tensor(labels, dtype=torch.float64)
        return x

    def test_labels(self):
        rewards = torch.tensor([[1.0, 0.0], [0.5, 0.6]])
        assert KTO().select(rewards)[1].tolist() == [[1, -1], [-1, 1]]
        assert KTO(threshold=0.55).select(torch.tensor([[0.7]]))[1].tolist() == [[1]]

    def test_no_gradient_through_the_baseline(self):
        """Claim C22."""
        x = self.inputs(1.0)
        assert torch.autograd.grad(KTO()(x).loss, x.kl_baseline, allow_unused=True)[0] is None

    def test_a_negative_baseline_counts_as_zero(self):
        """Claim C22."""
        assert value(KTO(), self.inputs(-3.0)) == value(KTO(), self.inputs(0.0)) == value(APOZero(), self.inputs(-3.0))
        assert value(KTO(), self.inputs(2.0)) != value(KTO(), self.inputs(0.0))

    def test_class_weights(self):
        x = self.inputs(0.0)
        good, bad = sigmoid(0.1 * 2), sigmoid(-0.1 * 6)
        assert value(KTO(desirable_weight=3, undesirable_weight=0.5), x) == pytest.approx((3 * good + 0.5 * bad) / 2)

    def test_metrics_by_hand(self):
        # beta 0.1, baseline 3: -2 is below it although desirable, -6 is below it as it should be.
        found = KTO()(self.inputs(3.0)).metrics
        assert found.pop("kl_baseline").item() == 3
        above = pair(
            [2.0], [-6.0], kl_baseline=torch.tensor(3.0, dtype=torch.float64)
        )  # desirable, but below the baseline
        assert KTO()(above).metrics["reward_accuracy"][0].item() == 1
        assert {k: round((s / n).item(), 12) for k, (s, n) in found.items()} == {
            "reward_chosen": -0.2,
            "reward_rejected": -0.6,
            "reward_accuracy": 0.5,
            "desirable_share": 0.5,
        }

    def test_only_kto_wants_a_baseline(self):
        assert (KTO().needs_kl_baseline, APOZero().needs_kl_baseline) == (True, False)

    @pytest.mark.parametrize("kind", [KTO, APOZero])
    def test_negative_weights_are_refused(self, kind: type):
        with pytest.raises(UserError, match="undesirable_weight: expected a number >= 0, got -1"):
            kind(undesirable_weight=-1)


@pytest.mark.parametrize("kind", [*PAIRWISE, KTO, APOZero])
def test_beta_must_be_positive_and_may_follow_the_step(kind: type):
    with pytest.raises(UserError, match="beta: expected a number > 0, got 0"):
        kind(beta=0)
    with pytest.raises(UserError, match=r"beta: expected a number > 0, got LinearSchedule\(start=0.1, end=0"):
        kind(beta=LinearSchedule(0.1, 0, steps=3))
    x = pair(*X, step=1, kl_baseline=torch.tensor(0.0))
    assert value(kind(beta=LinearSchedule(0.1, 0.5, steps=2)), x) == pytest.approx(value(kind(beta=0.3), x))


class TestWeightedSum:
    def test_is_the_sum_each_with_its_own_advantages(self):
        loss = WeightedSum([DPO(), SFT()], [1.0, 0.2])
        index, advantages = loss.select(torch.tensor([[0.0, 1.0]]))
        assert index.tolist() == [[1, 0]]  # the order of the pair
        assert advantages.tolist() == [[[1, 1], [-1, 0]]]  # SFT imitates the chosen one alone
        x = pair(*X)
        x.advantages = advantages[0].double()
        # SFT: the chosen tokens cost 1 each, divided by all five.
        assert value(loss, x) == pytest.approx(-math.log(sigmoid(0.4)) + 0.2 * 2 / 5)
        metrics = loss(x).metrics
        assert metrics["loss_DPO"].item() == pytest.approx(-math.log(sigmoid(0.4)))
        assert metrics["loss_SFT"].item() == pytest.approx(2 / 5)
        assert metrics["margin"][0].item() == pytest.approx(0.4)
        assert metrics["nll"][0].item() == 2

    def test_grpo_and_kl_is_grpo_with_beta(self):
        x = pair(*X)
        one, two = GRPO(beta=0.05), WeightedSum([GRPO(), KL()], [1.0, 0.05])
        expected = torch.autograd.grad(one(x).loss, x.logps)[0]
        x.advantages = two.select(torch.tensor([[1.0, 0.0]], dtype=torch.float64))[1][0]
        torch.testing.assert_close(torch.autograd.grad(two(x).loss, x.logps)[0], expected, rtol=1e-12, atol=1e-15)

    def test_weights_may_follow_the_step(self):
        loss = WeightedSum([SFT(), SFT()], [1.0, LinearSchedule(1.0, 0.0, steps=10)])
        x = pair(*X)
        x.advantages = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        values = []
        for x.step in (0, 5, 20):
            values.append(value(loss, x))
        assert values == pytest.approx([0.8, 0.6, 0.4])
        assert {"loss_SFT_0", "loss_SFT_1"} <= set(loss(x).metrics)

    def test_a_metric_of_several_is_that_of_the_first(self):
        x = pair(*X)
        x.advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        margins = [
            WeightedSum([DPO(beta=b), IPO(beta=0.7, log_ratios="sum")])(x).metrics["margin"][0] for b in (0.1, 0.2)
        ]
        assert [m.item() for m in margins] == pytest.approx([0.4, 0.8])

    def test_takes_on_what_its_losses_need(self):
        loss = WeightedSum([SFT(), KTO(), GRPO(entropy_bonus=0.1, mask_truncated=True)])
        assert loss.needs_reference
        assert loss.needs_entropy
        assert loss.needs_kl_baseline
        assert loss.masks_truncated
        assert not loss.drops_zero_advantages
        assert loss.unit == 1
        assert WeightedSum([SFT(), DPO()]).unit == 2

    def test_losses_that_select_other_rows_are_refused(self):
        loss = WeightedSum([DPO(), GRPO()])
        assert loss.select(torch.zeros(1, 2))[0].tolist() == [[0, 1]]
        with pytest.raises(UserError, match=r"DPO and GRPO cannot be added up: of groups of 4, .* selects 2 .* 4\."):
            loss.select(torch.zeros(1, 4))

    def test_a_loss_refuses_for_all(self):
        with pytest.raises(UserError, match="TwoGRPO compares two completions"):
            WeightedSum([KL(), TwoGRPO()]).select(torch.zeros(1, 4))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: WeightedSum([]), "losses: expected at least one loss"),
            (lambda: WeightedSum([SFT()], [1.0, 2.0]), "weights: expected one for each of the 1 losses, got 2"),
            (lambda: WeightedSum([WeightedSum([SFT()])]), "a WeightedSum inside a WeightedSum"),
        ],
    )
    def test_what_cannot_be_summed(self, make, message: str):
        with pytest.raises(UserError, match=message):
            make()
