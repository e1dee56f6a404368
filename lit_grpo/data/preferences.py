"""Offline data: groups that somebody else wrote and scored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm import tqdm

from lit_grpo.data.base import PromptData
from lit_grpo.data.collate import checked_select, make_rows, mismatched_rows, selection_stats, step_batches
from lit_grpo.data.layouts import Example, Preferences, read_examples
from lit_grpo.data.prompts import as_messages, check_templates, check_vocabulary, encode_prompt, render_chat
from lit_grpo.data.types import Batch, Completion, Group
from lit_grpo.distributed import data_rank
from lit_grpo.errors import UserError

CHUNK = 1024
"""Rows tokenised at a time: the tokenizer shares a list of texts out between the cores."""


class PreferenceData(PromptData):
    """Pairs, labelled completions or demonstrations of a file, as groups scored 1 and 0.

    Args:
        train: prompts with completions; its columns say of which kind.
        batch_size: groups of one optimizer step, over all processes; what is left of the data after whole steps is left
            out until the next pass. Each step takes ``trainer.accumulate_grad_batches`` micro-batches per process.
        steps_per_phase: optimizer steps of one phase (an epoch of the Trainer), after which metrics are logged; if not
            given, one pass over the data.
        max_completion_tokens: longer completions are cut off there, on both sides of a pair alike.
        held_out_and_reward: arguments of :class:`~lit_grpo.data.base.PromptData`.
    """

    def __init__(
        self,
        train: Preferences,
        batch_size: int = 64,
        steps_per_phase: int | None = None,
        max_completion_tokens: int | None = None,
        **held_out_and_reward: Any,
    ) -> None:
        super().__init__(**held_out_and_reward)
        for key, value in (("max_completion_tokens", max_completion_tokens), ("steps_per_phase", steps_per_phase)):
            if value is not None and value < 1:
                raise UserError(f"data.init_args.{key}: expected a whole number >= 1, got {value}.")
        self.steps_per_phase = steps_per_phase
        self.train, self.batch_size, self.max_completion_tokens = train, batch_size, max_completion_tokens
        self.kind, self.groups = "", list[Group]()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.groups = self.load_groups()
            self.check_sizes()
        super().setup(stage)

    def load_groups(self) -> list[Group]:
        """The groups of all rows except those that cannot train."""
        key, limit = "data.init_args.train", self.max_prompt_tokens
        check_templates(self.template, self.chat_template, self.trainer.lightning_module.tokenizer)
        examples, self.kind = read_examples(self.train, key)
        self.select([[1.0, 0.0][: len(examples[0].rewards)]])  # before tokenising, which takes its time
        groups, long, alike, tied = [], 0, 0, 0
        for example, group in zip(examples, self.encode(examples), strict=True):
            ids = [completion.token_ids for completion in group.completions]
            if limit is not None and len(group.prompt_ids) > limit:
                long += 1
            elif len(ids) == 2 and ids[0] == ids[1]:
                alike += 1
            elif len(ids) == 2 and group.rewards[0] == group.rewards[1]:
                tied += 1
            else:
                self.check_length(len(group.prompt_ids) + max(map(len, ids)), example.where)
                groups.append(group)
        rank_zero_info(f"{key}: read {len(examples)} {self.kind}")
        if long:
            rank_zero_info(f"{key}: left out {long} with prompts longer than {limit} tokens")
        if alike:
            rank_zero_info(f"{key}: left out {alike} pairs whose two sides are the same")
        if tied:
            rank_zero_info(f"{key}: left out {tied} pairs whose sides have the same score")
        return groups

    def encode(self, examples: list[Example]) -> Iterator[Group]:
        """Tokenise prompts and completions apart, so that no token spans both.

        Completions end with a stop token, unless they were cut off.

        Raises:
            UserError: if a row does not fit the settings or the model.
        """
        module, limit = self.trainer.lightning_module, self.max_completion_tokens
        numbers = list(range(module.vocab_size))  # groups hold these very objects: 8 bytes a token instead of 40
        hidden = None if self.trainer.global_rank == 0 else True  # None: unless it is a terminal
        bar = tqdm(total=len(examples), desc="Tokenising", unit="row", delay=1, leave=False, disable=hidden)
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            rendered = [self.render(example) for example in chunk]
            texts = [text for _, completions in rendered for text in completions]
            encoded = iter(module.tokenizer(texts, add_special_tokens=False)["input_ids"])
            for example, (prompt_ids, completions) in zip(chunk, rendered, strict=True):
                ids = [prompt_ids, *(self.with_stop(next(encoded)) for _ in completions)]
                check_vocabulary(max(map(max, ids)), len(numbers), example.where)
                prompt_ids, *sides = [[numbers[token] for token in part] for part in ids]
                cut = [Completion(side[:limit], truncated=limit is not None and len(side) > limit) for side in sides]
                yield Group(prompt_ids, cut, example.rewards)
            bar.update(len(chunk))
        bar.close()

    def render(self, example: Example) -> tuple[list[int], list[str]]:
        """Token ids of a row's prompt, and what the policy would have to write after it, as text.

        Raises:
            UserError: if the row does not fit the settings or the chat template.
        """
        tokenizer, where = self.trainer.lightning_module.tokenizer, example.where
        begin, ids, _ = encode_prompt(example.prompt, where, tokenizer, self.template, self.chat_template)
        if not self.chat_template:
            if any(isinstance(completion, list) for completion in example.completions):
                raise UserError(f"{where} has chat messages as completions. Set data.init_args.chat_template to true.")
            return ids, example.completions
        prompt = example.prompt
        if isinstance(prompt, str):
            prompt = as_messages(self.template.replace("{prompt}", prompt), "user")
        wholes = [
            render_chat([*prompt, *as_messages(completion, "assistant")], where, tokenizer, add_generation_prompt=False)
            for completion in example.completions
        ]
        for whole in wholes:
            if not whole.startswith(begin):
                raise UserError(
                    f"{where}: with its completion, the chat template writes the prompt otherwise than without:"
                    f" {whole!r} does not begin with {begin!r}. Give the model's tokenizer another chat template."
                )
        return ids, [whole[len(begin) :] for whole in wholes]

    def with_stop(self, ids: list[int]) -> list[int]:
        """A completion up to its last stop token, or with an end-of-sequence token where it has none."""
        module = self.trainer.lightning_module
        end = next((i for i in range(len(ids), 0, -1) if ids[i - 1] in module.stop_token_ids), 0)
        if end and not module.tokenizer.decode(ids[end:]).strip():  # templates put a newline after the stop token
            return ids[:end]
        return [*ids, module.tokenizer.eos_token_id]

    def check_length(self, length: int, where: str) -> None:
        """Refuse what is beyond the model's context.

        Raises:
            UserError: naming what has this length.
        """
        context = self.trainer.lightning_module.context
        if length > context:
            raise UserError(
                f"{where} has {length} tokens, beyond the model's context of {context}. Drop or shorten it, or set"
                " data.init_args.max_prompt_tokens and max_completion_tokens."
            )

    def check_sizes(self) -> None:
        """Refuse sizes that do not come out even, and note statistics."""
        loss = self.trainer.lightning_module.loss
        world, accumulate = data_rank(self.trainer)[1], self.trainer.accumulate_grad_batches
        if self.batch_size < 1 or self.batch_size % world or self.batch_size // world < accumulate:
            raise UserError(
                f"data.init_args.batch_size: {self.batch_size} groups cannot fill {accumulate} micro-batches"
                f" (trainer.accumulate_grad_batches) on each of {world} processes. Use a multiple of {world}, at least"
                f" {world * accumulate}."
            )
        if len(self.groups) < self.batch_size:
            raise UserError(
                f"data.init_args.batch_size: {self.batch_size} groups per step, but of {self.train.path!r} only"
                f" {len(self.groups)} are left. Lower it, or raise max_prompt_tokens or max_completion_tokens if set."
            )
        self.check_limits(len(OfflineLoader(self)), accumulate)
        completions = [completion for group in self.groups for completion in group.completions]
        lengths = [len(completion.token_ids) for completion in completions]
        if loss.needs_kl_baseline:
            next(iter(OfflineLoader(self)))  # a step with a single prompt is refused
            name, prompt = type(loss).__name__, max(len(group.prompt_ids) for group in self.groups)
            where = f"model.loss: {name} also reads prompts with completions of other rows, the longest of which"
            self.check_length(prompt + max(lengths), where)
        index, advantages = self.select([group.rewards for group in self.groups])
        self.stats = selection_stats(make_rows(self.groups, index, advantages, loss), index.shape[1]) | {
            "completion_tokens": sum(lengths) / len(lengths),
            "truncated_share": sum(completion.truncated for completion in completions) / len(completions),
        }

    def select(self, rewards: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the loss makes of the rewards, see ``Loss.select``.

        Raises:
            UserError: if it cannot train on groups of this size.
        """
        loss = self.trainer.lightning_module.loss
        try:
            return checked_select(loss, torch.tensor(rewards, dtype=torch.float64))
        except UserError as error:
            raise UserError(
                f"model.loss: {type(loss).__name__} cannot train on the {self.kind} of {self.train.path!r}, groups of"
                f" {len(rewards[0])}. Single completions train with SFT, KTO or APOZero. ({error})"
            ) from error

    def train_dataloader(self) -> Any:
        return OfflineLoader(self)


