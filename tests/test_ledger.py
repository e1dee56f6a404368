"""Where the time of a run goes, and what it was spent on."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT
from test_invariance import LAYOUTS, rank, train

from callbacks import Ledger
from callbacks.ledger import PARTS
from lit_grpo.__main__ import main

COUNTS = ("rows_trained", "tokens_trained", "tokens_generated")


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
        assert float(row["train/tokens_scored"]) == 0  # the canary, with which a process begins, is no part of a phase
    assert ledger["rows_trained"] == sum(float(row["train/rows_trained"]) for row in rows)
    assert ledger["tokens_trained"] == sum(float(row["train/tokens_trained"]) for row in rows)
    assert ledger["tokens_generated"] == sum(float(row["train/tokens"]) for row in rows)


def sums(job: dict[str, str], **options: Any) -> dict[str, float]:
    """Of a phase in which all rows are trained on."""
    ledger = Ledger()
    train(job["model"], job["many"], Path(job["folder"]), "grpo kl", keep_zeros=True, callbacks=[ledger], **options)
    return {name: ledger.sums[name] for name in COUNTS}


@pytest.mark.parametrize("layout", ["ddp", "tensor"])
def test_counts_are_those_of_all_processes(layout: str, model: str, many_prompts: str, tmp_path: Path):
    """Once each, also where two processes have the same data."""
    job = {"model": model, "many": many_prompts, "folder": str(tmp_path), "layout": layout}
    subprocess.run([sys.executable, __file__, json.dumps(job)], check=True, timeout=300, env=ENVIRONMENT)
    assert json.loads((tmp_path / "sums.json").read_text()) == sums(job)
    assert sums(job)["rows_trained"] == 16 * 4


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    found = sums(job, devices=2, strategy=LAYOUTS[2][job["layout"]][1]())
    if rank() == 0:
        (Path(job["folder"]) / "sums.json").write_text(json.dumps(found))
