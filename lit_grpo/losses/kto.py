"""KTO (arXiv 2402.01306) and APO-zero on single completions (arXiv 2408.06266)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_grpo.losses.base import Loss, LossInputs, LossOutput, Metrics, above, all_rows, at_least, mean_over, share_of
from lit_grpo.losses.preference import sequence_logps
from lit_grpo.losses.schedules import Coefficient, at


class KTO(Loss):
    r"""Kahneman-Tversky optimization: completions are good or bad by themselves, no pairs.

    .. math::
        L = \mathrm{mean}_i \begin{cases}
        \lambda_D\,(1 - \sigma(\beta (s_i - z_0))) & \text{if } o_i \text{ is desirable} \\
        \lambda_U\,(1 - \sigma(\beta (z_0 - s_i))) & \text{if not}
        \end{cases}

    with :math:`s = \log \pi_\theta / \pi_{ref}` of the completion. The baseline :math:`z_0` estimates how far the
    policy is from the reference: the mean of s over prompts with completions of *other* prompts, at least 0, without
    gradient. It is taken over the whole optimizer step, so that it does not depend on micro-batches; it costs one more
    forward pass of policy and reference.

    Args:
        beta: how near to the reference the optimum lies; larger is nearer.
        desirable_weight: :math:`\lambda_D`. The paper's rule for unequal numbers n of both kinds:
            :math:`\lambda_D n_D / (\lambda_U n_U)` between 1 and 4/3.
        undesirable_weight: :math:`\lambda_U`.
        threshold: completions with a reward above it are desirable.

    Reference:
        "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, Eq. 7 and 8.

    Example:
        >>> KTO().select(torch.tensor([[1.0, 0.0]]))[1].tolist()
        [[1.0, -1.0]]
    """

    needs_reference = True
    needs_kl_baseline = True
    drops_zero_advantages = True

    def __init__(
        self,
        beta: Coefficient = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        above(0, beta=beta)
        at_least(0, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        self.beta, self.threshold = beta, threshold
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        return all_rows(rewards), (rewards > self.threshold).to(rewards.dtype) * 2 - 1

    def baseline(self, inputs: LossInputs) -> Tensor:
        """z_0, a scalar without gradient."""
        assert inputs.kl_baseline is not None
        return inputs.kl_baseline.detach().clamp(min=0)

    def forward(self, inputs: LossInputs) -> LossOutput:
        beta, z0 = at(self.beta, inputs.step), self.baseline(inputs)
        scores = beta * sequence_logps(inputs, "sum")
        desirable, undesirable = inputs.advantages > 0, inputs.advantages < 0
        gain = (scores - beta * z0) * inputs.advantages.sign()
        weight = self.desirable_weight * desirable + self.undesirable_weight * undesirable
        metrics: Metrics = {
            "reward_chosen": mean_over(scores, desirable),
            "reward_rejected": mean_over(scores, undesirable),
            "reward_accuracy": share_of(gain > 0, desirable | undesirable),
            "desirable_share": share_of(desirable, desirable | undesirable),
        }
        if self.needs_kl_baseline:
            metrics["kl_baseline"] = z0
        return LossOutput((weight * torch.sigmoid(-gain)).sum() / inputs.total_rows, metrics)


class APOZero(KTO):
    r"""KTO with :math:`z_0 = 0`: raises what is good and lowers what is bad, each for itself, no extra forward pass.

    On pairs this is half of the paper's paired loss, which is the sum, not the mean, over the two completions.

    Reference:
        "Anchored Preference Optimization", arXiv 2408.06266, Eq. 7.

    Example:
        >>> logps = torch.tensor([[-1.0], [-1.0]])
        >>> inputs = LossInputs(logps, torch.ones(2, 1).bool(), torch.tensor([1.0, -1.0]), ref_logps=logps)
        >>> APOZero()(inputs).loss.item()
        0.5
    """

    needs_kl_baseline = False

    def baseline(self, inputs: LossInputs) -> Tensor:
        return torch.zeros_like(inputs.advantages[0])
