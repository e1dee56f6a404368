"""The claims of arXiv 2510.00977, and where they end, by enumerating every group that the real losses could see.

C1 to C24 number the checkable claims about the paper; what is not here is in ``test_losses.py``.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lit_grpo.losses import GRPO, LossInputs, TwoGRPO
from lit_grpo.metrics import pass_at_k
from lit_grpo.theory import (
    contrastive_coefficient,
    control_variate_variance,
    discard_rate,
    expected_coefficient,
    exploration_probability,
    informative_share,
    kappa,
    mean_reward_from_discard_rate,
    snr_per_rollout,
    snr_per_trained_row,
)

SCALES = ["population", "sample", "none"]
PASS_RATES = [0.05, 0.2, 0.36, 0.5, 0.9]

# A policy over two tokens that stops at the first 0, at the latest after three tokens: four sequences.
TOKENS = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
MASK = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-12) -> bool:
    return bool((torch.as_tensor(actual) - torch.as_tensor(expected, dtype=torch.float64)).abs().max() <= tolerance)


def logits_of(probs: Tensor) -> Tensor:
    """Logits ``[3, 2]``, one row per token position, that give the four sequences these probabilities."""
    left = 1 - torch.cat([vector(0), probs.cumsum(0)[:2]])
    stop = probs[:3] / left
    return torch.stack([stop, 1 - stop], dim=-1).log()


def sequence_logps(logits: Tensor) -> Tensor:
    """Log-prob ``[4, 3]`` of every token of every sequence."""
    return logits.log_softmax(-1)[torch.arange(3), TOKENS] * MASK


def scores(logits: Tensor) -> Tensor:
    """Gradient ``[4, 6]`` of the log-prob of every sequence."""
    return torch.autograd.functional.jacobian(lambda x: sequence_logps(x).sum(-1), logits).flatten(1)


def expected_gradient(loss: GRPO, logits: Tensor, correct: Tensor, group_size: int) -> Tensor:
    """Exact mean ``[3, 2]`` of the gradient that ascends the objective, over all ``4 ** group_size`` groups."""
    logits = logits.clone().requires_grad_()
    logps = sequence_logps(logits)
    groups = torch.cartesian_prod(*[torch.arange(4)] * group_size)
    chance = logps.detach().sum(-1).exp()[groups].prod(-1, keepdim=True)
    advantages = loss.select(correct[groups])[1]
    rows = groups.flatten()
    # On-policy the loss is linear in the advantages, so they can carry the chance of their group.
    inputs = LossInputs(logps[rows], MASK[rows], (advantages * chance).flatten(), total_rows=group_size)
    return -torch.autograd.grad(loss(inputs).loss, logits)[0]


def pass_rate_gradient(logits: Tensor, correct: Tensor) -> tuple[float, Tensor]:
    """Pass rate p and its exact gradient ``[3, 2]``."""
    logits = logits.clone().requires_grad_()
    p = sequence_logps(logits).sum(-1).exp() @ correct
    return p.item(), torch.autograd.grad(p, logits)[0]


def binary_groups(group_size: int) -> tuple[Tensor, Tensor]:
    """Groups of rewards ``[M, G]`` and how many groups each stands for: itself, or all with as many winners."""
    if group_size <= 8:
        rewards = vector(*itertools.chain(*itertools.product((0, 1), repeat=group_size))).view(-1, group_size)
        return rewards, torch.ones(len(rewards), dtype=torch.float64)
    winners = torch.arange(group_size + 1)
    rewards = (torch.arange(group_size) < winners[:, None]).double()
    return rewards, vector(*(float(math.comb(group_size, n)) for n in range(group_size + 1)))


def chances(rewards: Tensor, ways: Tensor, p: float) -> Tensor:
    """Chance ``[M]`` of the groups of :func:`binary_groups` at pass rate p."""
    return ways * p ** rewards.sum(-1) * (1 - p) ** (1 - rewards).sum(-1)


class TestKappa:
    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("group_size", [2, 3, 4, 8, 16, 64])
    @pytest.mark.parametrize("p", PASS_RATES)
    def test_is_the_slope_of_the_expected_advantage(self, p: float, group_size: int, scale: str):
        """C4 (Prop. C.1), with advantages from the loss: E[A | x] = kappa (x - p)."""
        rewards, ways = binary_groups(group_size)
        advantages, chance = GRPO(scale=scale).select(rewards)[1], chances(rewards, ways, p)
        slope = kappa(p, group_size, scale)
        assert close(chance @ (advantages * rewards).mean(-1) / p, slope * (1 - p))
        assert close(chance @ (advantages * (1 - rewards)).mean(-1) / (1 - p), -slope * p)

    def test_by_hand(self):
        """C4. At G = 4 and n winners, A+ = sqrt((4 - n) / n) = sqrt 3, 1, 1 / sqrt 3.

        E[A | 1] = q^3 sqrt 3 + 3 p q^2 + 3 p^2 q / sqrt 3; divided by q: sqrt 3 (p^2 + q^2) + 3 p q.
        """
        p = vector(0, 0.2, 0.5, 1)
        assert close(kappa(p, 4), math.sqrt(3) * (p**2 + (1 - p) ** 2) + 3 * p * (1 - p))
        assert close(kappa(p, 2), 1)
        assert close(kappa(p, 2, "sample"), math.sqrt(0.5))
        assert close(kappa(p, 2, "none"), 0.5)

    @pytest.mark.parametrize(
        ("p", "group_sizes", "values"),
        [
            (0.05, [2, 4, 8, 16], [1, 1.71, 2.47, 3.27]),
            (0.2, [2, 4, 8, 16, 64, math.inf], [1, 1.658, 2.107, 2.346, 2.469, 2.5]),
        ],
    )
    def test_values(self, p: float, group_sizes: list[float], values: list[float]):
        """C4."""
        assert [kappa(p, size).item() for size in group_sizes] == pytest.approx(
            values, abs=0.005 if p == 0.05 else 5e-4
        )

    @pytest.mark.parametrize("scale", SCALES)
    def test_large_groups_approach_the_limit(self, scale: str):
        """C4: at G to infinity kappa is the derivative of 2 arcsin sqrt p, at G = 2 that of p."""
        p = vector(*PASS_RATES).requires_grad_()
        limit = torch.autograd.grad((2 * p.sqrt().arcsin()).sum(), p)[0] if scale != "none" else torch.ones(5)
        p = p.detach()
        assert close(kappa(p, math.inf, scale), limit)
        gaps = torch.stack([(kappa(p, group_size, scale) - limit).abs() for group_size in (64, 256, 1024)])
        assert (gaps[1:] < gaps[:-1] / 2).all()

    @pytest.mark.parametrize(
        ("group_size", "scale", "printed"),
        [(2, "population", 1), (2, "sample", 0.7071), (4, "population", 1.625), (6, "population", 1.822)],
    )
    def test_is_the_ratio_of_the_expected_gradient_to_that_of_the_pass_rate(
        self, group_size: int, scale: str, printed: float
    ):
        """C5: on-policy with summed log-probs, in every coordinate. The group size changes the objective."""
        logits, correct = logits_of(vector(0.26, 0.20, 0.10, 0.44)), vector(1, 0, 1, 0)
        p, exact = pass_rate_gradient(logits, correct)
        assert p == pytest.approx(0.36, rel=1e-12)
        gradient = expected_gradient(GRPO(scale=scale, aggregation="sequence_sum"), logits, correct, group_size)
        assert exact.abs().min() > 0.01
        assert close(gradient / exact, kappa(p, group_size, scale))
        assert (gradient / exact)[0, 0].item() == pytest.approx(printed, abs=5e-4)

    def test_a_mean_over_tokens_ascends_no_function_of_the_pass_rate(self):
        """C5 needs summed log-probs: dividing by unequal lengths turns the gradient."""
        logits, correct = logits_of(vector(0.26, 0.20, 0.10, 0.44)), vector(1, 0, 1, 0)
        gradient = expected_gradient(GRPO(aggregation="sequence_mean"), logits, correct, 2)
        exact = pass_rate_gradient(logits, correct)[1]
        assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) < 0.99

    def test_large_groups_push_hard_prompts_faster(self):
        """C24, its part in theory: one expected step on Bernoulli policies with logit z, where dp/dz = p (1 - p)."""
        p = torch.linspace(0.05, 0.9, 18, dtype=torch.float64)
        steps = {}
        for group_size in (2, 16):
            rewards, ways = binary_groups(group_size)
            advantages = GRPO().select(rewards)[1]
            # d log-prob / dz = r - p; z moves by the expected E[mean_i A_i (r_i - p)] and p by p (1 - p) times that.
            steps[group_size] = torch.stack(
                [
                    rate * (1 - rate) * (chances(rewards, ways, float(rate)) @ (advantages * (rewards - rate)).mean(-1))
                    for rate in p
                ]
            )
        assert close(steps[2], (p * (1 - p)) ** 2)
        assert close(steps[16] / steps[2], kappa(p, 16))
        assert (steps[16] / steps[2])[0].item() == pytest.approx(3.27, abs=0.005)
        assert (steps[16] / steps[2]).argmax() == 0


class TestContrastiveCoefficient:
    def test_of_binary_rewards(self):
        """Prop. 3.2: sqrt(p (1 - p)) of the group's own share of winners."""
        rewards = binary_groups(5)[0]
        share = rewards.mean(-1)
        assert close(contrastive_coefficient(rewards), (share * (1 - share)).sqrt())
        assert contrastive_coefficient(rewards.bool()).dtype == torch.float64

    def test_of_other_rewards_by_hand(self):
        # 0, 1, 3: mean 4/3, deviations -4/3, -1/3, 5/3, population variance 42/27 = 14/9.
        # sum |A| = (10/3) / (sqrt 14 / 3) = 10 / sqrt 14, divided by 2 G = 6.
        expected = vector(10 / (6 * math.sqrt(14)), 0)
        assert close(contrastive_coefficient(torch.tensor([[0.0, 1.0, 3.0], [0.1, 0.1, 0.1]])), expected)

    def test_of_every_pair_that_differs_is_a_half(self):
        """C10: rewards of any size, so that noise counts in full."""
        rewards = vector(0.5, 0.5001, -3, 40).view(2, 2)
        assert close(contrastive_coefficient(rewards), 0.5)


