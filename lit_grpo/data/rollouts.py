"""Online data: each phase, the engine answers fresh prompts and the loss picks the rows to train on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_grpo.data.base import NOTHING_SAMPLED, PromptData
from lit_grpo.data.collate import checked_select, make_rows, mismatched_rows, selection_stats, step_batches
from lit_grpo.data.loader import FilledLoader
from lit_grpo.data.prompts import Prompt, Source
from lit_grpo.engines.base import Engine, Sampling
from lit_grpo.errors import UserError


class RolloutData(PromptData):
    """Prompts in, rollouts out. One Lightning epoch is one *phase*: sample, score, update.

    Everything a phase needs is a function of (seed, phase), independent of the number of processes, so nothing about
    data is ever checkpointed.

    Args:
        train: prompts to train on.
        prompts_per_phase: prompts of a phase, over all processes.
        group_size: completions per prompt.
        updates_per_phase: optimizer steps made on one phase's rollouts. Each takes ``trainer.accumulate_grad_batches``
            micro-batches per process.
        held_out_and_reward: arguments of :class:`~lit_grpo.data.base.PromptData`.
    """

    def __init__(
        self,
        train: Source,
        prompts_per_phase: int = 256,
        group_size: int = 2,
        updates_per_phase: int = 1,
        **held_out_and_reward: Any,
    ) -> None:
        super().__init__(**held_out_and_reward)
        sizes = {
            "prompts_per_phase": prompts_per_phase,
            "group_size": group_size,
            "updates_per_phase": updates_per_phase,
        }
        for key, value in sizes.items():
            if value < 1:
                raise UserError(f"data.init_args.{key}: expected a whole number >= 1, got {value}.")
        self.train, self.prompts_per_phase = train, prompts_per_phase
        self.group_size, self.updates_per_phase = group_size, updates_per_phase

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check_sizes()
            self.prompts["train"] = self.load_prompts(self.train, "data.init_args.train")
            batches = self.updates_per_phase * self.trainer.accumulate_grad_batches
            self.loaders["train"] = FilledLoader(batches, NOTHING_SAMPLED)
        super().setup(stage)

    def check_sizes(self) -> None:
        """Do the arithmetic of a phase, print it, and refuse what does not come out even."""
        world, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
        loss = self.trainer.lightning_module.loss
        self.check_limits(self.updates_per_phase * accumulate, self.updates_per_phase * accumulate)
        rows_per_prompt = self.rows_per_prompt = checked_select(loss, torch.zeros(1, self.group_size))[0].shape[1]
        share, rest = divmod(self.prompts_per_phase, self.updates_per_phase * world)
        if rest:
            raise UserError(
                f"data.init_args.prompts_per_phase: {self.prompts_per_phase} prompts do not divide by updates_per_phase"
                f" {self.updates_per_phase} x {world} processes = {self.updates_per_phase * world}. Use a multiple of"
                f" {self.updates_per_phase * world}, such as {(share + 1) * self.updates_per_phase * world}."
            )
        if share * rows_per_prompt // loss.unit < accumulate:
            raise UserError(
                f"trainer.accumulate_grad_batches: {accumulate} micro-batches need at least as many"
                f" {'rows' if loss.unit == 1 else 'pairs'}, but one update has {share * rows_per_prompt // loss.unit}"
                " per process. Lower it, or raise data.init_args.prompts_per_phase."
            )
        rank_zero_info(
            f"One phase: {self.prompts_per_phase} prompts x {self.group_size} completions ="
            f" {self.prompts_per_phase * self.group_size} rollouts -> updates: {self.updates_per_phase}, rows per"
            f" update: {share * world * rows_per_prompt}, processes: {world}, micro-batches per process and update:"
            f" {accumulate}."
        )

    def phase_prompts(self, phase: int) -> list[Prompt]:
        """All prompts of a phase, in order: the training set is gone through in a new random order each time."""
        prompts = self.prompts["train"]
        positions = range(phase * self.prompts_per_phase, (phase + 1) * self.prompts_per_phase)
        orders = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(len(prompts))
            for epoch in range(positions[0] // len(prompts), positions[-1] // len(prompts) + 1)
        }
        return [prompts[orders[i // len(prompts)][i % len(prompts)]] for i in positions]

    def collect(self, engine: Engine, sampling: Sampling, phase: int) -> None:
        """Sample and score a phase's rollouts, this rank's share, and fill the train loader and ``stats``."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        loss, accumulate = self.trainer.lightning_module.loss, self.trainer.accumulate_grad_batches
        prompts = dict(list(enumerate(self.phase_prompts(phase)))[rank::world])
        groups, stats = self.sample(engine, sampling, "train", phase, prompts, self.group_size)

        strategy = self.trainer.strategy
        rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
        everyone = strategy.all_gather(rewards.to(strategy.root_device)).cpu().reshape(world, *rewards.shape)
        index, advantages = checked_select(loss, everyone.transpose(0, 1).flatten(0, 1))  # in the order of the prompts
        if index.shape[1] != self.rows_per_prompt:
            raise UserError(
                f"model.loss: {type(loss).__name__}.select chose {index.shape[1]} rows of each group, but"
                f" {self.rows_per_prompt} before. Their number may depend on the group size only."
            )
        rows = make_rows(groups, index[rank::world], advantages[rank::world], loss)
        per_update = len(rows) // self.updates_per_phase
        updates = [rows[i : i + per_update] for i in range(0, len(rows), per_update)]
        tokens = torch.tensor([sum(len(row.completion.token_ids) for row in update) for update in updates])
        total_tokens = strategy.reduce(tokens.to(strategy.root_device), reduce_op="sum").tolist()
        batches = [
            batch
            for u, update in enumerate(updates)
            for batch in step_batches(
                update,
                accumulate,
                loss,
                per_update * world,
                total_tokens[u],
                mismatched_rows(update, self.rows_per_prompt) if loss.needs_kl_baseline else None,
                u == 0,
                sampling.temperature,
            )
        ]
        self.loaders["train"].fill(batches)
        self.stats = stats | {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(-1, correction=0).mean().item(),
            **selection_stats(rows, self.rows_per_prompt),
            "trained_share": sum(len(batch.tokens) for batch in batches) / len(rows),
            "completion_tokens": stats["tokens"] / len(self.samples),
            "truncated_share": sum(s.truncated for s in self.samples) / len(self.samples),
        }

    def train_dataloader(self) -> Any:
        return self.loaders["train"]
