"""What arXiv 2510.00977 claims of gradients, and where the losses meet: float64, a small policy, the real losses.

The claims on expectations over groups are in ``test_theory.py``. Numbers are those of the project's list of checkable
claims; where the paper prints a formula wrongly, the test asserts the right one and that the printed one fails.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lit_grpo.losses import (
    DPO,
    GRPO,
    IPO,
    KTO,
    RLOO,
    APOZero,
    Hinge,
    Loss,
    LossInputs,
    Reinforce,
    TwoGRPO,
)
from lit_grpo.losses.kl import kl_penalty

VOCAB, WIDTH = 7, 6


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Toy(nn.Module):
    """An autoregressive policy whose logits depend on the position and the token before."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(0.5 * torch.randn(WIDTH, VOCAB + 1, VOCAB))

    def logps(self, tokens: Tensor) -> Tensor:
        before = torch.cat([torch.full((len(tokens), 1), VOCAB), tokens[:, :-1]], 1)
        rows = self.logits[torch.arange(WIDTH).expand_as(tokens), before]
        return rows.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def completions(lengths: list[int]) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCAB, (len(lengths), WIDTH))
    return tokens, torch.arange(WIDTH) < torch.tensor(lengths)[:, None]


def gradient(
    policy: Toy, loss: Loss, tokens: Tensor, mask: Tensor, reference: Tensor, old: Tensor | None = None
) -> Tensor:
    """Gradient in the policy's parameters on one pair, the first completion preferred."""
    logps = policy.logps(tokens) * mask
    inputs = LossInputs(logps, mask, torch.tensor([1.0, -1.0]), old, reference * mask, kl_baseline=torch.tensor(0.0))
    return torch.autograd.grad(loss(inputs).loss, policy.logits)[0].flatten()


def factor(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The k for which a = k b, and the relative residual."""
    k = (a @ b) / (b @ b)
    return k.item(), ((a - k * b).norm() / a.norm()).item()


def random_group(group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Binary rewards that are not all equal, log-probs, old log-probs and a mask, with ratios beyond the clips."""
    rewards = torch.zeros(1, group_size)
    wins = torch.randint(1, group_size, ()).item()
    rewards[0, torch.randperm(group_size)[:wins]] = 1
    mask = torch.arange(WIDTH) < torch.randint(1, WIDTH + 1, (group_size, 1))
    old = -torch.rand(group_size, WIDTH) - 0.1
    return rewards, (old + 0.3 * torch.randn_like(old)) * mask, old * mask, mask


class TestGRPOIsContrastive:
    @pytest.mark.parametrize("group_size", [2, 3, 4, 8, 16])
    def test_objective_is_sqrt_variance_times_contrast(self, group_size: int):
        """Claim C1: Eq. 7 and Proposition 3.2 (v3), clipped tokens and unequal lengths included."""
        loss = GRPO(clip_low=0.2, clip_high=0.28)
        for _ in range(20):
            rewards, logps, old, mask = random_group(group_size)
            out = loss(LossInputs(logps, mask, loss.select(rewards)[1][0], old))
            wins, ratio = rewards[0] == 1, (logps - old).exp()
            clipped = torch.where(wins[:, None], ratio.clamp(max=1.28), ratio.clamp(min=0.8))
            means = (clipped * mask).sum(-1) / mask.sum(-1)
            p = rewards.mean()
            contrast = (p * (1 - p)).sqrt() * (means[wins].mean() - means[~wins].mean())
            assert -out.loss.item() == pytest.approx(contrast.item(), abs=1e-12)

    def test_token_coefficients(self):
        """Claim C2: Eq. 8. Its indicator is 1 for tokens that are *not* clipped, where the paper says "clipped"."""
        loss = GRPO(clip_low=0.2, clip_high=0.28)
        right, printed = 0.0, 0.0
        for _ in range(20):
            rewards, logps, old, mask = random_group(8)
            logps.requires_grad_()
            out = loss(LossInputs(logps, mask, loss.select(rewards)[1][0], old)).loss
            found = -torch.autograd.grad(out, logps)[0] * (-logps.detach()).exp()  # dJ / dpi = (dJ / dlogp) / pi
            wins, ratio, p = (rewards[0] == 1)[:, None], (logps - old).exp().detach(), rewards.mean()
            kept = torch.where(wins, ratio < 1.28, ratio > 0.8)
            share = torch.where(wins, 1 / wins.sum(), -1 / (~wins).sum())
            c = share * (p * (1 - p)).sqrt() / (mask.sum(-1, keepdim=True) * old.exp()) * mask
            right = max(right, (found - c * kept).abs().max().item())
            printed = max(printed, (found - c * ~kept).abs().max().item())
        assert right < 1e-12
        assert printed > 0.01

    def test_clip_acts_on_one_side_for_each_sign(self):
        """Claim C20: A > 0 has no gradient above 1 + clip_high and keeps it below 1 - clip_low; A < 0 the reverse."""
        ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0])
        for sign, kept in ((1.0, ratio < 1.28), (-1.0, ratio > 0.8)):
            logps = ratio.log()[None].requires_grad_()
            inputs = LossInputs(logps, torch.ones(1, 7).bool(), torch.tensor([sign]), torch.zeros(1, 7))
            found = torch.autograd.grad(GRPO(clip_low=0.2, clip_high=0.28)(inputs).loss, logps)[0][0]
            torch.testing.assert_close(found, -sign * ratio / 7 * kept, rtol=1e-12, atol=0)


