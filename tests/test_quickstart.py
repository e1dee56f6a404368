"""The quickstart, cut short: the same steps on the same task, a few phases of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_grpo import quickstart
from lit_grpo.rewards import math_reward

ROOT = Path(__file__).parent.parent
KEYS = {
    *("mean_at_4_before", "mean_at_4_after", "pass_at_4_before", "pass_at_4_after", "seconds_warm_start", "seconds_rl"),
    *("rollouts", "informative_share", "engine"),
}


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_problems_are_in_no_other_file(task: Path):
    held_out = {row["prompt"] for row in read(task / "val.jsonl")}
    assert len(held_out) == 256
    for name in ("train", "right", "unreliable"):
        assert not held_out & {row["prompt"] for row in read(task / f"{name}.jsonl")}


def test_answers_are_sums_and_demonstrations_as_reliable_as_they_say(task: Path):
    for row in read(task / "train.jsonl") + read(task / "val.jsonl"):
        assert int(row["answer"]) == sum(map(int, row["prompt"].rstrip("=").split("+")))
    for name, share in (("right", 1), ("unreliable", quickstart.RIGHT_SHARE)):
        rows = read(task / f"{name}.jsonl")
        right = [int(row["completion"]) == sum(map(int, row["prompt"].rstrip("=").split("+"))) for row in rows]
        assert sum(right) / len(rows) == pytest.approx(share, abs=0.02)


def test_task_is_a_function_of_its_seed(tmp_path: Path, task: Path):
    quickstart.make_task(tmp_path, seed=0)
    for name in ("val.jsonl", "unreliable.jsonl", "model/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (task / name).read_bytes()
    quickstart.make_task(tmp_path, seed=1)
    assert (tmp_path / "val.jsonl").read_bytes() != (task / "val.jsonl").read_bytes()


def test_short_run_writes_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quickstart, "NUM_DEMONSTRATIONS", 128)
    options = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1", "--data.prompts_per_phase=8"]
    monkeypatch.setattr("sys.argv", ["quickstart", "--seed=3", f"--folder={tmp_path}", *options])
    quickstart.main()
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "rl-001" / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert (summary["rollouts"], summary["engine"]) == (32, "HFRollout")
    assert f"{summary['mean_at_4_after']:.3f}" in said
    prompts = [row["prompt"] for row in read(tmp_path / "task-seed3" / "val.jsonl")]
    assert all(f"\n{prompt:24}" in said for prompt in prompts[:5])
    assert (tmp_path / "rl-001" / "learning_curve.png").stat().st_size > 10_000
    assert "math_reward" in (tmp_path / "rl-001" / "config.yaml").read_text()
    assert math_reward.__module__ == "lit_grpo.rewards.accuracy"

    quickstart.main()  # again: the warm start is kept, and the first run is not touched
    assert "is in" in capsys.readouterr().out
    assert (tmp_path / "rl-002" / "summary.json").exists()


def test_outside_the_repository_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["quickstart"])
    with pytest.raises(SystemExit, match="Run it from the root of the repository"):
        quickstart.main()


def test_a_typo_ends_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["quickstart", f"--folder={tmp_path}", "--rollout=VllmRollout"])
    with pytest.raises(SystemExit) as stop:
        quickstart.main()
    assert stop.value.code == 2
    assert "VllmRollout" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_warm_start_that_was_stopped_half_way_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quickstart, "NUM_DEMONSTRATIONS", 128)
    (tmp_path / "task" / "right").mkdir(parents=True)
    (tmp_path / "task" / "right" / "config.yaml").write_text("left over")
    quickstart.warm_start(tmp_path / "task", seed=0)
    assert (tmp_path / "task" / "unreliable" / "pretrained").is_dir()
