"""Metrics over sampled completions."""

from lit_grpo.metrics.at_k import MeanAtK, PassAtK
from lit_grpo.metrics.functional import mean_at_k, pass_at_k

__all__ = ["MeanAtK", "PassAtK", "mean_at_k", "pass_at_k"]
