"""RL post-training of language models on Lightning.

The names below are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_grpo.data import PreferenceData, RolloutData, Sample
    from lit_grpo.engines import HFEngine, VLLMEngine
    from lit_grpo.errors import UserError
    from lit_grpo.losses import GRPO, SFT, Loss, LossInputs, LossOutput, TwoGRPO
    from lit_grpo.metrics import MeanAtK, PassAtK
    from lit_grpo.module import PolicyModule
    from lit_grpo.rewards import MathReward, exact_match, math_reward

_HOME = {
    "data": ("PreferenceData", "RolloutData", "Sample"),
    "engines": ("HFEngine", "VLLMEngine"),
    "errors": ("UserError",),
    "losses": ("GRPO", "SFT", "Loss", "LossInputs", "LossOutput", "TwoGRPO"),
    "metrics": ("MeanAtK", "PassAtK"),
    "module": ("PolicyModule",),
    "rewards": ("MathReward", "exact_match", "math_reward"),
}
_MODULE_OF = {name: f"lit_grpo.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "GRPO",
    "SFT",
    "HFEngine",
    "Loss",
    "LossInputs",
    "LossOutput",
    "MathReward",
    "MeanAtK",
    "PassAtK",
    "PolicyModule",
    "PreferenceData",
    "RolloutData",
    "Sample",
    "TwoGRPO",
    "UserError",
    "VLLMEngine",
    "exact_match",
    "math_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
