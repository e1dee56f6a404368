"""Small real parts: a model folder, data files, and a trainer that says nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_grpo.module import PolicyModule
from lit_grpo.quickstart import make_task

torch.set_num_threads(1)  # two processes of pytest share two cores

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
"""Of processes that run a test file as a script."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip long tests unless they are asked for, and vLLM's where it is not installed, except in CI.

    Those of several processes, which take longest, come first: else one core has nothing to do in the end.
    """
    items.sort(key=lambda item: "processes" not in item.name)
    for item in items:
        if item.get_closest_marker("long") and "long" not in item.config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="long: make test-long"))
    try:
        import vllm  # noqa: F401
    except ImportError:
        if os.environ.get("CI"):
            raise
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's task: ``model/``, ``train.jsonl``, ``val.jsonl``, ``right.jsonl``, ``unreliable.jsonl``."""
    folder = tmp_path_factory.mktemp("task")
    make_task(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def model(task: Path) -> str:
    """A folder with a random Qwen2 of 0.5 M parameters (tied head) and its tokenizer."""
    return str(task / "model")


@pytest.fixture
def few_prompts(tmp_path: Path) -> str:
    """Eight prompts of different lengths with their answers."""
    rows = [{"prompt": f"{10**i}+{i}=", "answer": str(10**i + i)} for i in range(8)]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def many_prompts(tmp_path: Path) -> str:
    """Sixty-four prompts with their answers."""
    rows = [{"prompt": f"{10 + i}+{i}=", "answer": str(10 + 2 * i)} for i in range(64)]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def quiet_trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    """A trainer on the CPU without logging or bars; ``options`` go to it."""
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(**(defaults | options))


@pytest.fixture
def command(model: str, many_prompts: str) -> list[str]:
    """Six phases of two updates each, with ties replaced, and a schedule."""
    return [
        "fit", f"--model.model={model}", "--model.loss=TwoGRPO", "--model.optimizer=AdamW", "--model.optimizer.lr=1e-3",
        "--model.lr_scheduler={class_path: torch.optim.lr_scheduler.LinearLR, init_args: {total_iters: 9}}",
        "--data=RolloutData", f"--data.train.path={many_prompts}", f"--data.val.path={many_prompts}",
        "--data.prompts_per_phase=8", "--data.updates_per_phase=2", "--data.resample_ties=true",
        "--data.reward=test_invariance.even_first_digit", "--rollout.max_tokens=4",
        "--trainer.max_epochs=6", "--trainer.accelerator=cpu", "--trainer.check_val_every_n_epoch=2",
        "--checkpoint.every_n_phases=1", "--samples.every_n_phases=1", "--trainer.callbacks+=test_resume.Counted",
    ]  # fmt: skip


@pytest.fixture
def told_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets SIGTERM whenever it trains in the second phase."""
    step = PolicyModule.training_step

    def told(module: PolicyModule, *arguments: Any) -> Any:
        if module.current_epoch == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(module, *arguments)

    monkeypatch.setattr(PolicyModule, "training_step", told)
