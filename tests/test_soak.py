"""A long run holds on to nothing: memory, files, threads and processes stay as many as they were."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import psutil
import pytest
from conftest import ENVIRONMENT

EVERY = 5
"""Phases between two looks."""


class Look(L.Callback):
    """Notes what the process and its children hold."""

    def __init__(self, path: str) -> None:
        self.path, self.seen = Path(path), {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % EVERY:
            return
        gc.collect()
        process = psutil.Process()
        family = [process, *process.children(recursive=True)]
        self.seen[trainer.current_epoch + 1] = {
            "MiB": sum(member.memory_info().rss for member in family) / 2**20,
            "files": sum(member.num_fds() for member in family),
            "threads": sum(member.num_threads() for member in family),
            "processes": len(family),
        }
        self.path.write_text(json.dumps(self.seen))


def soak(phases: int, early: int, task: Path, tmp_path: Path) -> None:
    """Look after ``early`` phases and after all of them; validation, checkpoints and samples included."""
    looks = tmp_path / "looks.json"
    command = [
        "fit", f"--model.model={task / 'model'}", "--model.optimizer=AdamW", "--model.optimizer.lr=1e-3",
        "--data=RolloutData", f"--data.train.path={task / 'train.jsonl'}", f"--data.val.path={task / 'val.jsonl'}",
        "--data.prompts_per_phase=64", "--data.updates_per_phase=2", "--data.resample_ties=true",
        "--rollout=VLLMRollout", "--rollout.max_tokens=8", f"--trainer.max_epochs={phases}",
        "--trainer.accelerator=cpu", "--trainer.num_sanity_val_steps=0", f"--trainer.check_val_every_n_epoch={early}",
        "--checkpoint.every_n_phases=10", "--samples.every_n_phases=10", f"--run_dir={tmp_path / 'run'}",
        f"--trainer.callbacks={{class_path: test_soak.Look, init_args: {{path: {looks}}}}}",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "lit_grpo", *command], check=True, env=ENVIRONMENT, timeout=3000)
    seen = json.loads(looks.read_text())
    first, last = seen[str(early)], seen[str(phases)]
    assert last["MiB"] < 1.05 * first["MiB"]
    for what in ("files", "threads", "processes"):
        assert last[what] <= first[what], what


@pytest.mark.vllm
def test_thirty_phases(task: Path, tmp_path: Path):
    soak(30, 10, task, tmp_path)


@pytest.mark.long
@pytest.mark.vllm
def test_three_hundred_phases(task: Path, tmp_path: Path):
    soak(300, 30, task, tmp_path)
