"""Where the time of a phase goes, with groups of two and of sixteen on the same prompts; and how it grows with prompts.

    python benchmarks/breakdown.py [--repeats 3] [--picture docs/breakdown.png]     # needs vllm

Every run is a process of its own; runs alternate, ratios are of runs beside each other, and a table line is the median.
Micro-batches are of sixteen rows before ties are left out, and prompts are shared (``model.share_prompts``). The reward
is a coin with pass rate 0.5, so that half of the pairs, and hardly any group of sixteen, are tied.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from ours import train
from vs_trl import Work, make_task

from callbacks.ledger import PARTS

LONG = {"lengths": "long-tailed", "max_tokens": 128, "steps": 3}
PAIR = Work("25 M", 2, 0.5, engine="VLLMRollout", rollouts=64, micro_batches=4, **LONG)
WORK = {
    "2-GRPO, 25 M, 32 prompts": PAIR,
    "16-GRPO, 25 M, 32 prompts": replace(PAIR, group_size=16, rollouts=512, micro_batches=32),
    "2-GRPO, 0.6 M, 256 prompts": Work("0.6 M", 2, 0.5, "even", "HFRollout"),
}
TOKENS = ("generated", "scored", "forwarded", "trained")
GROWTH = {
    prompts: Work("0.6 M", 2, 0.5, "even", "HFRollout", 2 * prompts, 16, prompts // 64, steps)
    for prompts, steps in ((64, 33), (256, 9), (1024, 5), (4096, 3))
}


def ledger_of(work: Work) -> dict[str, float]:
    """Of a run in a process of its own."""
    said = subprocess.run(
        [sys.executable, __file__, "--work", json.dumps(asdict(work))], capture_output=True, text=True
    )
    if said.returncode:
        raise SystemExit(f"{work.name}:\n{said.stderr[-3000:]}")
    return json.loads(said.stdout.splitlines()[-1])


def seconds(ledger: dict[str, float], work: Work) -> float:
    """Of a phase."""
    return sum(ledger[part] for part in PARTS) / (work.steps - 1)


def ratio(name: str, pairs: list[tuple[float, float]]) -> None:
    found = sorted(a / b for a, b in pairs)
    print(f"{name}: {statistics.median(found):.3f} ({found[0]:.3f}-{found[-1]:.3f})", flush=True)


def draw(ledgers: dict[str, dict[str, float]], path: str) -> None:
    """Seconds of a phase, part by part."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 2.8), layout="constrained")
    for row, (name, ledger) in enumerate(ledgers.items()):
        total, left = sum(ledger[part] for part in PARTS), 0.0
        for number, part in enumerate(PARTS):
            share = ledger[part] / total
            label = part if row == 0 else None
            axis.barh(name, share, left=left, color=f"C{number}", label=label)
            if share > 0.04:
                axis.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color="white", fontsize=8)
            left += share
        axis.text(1.01, row, f"{total:.2g} s", va="center", fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of a phase")
    axis.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--picture")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        warnings.simplefilter("ignore")
        work = Work(**json.loads(options.work))
        with tempfile.TemporaryDirectory() as folder:
            make_task(Path(folder), work, prompts=4096)
            print(json.dumps(train(Path(folder), work)))
        return
    rounds = [{name: ledger_of(work) for name, work in WORK.items()} for _ in range(options.repeats)]
    phases = {
        name: {part: statistics.median(found[name][part] for found in rounds) / (work.steps - 1) for part in PARTS}
        for name, work in WORK.items()
    }
    print(f"{'seconds of a phase':32}" + "".join(f"{part:>11}" for part in PARTS))
    for name, parts in phases.items():
        total = sum(parts.values())
        print(f"{name:32}" + "".join(f"{parts[part]:6.2f} {parts[part] / total:4.0%}" for part in PARTS), flush=True)
    print(f"{'tokens of a phase':32}" + "".join(f"{kind:>11}" for kind in TOKENS))
    for name, work in WORK.items():
        of_each = [statistics.median(found[name][f"tokens_{kind}"] for found in rounds) for kind in TOKENS]
        print(f"{name:32}" + "".join(f"{tokens / (work.steps - 1):11,.0f}" for tokens in of_each), flush=True)
    two, sixteen = list(WORK)[:2]
    both = [(seconds(found[two], WORK[two]), seconds(found[sixteen], WORK[sixteen])) for found in rounds]
    ratio("wall-clock of 2-GRPO over 16-GRPO, same prompts", both)
    if options.picture:
        draw(phases, options.picture)
    grown = [{prompts: ledger_of(work) for prompts, work in GROWTH.items()} for _ in range(options.repeats)]
    print(f"{'microseconds of a rollout':32}" + "".join(f"{part:>11}" for part in PARTS))
    for prompts, work in GROWTH.items():
        parts = [statistics.median(found[prompts][part] for found in grown) for part in PARTS]
        of_one = [1e6 * part / (work.steps - 1) / work.rollouts for part in parts]
        print(f"{f'{prompts} prompts a phase':32}" + "".join(f"{each:11.0f}" for each in of_one), flush=True)
    for prompts, work in GROWTH.items():
        both = [
            (seconds(found[prompts], work) / work.rollouts, seconds(found[64], GROWTH[64]) / GROWTH[64].rollouts)
            for found in grown
        ]
        ratio(f"seconds per rollout, {prompts} prompts a phase, over 64", both)


if __name__ == "__main__":
    main()
