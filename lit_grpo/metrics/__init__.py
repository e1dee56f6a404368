"""Metrics over sampled completions."""

from lit_grpo.metrics.at_k import BestAtN, MajAtK, MeanAtK, PassAtK, PassHatK
from lit_grpo.metrics.functional import (
    Comparison,
    Estimate,
    best_at_n,
    maj_at_k,
    mean_at_k,
    mean_interval,
    paired_bootstrap,
    pass_at_k,
    pass_hat_k,
)

__all__ = [
    "BestAtN",
    "Comparison",
    "Estimate",
    "MajAtK",
    "MeanAtK",
    "PassAtK",
    "PassHatK",
    "best_at_n",
    "maj_at_k",
    "mean_at_k",
    "mean_interval",
    "paired_bootstrap",
    "pass_at_k",
    "pass_hat_k",
]
