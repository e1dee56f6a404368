"""Data modules and the types that travel from them to the loss."""

from lit_grpo.data.base import PromptData
from lit_grpo.data.layouts import Preferences
from lit_grpo.data.preferences import PreferenceData
from lit_grpo.data.prompts import Source
from lit_grpo.data.rollouts import RolloutData
from lit_grpo.data.scoring import RewardFn
from lit_grpo.data.types import Answers, Batch, Completion, Group, Sample

__all__ = [
    "Answers",
    "Batch",
    "Completion",
    "Group",
    "PreferenceData",
    "Preferences",
    "PromptData",
    "RewardFn",
    "RolloutData",
    "Sample",
    "Source",
]
