"""How much of a training step a loss takes: everything after the log-probs, against the whole step.

    python benchmarks/loss_overhead.py [--rows 512] [--tokens 256] [--repeats 5]

The step is forward and backward of a random Qwen2 of 0.5 M parameters with a vocabulary of 16, the smallest model of
this project, so that the share is at its largest. A loss is its forward with diagnostics, and its backward to the
log-probs. Steps and losses alternate; the table gives medians, and the largest share of any repeat.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lit_grpo.losses import LossInputs, diagnostics
from lit_grpo.policy import Policy
from lit_grpo.quickstart import small_qwen

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from loss_cases import LOSSES


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    policy = Policy(small_qwen(vocab_size=16)).train()
    shape = (options.rows, options.tokens)
    tokens = torch.randint(2, 16, (options.rows, options.tokens + 1))
    mask = torch.arange(options.tokens) < torch.randint(options.tokens // 2, options.tokens + 1, (options.rows, 1))
    logps, old, ref, sampler = (-torch.rand(shape) * mask for _ in range(4))
    rewards = torch.randint(0, 2, (options.rows // 2, 2)).double()
    share: dict[str, list[float]] = {name: [] for name in LOSSES}
    steps = []

    def step() -> None:
        policy(tokens, mask, entropy=False)[0].sum().backward()
        policy.zero_grad()

    for _ in range(options.repeats):
        steps.append(seconds(step))
        for name, loss in LOSSES.items():
            advantages = loss.select(rewards)[1].flatten(0, 1).float()
            leaf, entropy = logps.clone().requires_grad_(), torch.rand(shape).requires_grad_()
            inputs = LossInputs(leaf, mask, advantages, old, ref, sampler, entropy, torch.tensor(0.1), 3)

            def one(loss: torch.nn.Module = loss, inputs: LossInputs = inputs) -> None:
                loss(inputs).loss.backward()
                diagnostics(inputs)

            share[name].append(seconds(one) / steps[-1])
    print(f"step of {options.rows} x {options.tokens} tokens: {statistics.median(steps):.2f} s\n")
    print(f"{'loss':28}{'share of the step':>20}{'largest':>10}")
    for name, values in share.items():
        print(f"{name:28}{statistics.median(values):>20.2%}{max(values):>10.2%}")


if __name__ == "__main__":
    main()
