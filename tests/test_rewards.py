"""Rewards: what is right, what is wrong, and what must not stop a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_grpo.data import Sample
from lit_grpo.errors import UserError
from lit_grpo.rewards import MathReward, exact_match, math_reward
from lit_grpo.rewards.verify import is_correct, last_boxed


def samples(*pairs: tuple[str, str]) -> list[Sample]:
    return [Sample("q", completion, gold, num_tokens=1, truncated=False) for gold, completion in pairs]


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("46", "46"),
        ("46", r"So the answer is \boxed{46}."),
        ("1/2", r"\boxed{\frac{1}{2}}"),
        ("1/2", r"\boxed{0.5}"),
        ("$\\frac{1}{2}$", r"\boxed{\frac12}"),
        (r"We find $x = \boxed{7}$.", r"thus \boxed{7}"),  # a gold solution with its box
        (r"\left(3,\frac{\pi}{2}\right)", r"\boxed{(3, \frac{\pi}{2})}"),  # a bare gold tuple is not its first number
        ("12", r"\boxed{11}, no, \boxed{12}"),  # the last box
        ("25", r"\boxed{025}"),
    ],
)
def test_right_answers(gold: str, completion: str):
    assert is_correct(gold, completion)


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("46", "47"),
        ("46", ""),
        ("46", "="),
        ("12", r"\boxed{12}, no, \boxed{11}"),
        ("12", r"\boxed{12"),  # never closed: cut off
        ("12", r"12 \boxed{11}"),  # a box outranks a number outside
        ("12", r"\boxed{11} \boxed{12} \boxed{13}"),  # no guessing
    ],
)
def test_wrong_answers(gold: str, completion: str):
    assert not is_correct(gold, completion)


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
    reward = MathReward(timeout=3, workers=1)
    tower = r"\boxed{9^{9^{9^{9^{9}}}}}"
    before = time.monotonic()
    assert reward(samples(("1", "1"), ("3", tower), ("2", "2"))) == [1.0, 0.0, 1.0]
    assert time.monotonic() - before < 60  # it would run for ever; this is no measure of speed
    assert reward.timeouts == 1
    assert "scored 0" in caplog.text
    assert reward(samples(("5", "5"))) == [1.0]  # the pool lives on


def die(gold: str, completion: str) -> bool:
    os._exit(3)


def test_a_worker_that_dies_scores_zero_and_stops_nothing(monkeypatch: pytest.MonkeyPatch):
    reward = MathReward(workers=1)
    assert reward(samples(("1", "1"))) == [1.0]
    with monkeypatch.context() as patch:
        patch.setattr("lit_grpo.rewards.accuracy.is_correct", die)
        assert reward(samples(("1", "1"))) == [0.0]
    assert reward.timeouts == 1
    assert reward(samples(("1", "1"))) == [1.0]


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
