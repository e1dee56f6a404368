"""What online and offline data modules share: held-out prompts, a reward, and the engine's scored answers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_grpo.data.drawing import Drawing
from lit_grpo.data.loader import LazyLoader
from lit_grpo.data.prompts import Prompt, Source, check_vocabulary, load_prompts
from lit_grpo.data.scoring import RewardFn, Scoring, score
from lit_grpo.data.templates import TEMPLATES
from lit_grpo.data.types import Answers, Batch, Group, Sample
from lit_grpo.distributed import data_rank, gather_objects, gather_partners, partners
from lit_grpo.engines.base import Engine, Sampling, Stopped, never
from lit_grpo.errors import UserError
from lit_grpo.rewards import math_reward

COMPLETIONS_AT_ONCE = 2048
"""Of held-out prompts, each process: many enough for an engine to be busy, and lost when a run is killed."""

NOTHING_SAMPLED = (
    "No samples to read: no rollout callback has run. Give the Trainer one (HFRollout or VLLMRollout; the command line"
    " does so by itself). After resuming, it may also be that the checkpoint was saved inside a phase: use one saved at"
    " a phase's end."
)


class PromptData(L.LightningDataModule):
    """Held-out prompts that the engine answers and the reward scores, for ``validate``, ``test`` and ``predict``.

    Subclasses add what to train on.

    Args:
        val: prompts of validation.
        test: benchmarks of ``test``, by name; the prompts of validation if not given.
        predict: prompts of ``predict``, where no answer is needed; those of validation if not given.
        reward: scores samples, see ``RewardFn``.
        samples_per_prompt: completions of each held-out prompt, the k of Mean@k.
        template: text in which ``{prompt}`` is replaced by the row's text, or the name of one: ``none``, ``boxed``,
            ``qwen_math``, ``dapo`` or ``r1``.
        chat_template: whether prompts are wrapped in the tokenizer's chat template.
        max_prompt_tokens: longer prompts are left out, and counted in a log line.
        seed: prompts and samples are functions of it. The command line sets it to ``seed_everything``.
    """

    def __init__(
        self,
        val: Source | None = None,
        test: dict[str, Source] | None = None,
        predict: Source | None = None,
        reward: RewardFn = math_reward,
        samples_per_prompt: int = 4,
        template: str = "none",
        chat_template: bool = False,
        max_prompt_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if samples_per_prompt < 1:
            raise UserError(
                f"data.init_args.samples_per_prompt: expected a whole number >= 1, got {samples_per_prompt}."
            )
        if seed < 0:
            raise UserError(f"data.init_args.seed: expected a whole number >= 0, got {seed}.")
        benchmarks = test or {}
        for name in benchmarks:
            if not re.fullmatch(r"[\w-]+", name):
                raise UserError(
                    f"data.init_args.test: {name!r} names files and metrics; use letters, digits, hyphens and"
                    " underscores only."
                )
        self.sources: dict[str, Any] = {"val": val, "predict": predict}
        self.sources |= {f"test/{name}": source for name, source in benchmarks.items()}
        self.reward, self.samples_per_prompt, self.seed = reward, samples_per_prompt, seed
        self.template_name = template
        self.template = TEMPLATES.get(template, template)
        self.chat_template, self.max_prompt_tokens = chat_template, max_prompt_tokens
        self.prompts: dict[str, list[Prompt]] = {}
        """Those of ``train``, ``val``, ``predict``, and of each benchmark, ``test/NAME``."""
        self.loaders: dict[str, Any] = {}
        self.stats: dict[str, float] = {}
        """What there is to log about the data of the epoch that begins."""
        self.samples: list[Sample] = []
        """This rank's samples, scored: of the latest phase, or of the held-out prompts since ``begin``."""
        self.engine: tuple[Engine, Sampling] | None = None
        self.answers_are_read = False
        """Whether the reward says what a completion answers, so that majorities can be found."""
        self.answered: dict[str, dict[int, list[Sample]]] = {}
        """Samples of benchmarks by the place of the prompt, from before an interruption."""

    def setup(self, stage: str) -> None:
        stage, split = str(getattr(stage, "value", stage)), split_of(stage)
        chosen = {key: source for key, source in self.sources.items() if key.split("/")[0] == split and source}
        if not chosen and stage != "fit":
            if self.sources["val"] is None:
                example = "{my_benchmark: {path: ...}}" if split == "test" else "{path: ...}"
                raise UserError(
                    f"data.init_args.{split}: `lit-grpo {stage}` needs prompts; give them as {split}: {example}."
                )
            chosen = {"test/val" if split == "test" else split: self.sources["val"]}
        if split == "predict":
            chosen = {key: replace(source, answer=None) for key, source in chosen.items()}
        self.sources |= chosen
        for key, source in chosen.items():
            self.prompts[key] = self.load_prompts(source, yaml_key(key), scored=split != "predict")
            self.loaders[key] = LazyLoader(self.chunks(self.prompts[key]), functools.partial(self.answer, key))
        if stage != "predict":
            self.check_reward()

    def check_limits(self, batches: int, accumulate: int) -> None:
        """Refuse trainer settings that leave out part of an optimizer step: its denominators count all of it."""
        limit, overfit = self.trainer.limit_train_batches, self.trainer.overfit_batches
        whole = (
            limit == 1.0 if isinstance(limit, float) else limit >= batches or (limit > 0 and limit % accumulate == 0)
        )
        if not whole or overfit:
            raise UserError(
                f"trainer: limit_train_batches {limit} (fast_dev_run makes it 1) or overfit_batches {overfit} would cut"
                f" an optimizer step, which has {accumulate} micro-batches here, and so change its gradient. Make the"
                " data smaller instead."
            )

    def load_prompts(self, source: Source, key: str, scored: bool = True) -> list[Prompt]:
        """Load, tokenise and filter the prompts of a source."""
        module = self.trainer.lightning_module
        prompts = load_prompts(source, key, module.tokenizer, self.template, self.chat_template)
        check_vocabulary(max(max(prompt.token_ids) for prompt in prompts), module.vocab_size, key)
        limit = self.max_prompt_tokens
        kept = [p for p in prompts if limit is None or len(p.token_ids) <= limit]
        if not kept:
            raise UserError(
                f"data.init_args.max_prompt_tokens: all {len(prompts)} prompts of {key} are longer than {limit} tokens."
            )
        if len(kept) < len(prompts):
            rank_zero_info(
                f"{key}: left out {len(prompts) - len(kept)} of {len(prompts)} prompts, longer than {limit} tokens"
            )
        return self.with_readable_answers(kept, source, key) if scored else kept

    def with_readable_answers(self, prompts: list[Prompt], source: Source, key: str) -> list[Prompt]:
        """The prompts whose gold answer the reward can read; no completion of another could be right."""
        if source.answer is None or not hasattr(self.reward, "unreadable"):
            return prompts
        bad = dict.fromkeys(self.reward.unreadable([prompt.answer for prompt in prompts]))
        if len(bad) == len(prompts):
            raise UserError(
                f"{key}.answer: the reward can read no gold answer in column {source.answer!r} of {source.path!r}, the"
                f" first is {prompts[0].answer!r}. Name the right column, or another reward."
            )
        if bad:
            shown = ", ".join(f"row {prompts[i].row}: {prompts[i].answer!r}" for i in list(bad)[:20])
            rank_zero_warn(
                f"{key}: left out {len(bad)} of {len(prompts)} prompts of {source.path!r}, whose gold answer the reward"
                f" cannot read ({shown}{', ...' if len(bad) > 20 else ''}). Mend these rows if you want them."
            )
        return [prompt for i, prompt in enumerate(prompts) if i not in bad]

    def check_reward(self) -> None:
        """Call the reward on two gold answers before any model is loaded, so that its mistakes cost nothing."""
        prompts = next(iter(self.prompts.values()), [])[:2]
        samples = [Sample(p.text, p.answer, p.answer, 1, False, p.tolerance, p.messages) for p in prompts]
        score(self.reward, samples)
        self.answers_are_read = any(sample.parsed is not None for sample in samples)
        threshold = self.trainer.lightning_module.correct_at
        for sample in samples:
            if sample.reward is not None and sample.reward < threshold:
                rank_zero_warn(
                    f"data.init_args.reward: the gold answer {sample.answer!r} itself gets {sample.reward}, below"
                    f" model.correct_at {threshold}, from which Mean@k and Pass@k count a completion as correct."
                )
                break

    def check_lengths(self, rollout: int, evaluation: int, context: int) -> int:
        """Refuse prompts which leave no room for a completion.

        Args:
            rollout: longest completion of the prompts to train on, in tokens.
            evaluation: longest completion of held-out prompts.
            context: of the model.

        Returns:
            The longest prompt and completion together, in tokens.
        """
        longest = 0
        for key, prompts in self.prompts.items():
            prompt = max(prompts, key=lambda prompt: len(prompt.token_ids))
            trains = key == "train"
            length = len(prompt.token_ids) + (rollout if trains else evaluation)
            longest = max(longest, length)
            if length > context:
                setting = "max_tokens" if trains or rollout == evaluation else "evaluation.max_tokens"
                raise UserError(
                    f"rollout.init_args.{setting}: {length - len(prompt.token_ids)} tokens of completion and the"
                    f" {len(prompt.token_ids)} of the longest prompt of {yaml_key(key)} (row {prompt.row} of"
                    f" {self.sources[key].path!r}) are beyond the model's context of {context}. Lower it, or leave long"
                    " prompts out with data.init_args.max_prompt_tokens."
                )
        return longest

    def seeds(self, split: str, phase: int, positions: Sequence[int]) -> list[int]:
        """Sampling seed of each prompt: a function of the run's seed, the phase and its place, and of nothing else."""
        stream = ["train", "val", "test", "predict"].index(split)
        words = np.random.SeedSequence((self.seed, stream, phase)).generate_state(
            max(positions, default=0) + 1, np.uint64
        )
        return [int(words[i]) >> 2 for i in positions]

    def drawing(
        self,
        engine: Engine,
        sampling: Sampling,
        split: str,
        phase: int,
        prompts: dict[int, Prompt],
        n: int,
        scored: bool = True,
        stop: Callable[[], bool] = never,
        begin: int = 0,
    ) -> Drawing:
        """This process's share in answering prompts, given by their place in the phase: not yet begun.

        The n completions of each are those with the numbers from ``begin`` on, whatever was drawn of it before.
        Processes that have the same data (tensor parallelism) share the work.
        """
        place, count = partners(self.trainer)
        mine = dict(list(prompts.items())[place::count])
        decode = functools.partial(self.trainer.lightning_module.tokenizer.batch_decode, skip_special_tokens=True)
        asked = list(mine.values())
        scoring = Scoring(asked, n, decode, self.reward if scored else None)
        seeds = [seed + begin for seed in self.seeds(split, phase, list(mine))]
        return Drawing(engine, sampling, asked, seeds, scoring, stop)

    def drawn(self, drawing: Drawing, prompts: int) -> tuple[list[Group], dict[str, float]]:
        """The groups of so many prompts, of which a drawing is this process's share; ``samples`` has theirs.

        Returns:
            The groups, and ``seconds_generate``, ``seconds_reward`` and ``tokens``.

        Raises:
            Stopped: if sampling was given up, on all processes that have these prompts.
        """
        place, count = partners(self.trainer)
        try:
            part = drawing.result()
        except Stopped:
            part = None
        parts = [part for part in gather_partners(part, self.trainer) if part is not None]
        if len(parts) < count:
            raise Stopped
        n = drawing.scoring.n
        groups = [parts[i % count][0][i // count] for i in range(prompts)]
        self.samples = [s for i in range(prompts) for s in parts[i % count][1][i // count * n :][:n]]
        return groups, parts[place][2] | {"tokens": float(sum(s.num_tokens for s in self.samples))}

    def sampled_batches(self) -> list[Batch]:
        """Micro-batches of the rollouts that are about to be trained on; none where nobody sampled."""
        return []

    def reward_parts(self) -> dict[str, float]:
        """Means of what the reward had to say beside the rewards, over all processes' samples that have it."""
        mine: dict[str, list[float]] = {}
        for sample in self.samples:
            for name, value in sample.parts.items():
                mine.setdefault(f"reward_{name}", []).append(value)
        totals: dict[str, tuple[float, int]] = {}
        for part in gather_objects({name: (sum(v), len(v)) for name, v in mine.items()}, self.trainer):
            for name, (total, count) in part.items():
                before = totals.get(name, (0.0, 0))
                totals[name] = before[0] + total, before[1] + count
        return {name: total / count for name, (total, count) in sorted(totals.items())}

    def held_out(self, stage: str) -> list[str]:
        """Keys of the prompts of a stage, several of ``test``; ``fit`` has those of validation."""
        return [key for key in self.prompts if key.split("/")[0] == split_of(stage)]

    def chunks(self, prompts: list[Prompt]) -> list[dict[int, Prompt]]:
        """Held-out prompts by their place, this rank's share, in chunks that are answered one after the other."""
        rank, world = data_rank(self.trainer)
        size, placed = world * max(1, COMPLETIONS_AT_ONCE // self.samples_per_prompt), list(enumerate(prompts))
        return [dict(placed[i : i + size][rank::world]) for i in range(0, len(placed), size)]

    def begin(self, engine: Engine, sampling: Sampling) -> None:
        """Take the engine that answers held-out prompts from now on."""
        self.engine, self.samples = (engine, sampling), []

    def answer(self, key: str, prompts: dict[int, Prompt]) -> Answers:
        """Have the engine answer those of the prompts which it had not before an interruption."""
        if self.engine is None:
            raise UserError(NOTHING_SAMPLED)
        split, n, before = key.split("/")[0], self.samples_per_prompt, self.samples
        answers = {place: self.answered[key][place] for place in prompts if place in self.answered.get(key, {})}
        missing = {place: prompt for place, prompt in prompts.items() if place not in answers}
        self.drawn(self.drawing(*self.engine, split, 0, missing, n, scored=split != "predict"), len(missing))
        answers |= {place: self.samples[i * n : (i + 1) * n] for i, place in enumerate(missing)}
        groups = [answers[place] for place in prompts]
        if split == "val":  # of other splits there may be more than memory holds
            self.samples = before + self.samples
        return Answers(list(prompts), groups)

    def val_dataloader(self) -> Any:
        return [self.loaders[key] for key in self.held_out("validate")]

    def test_dataloader(self) -> Any:
        return [self.loaders[key] for key in self.held_out("test")]

    def predict_dataloader(self) -> Any:
        return [self.loaders[key] for key in self.held_out("predict")]


def split_of(stage: str) -> str:
    """Which prompts a stage of the Trainer answers; Lightning gives it as text or as an enumeration."""
    name = str(getattr(stage, "value", stage))
    return "val" if name in ("fit", "validate") else name


def yaml_key(key: str) -> str:
    """Where in YAML the prompts of a key of ``PromptData.prompts`` come from.

    >>> yaml_key("test/math_500")
    'data.init_args.test.math_500'
    """
    return "data.init_args." + key.replace("/", ".")
