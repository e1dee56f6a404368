"""Deciding whether a mathematical answer is right. Runs in worker processes: imports must stay light."""

from __future__ import annotations

import functools
import logging
import math
import re
import signal
from typing import Any, NamedTuple

CLOSE = 1e-9
"""Relative difference up to which decimal numbers are equal; whole numbers and fractions must be the same."""

LONGEST = 1000
"""Characters of an answer. No gold answer is so long, and parsers take minutes over some that are longer."""

ROUNDED = 1e-5
"""Relative difference of numbers that are only rounded otherwise. math-verify rounds to six decimals, so that all
tiny numbers are the same."""

WHOLE = re.compile(r"[-+]?\d{1,15}")

SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?)[eE]([-+]?\d+)(?![\w.])")
"""4.5e33, which LaTeX reads as 4.5 times Euler's number times 33. Minerva Math has many such gold answers."""


class Verdict(NamedTuple):
    """On one completion."""

    correct: bool = False
    answer: str | None = None
    """What the completion answers, the same text for equal answers; None if it answers nothing that can be read."""


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``; empty if that box was never closed, None if there is no box at all.

    Only the last box counts, or a completion could list guesses.

    >>> last_boxed(r"first \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return ""


def judge(gold: str, completion: str, tolerance: float = 0.0) -> Verdict:
    r"""Whether math-verify finds the completion's answer equal to the gold one.

    The answer is the last ``\boxed{}``; only a completion without any is searched for a number or formula. A gold
    answer may be bare, in dollars, or a whole solution with a box. There is no time limit here: call this where it can
    be killed.

    Args:
        gold: the gold answer.
        completion: what the model wrote.
        tolerance: by which a number may be off, or each of several.

    >>> judge("1/2", r"so it is \boxed{0.5}.")
    Verdict(correct=True, answer='0.5')
    """
    import math_verify

    gold, box = _bare(gold), last_boxed(completion)
    if box is not None and WHOLE.fullmatch(gold) and WHOLE.fullmatch(box.strip()):  # no need to parse
        return Verdict(abs(int(box) - int(gold)) <= tolerance, str(int(box)))
    if box is not None and len(box) > LONGEST:
        return Verdict()
    found = _parse(completion if box is None else f"\\boxed{{{box}}}")
    if not found:
        return Verdict()
    expected = _parse(f"\\boxed{{{gold}}}")
    correct = bool(math_verify.verify(expected, found, timeout_seconds=None))
    value, wanted = _number(found), _number(expected)
    if value is not None and wanted is not None:
        if not correct:
            relative = 0.0 if value.is_rational and wanted.is_rational else CLOSE
            correct = math.isclose(float(value), float(wanted), rel_tol=relative, abs_tol=tolerance)
        elif abs(value - wanted) < 1e-6:
            correct = math.isclose(float(value), float(wanted), rel_tol=ROUNDED, abs_tol=tolerance)
    elif not correct and tolerance and box is not None and "," in gold:
        correct = _each_within(tolerance, gold.split(","), box.split(","))
    if value is not None:
        return Verdict(correct, f"{float(value):.15g}")
    return Verdict(correct, gold if correct else str(found[0]))


def _each_within(tolerance: float, golds: list[str], answers: list[str]) -> bool:
    """Whether every answer is within the tolerance of a gold one of its own."""
    for gold in golds:
        hit = next((a for a in answers if judge(gold, f"\\boxed{{{a}}}", tolerance).correct), None)
        if hit is None:
            return False
        answers.remove(hit)
    return not answers


def judge_all(items: list[tuple[str, str, float]], seconds: float) -> list[Verdict | None]:
    """Verdicts on (gold, completion, tolerance), wrong where math-verify or sympy raise, as they do on strange text.

    An item that takes longer than ``seconds`` gets None and ends the list, so that it may be shorter than the items.
    Only what Python runs can be interrupted so; of the rest the pool must take care.
    """
    verdicts: list[Verdict | None] = []
    for item in items:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                verdicts.append(judge(*item))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Overran:
            return [*verdicts, None]
        except Exception:
            verdicts.append(Verdict())
    return verdicts


class Overran(BaseException):
    """The time for an item is over. No Exception, which parsers catch."""


def overrun(*_: object) -> None:
    raise Overran


def readable(golds: list[str]) -> list[bool]:
    """Whether math-verify can read each gold answer; no completion could be right if it cannot."""
    bare = map(_bare, golds)
    return [bool(WHOLE.fullmatch(gold) or _parse(f"\\boxed{{{gold}}}")) for gold in bare]


def _bare(gold: str) -> str:
    """A gold answer without dollars, or the last box of a whole solution."""
    box = last_boxed(gold)
    return (gold.strip().strip("$") if box is None else box).strip()


@functools.lru_cache(4096)  # a group has one gold answer, and often few answers
def _parse(text: str) -> Any:
    import math_verify

    written_out = SCIENTIFIC.sub(lambda found: rf"{found[1]} \times 10^{{{int(found[2])}}}", text)
    return math_verify.parse(written_out, parsing_timeout=None)


def _number(parsed: Any) -> Any:
    """The real number that was found, in ``x = number`` too; None for anything else."""
    if not parsed:
        return None
    value = parsed[0].rhs if type(parsed[0]).__name__ == "Equality" else parsed[0]
    try:
        real = getattr(value, "is_number", False) and value.is_real and math.isfinite(float(value))
    except ValueError:  # of products that are left as they were written, sympy may contradict itself
        return None
    return value if real else None


def start_worker() -> None:
    """Pay for the imports before the first deadline runs, and let a kill work at once, even inside C code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, overrun)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we set no time limit
    judge("1", "1")
