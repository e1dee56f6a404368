"""A run beside what theory says of it."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_grpo.data import Batch, RolloutData
from lit_grpo.errors import UserError
from lit_grpo.sharding import shares_out
from lit_grpo.theory import (
    contrastive_coefficient,
    effective_pairs,
    estimated_informative_share,
    informative_share,
    signal_and_noise,
)


class TheoryMonitor(L.Callback):
    """Logs per phase, under ``theory/``, what :mod:`lit_grpo.theory` speaks of, as it was measured.

    Of the rewards of the phase's prompts, before ties are replaced or more is drawn of them:

    - ``contrastive_coefficient``: mean over groups.
    - ``effective_pairs``: sum over groups; for groups of two, how many are informative.
    - ``informative_share_g2``, ``_g4``, ... up to the group size: at the group size the measured share of informative
      groups, below it unbiased estimates of what smaller groups would have had. Like the next two, of rewards that are
      all 0 or 1.
    - ``informative_share_predicted``: the share to expect of the prompts that came in earlier phases too, from all
      their completions there (:func:`~lit_grpo.theory.estimated_informative_share`). These know nothing of the present
      ones, so where the measured share stays away from it, the policy has moved since.
    - ``informative_share_at_mean``: as if all prompts had the phase's mean pass rate. Measured shares lie below it by
      as much as prompts differ.

    Of the gradients of a phase's updates before clipping, each cut into two halves that have no group in common:

    - ``gradient_signal``: squared norm of an update's expected gradient, unbiased, so that it may be negative.
    - ``gradient_noise``: trace of an update's covariance. Both are means over the phase's updates.
    - ``snr_per_rollout``, ``snr_per_trained_row``: signal over noise, divided by the completions generated for an
      update, or by the rows that it forwarded. Means are taken before dividing, as one update says little; so does
      one phase. They are those of :func:`~lit_grpo.theory.snr_per_rollout` and ``snr_per_trained_row`` up to a factor,
      the squared difference of winners' and losers' mean scores over the variance of scores. It is unknown, but the
      same for all group sizes, so ratios between them compare.

    Groups are taken to be independent. They are nearly so in losses that divide by the tokens of an update or by a
    deviation over all groups, and where an update has a good part of all prompts.

    It takes memory for one more gradient, and an even number of micro-batches per update. The update is the same.
    """

    def __init__(self) -> None:
        self.visits: dict[int, list[int]] = {}
        """Winners and completions so far, by the prompt's row."""
        self.first: list[Tensor] | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Have updates cut into halves.

        Raises:
            UserError: if they cannot be.
        """
        if stage != "fit":
            return
        data, accumulate = trainer.datamodule, trainer.accumulate_grad_batches
        if not isinstance(data, RolloutData) or data.group_size < 2:
            raise UserError(
                "trainer.callbacks: TheoryMonitor compares completions of one prompt, so it wants RolloutData with"
                f" group_size 2 or more; got {type(data).__name__}"
                f"{f' with {data.group_size}' if isinstance(data, RolloutData) else ''}. Leave it out."
            )
        if trainer.world_size > 1 or shares_out(trainer.strategy) or trainer.precision == "16-mixed":
            raise UserError(
                "trainer.callbacks: TheoryMonitor reads whole, unscaled gradients between micro-batches, as a single"
                f" process has them; got {trainer.world_size} processes, {type(trainer.strategy).__name__},"
                f" precision {trainer.precision}. Use trainer.devices 1, strategy auto and precision bf16-mixed or"
                " 32-true, or leave it out."
            )
        if accumulate % 2:
            raise UserError(
                "trainer.accumulate_grad_batches: TheoryMonitor cuts the micro-batches of an update into two halves, so"
                f" their number must be even, got {accumulate}. Set it to {2 * accumulate}."
            )
        sets, what = data.sets_of(data.first_half)
        if sets < accumulate // 2:
            raise UserError(
                f"trainer.accumulate_grad_batches: half of the {accumulate} micro-batches are to read half of an update"
                f" for TheoryMonitor, which has only {sets} {what}. Lower"
                " it, or raise data.init_args.prompts_per_phase."
            )
        data.halved = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        self.updates = torch.zeros((), device=pl_module.device)
        self.rows, self.first = 0, None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.place = batch_idx % trainer.accumulate_grad_batches
        self.rows += len(batch.tokens)
        if batch_idx == 0:
            self.found = self.of_rewards(trainer.datamodule, trainer.current_epoch)

    def of_rewards(self, data: Any, phase: int) -> dict[str, float]:
        """What a phase's rewards tell, and remember them."""
        size, prompts = data.draws_first, data.phase_prompts(phase)
        samples = data.samples[: len(prompts) * size]
        rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64).view(-1, size)
        found = {
            "contrastive_coefficient": contrastive_coefficient(rewards).mean().item(),
            "effective_pairs": effective_pairs(rewards).sum().item(),
        }
        if not ((rewards == 0) | (rewards == 1)).all():
            return found
        winners = rewards.sum(-1)
        for smaller in {2**i for i in range(1, size.bit_length())} | {size}:
            share = estimated_informative_share(winners, size, smaller)
            found[f"informative_share_g{smaller}"] = share.mean().item()
        found["informative_share_at_mean"] = informative_share(rewards.mean(), size).item()
        if before := [self.visits[prompt.row] for prompt in prompts if prompt.row in self.visits]:
            won, drawn = torch.tensor(before).T
            found["informative_share_predicted"] = estimated_informative_share(won, drawn, size).mean().item()
        for prompt, won_now in zip(prompts, winners.tolist(), strict=True):
            visits = self.visits.setdefault(prompt.row, [0, 0])
            visits[0] += int(won_now)
            visits[1] += size
        return found

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.place == trainer.accumulate_grad_batches // 2 - 1:
            self.first = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained(pl_module)]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        assert self.first is not None
        data, whole = trainer.datamodule, [p.grad for p in trained(pl_module)]
        halves = ((a, g - a) for a, g in zip(self.first, whole, strict=True) if g is not None)
        found = signal_and_noise(halves, data.first_half / data.groups_per_update)
        finite = found.isfinite().all()  # other updates are left out by the module
        self.sums += torch.where(finite, found, 0)
        self.updates += finite
        self.first = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data, updates, found = trainer.datamodule, self.updates.item(), self.found
        if updates:
            signal, noise = (self.sums / updates).tolist()
            found |= {"gradient_signal": signal, "gradient_noise": noise}
            if noise > 0:
                found["snr_per_rollout"] = signal / noise * data.updates_per_phase / data.rollouts
                found["snr_per_trained_row"] = signal / noise * data.updates_per_phase / self.rows
        pl_module.log_dict({f"theory/{name}": value for name, value in found.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"visits": self.visits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.visits = state_dict["visits"]


def trained(module: Any) -> list[torch.nn.Parameter]:
    """The parameters that training changes."""
    return [parameter for parameter in module.policy.parameters() if parameter.requires_grad]