class TestDPOIsContrastive:
    def test_gradient_in_closed_form(self):
        """Claim C6, Lemma B.1: -beta sigma(r- - r+) (grad log pi(o+) - grad log pi(o-)), away from the reference."""
        policy, beta = Toy(), 0.3
        tokens, mask = completions([4, 5])
        reference = Toy().logps(tokens).detach()
        sums = (policy.logps(tokens) * mask).sum(-1)
        rewards = beta * (sums - (reference * mask).sum(-1)).detach()
        closed = (
            -beta * torch.sigmoid(rewards[1] - rewards[0]) * torch.autograd.grad(sums[0] - sums[1], policy.logits)[0]
        )
        found = gradient(policy, DPO(beta=beta), tokens, mask, reference)
        torch.testing.assert_close(found, closed.flatten(), rtol=0, atol=1e-12)

    def test_token_coefficient_has_the_tokens_probability(self):
        """Claim C6, Eq. 9: d L / d pi(o_t) = -+ beta sigma / pi(o_t | o_<t), not / pi(o) as printed."""
        beta, probs = 0.3, torch.tensor([[0.5, 0.2], [0.3, 0.9]], requires_grad=True)
        reference = torch.tensor([[0.4, 0.4], [0.6, 0.5]]).log()
        inputs = LossInputs(probs.log(), torch.ones(2, 2).bool(), torch.tensor([1.0, -1.0]), ref_logps=reference)
        found = torch.autograd.grad(DPO(beta=beta)(inputs).loss, probs)[0]
        scores = beta * (probs.log() - reference).sum(-1).detach()
        weight = beta * torch.sigmoid(scores[1] - scores[0]) * torch.tensor([[-1.0], [1.0]])
        torch.testing.assert_close(found, weight / probs.detach(), rtol=0, atol=1e-12)
        assert (found - weight / probs.detach().prod(-1, keepdim=True)).abs().max() > 0.01


SUM, SEQUENCE_MEAN, TOKEN_MEAN = "sequence_sum", "sequence_mean", "token_mean"


class TestBridges:
    """Claim C7: at the reference, on one mixed pair, the losses have one direction and differ by a number."""

    @pytest.mark.parametrize(
        ("loss", "aggregation", "k"),
        [
            (DPO(beta=0.1), SUM, 0.1),
            (DPO(beta=0.3), SUM, 0.3),
            (DPO(beta=0.1, log_ratios="mean"), SEQUENCE_MEAN, 0.1),
            (Hinge(beta=0.1), SUM, 0.2),
            (KTO(beta=0.1), SUM, 0.1 / 4),
            (APOZero(beta=0.1), SUM, 0.1 / 4),
            (IPO(beta=0.1, log_ratios="sum"), SUM, 2 / 0.1),
            (IPO(beta=0.1), SEQUENCE_MEAN, 2 / 0.1),
            (RLOO(), SUM, 1.0),
            (Reinforce(), SUM, 1.0),
            (GRPO(aggregation=TOKEN_MEAN), SUM, 2 / 9),  # parallel: one constant, rows over tokens
        ],
        ids=str,
    )
    def test_a_multiple_of_two_grpo(self, loss: Loss, aggregation: str, k: float):
        policy = Toy()
        tokens, mask = completions([4, 5])
        reference = policy.logps(tokens).detach()
        two_grpo = gradient(policy, TwoGRPO(aggregation=aggregation), tokens, mask, reference)
        found, residual = factor(gradient(policy, loss, tokens, mask, reference), two_grpo)
        assert found == pytest.approx(k, rel=1e-12)
        assert residual < 1e-12

    @pytest.mark.parametrize(
        ("loss", "aggregation"),
        [(DPO(beta=0.1), SEQUENCE_MEAN), (GRPO(aggregation=TOKEN_MEAN), SEQUENCE_MEAN)],
        ids=str,
    )
    def test_not_where_lengths_are_averaged(self, loss: Loss, aggregation: str):
        """Claim C8: the paper's printed sequence mean is no multiple of DPO where lengths differ, and is where not."""
        for lengths, parallel in (([4, 5], False), ([4, 4], True)):
            policy = Toy()
            tokens, mask = completions(lengths)
            reference = policy.logps(tokens).detach()
            other = gradient(policy, TwoGRPO(aggregation=aggregation), tokens, mask, reference)
            residual = factor(gradient(policy, loss, tokens, mask, reference), other)[1]
            assert residual < 1e-12 if parallel else residual > 0.05

    @pytest.mark.parametrize("h", [-20.0, -2.0, 0.0, 2.0, 20.0])
    def test_away_from_the_reference_the_weights_part(self, h: float):
        """Claim C8: |dL/dh| is beta sigma(-beta h) for DPO, 1/2 for 2-GRPO, 2 |h - 1/(2 beta)| for IPO."""
        beta = 0.1

        def slope(loss: Loss) -> float:
            margin = torch.tensor(h, requires_grad=True)
            logps = torch.stack([margin / 2, -margin / 2])[:, None]
            x = LossInputs(logps, torch.ones(2, 1).bool(), torch.tensor([1.0, -1.0]), ref_logps=torch.zeros(2, 1))
            return torch.autograd.grad(loss(x).loss, margin)[0].item()

        assert slope(DPO(beta=beta)) == pytest.approx(-beta / (1 + math.exp(beta * h)), rel=1e-12)
        assert slope(Hinge(beta=beta)) == pytest.approx(-beta if h < 10 else 0.0)
        assert slope(IPO(beta=beta, log_ratios="sum")) == pytest.approx(2 * (h - 5), rel=1e-12)  # turns round at 5
        assert slope(TwoGRPO()) == pytest.approx(-0.5, rel=1e-12)  # on-policy: h does not enter

    def test_two_grpo_is_rloo_on_binary_rewards(self):
        """Claim C9."""
        rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
        assert torch.equal(TwoGRPO().select(rewards)[1], RLOO().select(rewards)[1])
        continuous = torch.tensor([[0.2, 0.9]])
        assert not torch.equal(TwoGRPO().select(continuous)[1], RLOO().select(continuous)[1])