class TestAdvantages:
    def test_of_two_keep_only_the_sign(self):
        """C10, and C9 on binary rewards: then 2-GRPO is RLOO with two."""
        g = torch.Generator().manual_seed(0)
        rewards = torch.randn(50, 2, generator=g, dtype=torch.float64)
        assert close(GRPO().select(rewards)[1], (rewards - rewards.flip(-1)).sign())
        rewards = binary_groups(2)[0]
        assert close(TwoGRPO().select(rewards)[1], rewards - rewards.flip(-1), 0)

    @pytest.mark.parametrize(("epsilon", "printed"), [(1e-6, 0.7071058), (1e-4, 0.7070068)])
    def test_of_other_frameworks_are_ours_shrunk_by_their_epsilon(self, epsilon: float, printed: float):
        """C3: verl and TRL divide 1/2 by the sample deviation sqrt(1/2) plus epsilon."""
        ours = GRPO(scale="sample").select(vector(1, 0)[None])[1][0]
        std = math.sqrt(0.5)
        assert close(ours * std / (std + epsilon), vector(printed, -printed), 5e-8)


# p, G, E[c], informative share, squared SNR per rollout and per trained row.
TABLE = [
    (0.05, 2, 0.048, 0.095, 0.024, 0.250),
    (0.05, 8, 0.117, 0.337, 0.041, 0.122),
    (0.05, 16, 0.155, 0.560, 0.043, 0.077),
    (0.05, 64, 0.206, 0.962, 0.044, 0.046),
    (0.18, 2, 0.148, 0.295, 0.074, 0.250),
    (0.18, 8, 0.316, 0.796, 0.126, 0.158),
    (0.18, 16, 0.357, 0.958, 0.133, 0.139),
    (0.18, 64, 0.379, 1.00, 0.144, 0.144),
    (0.50, 2, 0.250, 0.500, 0.125, 0.250),
    (0.50, 8, 0.464, 0.992, 0.217, 0.219),
    (0.50, 16, 0.484, 1.00, 0.234, 0.234),
    (0.50, 64, 0.496, 1.00, 0.246, 0.246),
]


