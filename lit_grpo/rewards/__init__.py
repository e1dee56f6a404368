"""Rewards: callables from samples to one float each. Importing them does not import torch: worker processes do so."""

from lit_grpo.rewards.accuracy import MathReward, math_reward
from lit_grpo.rewards.exact import exact_match
from lit_grpo.rewards.reward_model import RewardModel
from lit_grpo.rewards.reward_sum import RewardSum, overlaps, resolved
from lit_grpo.rewards.shape import FormatReward, LengthPenalty, RepetitionPenalty

__all__ = [
    "FormatReward",
    "LengthPenalty",
    "MathReward",
    "RepetitionPenalty",
    "RewardModel",
    "RewardSum",
    "exact_match",
    "math_reward",
    "overlaps",
    "resolved",
]
