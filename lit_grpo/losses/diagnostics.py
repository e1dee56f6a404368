"""What every run logs about its log-probs, whatever the loss."""

from __future__ import annotations

import torch

from lit_grpo.losses.base import MAX_LOG_RATIO, LossInputs, Metrics, mean_over, share_of


def diagnostics(inputs: LossInputs) -> Metrics:
    """Metrics of a micro-batch that depend on log-probs alone, detached; means are over its completion tokens.

    - ``kl``: the k3 estimate of KL(policy || reference) per token. An estimate only where the policy sampled.
    - ``ratio_mean``, ``ratio_min``, ``ratio_max``: of policy to old policy, where they differ.
    - ``clamped_share``: tokens whose log-ratio to either was beyond +-20, where it is clamped before it is
      exponentiated.
    - ``entropy``: in nats per token, if it was computed.
    """
    logps, mask = inputs.logps.detach(), inputs.mask
    metrics: Metrics = {}
    clamped = torch.zeros_like(mask)
    if inputs.ref_logps is not None:
        delta = inputs.ref_logps - logps
        clamped = delta.abs() > MAX_LOG_RATIO
        delta = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        metrics["kl"] = mean_over(delta.exp() - 1 - delta, mask)
    if inputs.old_logps is not None:
        log_ratio = logps - inputs.old_logps
        clamped = clamped | (log_ratio.abs() > MAX_LOG_RATIO)
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        metrics["ratio_mean"] = mean_over(ratio, mask)
        metrics["ratio_min"] = torch.where(mask, ratio, torch.inf).amin()
        metrics["ratio_max"] = torch.where(mask, ratio, 0).amax()
    if inputs.ref_logps is not None or inputs.old_logps is not None:
        metrics["clamped_share"] = share_of(clamped, mask)
    if inputs.entropy is not None:
        metrics["entropy"] = mean_over(inputs.entropy, mask)
    return metrics