class TestSignal:
    @pytest.mark.parametrize(("p", "group_size", "coefficient", "share", "rollout", "row"), TABLE)
    def test_table_through_the_loss(
        self, p: float, group_size: int, coefficient: float, share: float, rollout: float, row: float
    ):
        """Every group of a Bernoulli policy through ``GRPO.select``, theory to 1e-12 and the table to its digits."""
        rewards, ways = binary_groups(group_size)
        chance, advantages = chances(rewards, ways, p), GRPO().select(rewards)[1]
        # With independent scores of variance 1 the group's gradient (1/G) sum A_i s_i has variance sum A_i^2 / G^2.
        signal = chance @ advantages.abs().sum(-1) / (2 * group_size)
        informative = chance @ advantages.any(-1).double()
        noise = chance @ advantages.square().sum(-1) / group_size**2
        seen = vector(signal, informative, signal**2 / (noise * group_size))
        seen = torch.cat([seen, seen[2:] / informative])
        theory = [f(p, group_size) for f in (expected_coefficient, informative_share, snr_per_rollout)]
        assert close(seen, torch.stack([*theory, snr_per_trained_row(p, group_size)]))
        assert close(seen, vector(coefficient, share, rollout, row), 5e-4 + 1e-9)

    def test_informative_groups_match_a_simulation(self):
        g = torch.Generator().manual_seed(0)
        rewards = (torch.rand(100_000, 8, generator=g) < 0.18).double()
        coefficient = contrastive_coefficient(rewards)
        # Standard errors: 0.16 / sqrt(1e5) = 5e-4 and sqrt(0.8 * 0.2 / 1e5) = 1.3e-3.
        assert coefficient.mean().item() == pytest.approx(expected_coefficient(0.18, 8).item(), abs=0.002)
        share = (coefficient > 0).double().mean().item()
        assert share == pytest.approx(informative_share(0.18, 8).item(), abs=0.005)

    def test_no_group_size_beats_pairs_per_trained_row(self):
        p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
        assert close(snr_per_trained_row(p, 2), 0.25)
        for group_size in (3, 4, 8, 64):
            assert (snr_per_trained_row(p, group_size) < 0.25).all()
        assert snr_per_trained_row(0.5, math.inf).item() == 0.25

    def test_histogram_by_hand(self):
        # A quarter of the prompts never solved, three quarters at 1/2: P = 3/4 1/2, E[c] = 3/4 1/4 at G = 2.
        p, weights = vector(0, 0.5), torch.tensor([10, 30])
        assert informative_share(p, 2, weights).item() == pytest.approx(0.375)
        assert expected_coefficient(p, 2, weights).item() == pytest.approx(0.1875)
        assert snr_per_rollout(p, 2, weights).item() == pytest.approx(0.1875**2 / 0.375)
        assert snr_per_trained_row(p, 2, weights).item() == pytest.approx(0.25)

    @pytest.mark.parametrize("group_size", [2, 16, math.inf])
    def test_prompts_without_any_signal(self, group_size: float):
        p = vector(0, 1)
        assert not expected_coefficient(p, group_size).any()
        assert not informative_share(p, group_size).any()
        assert not snr_per_rollout(p, group_size).any()
        assert snr_per_trained_row(p, group_size).isnan().all()

    def test_limit_of_large_groups(self):
        p = vector(*PASS_RATES)
        for f in (expected_coefficient, informative_share, snr_per_rollout, snr_per_trained_row):
            assert f(p, 1024).tolist() == pytest.approx(f(p, math.inf).tolist(), rel=0.02)


