"""The only place where hidden states become log-probs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**25
"""Logits held at once: 128 MiB in float32."""


def completion_logps(
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    head: nn.Linear,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the completion tokens, taken in chunks whose logits are recomputed in the backward pass.

    Logits never exist for prompt or padding positions, nor for the whole micro-batch at once.

    Args:
        hidden: ``[N, T, H]`` last hidden states of the decoder.
        tokens: ``[N, T]`` the ids that were fed to it.
        mask: ``[N, T - 1]`` bool, True where token t + 1 is wanted.
        head: maps hidden states to logits.
        temperature: what logits are divided by; the one at which the completions were sampled.
        softcap: logits are squashed into ``(-softcap, softcap)`` first, as Gemma 2 does.
        entropy: whether the entropy of each token's distribution is wanted too.

    Returns:
        Log-probs, and entropies in nats or None, both ``[N, T - 1]`` in float32 (float64 for a float64 model), 0
        outside the mask.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    states, targets = hidden[:, :-1][mask], tokens[:, 1:][mask]

    def chunk_logps(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).to(dtype)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        total = logits.logsumexp(-1)
        logps = logits.gather(-1, targets[:, None]).squeeze(-1) - total
        return logps, total - (logits.softmax(-1) * logits).sum(-1) if entropy else logps.detach()

    size = max(1, CHUNK_LOGITS // head.weight.shape[0])
    chunks = [
        checkpoint(chunk_logps, s, t, use_reentrant=False, preserve_rng_state=False)
        for s, t in zip(states.split(size), targets.split(size), strict=True)
    ]

    def scattered(values: list[Tensor]) -> Tensor:
        return torch.zeros(mask.shape, dtype=dtype, device=hidden.device).masked_scatter(mask, torch.cat(values))

    return scattered([logps for logps, _ in chunks]), scattered([e for _, e in chunks]) if entropy else None
