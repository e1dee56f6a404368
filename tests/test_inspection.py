"""Samples looked at: numbers by hand, the files of a small real run, the page, and every mistake."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_invariance import even_first_digit

from callbacks.outliers import measure
from lit_grpo.__main__ import main
from lit_grpo.data import Sample
from lit_grpo.data.types import Batch
from lit_grpo.losses import DPO, GRPO, GSPO
from lit_grpo.reports.inspection import by_length, inspect, repetition, short


def sample(prompt: str, completion: str, reward: float, tokens: int = 1, cut: bool = False, **parts: float) -> Any:
    return {
        "prompt": prompt, "completion": completion, "reward": reward, "num_tokens": tokens, "truncated": cut,
        "parts": parts,
    }  # fmt: skip


SAMPLES = [
    sample("a", "1", 1.0, 2, right=1.0),
    sample("a", "1", 0.5, 4, right=1.0),
    sample("b", "1", 0.0, 6, right=0.0),
    sample("b", "<b>one two one two one two</b>", -0.5, 100, cut=True, right=0.0),
]
OUTLIERS = [
    {"prompt": "a", "completion": str(i), "mismatch": i / 100, "outside_clip": share}
    for i, share in enumerate((0.0, 0.5, None, 0.25))
]


class TestByHand:
    def test_rewards_by_component(self):
        found = inspect(SAMPLES, [], "")
        assert found.components == [
            ("reward", 0.25, pytest.approx((1.25 / 4) ** 0.5), 0.5),  # deviations 0.75, 0.25, -0.25, -0.75
            ("right", 0.5, 0.5, 0.5),
        ]

    def test_best_and_worst_come_in_order(self):
        lists = inspect(SAMPLES, [], "").lists
        assert [row["shown"] for row in lists["Best"]] == ["1", "0.5", "0", "-0.5"]
        assert [row["shown"] for row in lists["Worst"]] == ["-0.5", "0", "0.5", "1"]
        tied = [sample(prompt, text, 1.0) for prompt in "ab" for text in "xyz"]
        best = inspect(tied, [], "").lists["Best"]
        assert [row["prompt"] + row["completion"] for row in best] == ["ax", "bx", "ay", "by", "az"]
        assert not any("clip" in name or "mismatch" in name for name in lists)

    def test_outliers_come_in_order(self):
        lists = inspect(SAMPLES, OUTLIERS, "").lists
        assert [row["shown"] for row in lists["Most tokens outside the clip range"]] == ["50%", "25%"]
        assert [row["completion"] for row in lists["Largest mismatch of sampler and trainer"]] == ["3", "2", "1", "0"]

    def test_lists_that_are_empty_say_so(self):
        """As that of clipping is where a phase has one update."""
        found = inspect(SAMPLES, [row | {"outside_clip": 0.0} for row in OUTLIERS], "")
        assert "\nMost tokens outside the clip range\n        none\n" in found.text()
        assert re.search(r"Most tokens outside the clip range</h2>\s*<p>none</p>", found.page())

    def test_duplicates_are_of_one_prompt(self):
        found = inspect(SAMPLES, [], "")
        assert found.duplicates == 0.5  # the third has the same text, but for another prompt
        assert found.common == [("1", 3)]

    def test_repeated_n_grams(self):
        """a b c d a b c d: five 4-grams of which the last was there; three words have none."""
        assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
        assert repetition("a a a") == 0

    def test_lengths_in_fifths(self):
        rows = [sample("", "", float(i > 4), tokens=10 - i, cut=i == 0) for i in range(10)]
        assert by_length(rows) == [
            (1, 2, 2, 1, 0),
            (3, 4, 2, 1, 0),
            (5, 6, 2, 0.5, 0),
            (7, 8, 2, 0, 0),
            (9, 10, 2, 0, 0.5),
        ]
        assert [part[2] for part in by_length(rows[:3])] == [1, 1, 1]
        alike = [sample("", "", 1.0, tokens=min(i, 4)) for i in range(10)]
        assert [part[:3] for part in by_length(alike)] == [(0, 1, 2), (2, 3, 2), (4, 4, 6)]

    def test_what_would_steer_a_terminal_is_not_shown(self):
        assert short("a\x1b[2Jb\rc\u2028d\ne") == "a·[2Jb·c·d ↵ e"

    def test_long_texts_lose_their_middle(self):
        assert short("one\ntwo") == "one ↵ two"
        cut = short("a" * 100 + "b" * 100, 20)
        assert len(cut) == 20
        assert (cut[0], cut[-1]) == ("a", "b")


class TestMeasure:
    def batch(self, on_policy: bool, old_logps: torch.Tensor | None = None) -> Batch:
        mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]]).bool()
        sampler = torch.tensor([[0, -1.0, -1.0, -1.0], [0, 0, -2.0, 0]])
        tokens, advantages = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([1.0, -1.0])
        return Batch(tokens, mask, advantages, sampler, on_policy, 1.0, 2, 4, old_logps=old_logps)

    LOGPS = torch.tensor([[9.0, -1.0, -1.3, -0.7], [9.0, 9.0, -2.1, 9.0]])

    def test_by_hand(self):
        """Ratios 1, 0.74, 1.35 and, in the other row, 0.90; what is outside the mask does not count."""
        mismatch, outside = measure(GRPO(), self.LOGPS, self.batch(on_policy=False))
        torch.testing.assert_close(mismatch, torch.tensor([0.2, 0.1]))
        assert outside is not None
        torch.testing.assert_close(outside, torch.tensor([2 / 3, 0]))
        _, outside = measure(GRPO(clip_high=0.4, clip_low=0.05), self.LOGPS, self.batch(on_policy=False))
        assert outside is not None
        torch.testing.assert_close(outside, torch.tensor([1 / 3, 1]))

    def test_ratio_is_to_the_old_policy(self):
        _, outside = measure(GRPO(), self.LOGPS, self.batch(False, old_logps=self.LOGPS))
        assert outside is not None
        assert outside.tolist() == [0, 0]
        _, outside = measure(GRPO(), self.LOGPS, self.batch(on_policy=True))
        assert outside is not None
        assert outside.tolist() == [0, 0]

    @pytest.mark.parametrize("loss", [DPO(), GSPO()])
    def test_losses_that_clip_no_tokens_have_none(self, loss: Any):
        assert measure(loss, self.LOGPS, self.batch(on_policy=False))[1] is None


def scored(samples: list[Sample]) -> list[float]:
    for s in samples:
        s.parts["short"] = float(s.num_tokens < 3)
    return even_first_digit(samples)


class TestRun:
    @pytest.fixture(scope="class")
    def run(self, task: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("inspect") / "run"
        main([
            "fit", f"--run_dir={folder}", f"--model.model={model}", "--model.loss=GRPO", "--model.optimizer=AdamW",
            "--model.optimizer.lr=0.03", "--data=RolloutData", f"--data.train.path={task / 'train.jsonl'}",
            f"--data.val.path={task / 'val.jsonl'}", "--data.reward=test_inspection.scored",
            "--data.prompts_per_phase=16", "--data.group_size=4", "--data.updates_per_phase=2",
            "--rollout.max_tokens=6", "--samples.every_n_phases=2", "--trainer.max_epochs=4",
            "--trainer.check_val_every_n_epoch=4", "--trainer.accelerator=cpu",
            "--trainer.accumulate_grad_batches=2",
        ])  # fmt: skip
        return folder

    def rows(self, run: Path, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / "samples" / f"{name}.jsonl").read_text().splitlines()]

    def test_outliers_are_written_when_samples_are(self, run: Path):
        written = {path.stem.split("-")[1] for path in (run / "samples").glob("train-*")}
        assert {path.stem.split("-")[1] for path in (run / "samples").glob("outliers-*")} == written
        assert written == {"00000", "00002", "00003"}

    def test_outliers_agree_with_the_log(self, run: Path):
        """As many rows as were forwarded, whose texts are rollouts; the clip's shares are those that were logged."""
        with open(run / "metrics.csv", newline="") as file:
            (log,) = (row for row in csv.DictReader(file) if row["train/reward"] and row["epoch"] == "2")
        outliers, samples = self.rows(run, "outliers-00002"), self.rows(run, "train-00002")
        assert len(outliers) == round(float(log["train/trained_share"]) * 64)
        assert {(row["prompt"], row["completion"]) for row in outliers} <= {
            (row["prompt"], row["completion"]) for row in samples
        }
        assert any(row["outside_clip"] for row in outliers)  # in the second update
        assert max(row["mismatch"] for row in outliers) > 1e-3
        assert 0 <= float(log["train/sampler_mismatch"]) < 1e-4  # before the first
        assert min(row["mismatch"] for row in outliers) < 1e-4

    def test_the_terminal_and_the_page(self, run: Path, capsys: pytest.CaptureFixture[str]):
        main(["inspect", str(run), "--phase", "2"])
        said = capsys.readouterr().out
        assert said.startswith("run, rollouts of phase 2: 64 completions\n")
        for line in ("short", "Best", "Worst", "Most tokens outside the clip range", "Largest mismatch"):
            assert f"\n{line}" in said
        page = (run / "inspection.html").read_text()
        assert "rollouts of phase 2" in page
        assert "data:image/png;base64,iVBOR" in page
        assert "http" not in page.replace("data:image/png;base64", "")

    def test_the_latest_and_held_out_samples(self, run: Path, capsys: pytest.CaptureFixture[str]):
        main(["inspect", str(run)])
        assert "phase 3: 64 completions" in capsys.readouterr().out
        main(["inspect", str(run), "--split", "val", "--phase", "0"])
        said = capsys.readouterr().out
        assert "held-out samples after updates: 0: 1024 completions" in said
        assert "mismatch" not in said

    def test_texts_are_not_markup(self, tmp_path: Path):
        page = inspect(SAMPLES, [], "<run>").page()
        assert "&lt;run&gt;" in page
        assert "&lt;b&gt;one two" in page
        assert "<b>one two" not in page

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["no/such"], "RUN: 'no/such' is no folder"),
            (["empty"], "'empty' holds no samples/train-*.jsonl"),
            (["run", "--phase", "1"], "nothing of train was written at 1. There are 0, 2, 3."),
            (["run", "--split", "val", "--phase", "2"], "nothing of val was written at 2. There are 0, 8."),
            (["damaged"], "train-00000.jsonl' is damaged"),
            (["blank"], "train-00000.jsonl' is empty"),
        ],
    )
    def test_mistakes(
        self, run: Path, tmp_path: Path, arguments: list[str], message: str, monkeypatch: Any, capsys: Any
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run").symlink_to(run)
        (tmp_path / "empty").mkdir()
        for name, text in (("damaged", '{"prompt": "a'), ("blank", "")):
            (tmp_path / name / "samples").mkdir(parents=True)
            (tmp_path / name / "samples" / "train-00000.jsonl").write_text(text)
        with pytest.raises(SystemExit) as stop:
            main(["inspect", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_it_needs_no_model():
    """Reading a folder does not wait for torch."""
    code = "import sys, lit_grpo.reports.inspection; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "lightning", "transformers", "matplotlib"} & {*said}
