"""Sampling with ``transformers``: the default engine, which runs wherever training does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.initialization import no_init_weights

from lit_grpo.data.types import Completion
from lit_grpo.engines.base import Deadline, Engine, Sampling


class HFEngine(Engine):
    """``model.generate`` on the policy's own weights.

    The engine's model has no memory of its own: ``load_weights`` makes its parameters point at the tensors it is given.
    For an unsharded policy they are the policy's; a sharded one is gathered whole until the engine sleeps.

    Args:
        config: the ``transformers`` configuration of the model.
        stop_token_ids: all ids that end a completion.
        context: longest prompt and completion together, in tokens.
        max_batch_size: most completions decoded at once.
        timeout: as in :class:`Engine`.
    """

    def __init__(
        self, config: Any, stop_token_ids: list[int], context: int, max_batch_size: int = 512, timeout: float = 1500.0
    ) -> None:
        super().__init__(context, timeout)
        self.stop_token_ids, self.max_batch_size = stop_token_ids, max_batch_size
        with no_init_weights():
            self.model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval().requires_grad_(False)
        self.model.generation_config = GenerationConfig()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        detached = {name: tensor.detach() for name, tensor in weights}
        self.model.load_state_dict(detached, assign=True)
        self.model.to(next(iter(detached.values())).device)  # buffers that are not in a state dict, such as rotary ones

    def sleep(self) -> None:
        """Let go of the weights: those of a sharded policy are a copy."""
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int], deadline: Deadline
    ) -> list[list[Completion]]:
        rows = [(i, seeds[i] + j) for i in range(len(prompts)) for j in range(n)]
        rows.sort(
            key=lambda row: len(prompts[row[0]])
        )  # little padding; a stable sort keeps the samples of a prompt in order
        completions: list[list[Completion]] = [[] for _ in prompts]
        for start in range(0, len(rows), self.max_batch_size):
            part = rows[start : start + self.max_batch_size]
            generated = self._decode([prompts[i] for i, _ in part], sampling, [seed for _, seed in part], deadline)
            for (i, _), completion in zip(part, generated, strict=True):
                completions[i].append(completion)
        return completions

    def _decode(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int], deadline: Deadline
    ) -> list[Completion]:
        device, width = self.model.device, max(map(len, prompts))
        padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        stops = torch.tensor(self.stop_token_ids, device=device)

        def unfinished(tokens: Tensor) -> str:
            written = tokens[:, width:]
            row = int(torch.isin(written, stops).any(-1).logical_not().nonzero()[0])
            return f"token {written.shape[1]} of prompt {prompts[row]}"

        sampler = _Sampler(sampling, seeds, device, lambda tokens: deadline.check(lambda: unfinished(tokens)))
        output = self.model.generate(
            padded,
            attention_mask=attention,
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                eos_token_id=self.stop_token_ids,
                pad_token_id=self.stop_token_ids[0],
            ),
            logits_processor=LogitsProcessorList([sampler]),
        )
        logps = torch.stack(sampler.logps, dim=1).tolist()
        completions = []
        for token_ids, token_logps in zip(output[:, width:].tolist(), logps, strict=True):
            stop = next((t for t, token in enumerate(token_ids) if token in self.stop_token_ids), None)
            length = len(token_ids) if stop is None else stop + 1
            completions.append(Completion(token_ids[:length], token_logps[:length], truncated=stop is None))
        return completions


class _Sampler(LogitsProcessor):
    """Draws each row's next token with the row's own random numbers and leaves greedy decoding no other choice.

    ``model.generate`` can only draw from one global generator; doing it here makes a row's tokens independent of the
    rows beside it, and yields their log-probs on the way.
    """

    def __init__(
        self, sampling: Sampling, seeds: list[int], device: torch.device, each_step: Callable[[Tensor], None]
    ) -> None:
        self.sampling, self.each_step = sampling, each_step
        self.logps: list[Tensor] = []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.uniforms = torch.stack([torch.rand(sampling.max_tokens, generator=g) for g in generators]).to(device)
        self.filters = LogitsProcessorList()  # in vLLM's order
        if sampling.min_p:
            self.filters.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k:
            self.filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.filters.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.each_step(input_ids)
        temperature = self.sampling.temperature
        logps = self.filters(input_ids, scores.float() / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            token = logps.argmax(-1, keepdim=True)
        else:
            cumulative = logps.exp().cumsum(-1)
            uniform = self.uniforms[:, len(self.logps), None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, uniform, right=True).clamp(max=scores.shape[-1] - 1)
        self.logps.append(logps.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)
