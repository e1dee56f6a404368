"""What is run: group sizes at equal prompts and at equal rollouts, ties, losses; and a policy that stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_grpo.losses import TwoGRPO
from lit_grpo.quickstart import CONFIGS

TASK = Path("runs/quickstart/task-seed0")
"""What configs/quickstart.yaml begins from: all seeds train the same model."""

TWO, ONCE = "reproduce/g2_scaled.yaml", "reproduce/once.yaml"
RUNS = {
    "16-GRPO": "reproduce/g16.yaml",
    "2-GRPO": TWO,
    "4-GRPO": "reproduce/g4_scaled.yaml",
    "8-GRPO": "reproduce/g8_scaled.yaml",
    "2-GRPO_same_rate": "reproduce/g2.yaml",
    "2-GRPO_twice_as_long": "reproduce/g2.yaml reproduce/longer.yaml",
    "4-GRPO_same_rate": "reproduce/g4.yaml",
    "8-GRPO_same_rate": "reproduce/g8.yaml",
    "4-GRPO_same_rollouts": "reproduce/g4_rollouts.yaml",
    "8-GRPO_same_rollouts": "reproduce/g8_rollouts.yaml",
    "16-GRPO_same_rollouts": "reproduce/g16_rollouts.yaml",
    "4-GRPO_same_rollouts_scaled": "reproduce/g4_rollouts.yaml reproduce/g4_rollouts_scaled.yaml",
    "8-GRPO_same_rollouts_scaled": "reproduce/g8_rollouts.yaml reproduce/g8_rollouts_scaled.yaml",
    "16-GRPO_same_rollouts_scaled": "reproduce/g16_rollouts.yaml reproduce/g16_rollouts_scaled.yaml",
    "2-GRPO_all_rows": f"{TWO} reproduce/all_rows.yaml",
    "2-GRPO+RS": f"{TWO} reproduce/rs.yaml",
    "Adaptive": "reproduce/adaptive.yaml",
    "DPO": f"{TWO} online/dpo.yaml",
    "IPO": f"{TWO} online/ipo.yaml",
    "KTO": f"{TWO} online/kto.yaml",
    "2-GRPO_same_data": f"{TWO} {ONCE}",
    "DPO_same_data": f"{TWO} online/dpo.yaml {ONCE}",
    "IPO_same_data": f"{TWO} online/ipo.yaml {ONCE}",
    "KTO_same_data": f"{TWO} online/kto.yaml {ONCE}",
}
"""Name and overlays of each run that trains; others are compared with the first."""

FIXED = "reproduce/fixed.yaml"
FIXED_RUNS = {
    "2-GRPO": f"{TWO} {FIXED}",
    "4-GRPO": f"reproduce/g4_rollouts.yaml {FIXED}",
    "8-GRPO": f"reproduce/g8_rollouts.yaml {FIXED}",
    "16-GRPO": f"reproduce/g16_rollouts.yaml {FIXED} reproduce/all_samples.yaml",
    "Adaptive": f"reproduce/adaptive.yaml {FIXED}",
}
"""Name and overlays of each run at the fixed policy; others are compared with the first."""


class TwoGRPOAllRows(TwoGRPO):
    """2-GRPO that forwards tied pairs too, which have no gradient: the same updates to rounding, at full cost.

    Args:
        two_grpo: arguments of :class:`~lit_grpo.losses.TwoGRPO`.
    """

    def __init__(self, **two_grpo: Any) -> None:
        super().__init__(**two_grpo)
        self.drops_zero_advantages = False


def command(runs: dict[str, str], out: Path) -> list[str]:
    """The arguments of ``lit-grpo compare``.

    Args:
        runs: ``RUNS`` or ``FIXED_RUNS``.
        out: folder of runs and report.
    """
    entries = [f"{name}={'+'.join(str(CONFIGS / file) for file in files.split())}" for name, files in runs.items()]
    common = [str(CONFIGS / file) for file in ("quickstart.yaml", "reproduce/base.yaml")]
    return [*entries, "--common", *common, "--out", str(out)]
