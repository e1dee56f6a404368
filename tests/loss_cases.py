"""What the tests of losses share: every loss with settings that change it, and random rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_grpo.losses import (
    CISPO,
    DAPO,
    DPO,
    GRPO,
    GSPO,
    IPO,
    KL,
    KTO,
    ORPO,
    RLOO,
    SFT,
    AdaptiveGRPO,
    APOZero,
    DrGRPO,
    Hinge,
    LinearSchedule,
    Loss,
    LossInputs,
    Reinforce,
    SimPO,
    TwoGRPO,
    WeightedSum,
)

LOSSES: dict[str, Loss] = {
    "GRPO": GRPO(),
    "GRPO kl": GRPO(beta=0.1),
    "GRPO kl k2": GRPO(beta=LinearSchedule(0.2, 0.0, 10), kl="k2"),
    "GRPO kl k3_ratio": GRPO(beta=0.1, kl="k3_ratio"),
    "GRPO entropy": GRPO(entropy_bonus=0.01),
    "GRPO tis": GRPO(tis_clip=1.05),
    "GRPO tis sequence": GRPO(tis_clip=1.05, tis_level="sequence"),
    "GRPO dual clip": GRPO(dual_clip=1.3),
    "GRPO sample, token mean": GRPO(scale="sample", aggregation="token_mean", epsilon=1e-4),
    "GRPO none, sequence sum": GRPO(scale="none", aggregation="sequence_sum"),
    "GRPO batch": GRPO(scale="batch"),
    "TwoGRPO": TwoGRPO(),
    "AdaptiveGRPO": AdaptiveGRPO(),
    "DrGRPO": DrGRPO(length=7),
    "DAPO": DAPO(),
    "RLOO": RLOO(),
    "Reinforce": Reinforce(),
    "GSPO": GSPO(),
    "CISPO": CISPO(max_ratio=1.1),
    "KL": KL(),
    "DPO": DPO(),
    "DPO conservative": DPO(label_smoothing=0.2),
    "DPO robust": DPO(label_smoothing=0.2, smoothing="robust"),
    "DPO mean": DPO(log_ratios="mean"),
    "IPO": IPO(),
    "IPO sum": IPO(log_ratios="sum"),
    "Hinge": Hinge(),
    "SimPO": SimPO(),
    "ORPO": ORPO(),
    "KTO": KTO(desirable_weight=1.3),
    "APOZero": APOZero(),
    "SFT": SFT(),
    "DPO + SFT": WeightedSum([DPO(), SFT()], [1.0, LinearSchedule(0.1, 0.0, 10)]),
    "TwoGRPO + KL": WeightedSum([TwoGRPO(), KL()], [1.0, 0.05]),
}

FIELDS = ("logps", "mask", "advantages", "old_logps", "ref_logps", "sampler_logps", "entropy")


def make_inputs(loss: Loss, rows: int = 4, width: int = 5, seed: int = 0, **fields: object) -> LossInputs:
    """Random rows in float64 with advantages that the loss selects; row i has ``i % (width - 1) + 1`` tokens."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < (torch.arange(rows) % (width - 1) + 1)[:, None]

    def draw(scale: float = 1.0) -> Tensor:
        return -scale * torch.rand(rows, width, generator=g, dtype=torch.float64) * mask

    logps = draw()
    rewards = torch.rand(rows // 2, 2, generator=g, dtype=torch.float64)
    values = {
        "logps": logps,
        "mask": mask,
        "advantages": loss.select(rewards)[1].flatten(0, 1),
        "old_logps": (logps + 0.1 * draw()) * mask,
        "ref_logps": draw(),
        "sampler_logps": (logps + 0.1 * draw()) * mask,
        "entropy": -draw(),
        "kl_baseline": torch.tensor(0.3, dtype=torch.float64),
        "step": 3,
    }
    return LossInputs(**(values | fields))  # type: ignore[arg-type]


def grad(loss: Loss, inputs: LossInputs) -> Tensor:
    """Gradient of the loss in the log-probs."""
    logps = inputs.logps.detach().requires_grad_()
    inputs.logps = logps
    return torch.autograd.grad(loss(inputs).loss, logps)[0]
