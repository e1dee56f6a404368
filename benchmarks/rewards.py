"""Scoring mathematics: seconds for many answers, how long the parent is held up, and what hostile answers cost.

    python benchmarks/rewards.py

Ten thousand answers in groups of sixteen to gold answers of which 60 % are whole numbers, the rest fractions, decimals,
roots, multiples of pi and pairs; then a thousand completions that were written to do harm.
"""

from __future__ import annotations

import multiprocessing
import random
import threading
import time

from lit_grpo.data import Sample
from lit_grpo.rewards import MathReward

FORMS = [
    *[str] * 6,
    lambda i: rf"\frac{{{i}}}{{7}}",
    lambda i: f"{i}.5",
    lambda i: rf"{i}\sqrt{{2}}" if i % 2 else rf"{i}\pi",
    lambda i: f"({i}, {i + 1})",
]


def answers(count: int) -> list[Sample]:
    draw = random.Random(0)
    samples = []
    for i in range(count):
        gold = i // 16
        form = FORMS[gold % len(FORMS)]
        answer = form(gold + draw.choice([0, 0, 0, 1, 2, 3, 4, 5]))
        text = "Let us think step by step. " * 20 + rf"The answer is \boxed{{{answer}}}."
        samples.append(Sample("", text, form(gold), num_tokens=1, truncated=False))
    return samples


def hostile(count: int) -> list[Sample]:
    """One after the other of what has stopped or fooled parsers, each a little different from all others."""
    bodies = [
        lambda i: f"9^{{9^{{9^{{9^{{{i}}}}}}}}}",
        lambda i: "7" * 100_000 + str(i),
        lambda i: "{" * 5000 + str(i) + "}" * 5000,
        lambda i: r"\frac{1}{" * 200 + str(i) + "}" * 200,
        lambda i: r"\sqrt{" * 300 + str(i),
        lambda i: f"\ud800\udfff\x00\x1b[2J{i}",
        lambda i: f"({i}+x)^{{999999}}",
        lambda i: f"{i}!!!!!!",
        lambda i: "1" + "+1" * 3000 + f"+{i}",
        lambda i: rf"\int_0^{{\infty}} e^{{x^{{{i}}}}} \sin(x^x) dx",
    ]
    texts = [rf"\boxed{{{bodies[i % len(bodies)](i)}}}" for i in range(count)]
    return [Sample("", text, "3", num_tokens=1, truncated=False) for text in texts]


def held_up(reward: MathReward, samples: list[Sample]) -> tuple[float, float, list[float]]:
    """Seconds of scoring, the longest that another thread of the parent had to wait, and the scores."""
    gaps, over = [0.0], threading.Event()

    def beat() -> None:
        last = time.perf_counter()
        while not over.wait(0.002):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=beat)
    thread.start()
    start = time.perf_counter()
    scores = reward(samples)
    seconds = time.perf_counter() - start
    over.set()
    thread.join()
    return seconds, max(gaps), scores


def main() -> None:
    reward = MathReward(workers=2)
    start = time.perf_counter()
    reward(answers(2))
    print(f"start of the pool: {time.perf_counter() - start:.1f} s, once")
    seconds, gap, scores = held_up(reward, answers(10_000))
    print(f"10,000 answers: {seconds:.1f} s, {sum(scores):.0f} right, parent held up at most {1000 * gap:.0f} ms")
    strict = MathReward(timeout=1, workers=2)
    strict(answers(2))
    samples = hostile(1000)
    seconds, gap, scores = held_up(strict, samples)
    late = sum(sample.parts["timeout_rate"] for sample in samples)
    print(
        f"1,000 hostile answers at 1 s each: {seconds:.0f} s, {late:.0f} over time, {sum(scores):.0f} right, parent"
        f" held up at most {1000 * gap:.0f} ms, {len(multiprocessing.active_children())} processes"
    )
    seconds, _, scores = held_up(strict, answers(1000))
    print(f"1,000 answers after that: {seconds:.1f} s, {sum(scores):.0f} right")


if __name__ == "__main__":
    main()
