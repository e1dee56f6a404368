"""Two real processes, each with its own vLLM, under DDP and with sharded weights (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import quiet_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from test_invariance import even_first_digit, furthest
from torch import Tensor

from callbacks import VLLMRollout
from lit_grpo.data import RolloutData, Source
from lit_grpo.engines import full_weights
from lit_grpo.losses import TwoGRPO
from lit_grpo.module import PolicyModule

STRATEGIES = {
    "ddp": lambda: "ddp",
    "fsdp2": lambda: ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", save_distributed_checkpoint=False
    ),
}


class Keep(L.Callback):
    """Takes the full weights while the processes still share them."""

    weights: dict[str, Tensor]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in full_weights(pl_module.policy.lm)}


def train(model: str, prompts: str, folder: Path, strategy: str) -> None:
    """Three phases; each process writes its view of the weights and of the metrics."""
    module = PolicyModule(model, TwoGRPO(beta=0.1, kl="k2"), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    data = RolloutData(Source(prompts), reward=even_first_digit, prompts_per_phase=8, resample_ties=True)
    keep = Keep()
    trainer = quiet_trainer(
        folder,
        max_epochs=3,
        devices=2,
        accumulate_grad_batches=2,
        strategy=STRATEGIES[strategy](),
        callbacks=[VLLMRollout(max_tokens=6, bucket_mib=1), keep],
    )
    trainer.fit(module, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save((keep.weights, metrics), folder / f"{strategy}-{trainer.global_rank}.pt")


@pytest.mark.vllm
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_processes_train_together(model: str, many_prompts: str, tmp_path: Path, strategy: str):
    job = [model, many_prompts, str(tmp_path), strategy]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, __file__, json.dumps(job)], check=True, timeout=400, env=environment)
    (ours, metrics), (theirs, _) = (torch.load(tmp_path / f"{strategy}-{rank}.pt") for rank in range(2))
    assert furthest(ours, theirs) == 0
    from lit_grpo.policy import load_policy

    start = dict(full_weights(load_policy(model).lm))
    assert ours.keys() == start.keys()
    assert furthest(ours, start) > 1e-3
    assert metrics["train/sampler_mismatch"] < 1e-4
    assert metrics["train/informative_share"] == 1  # ties were replaced, whichever process had them
    assert metrics["train/rollouts"] > 3 * 16


if __name__ == "__main__":
    model, prompts, folder, strategy = json.loads(sys.argv[1])
    train(model, prompts, Path(folder), strategy)
