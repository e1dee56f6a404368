"""What online and offline data modules share: held-out prompts, a reward, and the engine's scored answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_grpo.data.loader import FilledLoader
from lit_grpo.data.prompts import Prompt, Source, check_vocabulary, load_prompts
from lit_grpo.data.templates import TEMPLATES
from lit_grpo.data.types import Batch, Group, Sample
from lit_grpo.engines.base import Engine, Sampling
from lit_grpo.errors import UserError
from lit_grpo.rewards import math_reward, resolved

RewardFn = Callable[[list[Sample]], Any]
"""Scores samples: a list of one float each, or a coroutine that returns it. Any importable function, or object with
``__call__``, may stand in YAML."""

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
        test: prompts of ``test``; those of validation if not given.
        predict: prompts of ``predict``; those of test or validation if not given.
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
        test: Source | None = None,
        predict: Source | None = None,
        reward: RewardFn = math_reward,
        samples_per_prompt: int = 4,
        template: str = "{prompt}",
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
        self.sources = {"val": val, "test": test, "predict": predict}
        self.reward, self.samples_per_prompt, self.seed = reward, samples_per_prompt, seed
        self.template = TEMPLATES.get(template, template)
        self.chat_template, self.max_prompt_tokens = chat_template, max_prompt_tokens
        self.prompts: dict[str, list[Prompt]] = {}
        self.loaders: dict[str, FilledLoader[Any]] = {}
        self.stats: dict[str, float] = {}
        """What there is to log about the data of the epoch that begins."""
        self.samples: list[Sample] = []
        """The latest samples of this rank, scored."""

    def setup(self, stage: str) -> None:
        stage = str(getattr(stage, "value", stage))  # Lightning passes an enumeration
        split = "val" if stage in ("fit", "validate") else stage
        fallbacks = {"val": ["val"], "test": ["test", "val"], "predict": ["predict", "test", "val"]}[split]
        key = next((key for key in fallbacks if self.sources[key] is not None), None)
        if key is not None and (source := self.sources[key]) is not None:
            prompts = self.load_prompts(source, f"data.init_args.{key}")
            scored = stage != "predict"
            self.prompts[split] = (
                self.with_readable_answers(prompts, source, f"data.init_args.{key}") if scored else prompts
            )
            self.loaders[split] = FilledLoader(1, NOTHING_SAMPLED)
        elif stage != "fit":
            raise UserError(f"data.init_args.{split}: `lit-grpo {stage}` needs prompts; give a path and its columns.")
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

    def load_prompts(self, source: Source, key: str) -> list[Prompt]:
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
        return kept

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
        samples = [Sample(p.text, p.answer, p.answer, num_tokens=1, truncated=False) for p in prompts]
        self.score_samples(samples)
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
        for split, prompts in self.prompts.items():
            prompt = max(prompts, key=lambda prompt: len(prompt.token_ids))
            trains = split == "train"
            length = len(prompt.token_ids) + (rollout if trains else evaluation)
            longest = max(longest, length)
            if length > context:
                key = "max_tokens" if trains or rollout == evaluation else "evaluation.max_tokens"
                raise UserError(
                    f"rollout.init_args.{key}: {length - len(prompt.token_ids)} tokens of completion and the"
                    f" {len(prompt.token_ids)} of the longest prompt of data.init_args.{split} are beyond the model's"
                    f" context of {context}. Lower it, or leave long prompts out with data.init_args.max_prompt_tokens."
                )
        return longest

    def seeds(self, split: str, phase: int, positions: Sequence[int]) -> list[int]:
        """Sampling seed of each prompt: a function of the run's seed, the phase and its place, and of nothing else."""
        stream = ["train", "val", "test", "predict"].index(split)
        entropy = [np.random.SeedSequence((self.seed, stream, phase, i)) for i in positions]
        return [int(e.generate_state(1, np.uint64)[0] >> np.uint64(2)) for e in entropy]

    def sample(
        self,
        engine: Engine,
        sampling: Sampling,
        split: str,
        phase: int,
        prompts: dict[int, Prompt],
        n: int,
        score: bool = True,
    ) -> tuple[list[Group], dict[str, float]]:
        """Have the engine answer prompts, given by their place in the phase, and the reward score the answers.

        Returns:
            The groups, and ``seconds_generate``, ``seconds_reward`` and ``tokens``.
        """
        tokenizer = self.trainer.lightning_module.tokenizer
        start = time.perf_counter()
        token_ids = [prompt.token_ids for prompt in prompts.values()]
        answers = engine.generate(token_ids, n, sampling, self.seeds(split, phase, list(prompts))) if prompts else []
        generated = time.perf_counter()

        texts = iter(tokenizer.batch_decode([c.token_ids for cs in answers for c in cs], skip_special_tokens=True))
        self.samples = [
            Sample(prompt.text, next(texts), prompt.answer, len(c.token_ids), c.truncated, prompt.tolerance)
            for prompt, completions in zip(prompts.values(), answers, strict=True)
            for c in completions
        ]
        if score:
            self.score_samples(self.samples)
        rewards = [0.0 if s.reward is None else s.reward for s in self.samples]
        groups = [
            Group(prompt.token_ids, completions, rewards[i * n : (i + 1) * n])
            for i, (prompt, completions) in enumerate(zip(prompts.values(), answers, strict=True))
        ]
        return groups, {
            "seconds_generate": generated - start,
            "seconds_reward": time.perf_counter() - generated,
            "tokens": float(sum(s.num_tokens for s in self.samples)),
        }

    def score_samples(self, samples: list[Sample]) -> None:
        """Fill in the samples' rewards.

        Raises:
            UserError: if the reward raises, or returns anything but one finite number per sample.
        """
        if not samples:
            return
        name = getattr(self.reward, "__qualname__", type(self.reward).__qualname__)
        try:
            (scores,) = resolved([self.reward(samples)])
            rewards = list(scores)
        except UserError:
            raise
        except Exception as error:
            frame = error.__traceback__
            while frame and frame.tb_next:
                frame = frame.tb_next
            where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
            raise UserError(
                f"data.init_args.reward: {name} raised {type(error).__name__}: {error} (at {where}) on {len(samples)}"
                f" samples; the first is {samples[0]}."
            ) from error
        if len(rewards) != len(samples):
            raise UserError(
                f"data.init_args.reward: {name} returned {len(rewards)} values for {len(samples)} samples; expected one"
                " each."
            )
        for sample, reward in zip(samples, rewards, strict=True):
            if isinstance(reward, Tensor | np.generic) and reward.ndim == 0:
                reward = reward.item()
            if not isinstance(reward, int | float) or not abs(reward) < 1e30:
                raise UserError(
                    f"data.init_args.reward: {name} returned {reward!r}; expected a finite number. The sample:"
                    f" {sample}."
                )
            sample.reward = float(reward)

    def sampled_batches(self) -> list[Batch]:
        """Micro-batches of the rollouts that are about to be trained on; none where nobody sampled."""
        return []

    def collect_eval(self, engine: Engine, sampling: Sampling, split: str) -> None:
        """Sample this rank's share of the held-out prompts and fill the loader that is read next."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        prompts = dict(list(enumerate(self.prompts[split]))[rank::world])
        groups, _ = self.sample(engine, sampling, split, 0, prompts, self.samples_per_prompt, score=split != "predict")
        rewards = torch.tensor([group.rewards for group in groups]).reshape(len(groups), self.samples_per_prompt)
        self.loaders[split].fill([rewards])

    def eval_loader(self, split: str) -> FilledLoader[Tensor] | list[Any]:
        """One item per pass: this rank's rewards ``[P, n]``."""
        return self.loaders.get(split, [])

    def val_dataloader(self) -> Any:
        return self.eval_loader("val")

    def test_dataloader(self) -> Any:
        return self.eval_loader("test")

    def predict_dataloader(self) -> Any:
        return self.eval_loader("predict")
