"""The gradient does not depend on how a step was cut: the real Trainer, a fixed engine, one update, many cuts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, quiet_trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks import ReferenceCache, Rollout
from lit_grpo.data import PreferenceData, Preferences, RolloutData, Sample, Source
from lit_grpo.data.types import Completion
from lit_grpo.engines import Deadline, Engine, Sampling
from lit_grpo.losses import DAPO, DPO, GRPO, IPO, KTO, SFT, TwoGRPO, WeightedSum
from lit_grpo.module import PolicyModule


class ScriptedEngine(Engine):
    """Writes completions that are functions of the seed alone, of very different lengths."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        list(weights)

    def _generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int], deadline: Deadline
    ) -> list[list[Completion]]:
        return [[self.complete(seed + j) for j in range(n)] for seed in seeds]

    def complete(self, seed: int) -> Completion:
        g = torch.Generator().manual_seed(seed)
        length = int(torch.randint(1, 12, (), generator=g))
        ids = torch.randint(2, 12, (length,), generator=g).tolist()
        return Completion([*ids, 1], (-torch.rand(length + 1, generator=g)).tolist())


class ScriptedRollout(Rollout):
    def make_engine(self, module, context):
        return ScriptedEngine(context)

    def canary(self, trainer, pl_module, engine) -> None:
        """Its log-probs are made up, and would not pass."""


def even_first_digit(samples: list[Sample]) -> list[float]:
    return [float(s.completion[:1] in set("02468")) for s in samples]


LOSSES = {
    "2-grpo": lambda: TwoGRPO(),
    "grpo token mean": lambda: GRPO(aggregation="token_mean"),
    "grpo kl": lambda: GRPO(beta=0.3, scale="sample"),
    "grpo batch, entropy, tis": lambda: GRPO(scale="batch", entropy_bonus=0.1, tis_clip=1.5),
    "dapo": lambda: DAPO(),
    "dpo": lambda: DPO(),
    "ipo": lambda: IPO(),
    "kto": lambda: KTO(),
    "2-grpo and sft": lambda: WeightedSum([TwoGRPO(), SFT()], [1.0, 0.3]),
}
METRICS = {f"train/{name}" for name in ("loss", "margin", "reward_accuracy", "reward_chosen", "nll", "kl_baseline")}
GROUPS_OF_TWO = {"2-grpo", "2-grpo and sft"}


class Float64Module(PolicyModule):
    """The same module in float64, with a reference that is not the policy, so that losses depend on it."""

    def configure_model(self) -> None:
        super().configure_model()
        self.double()
        if self.reference is not None:
            g = torch.Generator().manual_seed(1)
            for p in self.reference.parameters():
                p.add_(0.03 * torch.randn(p.shape, generator=g, dtype=p.dtype))

    def estimate_kl_baseline(self, batches) -> Tensor:
        baseline = super().estimate_kl_baseline(batches)
        assert baseline > 0.01  # at 0 it is clamped, and a test of it would see nothing
        return baseline