class TestDiscardRate:
    # Table 3: Qwen-7B on MATH at steps 10, 40, 70, 100, 130.
    PRINTED = vector(0.5284, 0.6917, 0.6763, 0.7711, 0.7141)

    @pytest.mark.parametrize("p", [0.0, *PASS_RATES, 1.0])
    def test_is_the_share_of_pairs_that_the_loss_gives_no_advantage(self, p: float):
        """C15."""
        rewards, ways = binary_groups(2)
        dead = ~TwoGRPO().select(rewards)[1].any(-1)
        assert close(discard_rate(p), chances(rewards, ways, p) @ dead.double())

    def test_table_3_is_the_discard_rate_and_not_the_printed_formula(self):
        """C15: what appendix D.3 prints, 1 - r^2 - (1 - r)^2, keeps at most half; all of Table 3 is above."""
        p = torch.linspace(0, 1, 101, dtype=torch.float64)
        assert close(1 - discard_rate(p), informative_share(p, 2))
        assert informative_share(p, 2).max() == 0.5 < self.PRINTED.min()
        rewards = mean_reward_from_discard_rate(self.PRINTED)
        assert close(rewards, vector(0.62, 0.81, 0.80, 0.87, 0.83), 0.005)
        assert close(discard_rate(rewards), self.PRINTED)
        assert close(discard_rate(1 - rewards), self.PRINTED)

    def test_spread_between_prompts_raises_it(self):
        """C15. Half the prompts at 0.2, half at 0.8: 0.68 discarded; all of them at the mean 0.5: 0.5."""
        p = vector(0.2, 0.8)
        assert discard_rate(p).mean().item() == pytest.approx(0.68)
        assert mean_reward_from_discard_rate(discard_rate(p).mean()) > p.mean()


