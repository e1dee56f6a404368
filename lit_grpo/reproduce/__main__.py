"""``python -m lit_grpo.reproduce``: all runs, then table, answers and figures. Given again, it goes on."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from lit_grpo.errors import mistakes_end_with_a_message
from lit_grpo.quickstart import CONFIGS, warm_start
from lit_grpo.reports.compare import compare
from lit_grpo.reproduce.answers import report
from lit_grpo.reproduce.runs import FIXED_RUNS, RUNS, TASK, command
from lit_grpo.reproduce.signal import SignalToNoise


def main() -> None:
    """Make the warm-started model if it is not there, then all runs; arguments go to ``lit-grpo compare``."""
    parser = argparse.ArgumentParser("reproduce", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of runs and report")
    given, args = parser.parse_known_args()
    if not CONFIGS.is_dir():
        sys.exit(f"reproduce: error: no folder configs/ here ({Path.cwd()}). Run it from the root of the repository.")
    with mistakes_end_with_a_message("reproduce"):
        warm_start(TASK, seed=0)
        signal = SignalToNoise()
        fixed = compare([*command(FIXED_RUNS, given.out / "fixed_policy"), *args], signal.read)
        trained = compare([*command(RUNS, given.out), *args], partial(report, signal=signal))
    if not (fixed and trained):
        sys.exit(1)


if __name__ == "__main__":
    main()
