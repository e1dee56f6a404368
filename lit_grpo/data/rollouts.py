"""Online data: each phase, the engine answers fresh prompts and the loss picks the rows to train on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_grpo.data.base import NOTHING_SAMPLED, PromptData
from lit_grpo.data.collate import (
    Row,
    checked_select,
    make_rows,
    mismatched_rows,
    rows_together,
    selection_stats,
    step_batches,
)
from lit_grpo.data.drawing import Drawing
from lit_grpo.data.loader import FilledLoader
from lit_grpo.data.prompts import Prompt, Source
from lit_grpo.data.types import Batch, Group
from lit_grpo.distributed import data_rank, gather_objects
from lit_grpo.engines.base import Engine, Sampling, Stopped, never
from lit_grpo.errors import UserError
from lit_grpo.losses.base import Loss


class RolloutData(PromptData):
    """Prompts in, rollouts out. One Lightning epoch is one *phase*: sample, score, update.

    Everything a phase needs is a function of (seed, phase), independent of the number of processes, so nothing about
    data is ever checkpointed.

    Args:
        train: prompts to train on.
        prompts_per_phase: prompts of a phase, over all processes.
        group_size: completions per prompt; the most, with a loss that draws the rest of a group only in ties.
        updates_per_phase: optimizer steps made on one phase's rollouts. Each takes ``trainer.accumulate_grad_batches``
            micro-batches per process.
        resample_ties: replace groups without any advantage by those of fresh prompts, until all have one or
            ``max_rollouts`` are spent (2-GRPO+RS of arXiv 2510.00977, dynamic sampling of arXiv 2503.14476).
        max_rollouts: of a phase with resampling, the first ones included. If not given, eight times as many as without,
            which for groups of two is what groups of sixteen would take.
        held_out_and_reward: arguments of :class:`~lit_grpo.data.base.PromptData`.
    """

    def __init__(
        self,
        train: Source,
        prompts_per_phase: int = 256,
        group_size: int = 2,
        updates_per_phase: int = 1,
        resample_ties: bool = False,
        max_rollouts: int | None = None,
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
        self.sources["train"] = train
        self.group_size, self.updates_per_phase = group_size, updates_per_phase
        least = prompts_per_phase * group_size
        self.resample_ties, self.max_rollouts = resample_ties, 8 * least if max_rollouts is None else max_rollouts
        if max_rollouts is not None and not (resample_ties and max_rollouts >= least):
            raise UserError(
                f"data.init_args.max_rollouts: got {max_rollouts}; expected at least the {least} of prompts_per_phase x"
                " group_size, together with resample_ties: true."
            )
        self.stop_wanted: Callable[[], bool] = never
        """Asked while a phase is sampled whether to give it up."""
        self.rollouts = 0
        """Completions sampled in the latest phase by all processes."""
        self.halved = False
        """Whether one half of an update's groups is read before the other; then micro-batches are an even number."""
        self.ahead: tuple[int, Drawing] | None = None
        """A later phase, and its rollouts as they are being drawn."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.check_sizes()
            self.prompts["train"] = self.load_prompts(self.train, "data.init_args.train")
            batches = self.updates_per_phase * self.trainer.accumulate_grad_batches
            self.loaders["train"] = FilledLoader(batches, NOTHING_SAMPLED)
        super().setup(stage)

    def check_sizes(self) -> None:
        """Do the arithmetic of a phase, print it, and refuse what does not come out even."""
        world, accumulate = data_rank(self.trainer)[1], self.trainer.accumulate_grad_batches
        loss = self.trainer.lightning_module.loss
        self.check_limits(self.updates_per_phase * accumulate, self.updates_per_phase * accumulate)
        self.draws_first = self.check_draws(loss)
        rows_per_prompt = self.rows_per_prompt = checked_select(loss, torch.zeros(1, self.group_size))[0].shape[1]
        share, rest = divmod(self.prompts_per_phase, self.updates_per_phase * world)
        if rest:
            raise UserError(
                f"data.init_args.prompts_per_phase: {self.prompts_per_phase} prompts do not divide by updates_per_phase"
                f" {self.updates_per_phase} x {world} processes = {self.updates_per_phase * world}. Use a multiple of"
                f" {self.updates_per_phase * world}, such as {(share + 1) * self.updates_per_phase * world}."
            )
        sets, what = self.sets_of(share)
        if sets < accumulate:
            raise UserError(
                f"trainer.accumulate_grad_batches: {accumulate} micro-batches need at least as many {what}, but one"
                f" update has {sets} per process. Lower it, or raise"
                " data.init_args.prompts_per_phase."
            )
        counts = dict.fromkeys([self.draws_first, self.group_size])  # one, or the least and the most
        completions = " to ".join(str(n) for n in counts)
        rollouts = " to ".join(str(self.prompts_per_phase * n) for n in counts)
        rank_zero_info(
            f"One phase: {self.prompts_per_phase} prompts x {completions} completions = {rollouts} rollouts -> updates:"
            f" {self.updates_per_phase}, rows per update: {share * world * rows_per_prompt}, processes: {world},"
            f" micro-batches per process and update: {accumulate}."
        )

    @property
    def sharing(self) -> int:
        """Rows with the same prompt, if it is read once for them; else 0."""
        return self.rows_per_prompt if self.trainer.lightning_module.share_prompts else 0

    def check_draws(self, loss: Loss) -> int:
        """How many completions of each prompt are drawn at first; all, unless the loss says otherwise."""
        if loss.draws_first is None:
            return self.group_size
        name = type(loss).__name__
        if self.group_size <= loss.draws_first:
            raise UserError(
                f"data.init_args.group_size: {name} draws {loss.draws_first} completions of a prompt, and the rest of"
                f" its group in ties, got groups of {self.group_size}. Set group_size to {loss.draws_first + 1} or"
                " more."
            )
        if self.resample_ties:
            raise UserError(
                f"data.init_args.resample_ties: {name} draws more of the prompts that are tied, and does not replace"
                " them. Leave it out, or set model.loss to TwoGRPO."
            )
        return loss.draws_first

    def sets_of(self, groups: int) -> tuple[int, str]:
        """How many sets of rows that stay in one micro-batch a number of groups has, and what to call them."""
        unit = rows_together(self.trainer.lightning_module.loss.unit, self.sharing)
        what = {1: "rows", 2: "pairs"}.get(unit, f"sets of {unit} rows that share a prompt")
        return groups * math.ceil(self.rows_per_prompt / unit), what

    def phase_prompts(self, phase: int) -> list[Prompt]:
        """All prompts of a phase, in order: the training set is gone through in a new random order each time."""
        prompts = self.prompts["train"]
        positions = range(phase * self.prompts_per_phase, (phase + 1) * self.prompts_per_phase)
        orders = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(len(prompts))
            for epoch in range(positions[0] // len(prompts), positions[-1] // len(prompts) + 1)
        }
        return [prompts[orders[i // len(prompts)][i % len(prompts)]] for i in positions]

    def fresh_prompts(self, phase: int) -> Iterator[Prompt]:
        """Prompts that take the place of ties: those that are not in the phase, in a random order of their own."""
        prompts, used = self.prompts["train"], {id(prompt) for prompt in self.phase_prompts(phase)}
        order = np.random.default_rng((self.seed, phase, len(prompts))).permutation(len(prompts))
        return (prompts[i] for i in order if id(prompts[i]) not in used)

    @property
    def groups_per_update(self) -> int:
        """Of this process."""
        return self.prompts_per_phase // (self.updates_per_phase * data_rank(self.trainer)[1])

    @property
    def first_half(self) -> int:
        """Groups of an update that are read first where it is halved."""
        return self.groups_per_update // 2

    def everyones(self, values: torch.Tensor) -> torch.Tensor:
        """All processes' values ``[P, ...]``, one for each group, in the order of the prompts."""
        everyone = torch.stack(gather_objects(values, self.trainer))
        return everyone.transpose(0, 1).flatten(0, 1)

    def select_rows(self, groups: list[Group]) -> list[Row]:
        """The rows of this process's groups that train; the loss chose them with all processes' rewards in sight."""
        (rank, world), loss = data_rank(self.trainer), self.trainer.lightning_module.loss
        rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
        index, advantages = checked_select(loss, self.everyones(rewards))
        if index.shape[1] != self.rows_per_prompt:
            raise UserError(
                f"model.loss: {type(loss).__name__}.select chose {index.shape[1]} rows of each group, but"
                f" {self.rows_per_prompt} before. Their number may depend on the group size only."
            )
        return make_rows(groups, index[rank::world], advantages[rank::world], loss)

    def ties(self, groups: list[Group]) -> list[int]:
        """Places, among those of all processes, of groups without any advantage."""
        rows, k = self.select_rows(groups), self.rows_per_prompt
        silent = torch.tensor([all(row.silent for row in rows[i : i + k]) for i in range(0, len(rows), k)])
        return self.everyones(silent).nonzero().flatten().tolist()

    def replace_ties(
        self, engine: Engine, sampling: Sampling, phase: int, groups: list[Group], stats: dict[str, float]
    ) -> dict[str, float]:
        """Put groups of fresh prompts in the place of those without an advantage, as far as the budget goes.

        Every process samples its share of the replacements and gets those that stand in its own places, so that all
        keep equally many groups; which prompts and tokens they are does not depend on the number of processes.
        """
        rank, world = data_rank(self.trainer)
        fresh, drawn, samples = self.fresh_prompts(phase), self.prompts_per_phase, self.samples
        ties = at_first = self.ties(groups)
        while True:
            left = self.max_rollouts // self.group_size - drawn
            places = list(zip(ties, itertools.islice(fresh, max(0, min(len(ties), left))), strict=False))
            if not places:
                break
            share = {drawn + i: prompt for i, (_, prompt) in enumerate(places) if i % world == rank}
            replacements, more = self.drawn_by_all(self.train_drawing(engine, sampling, phase, share), len(share))
            samples, stats = samples + self.samples, {name: stats[name] + more[name] for name in stats}
            for part in gather_objects(dict(zip(share, replacements, strict=True)), self.trainer):
                for position, group in part.items():
                    place = places[position - drawn][0]
                    if place % world == rank:
                        groups[place // world] = group
            drawn += len(places)
            ties = self.ties(groups)
        self.samples, self.rollouts = samples, drawn * self.group_size
        return stats | {
            "resampled_share": (len(at_first) - len(ties)) / self.prompts_per_phase,
            "rollouts_per_group": drawn / self.prompts_per_phase,
        }

    def draw_the_rest(
        self, engine: Engine, sampling: Sampling, phase: int, groups: list[Group], stats: dict[str, float]
    ) -> dict[str, float]:
        """Draw the rest of those groups whose first completions have no advantage, and fill up the others.

        Stand-ins make all groups equally large: they have reward NaN, and so no advantage, and are no samples.
        """
        rewards, samples = torch.tensor([group.rewards for group in groups], dtype=torch.float64), self.samples
        ties = (checked_select(self.trainer.lightning_module.loss, rewards)[1] == 0).all(-1).tolist()
        share = dict(itertools.compress(self.share_of(phase).items(), ties))
        drawing = self.train_drawing(engine, sampling, phase, share, begin=self.draws_first)
        rest, more = self.drawn_by_all(drawing, len(share))
        missing, found = self.group_size - self.draws_first, iter(rest)
        for group, tie in zip(groups, ties, strict=True):
            stand_ins = Group(group.prompt_ids, (group.completions * missing)[:missing], [math.nan] * missing)
            others = next(found) if tie else stand_ins
            group.completions += others.completions
            group.rewards += others.rewards
        self.samples = samples + self.samples
        self.rollouts += missing * sum(gather_objects(len(rest), self.trainer))
        return {name: stats[name] + more[name] for name in stats} | {"extended_share": len(rest) / len(groups)}

    def train_drawing(
        self, engine: Engine, sampling: Sampling, phase: int, prompts: dict[int, Prompt], begin: int = 0
    ) -> Drawing:
        """As ``drawing``, of prompts to train on, which is given up where the run is to end."""
        n = self.group_size - begin if begin else self.draws_first
        return self.drawing(engine, sampling, "train", phase, prompts, n, stop=lambda: self.stop_wanted(), begin=begin)

    def drawn_by_all(self, drawing: Drawing, prompts: int) -> tuple[list[Group], dict[str, float]]:
        """As ``drawn``.

        Raises:
            Stopped: on all processes, if one of them gave up.
        """
        try:
            drawn = self.drawn(drawing, prompts)
        except Stopped:
            drawn = None
        if self.trainer.strategy.reduce_boolean_decision(drawn is None, all=False) or drawn is None:
            raise Stopped
        return drawn

    def share_of(self, phase: int) -> dict[int, Prompt]:
        """This process's prompts of a phase, by their place among all."""
        rank, world = data_rank(self.trainer)
        return dict(list(enumerate(self.phase_prompts(phase)))[rank::world])

    def draw_ahead(self, engine: Engine, sampling: Sampling, phase: int) -> None:
        """Begin to draw the rollouts of a phase that comes later; until they are drawn, the engine is busy."""
        drawing = self.train_drawing(engine, sampling, phase, self.share_of(phase))
        device = self.trainer.strategy.root_device

        def prepare() -> None:  # what each thread has of its own
            torch.get_num_threads()  # and so has OpenMP keep to it, before vLLM asks OpenMP
            if device.type == "cuda":
                torch.cuda.set_device(device)

        drawing.begin(prepare)
        self.ahead = phase, drawing

    def wait(self) -> float:
        """Return when the engine has nothing left to do: how many seconds that took."""
        return 0.0 if self.ahead is None else self.ahead[1].wait()

    def give_up(self) -> None:
        """Let rollouts be that were being drawn ahead."""
        if self.ahead is not None:
            self.ahead[1].give_up()
            self.ahead = None

    def collect(self, engine: Engine, sampling: Sampling, phase: int) -> None:
        """Sample and score a phase's rollouts, this rank's share, and fill the train loader and ``stats``."""
        world, prompts = data_rank(self.trainer)[1], self.share_of(phase)
        loss, accumulate = self.trainer.lightning_module.loss, self.trainer.accumulate_grad_batches
        stale = self.ahead is not None and self.ahead[0] == phase
        drawing = self.ahead[1] if stale and self.ahead else self.train_drawing(engine, sampling, phase, prompts)
        groups, stats = self.drawn_by_all(drawing, len(prompts))
        self.rollouts, self.ahead = self.prompts_per_phase * self.draws_first, None
        rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)  # before more is drawn of ties
        if self.resample_ties:
            stats = self.replace_ties(engine, sampling, phase, groups, stats)
        if self.draws_first < self.group_size:
            stats = self.draw_the_rest(engine, sampling, phase, groups, stats)

        rows = self.select_rows(groups)
        per_update = self.groups_per_update * self.rows_per_prompt
        updates = [rows[i : i + per_update] for i in range(0, len(rows), per_update)]
        tokens = [sum(len(row.completion.token_ids) for row in update) for update in updates]
        total_tokens = [sum(of_all) for of_all in zip(*gather_objects(tokens, self.trainer), strict=True)]
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
                u == 0 and not stale,
                sampling.temperature,
                self.sharing,
                self.first_half * self.rows_per_prompt if self.halved else None,
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
            **self.reward_parts(),
        }

    def sampled_batches(self) -> list[Batch]:
        return self.loaders["train"].items or []

    def train_dataloader(self) -> Any:
        return self.loaders["train"]
