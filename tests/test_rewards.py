"""Rewards: what is right, what is wrong, and what must not stop a run."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_grpo.data import Sample
from lit_grpo.errors import UserError
from lit_grpo.rewards import (
    FormatReward,
    LengthPenalty,
    MathReward,
    RepetitionPenalty,
    RewardSum,
    exact_match,
    math_reward,
)
from lit_grpo.rewards.verify import _number, judge, last_boxed


def samples(*pairs: tuple[str, str]) -> list[Sample]:
    return [Sample("q", completion, gold, num_tokens=1, truncated=False) for gold, completion in pairs]


ACCEPTED = {
    "whole numbers": ("46", "46"),
    "a sentence around the box": ("46", r"So the answer is \boxed{46}."),
    "a fraction is its value": ("1/2", r"\boxed{\frac{1}{2}}"),
    "and a decimal": ("1/2", r"\boxed{0.5}"),
    "gold in dollars": ("$\\frac{1}{2}$", r"\boxed{\frac12}"),
    "gold is a whole solution with its box": (r"We find $x = \boxed{7}$.", r"thus \boxed{7}"),
    "a bare gold tuple is not its first number": (r"\left(3,\frac{\pi}{2}\right)", r"\boxed{(3, \frac{\pi}{2})}"),
    "the last box": ("12", r"\boxed{11}, no, \boxed{12}"),
    "leading zeros": ("025", r"\boxed{25}"),
    "and in the answer": ("25", r"\boxed{025}"),
    "thousands": ("1,234", r"\boxed{1234}"),
    "thousands in the answer": ("1234", r"\boxed{1,234}"),
    "a gold that was stored as a float": ("27.0", r"\boxed{27}"),
    "a line end after the gold": ("8.7 \\times 10^{8}\n", r"\boxed{8.7\times 10^8}"),
    "scientific notation with an e in the answer": (r"8.7 \times 10^{8}", r"\boxed{8.7e8}"),
    "and in the gold": ("4.5e33", r"\boxed{4.5\times 10^{33}}"),
    "with a sign": ("2.5E-3", r"\boxed{0.0025}"),
    "small numbers that are the same": (r"6.6\times 10^{-34}", r"\boxed{6.6e-34}"),
    "powers of ten written out": (r"8.7 \times 10^{8}", r"\boxed{870000000}"),
    "a unit in the answer": ("5", r"\boxed{5\text{ cm}}"),
    "a unit in the gold": (r"5\text{ cm}", r"\boxed{5}"),
    "degrees": ("90", r"\boxed{90^\circ}"),
    "money": (r"\$5", r"\boxed{5}"),
    "percent as the number": ("50", r"\boxed{50\%}"),
    "percent as a hundredth": ("0.1", r"\boxed{10\%}"),
    "six decimals of a third": ("1/3", r"\boxed{0.333333}"),
    "six decimals of pi": (r"\pi", r"\boxed{3.141593}"),
    "several answers in any order": ("1,2", r"\boxed{2, 1}"),
    "several answers in dollars each": ("$1$, $2$", r"\boxed{1,2}"),
    "an equation for its value": ("5", r"\boxed{x=5}"),
    "an inequality as an interval": ("x>2", r"\boxed{(2,\infty)}"),
    "an expression in another form": (r"x^2+2x+1", r"\boxed{(x+1)^2}"),
    "roots": (r"2\sqrt{2}", r"\boxed{\sqrt{8}}"),
    "words": (r"\text{even}", r"\boxed{\text{even}}"),
    "without a box, the last number": ("12", "The answer is 12."),
    "a minus sign of typography": ("-1", "\\boxed{\N{MINUS SIGN}1}"),
}

REFUSED = {
    "another number": ("46", "47"),
    "nothing": ("46", ""),
    "no answer": ("46", "="),
    "the last box counts": ("12", r"\boxed{12}, no, \boxed{11}"),
    "a box that was never closed": ("12", r"\boxed{12"),
    "a box outranks a number outside": ("12", r"12 \boxed{11}"),
    "no guessing": ("12", r"\boxed{11} \boxed{12} \boxed{13}"),
    "three decimals of a third": ("1/3", r"\boxed{0.333}"),
    "two decimals of pi": (r"\pi", r"\boxed{3.14}"),
    "a point's coordinates have an order": ("(1,2)", r"\boxed{(2,1)}"),
    "an open interval is not closed": ("(0,1)", r"\boxed{[0,1]}"),
    "large whole numbers that are close": ("123456789012", r"\boxed{123456789013}"),
    "large powers that overflow": (r"10^{400}", r"\boxed{10^{500}}"),
    "Euler's number is no power of ten": ("1e11", r"\boxed{e11}"),
    "small numbers are as different as large ones": (r"1\times 10^{-19}", r"\boxed{2\times 10^{-19}}"),
    "also as decimals, which math-verify rounds to six places": ("0.0000001", r"\boxed{0.0000003}"),
    "a small number is not none": ("0", r"\boxed{0.0000001}"),
    "thousands by spaces": ("1000", r"\boxed{1 000}"),
    "an answer longer than any": ("3", r"\boxed{" + "3" * 2000 + "}"),
}


@pytest.mark.parametrize("reason", ACCEPTED)
def test_right_answers(reason: str):
    assert judge(*ACCEPTED[reason]).correct


@pytest.mark.parametrize("reason", REFUSED)
def test_wrong_answers(reason: str):
    assert not judge(*REFUSED[reason]).correct


def test_what_sympy_contradicts_itself_on_is_no_number():
    """An unevaluated 1 * 0, as math-verify reads `1 000`, may not know whether it is even."""

    class Contradiction:
        is_number = True

        @property
        def is_real(self) -> bool:
            raise ValueError("inconsistent assumptions")

    assert _number([Contradiction()]) is None


def test_a_tolerance_is_for_numbers_that_are_close():
    for gold in ("3.14", "3"):
        assert judge(gold, rf"\boxed{{{gold}}}", tolerance=0.01).correct
    assert judge("3.14", r"\boxed{3.15}", tolerance=0.0100001).correct
    assert not judge("3.14", r"\boxed{3.16}", tolerance=0.01).correct
    assert judge("100", r"\boxed{101}", tolerance=1).correct
    assert not judge("x", r"\boxed{y}", tolerance=1e9).correct
    assert judge("3.14, 2.0", r"\boxed{2.0, 3.141}", tolerance=0.01).correct
    assert not judge("3.14, 2.0", r"\boxed{2.0, 3.2}", tolerance=0.01).correct
    assert not judge("3.14, 2.0", r"\boxed{3.14, 3.141}", tolerance=0.01).correct
    assert not judge("3.14, 2.0", r"\boxed{3.14, 2.0, 5}", tolerance=0.01).correct


@pytest.mark.parametrize(
    "answers",
    [
        ("1/2", r"\boxed{\frac12}", r"\boxed{0.5}", r"it is \boxed{x = .50}"),
        ("7", r"\boxed{7}", r"\boxed{007}", r"\boxed{7.0}", "7"),
        ("x^2-1", r"\boxed{(x-1)(x+1)}", r"\boxed{x^2 - 1}"),
    ],
)
def test_equal_answers_are_the_same_vote(answers: tuple[str, ...]):
    gold, *completions = answers
    assert len({judge(gold, completion).answer for completion in completions}) == 1
    assert judge(gold, r"\boxed{8}").answer not in {judge(gold, completion).answer for completion in completions}
    assert judge(gold, "none").answer is None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("no box", None),
        (r"\boxed{}", ""),
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed{a", ""),
        (r"\boxed{1} \boxed{2}", "2"),
    ],
)
def test_last_boxed(text: str, content: str | None):
    assert last_boxed(text) == content


def test_exact_match():
    assert exact_match(samples(("4", " 4\n"), ("4", "4."), ("4", "5"))) == [1.0, 0.0, 0.0]


def test_math_reward_scores_in_order_and_repeats_alike():
    assert math_reward(samples(("1", "1"), ("1", "2"), ("2", "2"), ("1", "1"))) == [1.0, 0.0, 1.0, 1.0]


def test_a_hang_scores_zero_is_counted_and_stops_nothing(caplog: pytest.LogCaptureFixture):
    """The first is stuck in C code, which only killing the process ends; the second in Python."""
    reward = MathReward(timeout=3, workers=1)
    tower, integral = r"\boxed{9^{9^{9^{9^{9}}}}}", r"\boxed{\int_0^{\infty} e^{x^{9}} \sin(x^x) dx}"
    found = samples(("1", "1"), ("3", tower), ("2", "2"), ("3", integral), ("4", "4"))
    before = time.monotonic()
    assert reward(found) == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert time.monotonic() - before < 90  # it would run for ever; this is no measure of speed
    assert [sample.parts["timeout_rate"] for sample in found] == [0, 1, 0, 1, 0]
    assert [sample.parsed for sample in found] == ["1", None, "2", None, "4"]
    assert caplog.text.count("no verdict within 3 s, so a score of 0") == 2
    assert reward(samples(("5", "5"))) == [1.0]  # the pool lives on


def die(items: list[object], seconds: float) -> list[object]:
    os._exit(3)


def test_a_worker_that_dies_scores_zero_and_stops_nothing(monkeypatch: pytest.MonkeyPatch):
    reward = MathReward(workers=1)
    assert reward(samples(("1", "1"))) == [1.0]
    with monkeypatch.context() as patch:
        patch.setattr("lit_grpo.rewards.accuracy.judge_all", die)
        (sample,) = samples(("1", "1"))
        assert reward([sample]) == [0.0]
        assert sample.parts["timeout_rate"] == 1
    assert reward(samples(("1", "1"))) == [1.0]


def test_what_models_may_write_to_do_harm(capfd: pytest.CaptureFixture[str]):
    """Every kind that the benchmark has, and a few; none is right, none prints, and the pool is as before."""
    reward = MathReward(timeout=1, workers=2)
    assert reward(samples(("3", r"\boxed{3}"))) == [1.0]
    workers = {process.pid for process in multiprocessing.active_children()}
    bodies = [
        "{" * 5000, "7" * 100_000, r"\frac{1}{" * 200 + "3" + "}" * 200, r"\sqrt{" * 300, "\ud800\udfff\x00\x1b[2J",
        "3!!!!!!", "1" + "+1" * 3000, "", " ", "\\", "}{", "%", "$", "1/0", "0^0", "\\input{/etc/passwd}", "__import__('os')",
        "(3+x)^{999999}",
    ]  # fmt: skip
    hostile = samples(*((("3", rf"\boxed{{{body}}}")) for body in bodies))
    assert reward(hostile) == [0.0] * len(hostile)
    assert reward(samples(("3", r"\boxed{3}"), ("3", r"\boxed{4}"))) == [1.0, 0.0]
    assert len(multiprocessing.active_children()) <= len(workers)
    assert capfd.readouterr().out == ""


def test_gold_answers_that_cannot_be_read():
    assert math_reward.unreadable(["1", r"\text{}", "25%", "", r"\frac{1}{", r"so \boxed{3}"]) == [1, 3]


class TestShape:
    def test_format(self):
        texts = {"<think>a\nb</think>\n<answer>2</answer>": 1, "<answer>2</answer>": 0, "x <think></think><answer></answer>": 0}  # fmt: skip
        assert FormatReward()(samples(*(("2", text) for text in texts))) == list(texts.values())
        assert FormatReward(r"\d+")(samples(("2", "12"), ("2", "12 "))) == [1, 0]
        with pytest.raises(UserError, match=r"pattern: '\(' is no regular expression: missing"):
            FormatReward("(")

    def test_repetition(self):
        assert RepetitionPenalty(3)(samples(("", "a b c a b c a b c"), ("", "a b"), ("", ""))) == pytest.approx(
            [3 / 7 - 1, 0, 0]
        )
        with pytest.raises(UserError, match="ngram: expected a whole number >= 1, got 0"):
            RepetitionPenalty(0)

    def test_length(self):
        found = [Sample("q", "", "", num_tokens=n, truncated=False) for n in (0, 6, 7, 10, 12)]
        assert LengthPenalty(max_tokens=10, buffer=4)(found) == [0, 0, -0.25, -1, -1]
        for max_tokens, buffer, message in (
            (0, 1, "max_tokens: expected a whole number >= 1, got 0"),
            (4, 0, "buffer: expected a whole number >= 1, got 0"),
            (4, 5, "buffer: 5 tokens are more than the 4 of max_tokens"),
        ):
            with pytest.raises(UserError, match=message):
                LengthPenalty(max_tokens, buffer)


class TestSum:
    def test_parts_are_kept(self):
        reward = RewardSum({"right": exact_match, "format": FormatReward(r"\d")}, weights={"format": 0.25})
        found = samples(("4", "4"), ("4", "44"), ("4", "5"))
        assert reward(found) == [1.25, 0, 0.25]
        assert [sample.parts for sample in found] == [
            {"right": 1, "format": 1}, {"right": 0, "format": 0}, {"right": 0, "format": 1}
        ]  # fmt: skip

    def test_coroutines_wait_together(self):
        started = []

        def slow(name: str) -> Callable[[list[Sample]], Any]:
            async def reward(found: list[Sample]) -> list[float]:
                started.append(name)
                while len(started) < 2:  # for ever, if the other did not start meanwhile
                    await asyncio.sleep(0)
                return [1.0] * len(found)

            return reward

        assert RewardSum({"a": slow("a"), "b": slow("b")})(samples(("4", "4"))) == [2.0]

    @pytest.mark.parametrize(
        ("rewards", "weights", "message"),
        [({}, {}, "got none"), ({"a": exact_match}, {"b": 1.0}, "a weight for 'b', which is none of them")],
    )
    def test_names_that_do_not_fit(self, rewards: dict[str, Any], weights: dict[str, float], message: str):
        with pytest.raises(UserError, match=message):
            RewardSum(rewards, weights)


SCRIPT = """
import multiprocessing
from lit_grpo.data import Sample
from lit_grpo.rewards import MathReward

if __name__ == "__main__":
    reward = MathReward(workers=2)
    print(reward([Sample("", "1", "1", 1, False)]))
    print(*[process.pid for process in multiprocessing.active_children()])
"""


def test_no_process_outlives_the_run(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120, check=True
    )
    score, pids = run.stdout.splitlines()
    assert score == "[1.0]"
    assert len(pids.split()) == 2
    for pid in map(int, pids.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    run = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
    assert "if __name__ == '__main__':" in run.stderr
    assert run.returncode != 0


@pytest.mark.parametrize("setting", [{"timeout": 0}, {"workers": 0}])
def test_impossible_settings_name_the_key(setting: dict[str, int]):
    with pytest.raises(UserError, match=f"reward.init_args.{next(iter(setting))}: expected a number above 0, got 0"):
        MathReward(**setting)


def test_workers_do_not_import_torch():
    code = "import sys, lit_grpo.rewards.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_sum_knows_the_answers_that_its_parts_cannot_read():
    reward = RewardSum({"right": math_reward, "same": exact_match})
    assert reward.unreadable(["1", r"\text{}", "2"]) == math_reward.unreadable(["1", r"\text{}", "2"]) == [1]
    assert RewardSum({"same": exact_match}).unreadable([r"\text{}"]) == []
