"""Objectives. Each is one short file; any of them, or your own, goes under ``model.loss`` in YAML."""

from lit_grpo.losses.base import Loss, LossInputs, LossOutput, aggregate
from lit_grpo.losses.grpo import GRPO, TwoGRPO
from lit_grpo.losses.sft import SFT

__all__ = ["GRPO", "SFT", "Loss", "LossInputs", "LossOutput", "TwoGRPO", "aggregate"]