class TestKLEstimators:
    """Claim C18, by exact enumeration of one token: values and gradients under samples from the policy."""

    @pytest.mark.parametrize(
        ("estimator", "value_is_exact", "gradient_of"),
        [("k2", False, "reverse"), ("k3", True, "forward"), ("k3_ratio", True, "reverse")],
    )
    def test_value_and_gradient(self, estimator: str, value_is_exact: bool, gradient_of: str):
        theta = torch.randn(5, requires_grad=True)
        reference = torch.randn(5).log_softmax(0)
        logps = theta.log_softmax(0)
        probs = logps.exp()
        divergences = {
            "reverse": (probs * (logps - reference)).sum(),
            "forward": (reference.exp() * (reference - logps)).sum(),
        }
        gradients = {k: torch.autograd.grad(kl, theta, retain_graph=True)[0] for k, kl in divergences.items()}
        assert (gradients["reverse"] - gradients["forward"]).norm() > 0.01

        penalty = kl_penalty(logps, reference, logps - logps.detach(), estimator)
        mean = (probs.detach() * penalty).sum()
        assert (abs((mean - divergences["reverse"]).item()) < 1e-12) == value_is_exact
        found = torch.autograd.grad(mean, theta)[0]
        torch.testing.assert_close(found, gradients[gradient_of], rtol=0, atol=1e-12)

    def test_why_k1_is_refused(self):
        theta = torch.randn(5, requires_grad=True)
        logps = theta.log_softmax(0)
        mean = (logps.exp().detach() * (logps - torch.randn(5).log_softmax(0))).sum()
        assert torch.autograd.grad(mean, theta)[0].abs().max() < 1e-15


class TestScaleOfAdvantages:
    """Claim C21: under Adam, +-1 or +-0.7071 is the same run, unless a term of another scale is added."""

    def run(self, scale: str, beta: float) -> Tensor:
        torch.manual_seed(1)
        policy, loss = Toy(), GRPO(scale=scale, beta=beta, kl="k2")
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
        reference = Toy()
        for _ in range(200):
            tokens, mask = completions([WIDTH] * 8)
            rewards = torch.randint(0, 2, (4, 2)).double()
            logps = policy.logps(tokens)
            advantages = loss.select(rewards)[1].flatten()
            out = loss(LossInputs(logps, mask, advantages, ref_logps=reference.logps(tokens).detach())).loss
            optimizer.zero_grad()
            out.backward()
            optimizer.step()
        return policy.logits.detach()

    def test_adam_does_not_see_it_without_a_kl_term(self):
        one, two = self.run("population", 0.0), self.run("sample", 0.0)
        assert ((one - two).norm() / one.norm()).item() < 1e-5  # Adam's own epsilon is what is left

    def test_and_does_with_one(self):
        one, two = self.run("population", 0.3), self.run("sample", 0.3)
        assert ((one - two).norm() / one.norm()).item() > 1e-3
