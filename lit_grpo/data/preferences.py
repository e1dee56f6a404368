"""Offline data: groups that somebody else wrote and scored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_grpo.data.base import PromptData
from lit_grpo.data.collate import checked_select, make_rows, mismatched_rows, selection_stats, step_batches
from lit_grpo.data.layouts import Example, Preferences, read_examples
from lit_grpo.data.prompts import as_messages, check_templates, encode_prompt
from lit_grpo.data.types import Batch, Completion, Group
from lit_grpo.errors import UserError


class PreferenceData(PromptData):
    """Pairs, labelled completions or demonstrations of a file, as groups scored 1 and 0.

    Args:
        train: prompts with completions; its columns say of which kind.
        batch_size: groups of one optimizer step, over all processes; a last incomplete step of an epoch is left out.
            Each step takes ``trainer.accumulate_grad_batches`` micro-batches per process.
        max_completion_tokens: longer completions are cut off there, on both sides of a pair alike.
        held_out_and_reward: arguments of :class:`~lit_grpo.data.base.PromptData`.
    """

    def __init__(
        self,
        train: Preferences,
        batch_size: int = 64,
        max_completion_tokens: int | None = None,
        **held_out_and_reward: Any,
    ) -> None:
        super().__init__(**held_out_and_reward)
        if max_completion_tokens is not None and max_completion_tokens < 1:
            raise UserError(
                f"data.init_args.max_completion_tokens: expected a whole number >= 1, got {max_completion_tokens}."
            )
        self.train, self.batch_size, self.max_completion_tokens = train, batch_size, max_completion_tokens
        self.kind, self.groups = "", list[Group]()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.groups = self.load_groups()
            self.check_sizes()
        super().setup(stage)

    def load_groups(self) -> list[Group]:
        """Tokenise prompts and completions apart, so that no token spans both; leave out what cannot train."""
        key, limit = "data.init_args.train", self.max_prompt_tokens
        check_templates(self.template, self.chat_template, self.trainer.lightning_module.tokenizer)
        examples, self.kind = read_examples(self.train, key)
        groups, long, alike = [], 0, 0
        for i, example in enumerate(examples):
            group = self.encode(example, f"{key}: row {i} of {self.train.path!r}")
            ids = [completion.token_ids for completion in group.completions]
            if limit is not None and len(group.prompt_ids) > limit:
                long += 1
            elif len(ids) == 2 and ids[0] == ids[1]:
                alike += 1
            else:
                groups.append(group)
        rank_zero_info(f"{key}: read {len(examples)} {self.kind}")
        if long:
            rank_zero_info(f"{key}: left out {long} with prompts longer than {limit} tokens")
        if alike:
            rank_zero_info(f"{key}: left out {alike} pairs whose two sides are the same")
        return groups

    def encode(self, example: Example, where: str) -> Group:
        """Token ids of one row. Completions end with a stop token, unless they were cut off.

        Raises:
            UserError: if the row does not fit the settings or the model.
        """
        module, limit = self.trainer.lightning_module, self.max_completion_tokens
        _, prompt_ids = encode_prompt(example.prompt, where, module.tokenizer, self.template, self.chat_template)
        completions = []
        for completion in example.completions:
            ids = self.completion_ids(example.prompt, completion, where)
            truncated = limit is not None and len(ids) > limit
            completions.append(Completion(ids[:limit], truncated=truncated))
        longest = len(prompt_ids) + max(len(c.token_ids) for c in completions)
        if longest > module.context:
            raise UserError(
                f"{where} has {longest} tokens, beyond the model's context of {module.context}. Drop or shorten it, or"
                " set data.init_args.max_prompt_tokens and max_completion_tokens."
            )
        return Group(prompt_ids, completions, example.rewards)

    def completion_ids(self, prompt: Any, completion: Any, where: str) -> list[int]:
        """Token ids of one completion as the policy would have to write it."""
        module = self.trainer.lightning_module
        tokenizer = module.tokenizer
        if self.chat_template:
            if isinstance(prompt, str):
                prompt = self.template.replace("{prompt}", prompt)
            prompt = as_messages(prompt, "user")
            begin = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template([*prompt, *as_messages(completion, "assistant")], tokenize=False)
            if not whole.startswith(begin):
                raise UserError(
                    f"{where}: with its completion, the chat template writes the prompt otherwise than without:"
                    f" {whole!r} does not begin with {begin!r}. Use another tokenizer.chat_template."
                )
            text = whole[len(begin) :]
        elif isinstance(completion, str):
            text = completion
        else:
            raise UserError(
                f"{where} has a completion of type {type(completion).__name__}, expected text. If these are chat"
                " messages, set data.init_args.chat_template to true."
            )
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        stops = [i for i, token in enumerate(ids) if token in module.stop_token_ids]
        if stops and not tokenizer.decode(ids[stops[-1] + 1 :]).strip():  # templates put a newline after the stop token
            return ids[: stops[-1] + 1]
        return [*ids, tokenizer.eos_token_id]

    def check_sizes(self) -> None:
        """Refuse sizes that do not come out even, and losses that cannot train on these groups; note statistics."""
        loss = self.trainer.lightning_module.loss
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
        try:
            _, advantages = checked_select(loss, torch.tensor([group.rewards for group in self.groups]))
        except UserError as error:
            raise UserError(
                f"model.loss: {type(loss).__name__} cannot train on the {self.kind} of {self.train.path!r}, groups of"
                f" {len(self.groups[0].rewards)}. Single completions train with SFT, KTO or APOZero. ({error})"
            ) from error
        completions = [completion for group in self.groups for completion in group.completions]
        self.stats = selection_stats(advantages) | {
            "completion_tokens": sum(len(c.token_ids) for c in completions) / len(completions),
            "truncated_share": sum(c.truncated for c in completions) / len(completions),
        }

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
            rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
            rows = make_rows(groups, *checked_select(loss, rewards), loss)
            mismatched = mismatched_rows(rows) if loss.needs_kl_baseline else None
            total_tokens = sum(len(row.completion.token_ids) for row in rows)
            per_group = len(rows) // len(groups)
            mine = [g * per_group + k for g in range(trainer.global_rank, len(groups), world) for k in range(per_group)]
            yield from step_batches(
                [rows[i] for i in mine],
                trainer.accumulate_grad_batches,
                loss,
                len(rows),
                total_tokens,
                mismatched and [mismatched[i] for i in mine],
            )
