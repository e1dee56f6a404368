"""Rewards: callables from samples to one float each. Importing them does not import torch: worker processes do so."""

from lit_grpo.rewards.accuracy import MathReward, math_reward
from lit_grpo.rewards.exact import exact_match

__all__ = ["MathReward", "exact_match", "math_reward"]
