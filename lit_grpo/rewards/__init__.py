"""Rewards: callables from samples to one float each. Importing them does not import torch: worker processes do so."""

from lit_grpo.rewards.accuracy import MathReward, math_reward
from lit_grpo.rewards.exact import exact_match
from lit_grpo.rewards.overlong import OverlongPenalty
from lit_grpo.rewards.reward_model import RewardModel

__all__ = ["MathReward", "OverlongPenalty", "RewardModel", "exact_match", "math_reward"]
