"""Objectives. Each is one short file; any of them, or your own, goes under ``model.loss`` in YAML."""

from lit_grpo.losses.adaptive_grpo import AdaptiveGRPO
from lit_grpo.losses.base import Loss, LossInputs, LossOutput, aggregate, mean_over, share_of
from lit_grpo.losses.cispo import CISPO
from lit_grpo.losses.dapo import DAPO
from lit_grpo.losses.diagnostics import diagnostics
from lit_grpo.losses.dpo import DPO
from lit_grpo.losses.dr_grpo import DrGRPO
from lit_grpo.losses.grpo import GRPO
from lit_grpo.losses.gspo import GSPO
from lit_grpo.losses.hinge import Hinge
from lit_grpo.losses.ipo import IPO
from lit_grpo.losses.kl import KL
from lit_grpo.losses.kto import KTO, APOZero
from lit_grpo.losses.orpo import ORPO
from lit_grpo.losses.policy_gradient import Clipped, PolicyGradient
from lit_grpo.losses.preference import Pairwise
from lit_grpo.losses.reinforce import Reinforce
from lit_grpo.losses.rloo import RLOO
from lit_grpo.losses.schedules import CosineSchedule, LinearSchedule, Schedule
from lit_grpo.losses.sft import SFT
from lit_grpo.losses.simpo import SimPO
from lit_grpo.losses.two_grpo import TwoGRPO
from lit_grpo.losses.weighted_sum import WeightedSum

__all__ = [
    "CISPO",
    "DAPO",
    "DPO",
    "GRPO",
    "GSPO",
    "IPO",
    "KL",
    "KTO",
    "ORPO",
    "RLOO",
    "SFT",
    "APOZero",
    "AdaptiveGRPO",
    "Clipped",
    "CosineSchedule",
    "DrGRPO",
    "Hinge",
    "LinearSchedule",
    "Loss",
    "LossInputs",
    "LossOutput",
    "Pairwise",
    "PolicyGradient",
    "Reinforce",
    "Schedule",
    "SimPO",
    "TwoGRPO",
    "WeightedSum",
    "aggregate",
    "diagnostics",
    "mean_over",
    "share_of",
]
