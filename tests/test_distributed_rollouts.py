"""Two real processes, each with its own vLLM, under DDP and with sharded weights (FSDP2)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import ENVIRONMENT, quiet_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from test_invariance import even_first_digit, furthest
from torch import Tensor

from callbacks import VLLMRollout
from lit_grpo.data import RolloutData, Source
from lit_grpo.engines import full_weights
from lit_grpo.losses import TwoGRPO
from lit_grpo.module import PolicyModule
from lit_grpo.policy import load_policy

STRATEGIES = {
    "one": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp2": lambda: ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", save_distributed_checkpoint=False
    ),
}


class Keep(L.Callback):
    """Takes what every phase sampled, and the full weights while the processes still share them."""

    def __init__(self) -> None:
        self.samples: list[list[tuple[str, str]]] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.samples.append([(s.prompt, s.completion) for s in trainer.datamodule.samples])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in full_weights(pl_module.policy)}


def train(model: str, prompts: str, strategy: str, folder: Path) -> tuple[Keep, L.Trainer]:
    """Three phases."""
    module = PolicyModule(model, TwoGRPO(beta=0.1, kl="k2"), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    data = RolloutData(Source(prompts), reward=even_first_digit, prompts_per_phase=8, resample_ties=True)
    keep = Keep()
    trainer = quiet_trainer(
        folder,
        max_epochs=3,
        devices=1 if strategy == "one" else 2,
        accumulate_grad_batches=2,
        strategy=STRATEGIES[strategy](),
        callbacks=[VLLMRollout(max_tokens=6, bucket_mib=1), keep],
    )
    trainer.fit(module, datamodule=data)
    return keep, trainer


@pytest.mark.vllm
def test_a_run_again_samples_the_same(model: str, many_prompts: str, tmp_path: Path):
    (first, _), (second, _) = (train(model, many_prompts, "one", tmp_path) for _ in range(2))
    assert first.samples == second.samples
    assert furthest(first.weights, second.weights) == 0


@pytest.mark.vllm
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_processes_train_together(model: str, many_prompts: str, tmp_path: Path, strategy: str):
    job = [model, many_prompts, strategy, str(tmp_path)]
    subprocess.run([sys.executable, __file__, json.dumps(job)], check=True, timeout=400, env=ENVIRONMENT)
    (ours, samples, metrics), (theirs, more, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert furthest(ours, theirs) == 0
    alone, _ = train(model, many_prompts, "one", tmp_path)
    assert sorted(samples[0] + more[0]) == sorted(alone.samples[0])  # later ones differ as rounding does
    assert furthest(ours, alone.weights) < 1e-4
    start = dict(full_weights(load_policy(model).lm))
    assert ours.keys() == start.keys()
    assert furthest(ours, start) > 1e-3
    assert metrics["train/sampler_mismatch"] < 1e-4
    assert metrics["train/informative_share"] == 1  # ties were replaced, whichever process had them
    assert metrics["train/rollouts"] > 3 * 16


if __name__ == "__main__":
    *job, folder = json.loads(sys.argv[1])
    keep, trainer = train(*job, Path(folder))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save((keep.weights, keep.samples, metrics), Path(folder) / f"{trainer.global_rank}.pt")
