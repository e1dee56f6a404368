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
from lit_grpo.metrics.scores import Scores

__all__ = [
    "BestAtN",
    "Comparison",
    "Estimate",
    "MajAtK",
    "MeanAtK",
    "PassAtK",
    "PassHatK",
    "Scores",
    "best_at_n",
    "maj_at_k",
    "mean_at_k",
    "mean_interval",
    "paired_bootstrap",
    "pass_at_k",
    "pass_hat_k",
]
