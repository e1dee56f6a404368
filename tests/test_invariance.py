"""The gradient does not depend on how a step was cut: the real Trainer, a fixed engine, one update, many cuts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import quiet_trainer
from torch import Tensor

from callbacks import Rollout
from lit_grpo.data import RolloutData, Sample, Source
from lit_grpo.data.types import Completion
from lit_grpo.engines import Engine, Sampling
from lit_grpo.losses import GRPO, Loss, TwoGRPO
from lit_grpo.module import PolicyModule


class ScriptedEngine(Engine):
    """Writes completions that are functions of the seed alone, of very different lengths."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        list(weights)

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> list[list[Completion]]:
        return [[self.complete(seed + j) for j in range(n)] for seed in seeds]

    def complete(self, seed: int) -> Completion:
        g = torch.Generator().manual_seed(seed)
        length = int(torch.randint(1, 12, (), generator=g))
        ids = torch.randint(2, 12, (length,), generator=g).tolist()
        return Completion([*ids, 1], (-torch.rand(length + 1, generator=g)).tolist())


class ScriptedRollout(Rollout):
    def make_engine(self, module, max_model_len):
        return ScriptedEngine()


def even_first_digit(samples: list[Sample]) -> list[float]:
    return [float(s.completion[:1] in set("02468")) for s in samples]


LOSSES = {
    "2-grpo": lambda: TwoGRPO(),
    "grpo token mean": lambda: GRPO(aggregation="token_mean"),
    "grpo kl": lambda: GRPO(beta=0.3, scale="sample"),
}


class Float64Module(PolicyModule):
    """The same module in float64, with plain gradient descent so that weights show the gradient."""

    def configure_model(self) -> None:
        super().configure_model()
        self.double()


def train(
    model: str, prompts: str, folder: Path, loss: Loss, keep_zeros: bool = False, updates: int = 1, **options
) -> dict[str, Tensor]:
    """Weights after one phase of eight prompts."""
    if keep_zeros:
        loss.drops_zero_advantages = False
    module = Float64Module(model, loss, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), max_mismatch=100)
    group_size = 2 if isinstance(loss, TwoGRPO) else 4
    data = RolloutData(
        Source(prompts), reward=even_first_digit, prompts_per_phase=8, group_size=group_size, updates_per_phase=updates
    )
    quiet_trainer(folder, max_epochs=1, callbacks=[ScriptedRollout(max_tokens=12)], **options).fit(
        module, datamodule=data
    )
    return {name: tensor.detach() for name, tensor in module.policy.state_dict().items()}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("updates", [1, 2])
def test_accumulation_and_skipping_change_nothing(
    model: str, few_prompts: str, tmp_path: Path, loss: str, updates: int
):
    whole = train(model, few_prompts, tmp_path, LOSSES[loss](), keep_zeros=True, updates=updates)
    for accumulate in (1, 2, 4):
        cut = train(model, few_prompts, tmp_path, LOSSES[loss](), updates=updates, accumulate_grad_batches=accumulate)
        assert furthest(whole, cut) < 1e-12


def test_the_update_is_not_nothing(model: str, few_prompts: str, tmp_path: Path):
    from lit_grpo.policy import load_policy

    moved = train(model, few_prompts, tmp_path, TwoGRPO())
    assert furthest(load_policy(model).double().state_dict(), moved) > 1e-3


@pytest.mark.parametrize("chunk", [18, 18 * 7])
def test_chunk_size_of_the_log_probs_changes_nothing(
    monkeypatch, model: str, few_prompts: str, tmp_path: Path, chunk: int
):
    import lit_grpo.logprobs

    whole = train(model, few_prompts, tmp_path, TwoGRPO())
    monkeypatch.setattr(lit_grpo.logprobs, "CHUNK_LOGITS", chunk)
    assert furthest(whole, train(model, few_prompts, tmp_path, TwoGRPO())) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_processes_change_nothing(model: str, few_prompts: str, tmp_path: Path, loss: str):
    """Two real processes under DDP make the update of one; they also run equally many passes, or they would hang."""
    whole = train(model, few_prompts, tmp_path, LOSSES[loss]())
    job = {"model": model, "prompts": few_prompts, "folder": str(tmp_path), "loss": loss}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, __file__, json.dumps(job)], check=True, timeout=240, env=environment)
    split = torch.load(tmp_path / "split.pt")
    assert furthest(whole, split) < 1e-12


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    weights = train(
        job["model"],
        job["prompts"],
        Path(job["folder"]),
        LOSSES[job["loss"]](),
        accumulate_grad_batches=2,
        devices=2,
        strategy="ddp",
    )
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        torch.save(weights, Path(job["folder"]) / "split.pt")