class TestExploration:
    def test_pairs_find_as_much_as_one_group_if_nothing_is_learned_and_more_otherwise(self):
        """C14 (Prop. C.4): 16 completions of a prompt with p = 0.02, at once or as 8 pairs."""
        frozen, rising = vector(*[0.02] * 8), vector(*(0.02 * (1 + 0.3 * i) for i in range(8)))
        at_once = exploration_probability(0.02, 16)
        assert at_once.item() == pytest.approx(0.2762, abs=5e-5)
        assert close(exploration_probability(frozen, 2), at_once)
        assert exploration_probability(rising, 2).item() == pytest.approx(0.489, abs=5e-4)

    def test_against_enumeration(self):
        """C14: every outcome of two groups of two at pass rates 0.1 and 0.4."""
        rewards, ways = binary_groups(2)
        first, second = chances(rewards, ways, 0.1), chances(rewards, ways, 0.4)
        none = (first[:, None] * second)[(rewards.sum(-1)[:, None] + rewards.sum(-1)) == 0].sum()
        assert close(exploration_probability(vector(0.1, 0.4), 2), 1 - none)


class TestControlVariate:
    def test_algebra_on_a_sample(self):
        """C11 (Prop. 4.1): correlated Gaussian vectors, with the sample's own moments, which make it exact."""
        g = torch.Generator().manual_seed(0)
        shared, own, other = torch.randn(3, 300, 5, generator=g, dtype=torch.float64)
        positive, negative = shared + 0.5 * own, 2 * shared + other
        positive, negative = positive - positive.mean(0), negative - negative.mean(0)
        moments = [(x * y).sum(-1).mean().item() for x, y in ((positive,) * 2, (negative,) * 2, (positive, negative))]
        variance, control_variance, covariance = moments
        best = covariance / control_variance
        seen = {}
        for tenths in range(-10, 41):  # of c*
            c = tenths / 10 * best
            seen[tenths] = (positive - c * negative).square().sum(-1).mean().item()
            assert control_variate_variance(*moments, c) == pytest.approx(seen[tenths], rel=1e-12)
        assert min(seen, key=seen.__getitem__) == 10
        assert all((seen[tenths] > variance) == (tenths < 0 or tenths > 20) for tenths in seen if tenths not in (0, 20))
        rho_squared = covariance**2 / (variance * control_variance)
        assert 0.5 < rho_squared < 0.9
        assert control_variate_variance(*moments) == pytest.approx((1 - rho_squared) * variance, rel=1e-12)
        assert control_variate_variance(*moments, 2 * best) == pytest.approx(variance, rel=1e-12)

    def test_its_premise_does_not_follow_from_the_policy(self):
        """C12: p E g+ + (1 - p) E g- = 0 holds on-policy, and makes the means antiparallel.

        Four prompts, told apart by which of the sequences are correct, all with p = 1/2: winners and losers swap means
        with each other, g+ and g- are drawn independently within a prompt, so their covariance is that of the means.
        """
        probs = vector(0.3, 0.2, 0.2, 0.3)
        score = scores(logits_of(probs))
        prompts = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]).double()
        p = prompts @ probs
        assert close(p, 0.5)
        means, squares = [], []
        for side in (prompts, 1 - prompts):
            chance = side * probs / (side @ probs)[:, None]
            means.append(chance @ score)
            squares.append((chance @ score.square().sum(-1)).mean())
        assert close(p[:, None] * means[0] + (1 - p)[:, None] * means[1], 0)
        assert means[0].norm(dim=-1).min() > 0.1
        assert close(torch.cosine_similarity(*means, dim=-1), -1)

        overall = [mean.mean(0) for mean in means]
        variance, control_variance = (square - mean @ mean for square, mean in zip(squares, overall, strict=True))
        covariance = (means[0] * means[1]).sum(-1).mean() - overall[0] @ overall[1]
        assert covariance < -0.1
        assert control_variate_variance(variance, control_variance, covariance, 1.0) > variance

    @pytest.mark.parametrize("probs", [(0.26, 0.20, 0.10, 0.44), (0.05, 0.9, 0.03, 0.02), (0.25, 0.25, 0.25, 0.25)])
    @pytest.mark.parametrize("correct", [(1, 0, 1, 0), (0, 1, 1, 1), (0, 0, 0, 1)])
    def test_score_identity(self, probs: tuple[float, ...], correct: tuple[float, ...]):
        """C12: whatever the pass rate."""
        chance, wins = vector(*probs), vector(*correct).bool()
        weighted = scores(logits_of(chance)) * chance[:, None]
        p = chance[wins].sum()
        positive, negative = weighted[wins].sum(0) / p, weighted[~wins].sum(0) / (1 - p)
        assert close(p * positive + (1 - p) * negative, 0)
        assert positive @ negative == pytest.approx(-((1 - p) / p * negative @ negative).item(), rel=1e-9)
        assert positive @ negative < 0


