"""The only place where hidden states become log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**24
"""Logits held at once: 64 MiB in float32; on GPUs, which need larger matrices to be busy, eight times as many."""


def completion_logps(
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    head: nn.Linear,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the completion tokens, taken in chunks whose logits are computed again in the backward pass.

    Logits never exist for prompt or padding positions, nor for the whole micro-batch at once.

    Args:
        hidden: ``[N, T - 1, H]`` last hidden states of the decoder, of all tokens but the last.
        tokens: ``[N, T]`` the ids that were fed to it.
        mask: ``[N, T - 1]`` bool, True where token t + 1 is wanted.
        head: maps hidden states to logits.
        temperature: what logits are divided by; the one at which the completions were sampled.
        softcap: logits are squashed into ``(-softcap, softcap)`` first, as Gemma 2 does.
        entropy: whether the entropy of each token's distribution is wanted too.
        places: ``[n]`` where the mask, flattened, is True; if not given, that is found here, and a GPU waited for.

    Returns:
        Log-probs, and entropies in nats or None, both ``[N, T - 1]`` in float32 (float64 for a float64 model), 0
        outside the mask.
    """
    places = mask.flatten().nonzero().squeeze(-1) if places is None else places
    states, targets = hidden.flatten(0, 1).index_select(0, places), tokens[:, 1:].flatten().index_select(0, places)
    logps, entropies = _LinearLogps.apply(states, head.weight, head.bias, targets, temperature, softcap, entropy)

    def scattered(values: Tensor) -> Tensor:
        return values.new_zeros(mask.numel()).index_copy(0, places, values).view(mask.shape)

    return scattered(logps), scattered(entropies) if entropy else None


class _LinearLogps(torch.autograd.Function):
    """Log-probs and entropies of targets ``[n]`` under the logits that a linear layer makes of states ``[n, H]``.

    With z the logits after soft-capping and temperature, p their softmax and S its entropy,
    d log p(y) / dz = onehot(y) - p and dS / dz = -p (log p + S). Most of it is done in place: a chunk's logits are the
    only large tensor, and the weight's gradient the only other one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        device = states.device.type
        ctx.computes_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        ctx.temperature, ctx.softcap, ctx.entropy = temperature, softcap, entropy
        logps, totals, entropies = states.new_zeros(3, len(states), dtype=_at_least_float32(states)).unbind()
        for part, z, _ in _chunks(ctx, states, weight, bias):
            totals[part] = z.logsumexp(-1)
            logps[part] = z.gather(-1, targets[part, None]).squeeze(-1) - totals[part]
            if entropy:
                p = (z - totals[part, None]).exp_()
                entropies[part] = totals[part] - p.mul_(z).sum(-1)
        ctx.save_for_backward(states, weight, bias, targets, totals, entropies)
        return logps.clone(), entropies.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, totals, entropies = ctx.saved_tensors
        grads: list[Tensor | None] = [
            torch.zeros_like(x, dtype=_at_least_float32(x)) if wanted else None
            for x, wanted in zip((states, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        grad_states, grad_weight, grad_bias = grads
        head = weight.to(ctx.computes_in)
        for part, z, slope in _chunks(ctx, states, weight, bias):
            log_p = z.sub_(totals[part, None])
            if ctx.entropy:
                p = log_p.exp()
                factor = log_p.add_(entropies[part, None]).mul_(grad_entropies[part, None])
                grad_z = p.mul_(factor.add_(grad_logps[part, None])).neg_()
            else:
                grad_z = log_p.exp_().mul_(-grad_logps[part, None])
            grad_z.scatter_add_(-1, targets[part, None], grad_logps[part, None])
            grad_logits = (grad_z if slope is None else grad_z.mul_(slope)).div_(ctx.temperature)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(ctx.computes_in)
            if grad_states is not None:
                grad_states[part] = (grad_logits @ head).to(grad_states.dtype)
            if grad_weight is not None and grad_weight.dtype == grad_logits.dtype:
                grad_weight.addmm_(grad_logits.T, states[part].to(grad_logits.dtype))
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ states[part].to(grad_logits.dtype)
        as_given = (
            None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, (states, weight, bias), strict=True)
        )
        return (*as_given, None, None, None, None)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(
    ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Which states, their logits after soft-capping and temperature, and the slope of the soft-capping."""
    size = max(1, CHUNK_LOGITS * (8 if states.is_cuda else 1) // len(weight))
    weight, bias = weight.to(ctx.computes_in), None if bias is None else bias.to(ctx.computes_in)
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        z = F.linear(states[part].to(ctx.computes_in), weight, bias).to(_at_least_float32(states))
        slope = None
        if ctx.softcap is not None:
            z.div_(ctx.softcap).tanh_()
            slope = 1 - z.square()
            z.mul_(ctx.softcap)
        yield part, z.div_(ctx.temperature), slope
