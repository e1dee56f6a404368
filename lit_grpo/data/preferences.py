"""Offline data: groups that somebody else wrote and scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_grpo.data.base import PromptData
from lit_grpo.data.collate import checked_select, collate, micro_batches, select_rows
from lit_grpo.data.prompts import Source, load_prompts, load_rows
from lit_grpo.data.types import Batch, Completion, Group
from lit_grpo.errors import UserError


@dataclass
class Demonstrations(Source):
    """A source whose rows also hold a completion."""

    answer: str | None = None
    """Not used in training."""

    completion: str = "completion"
    """Column of the text that followed the prompt."""


class PreferenceData(PromptData):
    """Completions of a file, as groups of one scored 1.

    Args:
        train: prompts with completions.
        batch_size: groups of one optimizer step, over all processes; a last incomplete step of an epoch is left out.
            Each step takes ``trainer.accumulate_grad_batches`` micro-batches per process.
        held_out_and_reward: arguments of :class:`~lit_grpo.data.base.PromptData`.
    """

    def __init__(self, train: Demonstrations, batch_size: int = 64, **held_out_and_reward: Any) -> None:
        super().__init__(**held_out_and_reward)
        self.train, self.batch_size = train, batch_size
        self.groups: list[Group] = []

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.groups = self.load_groups()
            self.check_sizes()
        super().setup(stage)

    def load_groups(self) -> list[Group]:
        """Tokenise prompts and completions apart, so that no token spans both; completions end with the EOS token."""
        module, key = self.trainer.lightning_module, "data.init_args.train"
        prompts = load_prompts(self.train, key, module.tokenizer, self.template, self.chat_template)
        rows = load_rows(self.train, [self.train.completion], key)
        groups = []
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            if self.max_prompt_tokens is not None and len(prompt.token_ids) > self.max_prompt_tokens:
                continue
            completion = row[self.train.completion]
            if not isinstance(completion, str):
                raise UserError(
                    f"{key}.completion: row {i} of {self.train.path!r} holds {completion!r} in column"
                    f" {self.train.completion!r}, expected text."
                )
            ids = [*module.tokenizer(completion, add_special_tokens=False)["input_ids"], module.tokenizer.eos_token_id]
            if (length := len(prompt.token_ids) + len(ids)) > module.context:
                raise UserError(
                    f"{key}: row {i} of {self.train.path!r} has {length} tokens, beyond the model's context of"
                    f" {module.context}. Drop or shorten it."
                )
            groups.append(Group(prompt.token_ids, [Completion(ids)], [1.0]))
        if left_out := len(prompts) - len(groups):
            limit = self.max_prompt_tokens
            rank_zero_info(f"{key}: left out {left_out} of {len(prompts)} prompts, longer than {limit} tokens")
        return groups

    def check_sizes(self) -> None:
        """Refuse sizes that do not come out even, and losses that cannot train on single completions."""
        loss = self.trainer.lightning_module.loss
        try:
            checked_select(loss, torch.ones(1, 1))
        except UserError as error:
            raise UserError(
                f"model.loss: {type(loss).__name__} cannot train on demonstrations, which are groups of one. Use SFT."
            ) from error
        world, accumulate = self.trainer.world_size, self.trainer.accumulate_grad_batches
        self.check_limits(len(self.groups), accumulate)
        if self.batch_size < 1 or self.batch_size % world or self.batch_size // world < accumulate:
            raise UserError(
                f"data.init_args.batch_size: {self.batch_size} groups cannot fill {accumulate} micro-batches"
                f" (trainer.accumulate_grad_batches) on each of {world} processes. Use a multiple of {world}, at least"
                f" {world * accumulate}."
            )
        if len(self.groups) < self.batch_size:
            raise UserError(
                f"data.init_args.batch_size: {self.batch_size} groups per step, but of {self.train.path!r} only"
                f" {len(self.groups)} are left. Lower it, or raise max_prompt_tokens if it is set."
            )

    def train_dataloader(self) -> Any:
        return OfflineLoader(self)


class OfflineLoader:
    """One epoch over the groups in a new random order; every rank computes the same order and takes its own share."""

    def __init__(self, data: PreferenceData) -> None:
        self.data = data
        self.steps = len(data.groups) // data.batch_size

    def __len__(self) -> int:
        return self.steps * self.data.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[Batch]:
        data, trainer = self.data, self.data.trainer
        loss, world = trainer.lightning_module.loss, trainer.world_size
        order = np.random.default_rng((data.seed, trainer.current_epoch)).permutation(len(data.groups))
        for step in range(self.steps):
            groups = [data.groups[i] for i in order[step * data.batch_size : (step + 1) * data.batch_size]]
            rows = select_rows(groups, loss)
            total_tokens = sum(len(row.completion.token_ids) for row in rows)
            per_group = len(rows) // len(groups)
            mine = [
                row
                for g in range(trainer.global_rank, len(groups), world)
                for row in rows[g * per_group : (g + 1) * per_group]
            ]
            for part in micro_batches(mine, trainer.accumulate_grad_batches, loss.unit, loss.drops_zero_advantages):
                yield collate(part, len(rows), total_tokens)