def train(
    model: str,
    prompts: str,
    folder: Path,
    name: str,
    keep_zeros: bool = False,
    updates: int = 1,
    offline: str | None = None,
    callbacks: Sequence[Callback] = (),
    resample: bool = False,
    **options,
) -> dict[str, Tensor]:
    """Weights and metrics after one phase of eight prompts, or after one step on eight pairs of a file."""
    loss = LOSSES[name]()
    if keep_zeros:
        loss.drops_zero_advantages = False
    module = Float64Module(model, loss, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), max_mismatch=100)
    if offline is None:
        data = RolloutData(
            Source(prompts),
            reward=even_first_digit,
            prompts_per_phase=8,
            group_size=2 if name in GROUPS_OF_TWO else 4,
            updates_per_phase=updates,
            resample_ties=resample,
        )
    else:
        data = PreferenceData(Preferences(offline), batch_size=8)
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[ScriptedRollout(max_tokens=12), *callbacks], **options)
    trainer.fit(module, datamodule=data)
    weights = {name: tensor.detach() for name, tensor in module.policy.state_dict().items()}
    metrics = {name: value for name, value in trainer.callback_metrics.items() if name in METRICS}  # on every rank
    return weights | metrics


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Eight pairs whose sides have different lengths."""
    rows = [
        {"prompt": f"{i}+{i}=", "chosen": str(2 * i) * (i % 3 + 1), "rejected": str(i) * (i % 4 + 2)}
        for i in range(1, 9)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("updates", [1, 2])
def test_accumulation_and_skipping_change_nothing(
    model: str, few_prompts: str, tmp_path: Path, loss: str, updates: int
):
    whole = train(model, few_prompts, tmp_path, loss, keep_zeros=True, updates=updates)
    for accumulate in (1, 2, 4):
        cut = train(model, few_prompts, tmp_path, loss, updates=updates, accumulate_grad_batches=accumulate)
        assert furthest(whole, cut) < 1e-12


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_accumulation_changes_nothing_offline(model: str, pairs: str, tmp_path: Path, loss: str):
    whole = train(model, "", tmp_path, loss, offline=pairs)
    for accumulate in (2, 4):
        cut = train(model, "", tmp_path, loss, offline=pairs, accumulate_grad_batches=accumulate)
        assert furthest(whole, cut) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_the_update_is_not_nothing(model: str, few_prompts: str, tmp_path: Path, loss: str):
    from lit_grpo.policy import load_policy

    moved = train(model, few_prompts, tmp_path, loss)
    assert furthest(load_policy(model).double().state_dict(), moved) > 1e-4


@pytest.mark.parametrize("chunk", [18, 18 * 7])
def test_chunk_size_of_the_log_probs_changes_nothing(
    monkeypatch, model: str, few_prompts: str, tmp_path: Path, chunk: int
):
    import lit_grpo.logprobs

    loss = "grpo batch, entropy, tis"
    whole = train(model, few_prompts, tmp_path, loss)
    monkeypatch.setattr(lit_grpo.logprobs, "CHUNK_LOGITS", chunk)
    assert furthest(whole, train(model, few_prompts, tmp_path, loss)) < 1e-12


def test_processes_change_nothing(model: str, few_prompts: str, many_prompts: str, pairs: str, tmp_path: Path):
    """Two real processes under DDP make the update of one; they also run equally many passes, or they would hang.

    The exception is KTO on rollouts: its baseline pairs prompts with completions of the same process.
    """
    job = {"model": model, "prompts": few_prompts, "many": many_prompts, "pairs": pairs, "folder": str(tmp_path)}
    subprocess.run([sys.executable, __file__, json.dumps(job)], check=True, timeout=400, env=ENVIRONMENT)
    split = torch.load(tmp_path / "split.pt")
    for loss in LOSSES:
        whole = train(model, few_prompts, tmp_path, loss)
        assert (furthest(whole, split[loss]) < 1e-12) == (loss != "kto"), loss
    assert furthest(train(model, "", tmp_path, "kto", offline=pairs), split["kto offline"]) < 1e-12
    resampled = train(model, many_prompts, tmp_path, "2-grpo", resample=True)
    assert furthest(resampled, split["2-grpo resampled"]) < 1e-12
    assert furthest(resampled, train(model, many_prompts, tmp_path, "2-grpo")) > 1e-4
    cached = ReferenceCache(str(tmp_path / "reference.safetensors"))  # holds float32
    assert furthest(train(model, "", tmp_path, "dpo", offline=pairs), split["dpo cached"]) < 1e-6
    assert furthest(train(model, "", tmp_path, "dpo", offline=pairs, callbacks=[cached]), split["dpo cached"]) < 1e-12


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    two = {"accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp"}
    weights = {name: train(job["model"], job["prompts"], Path(job["folder"]), name, **two) for name in LOSSES}
    weights["kto offline"] = train(job["model"], "", Path(job["folder"]), "kto", offline=job["pairs"], **two)
    weights["2-grpo resampled"] = train(job["model"], job["many"], Path(job["folder"]), "2-grpo", resample=True, **two)
    cached = ReferenceCache(str(Path(job["folder"]) / "reference.safetensors"))
    weights["dpo cached"] = train(
        job["model"], "", Path(job["folder"]), "dpo", offline=job["pairs"], callbacks=[cached], **two
    )
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        torch.save(weights, Path(job["folder"]) / "split.pt")
