"""Sampling with ``transformers``: the default engine, which runs wherever training does."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessorList
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.initialization import no_init_weights

from lit_grpo.data.types import Completion
from lit_grpo.engines.base import Deadline, Engine, Sampling
from lit_grpo.engines.cache import can_be_joined, joined, roomy_cache

TOKENS_AT_ONCE = 2**10
"""Of prompts, read in one pass; on GPUs, which need larger matrices to be busy, sixteen times as many."""


class HFEngine(Engine):
    """Sampling on the policy's own weights: each prompt is read once, and completions that have ended cost nothing.

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
    ) -> Generator[tuple[int, list[Completion]]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
        rows = [(i, j) for i in order for j in range(n)]
        written: list[dict[int, Completion]] = [{} for _ in prompts]
        size = self.max_batch_size // n * n or self.max_batch_size  # whole groups, so that each prompt is read once
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            place = {i: k for k, i in enumerate(dict.fromkeys(i for i, _ in part))}
            of_prompt, of_seed = [place[i] for i, _ in part], [seeds[i] + j for i, j in part]
            for k, completion in self._write([prompts[i] for i in place], of_prompt, of_seed, sampling, deadline):
                i, j = part[k]
                written[i][j] = completion
                if len(written[i]) == n:
                    yield i, [written[i][j] for j in range(n)]

    @torch.no_grad()
    def _write(
        self, prompts: list[list[int]], of_prompt: list[int], seeds: list[int], sampling: Sampling, deadline: Deadline
    ) -> Iterator[tuple[int, Completion]]:
        """One completion for each seed, of the prompt with the number in ``of_prompt``; those that end first first."""
        device, count, most = self.model.device, len(seeds), sampling.max_tokens
        positions = torch.tensor([len(prompts[i]) for i in of_prompt], device=device)
        width = max(map(len, prompts))
        attention = torch.arange(width, device=device) >= width - positions[:, None]
        rows = torch.arange(count, device=device)  # those that go on
        draw, stops = _Draw(sampling, seeds, device), torch.tensor(self.stop_token_ids, device=device)
        token: Tensor | None = None
        written = torch.zeros(count, most, dtype=torch.int64, device=device)
        logps = torch.zeros(count, most, device=device)

        def completions(over: Tensor, length: int, truncated: bool) -> Iterator[tuple[int, Completion]]:
            parts = (over.tolist(), written[over, :length].tolist(), logps[over, :length].tolist())
            return ((row, Completion(ids, of_ids, truncated)) for row, ids, of_ids in zip(*parts, strict=True))

        def where() -> str:
            return f"token {t} of prompt {prompts[of_prompt[rows[0]]]}"

        for t in range(most):
            deadline.check(where)
            if token is None:
                logits, cache = self._read(prompts, of_prompt, width + most)
            else:
                logits = self._next(token[:, None], attention, positions[:, None] + t - 1, cache)
            token, logp = draw(logits, rows, t)
            written[rows, t], logps[rows, t] = token, logp
            ended = torch.isin(token, stops)
            if ended.any():
                yield from completions(rows[ended], t + 1, truncated=False)
                stay = ended.logical_not().nonzero().flatten()
                if not len(stay):
                    return
                holes = ended[: len(stay)].nonzero().flatten()  # which the last ones fill, so that others stay in place
                stay = torch.arange(len(stay), device=device).index_copy(0, holes, stay[len(stay) - len(holes) :])
                cache.reorder_cache(stay)
                rows, token, attention, positions = rows[stay], token[stay], attention[stay], positions[stay]
            attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=-1)
        yield from completions(rows, most, truncated=True)

    def _read(self, prompts: list[list[int]], of_prompt: list[int], most: int) -> tuple[Tensor, DynamicCache]:
        """Logits of the first token and the cache, a row for each number in ``of_prompt``; ``most`` as in the cache.

        Prompts come by length, and are read a part at a time, so that few tokens are padding, and memory is bounded.
        """
        device = self.model.device
        cache = roomy_cache(self.model.config, most)
        size = TOKENS_AT_ONCE * (16 if device.type == "cuda" else 1) if can_be_joined(cache) else math.inf
        parts, logits, start = list[DynamicCache](), list[Tensor](), 0
        while start < len(prompts):
            end = start + 1
            while end < len(prompts) and (end + 1 - start) * len(prompts[end]) <= size:
                end += 1
            part, width = prompts[start:end], len(prompts[end - 1])
            tokens = torch.tensor([[0] * (width - len(p)) + p for p in part], device=device)
            lengths = torch.tensor([[len(p)] for p in part], device=device)
            places = torch.arange(width, device=device) - width + lengths
            logits.append(self._next(tokens, places >= 0, places.clamp(min=0), cache))
            parts.append(cache)
            cache, start = roomy_cache(self.model.config, most), end
        rows = torch.tensor(of_prompt, device=device)
        return torch.cat(logits)[rows], joined(parts, rows)

    def _next(self, tokens: Tensor, attention: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits ``[R, V]`` of what follows ``tokens [R, T]``, which are added to the cache."""
        logits: Tensor = self.model(
            tokens, attention_mask=attention, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits
        return logits[:, -1]


class _Draw:
    """Draws each row's next token with the row's own random numbers, so that no row depends on those beside it."""

    def __init__(self, sampling: Sampling, seeds: list[int], device: torch.device) -> None:
        self.temperature = sampling.temperature
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.uniforms = torch.stack([torch.rand(sampling.max_tokens, generator=g) for g in generators]).to(device)
        self.filters = LogitsProcessorList()  # in vLLM's order
        if sampling.min_p:
            self.filters.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k:
            self.filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.filters.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: Tensor, rows: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Tokens ``[R]`` and their log-probs, from logits ``[R, V]`` of these rows at their t-th token."""
        logps: Tensor = self.filters(None, logits.float() / (self.temperature or 1.0)).log_softmax(-1)
        if self.temperature == 0:
            token = logps.argmax(-1, keepdim=True)
        else:
            cumulative = logps.exp().cumsum(-1)
            uniform = self.uniforms[rows, t, None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, uniform, right=True).clamp(max=logits.shape[-1] - 1)
        return token.squeeze(-1), logps.gather(-1, token).squeeze(-1)
