"""Sums of losses."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lit_grpo.errors import UserError
from lit_grpo.losses.base import Loss, LossInputs, LossOutput, Metrics
from lit_grpo.losses.schedules import Coefficient, at


class WeightedSum(Loss):
    r"""Any losses that agree on their rows, added up: :math:`L = \sum_j w_j L_j`.

    Each loss keeps the advantages that it made itself. They agree if, for the same groups, they select the same
    completions: on groups of two all losses do; on larger ones, losses on pairs select two and the others all.

    A metric that several losses report is that of the first; ``loss_NAME`` is each one's own loss, unweighted.

    Args:
        losses: at least one.
        weights: of each, a number or a :class:`~lit_grpo.losses.Schedule`; 1 if not given.

    Example:
        >>> from lit_grpo.losses import KL, TwoGRPO
        >>> loss = WeightedSum([TwoGRPO(), KL()], [1.0, 0.05])
        >>> loss.needs_reference, loss.select(torch.tensor([[1.0, 0.0]]))[1].tolist()
        (True, [[[1.0, 1.0], [-1.0, 1.0]]])
    """

    def __init__(self, losses: list[Loss], weights: list[Coefficient] | None = None) -> None:
        super().__init__()
        if not losses:
            raise UserError("model.loss.init_args.losses: expected at least one loss, got none.")
        weights = [1.0] * len(losses) if weights is None else weights
        if len(weights) != len(losses):
            raise UserError(
                f"model.loss.init_args.weights: expected one for each of the {len(losses)} losses, got {len(weights)}."
            )
        if any(isinstance(loss, WeightedSum) for loss in losses):
            raise UserError("model.loss.init_args.losses: a WeightedSum inside a WeightedSum; put its losses here.")
        if adaptive := [type(loss).__name__ for loss in losses if loss.draws_first]:
            raise UserError(
                f"model.loss.init_args.losses: {adaptive[0]} decides which completions are drawn, and other losses"
                " would train on that choice. Use it alone, or TwoGRPO in the sum."
            )
        self.losses, self.weights = nn.ModuleList(losses), weights
        kinds = [type(loss).__name__ for loss in losses]
        self.names = [k if kinds.count(k) == 1 else f"{k}_{j}" for j, k in enumerate(kinds)]
        self.unit = max(loss.unit for loss in losses)
        self.needs_reference = any(loss.needs_reference for loss in losses)
        self.needs_entropy = any(loss.needs_entropy for loss in losses)
        self.needs_kl_baseline = any(loss.needs_kl_baseline for loss in losses)
        self.masks_truncated = any(loss.masks_truncated for loss in losses)
        self.drops_zero_advantages = all(loss.drops_zero_advantages for loss in losses)

    def terms(self) -> list[Loss]:
        return cast(list[Loss], list(self.losses))

    def select(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Loss.select`, with one column of advantages for each loss: ``[P, K, L]``."""
        selected = [loss.select(rewards) for loss in self.terms()]
        # The loss with the largest unit decides the order, as its units must stay together.
        lead = max(range(len(selected)), key=lambda j: self.terms()[j].unit)
        index = selected[lead][0]
        place = index.argsort(-1).argsort(-1)
        columns = []
        for name, (other, advantages) in zip(self.names, selected, strict=True):
            if other.shape != index.shape or not other.sort(-1).values.equal(index.sort(-1).values):
                raise UserError(
                    f"model.loss: {self.names[lead]} and {name} cannot be added up: of groups of {rewards.shape[1]},"
                    f" the one selects {index.shape[1]} completions and the other"
                    f" {other.shape[1] if other.shape != index.shape else 'different ones'}. On groups of two"
                    " (data.init_args.group_size, or pairs) all losses select both."
                )
            columns.append(advantages.gather(-1, other.argsort(-1)).gather(-1, place))
        return index, torch.stack(columns, -1)

    def extra_repr(self) -> str:
        return f"weights={self.weights}"

    def forward(self, inputs: LossInputs) -> LossOutput:
        total = inputs.logps.new_zeros(())
        metrics: Metrics = {}
        for name, loss, weight, advantages in zip(
            self.names, self.terms(), self.weights, inputs.advantages.unbind(-1), strict=True
        ):
            output = loss(replace(inputs, advantages=advantages))
            total = total + at(weight, inputs.step) * output.loss
            metrics = output.metrics | metrics | {f"loss_{name}": output.loss.detach()}
        return LossOutput(total, metrics)
