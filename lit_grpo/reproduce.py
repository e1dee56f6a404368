"""``make reproduce``: the paper's comparisons on the quickstart's task, over three seeds, within an hour.

Group sizes 2, 4, 8 and 16 at equal prompts, with one rate and with the paper's scaled ones, and at equal rollouts; ties
replaced; DPO, IPO and KTO on the same rollouts. Given again, it goes on where it was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lit_grpo.errors import mistakes_end_with_a_message
from lit_grpo.quickstart import CONFIGS, warm_start
from lit_grpo.reports.compare import compare

TASK = Path("runs/quickstart/task-seed0")
"""What configs/quickstart.yaml begins from: all seeds train the same model."""

TWO = "reproduce/g2_scaled.yaml"
RUNS = {
    "16-GRPO": "reproduce/g16.yaml",
    "2-GRPO": TWO,
    "4-GRPO": "reproduce/g4_scaled.yaml",
    "8-GRPO": "reproduce/g8_scaled.yaml",
    "2-GRPO_same_rate": "reproduce/g2.yaml",
    "4-GRPO_same_rate": "reproduce/g4.yaml",
    "8-GRPO_same_rate": "reproduce/g8.yaml",
    "4-GRPO_same_rollouts": "reproduce/g4_rollouts.yaml",
    "8-GRPO_same_rollouts": "reproduce/g8_rollouts.yaml",
    "16-GRPO_same_rollouts": "reproduce/g16_rollouts.yaml",
    "2-GRPO+RS": f"{TWO} reproduce/rs.yaml",
    "DPO": f"{TWO} online/dpo.yaml",
    "IPO": f"{TWO} online/ipo.yaml",
    "KTO": f"{TWO} online/kto.yaml",
}
"""Name and overlays of each run; others are compared with the first."""


def command() -> list[str]:
    """The arguments of ``lit-grpo compare``."""
    entries = [f"{name}={'+'.join(str(CONFIGS / file) for file in files.split())}" for name, files in RUNS.items()]
    common = [str(CONFIGS / file) for file in ("quickstart.yaml", "reproduce/base.yaml")]
    return [*entries, "--common", *common, "--out", "runs/reproduce"]


def main() -> None:
    """Make the warm-started model if it is not there, then compare; arguments go to ``lit-grpo compare``."""
    if not CONFIGS.is_dir():
        sys.exit(f"reproduce: error: no folder configs/ here ({Path.cwd()}). Run it from the root of the repository.")
    with mistakes_end_with_a_message("reproduce"):
        warm_start(TASK, seed=0)
        compare([*command(), *sys.argv[1:]])


if __name__ == "__main__":
    main()
