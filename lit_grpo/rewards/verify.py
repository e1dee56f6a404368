"""Deciding whether a mathematical answer is right. Runs in worker processes: imports must stay light."""

from __future__ import annotations

import functools
import logging
import signal
from typing import Any


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


def is_correct(gold: str, completion: str) -> bool:
    r"""Whether math-verify finds the completion's answer equal to the gold one.

    The answer is the last ``\boxed{}``; only a completion without any is searched for a number or formula. A gold
    answer may be bare, in dollars, or a whole solution with a box. There is no time limit here: call this where it can
    be killed.
    """
    import math_verify

    box = last_boxed(completion)
    prediction = math_verify.parse(completion if box is None else f"\\boxed{{{box}}}", parsing_timeout=None)
    return bool(math_verify.verify(_parse_gold(gold), prediction, timeout_seconds=None))


@functools.lru_cache(4096)  # a group has one gold answer
def _parse_gold(gold: str) -> Any:
    import math_verify

    box = last_boxed(gold)
    return math_verify.parse(f"\\boxed{{{gold.strip().strip('$') if box is None else box}}}", parsing_timeout=None)


def start_worker() -> None:
    """Pay for the imports before the first deadline runs, and let a kill work at once, even inside C code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we set no time limit
    is_correct("1", "1")
