"""Seconds that the metrics take for 10,000 problems with 32 samples each: ``python benchmarks/metrics.py``."""

from __future__ import annotations

import statistics
import time

import torch

from lit_grpo.metrics import Scores, paired_bootstrap

PROBLEMS, SAMPLES, BATCH, REPEATS = 10_000, 32, 64, 5


def main() -> None:
    torch.manual_seed(0)
    votes = torch.randint(0, 8, (PROBLEMS, SAMPLES))
    rewards = (votes == 0).float()
    updates, computes, bootstraps = [], [], []
    for _ in range(REPEATS):
        scores = Scores(SAMPLES, [2, 4, 8, 16, 32])
        start = time.perf_counter()
        for i in range(0, PROBLEMS, BATCH):
            scores.update(rewards[i : i + BATCH], votes[i : i + BATCH], torch.arange(i, min(i + BATCH, PROBLEMS)))
        updates.append(time.perf_counter() - start)
        start = time.perf_counter()
        scores.compute()
        computes.append(time.perf_counter() - start)
        start = time.perf_counter()
        paired_bootstrap(rewards[:, 0], rewards[:, 1])
        bootstraps.append(time.perf_counter() - start)
    print(f"{PROBLEMS:,} problems x {SAMPLES} samples in batches of {BATCH}, medians of {REPEATS}:")
    for name, seconds in (("update", updates), ("compute", computes), ("paired bootstrap", bootstraps)):
        print(f"{name:18}{statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main()