class OfflineLoader:
    """The steps of one phase. Each pass over the groups has a new random order, the same on every rank."""

    def __init__(self, data: PreferenceData) -> None:
        self.data = data
        self.steps_per_pass = len(data.groups) // data.batch_size
        self.steps = data.steps_per_phase or self.steps_per_pass

    def __len__(self) -> int:
        return self.steps * self.data.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[Batch]:
        data, trainer = self.data, self.data.trainer
        loss, (rank, world) = trainer.lightning_module.loss, data_rank(trainer)
        first = trainer.current_epoch * self.steps
        for step in range(first, first + self.steps):
            number, step_of_pass = divmod(step, self.steps_per_pass)
            order = np.random.default_rng((data.seed, number)).permutation(len(data.groups))
            chosen = order[step_of_pass * data.batch_size : (step_of_pass + 1) * data.batch_size]
            groups = [data.groups[i] for i in chosen]
            rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
            rows = make_rows(groups, *checked_select(loss, rewards), loss)
            per_group = len(rows) // len(groups)
            mismatched = mismatched_rows(rows, per_group) if loss.needs_kl_baseline else None
            total_tokens = sum(len(row.completion.token_ids) for row in rows)
            mine = [g * per_group + k for g in range(rank, len(groups), world) for k in range(per_group)]
            yield from step_batches(
                [rows[i] for i in mine],
                trainer.accumulate_grad_batches,
                loss,
                len(rows),
                total_tokens,
                mismatched and [mismatched[i] for i in mine],
                sharing=per_group if trainer.lightning_module.share_prompts else 0,
            )
