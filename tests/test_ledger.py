"""Where the time of a run goes, and what it was spent on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from callbacks.ledger import PARTS
from lit_grpo.__main__ import main


def test_phases_add_up_to_the_run_and_tied_pairs_cost_nothing(model: str, many_prompts: str, tmp_path: Path):
    """Also where a run was gone on with. Tokens are counted again from the samples."""
    command = [
        "fit", f"--model.model={model}", "--model.loss=TwoGRPO", "--data=RolloutData", "--rollout.max_tokens=4",
        f"--data.train.path={many_prompts}", "--data.prompts_per_phase=32", "--data.updates_per_phase=2",
        "--data.reward=test_invariance.even_first_digit", "--trainer.accelerator=cpu", "--samples.every_n_phases=1",
        "--trainer.accumulate_grad_batches=2", f"--run_dir={tmp_path}", "--ckpt_path=last",
    ]  # fmt: skip
    for epochs in (2, 3):
        main([*command, f"--trainer.max_epochs={epochs}"])
    rows = []
    for path in (tmp_path / "metrics-000.csv", tmp_path / "metrics.csv"):
        with open(path, newline="") as file:
            rows += [row for row in csv.DictReader(file) if row.get("train/seconds_other")]
    assert len(rows) == 3
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    for part in PARTS:
        seconds = [float(row[f"train/seconds_{part}"]) for row in rows]
        assert all(value >= 0 for value in seconds)
        assert sum(seconds) == pytest.approx(ledger[part], rel=1e-5)
    for phase, row in enumerate(rows):
        samples = [json.loads(line) for line in (tmp_path / "samples" / f"train-{phase:05d}.jsonl").open()]
        pairs = list(zip(samples[::2], samples[1::2], strict=True))
        informative = [pair for pair in pairs if pair[0]["reward"] != pair[1]["reward"]]
        assert float(row["train/rows_trained"]) == 2 * len(informative)
        trained = sum(a["num_tokens"] + b["num_tokens"] for a, b in informative)
        assert float(row["train/tokens_trained"]) == trained
        assert trained < float(row["train/tokens_forwarded"])
        canary = phase in (0, 2)  # with which a process begins
        assert (float(row["train/tokens_scored"]) > 0) == canary
    assert ledger["rows_trained"] == sum(float(row["train/rows_trained"]) for row in rows)
    assert ledger["tokens_trained"] == sum(float(row["train/tokens_trained"]) for row in rows)
    assert ledger["tokens_generated"] == sum(float(row["train/tokens"]) for row in rows)