class TestMiniBatchVariance:
    def test_falls_with_the_number_of_independent_groups(self):
        """C13 (Lemma C.3): all batches of B pairs, each through ``select`` as a whole. Slope -1 on log-log."""
        probs, correct = vector(0.26, 0.20, 0.10, 0.44), vector(1, 0, 1, 0)
        score = scores(logits_of(probs))
        variances = []
        for groups in (1, 2, 3):
            completions = torch.cartesian_prod(*[torch.arange(4)] * (2 * groups)).view(-1, groups, 2)
            chance = probs[completions].prod(-1).prod(-1)
            advantages = torch.stack([GRPO().select(rewards)[1] for rewards in correct[completions]])
            gradients = (advantages[..., None] * score[completions]).mean((1, 2))
            mean = chance @ gradients
            variances.append((chance @ (gradients - mean).square().sum(-1)).item())
        assert variances[0] > 0.1
        for groups in (2, 3):
            assert math.log(variances[groups - 1] / variances[0]) / math.log(groups) == pytest.approx(-1, abs=1e-12)

    @staticmethod
    def group_moments(features: Tensor, policy: Tensor, good: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Exact mean ``[P, D]`` and mean square ``[P]`` of a group's gradient; prompts have one correct answer each.

        With n winners the gradient is (1/G) (n A+ s+ + A- (sum of the scores of G - n losers)), and the losers are
        independent draws with mean score m and mean square v.
        """
        score = features - (policy[..., None] * features).sum(1, keepdim=True)
        rows = torch.arange(len(good))
        p, winner = policy[rows, good], score[rows, good]
        loser = policy.clone()
        loser[rows, good] = 0
        loser = loser / (1 - p)[:, None]
        m, v = (loser[..., None] * score).sum(1), (loser * score.square().sum(-1)).sum(1)

        n = torch.arange(group_size + 1)
        rewards = (torch.arange(group_size) < n[:, None]).double()
        advantages = GRPO().select(rewards)[1] / group_size
        plus, minus = (advantages * rewards).sum(-1), (advantages * (1 - rewards)).sum(-1)
        lost = (group_size - n).double()
        each = minus / lost.clamp(min=1)
        ways = vector(*(float(math.comb(group_size, i)) for i in range(group_size + 1)))
        chance = ways * p[:, None] ** n * (1 - p[:, None]) ** lost

        mean = (chance @ plus)[:, None] * winner + (chance @ minus)[:, None] * m
        winner_square, cross, m_square = winner.square().sum(-1), (winner * m).sum(-1), m.square().sum(-1)
        square = (chance @ plus.square()) * winner_square + 2 * (chance @ (plus * minus)) * cross
        square = (
            square + (chance @ (each.square() * lost)) * v + (chance @ (each.square() * lost * (lost - 1))) * m_square
        )
        return mean, square

    @staticmethod
    def prompts(sharpness: float, count: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
        """Linear softmax over 8 answers; the correct one is drawn from the policy, so a sharp one finds prompts easy."""
        g = torch.Generator().manual_seed(1)
        features = torch.randn(count, 8, 16, generator=g, dtype=torch.float64)
        theta = torch.randn(16, generator=g, dtype=torch.float64) * sharpness
        policy = (features @ theta).softmax(-1)
        return features, policy, torch.multinomial(policy, 1, generator=g)[:, 0]

    def test_moments_of_a_group_against_enumeration(self):
        features, policy, good = self.prompts(0.6, count=3)
        mean, square = self.group_moments(features, policy, good, 3)
        groups = torch.cartesian_prod(*[torch.arange(8)] * 3)
        for prompt in range(3):
            chance = policy[prompt][groups].prod(-1)
            score = features[prompt] - policy[prompt] @ features[prompt]
            advantages = GRPO().select((groups == good[prompt]).double())[1]
            gradients = (advantages[..., None] * score[groups]).mean(1)
            assert close(chance @ gradients, mean[prompt])
            assert close(chance @ gradients.square().sum(-1), square[prompt])

    @pytest.mark.parametrize(("sharpness", "pass_rate"), [(0.1, 0.14), (0.6, 0.49)])
    def test_at_equal_rollouts_more_prompts_beat_larger_groups(self, sharpness: float, pass_rate: float):
        """C13 where rollouts share prompts and are not independent: 512 of them as 32 x 16 or as 256 x 2.

        Variance of the step's gradient relative to its squared mean, exact, for prompts drawn independently. At these
        pass rates pairs have less than half of it.
        """
        features, policy, good = self.prompts(sharpness)
        rows = torch.arange(len(good))
        p = policy[rows, good]
        assert p.mean().item() == pytest.approx(pass_rate, abs=0.005)
        slope = p[:, None] * (features[rows, good] - (policy[..., None] * features).sum(1))
        relative = {}
        for prompts, group_size in ((32, 16), (256, 2)):
            mean, square = self.group_moments(features, policy, good, group_size)
            assert close(mean, kappa(p, group_size)[:, None] * slope)
            step = mean.mean(0)
            relative[group_size] = ((square.mean() - step @ step) / prompts / (step @ step)).item()
        assert relative[16] > 2 * relative[2]


class TestDeadPairs:
    @pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "sequence_sum"])
    def test_skipping_them_changes_nothing_only_if_they_stay_in_the_denominator(self, aggregation: str):
        """C16: 7 of 10 pairs are ties. Without them in the denominator the gradient is 1 / (1 - 0.7) times as large."""
        logits = logits_of(vector(0.26, 0.20, 0.10, 0.44)).requires_grad_()
        rewards = vector(*[1, 0] * 3, *[1, 1] * 4, *[0, 0] * 3).view(10, 2)
        completions = torch.tensor([0, 1, 2, 3, 3, 0, *[0, 1, 2, 3] * 3, 1, 2])
        loss = GRPO(aggregation=aggregation)
        advantages = loss.select(rewards)[1].flatten()
        live = advantages != 0
        assert live.sum() == 6

        def gradient(which: Tensor, **totals: int) -> Tensor:
            rows = completions[which]
            x = LossInputs(sequence_logps(logits)[rows], MASK[rows], advantages[which], **totals)
            return torch.autograd.grad(loss(x).loss, logits)[0]

        whole = gradient(torch.ones(20).bool())
        tokens = MASK[completions].sum(-1).double()
        kept = gradient(live, total_rows=20, total_tokens=int(tokens.sum()))
        alone = gradient(live)
        assert whole.abs().max() > 0.01
        assert close(kept, whole)
        share = tokens[live].sum() / tokens.sum() if aggregation == "token_mean" else 0.3
        assert close(alone, whole / share)


class TestPassAtK:
    @pytest.mark.parametrize(("p", "n", "k"), [(0.3, 10, 4), (0.05, 8, 8), (0.7, 6, 1)])
    def test_is_unbiased(self, p: float, n: int, k: int):
        """C17: over all c of Binomial(n, p)."""
        correct = torch.arange(n + 1, dtype=torch.float64)
        chance = vector(*(math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)))
        assert close(chance @ pass_at_k(correct, torch.full_like(correct, n), k), 1 - (1 - p) ** k)

    def test_bootstrap_is_lower(self):
        """C17: verl's best@n draws n of the n samples with replacement, and misses a single correct one 1 time in e."""
        for c in (1, 2, 3):
            draws = torch.cartesian_prod(*[torch.arange(4)] * 4)
            bootstrap = (draws < c).any(-1).double().mean()
            assert close(bootstrap, 1 - (1 - c / 4) ** 4)
            assert bootstrap < pass_at_k(vector(c), vector(4), 4).item()
        correct = vector(1, 2, 4)
        assert close(1 - (1 - correct / 32) ** 32, vector(0.638, 0.873, 0.986), 5e-4)
        assert close(pass_at_k(correct, torch.full_like(correct, 32), 32), 1)


class TestMistakes:
    @pytest.mark.parametrize(
        "function", [kappa, expected_coefficient, informative_share, snr_per_rollout, snr_per_trained_row]
    )
    def test_of_pass_rates_and_group_sizes(self, function):
        for p in (-0.1, 1.5, math.nan):
            with pytest.raises(ValueError, match=rf"^Expected pass rates within 0 and 1, got {p}\.$"):
                function(vector(0.5, p), 4)
        for group_size in (1, 0, -math.inf, 2.5):
            with pytest.raises(
                ValueError, match=rf"`group_size` to be a whole number >= 2 or math.inf, got {group_size}"
            ):
                function(0.5, group_size)

    def test_of_other_arguments(self):
        with pytest.raises(ValueError, match=r"pass rates within 0 and 1, got 2\.0"):
            discard_rate(2)
        with pytest.raises(ValueError, match=r"pass rates within 0 and 1, got 2\.0"):
            exploration_probability(vector(0.5, 2), 2)
        with pytest.raises(ValueError, match=r"within 0.5 and 1, got 0.25"):
            mean_reward_from_discard_rate(0.25)
        with pytest.raises(ValueError, match="'population', 'sample' or 'none', got 'batch'"):
            kappa(0.5, 2, "batch")
        for shape in ([4], [4, 1]):
            with pytest.raises(ValueError, match=r"shape \[P, G\] with G >= 2, got \[4"):
                contrastive_coefficient(torch.zeros(shape))

    @pytest.mark.parametrize(
        "weights", [[1.0], [[1.0, 1.0]], [0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0]]
    )
    def test_of_weights(self, weights: list):
        with pytest.raises(ValueError, match=r"one shape \[K\], got \[1, 2\] and \[1, 2\]"):
            informative_share(vector(0.1, 0.9)[None], 2, torch.ones(1, 2))
        with pytest.raises(ValueError, match=r"Expected .*`weights`.* got .*"):
            informative_share(vector(0.1, 0.9), 2, torch.tensor(weights))
