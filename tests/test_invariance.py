"""The gradient does not depend on how a step was cut: the real Trainer, a fixed engine, one update, many cuts."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT, quiet_trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap

from callbacks import ReferenceCache, Rollout
from lit_grpo.data import PreferenceData, Preferences, RolloutData, Sample, Source
from lit_grpo.data.collate import step_batches
from lit_grpo.data.types import Batch, Completion
from lit_grpo.engines import Deadline, Engine, Sampling, full_weights
from lit_grpo.lora import LoRA
from lit_grpo.losses import (
    CISPO,
    DAPO,
    DPO,
    GRPO,
    GSPO,
    IPO,
    KTO,
    ORPO,
    RLOO,
    SFT,
    AdaptiveGRPO,
    APOZero,
    DrGRPO,
    Hinge,
    Reinforce,
    SimPO,
    TwoGRPO,
    WeightedSum,
)
from lit_grpo.module import PolicyModule
from lit_grpo.policy import load_policy, load_reference


class ScriptedEngine(Engine):
    """Writes completions that are functions of the seed alone, of very different lengths."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        list(weights)

    def _generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int], deadline: Deadline
    ) -> Iterator[tuple[int, list[Completion]]]:
        for i, seed in enumerate(seeds):
            yield i, [self.complete(seed + j) for j in range(n)]

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
    "dr. grpo": lambda: DrGRPO(length=12),
    "rloo": lambda: RLOO(),
    "reinforce": lambda: Reinforce(),
    "gspo": lambda: GSPO(),
    "cispo": lambda: CISPO(),
    "hinge": lambda: Hinge(),
    "simpo": lambda: SimPO(),
    "orpo": lambda: ORPO(),
    "apo zero": lambda: APOZero(),
    "adaptive": lambda: AdaptiveGRPO(),
}
METRICS = {f"train/{name}" for name in ("loss", "margin", "reward_accuracy", "reward_chosen", "nll", "kl_baseline")}
GROUPS_OF_TWO = {"2-grpo", "2-grpo and sft"}


class Module(PolicyModule):
    """The module in another precision, with a reference that is not the policy, so that losses depend on it."""

    double_precision = True

    def configure_model(self) -> None:
        super().configure_model()
        if self.double_precision:
            self.double()
            for model in [self.policy] + ([] if self.lora or not self.reference else [self.reference]):
                for norm in (m for m in model.modules() if type(m).__name__ == "Qwen2RMSNorm"):
                    norm.forward = functools.partial(norm_in_own_precision, norm)

    def estimate_kl_baseline(self, batches) -> Tensor:
        baseline = super().estimate_kl_baseline(batches)
        assert baseline > 0.01  # at 0 it is clamped, and a test of it would see nothing
        return baseline


def norm_in_own_precision(norm: Any, x: Tensor) -> Tensor:
    """The model's own norm computes in float32, whose roundings depend on the batch."""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


@contextmanager
def another_reference(model: str, folder: Path) -> Iterator[None]:
    """Have references loaded from a model that is a little different."""
    other = folder / "reference"
    if rank() == 0 and not other.exists():
        lm = load_policy(model).lm
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in lm.parameters():
                p.add_(0.03 * torch.randn(p.shape, generator=g))
        lm.save_pretrained(folder / "unfinished")
        (folder / "unfinished").rename(other)
    with mock.patch("lit_grpo.module.load_reference", lambda _, strategy: load_reference(str(other), strategy)):
        yield


class Keep(Callback):
    """Takes the full weights while processes still share them."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in full_weights(pl_module.policy)}


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def turned_and_padded(*arguments: Any) -> list[Batch]:
    """Micro-batches in the other order, with more padding."""
    batches = step_batches(*arguments)
    mismatched, batches[0].mismatched = batches[0].mismatched, None
    batches = [padded(batch) for batch in reversed(batches)]
    batches[0].mismatched = mismatched
    return batches


def padded(batch: Batch) -> Batch:
    assert batch.sampler_logps is not None
    tokens, mask, logps = (F.pad(x, (0, 7)) for x in (batch.tokens, batch.mask, batch.sampler_logps))
    return replace(batch, tokens=tokens, mask=mask, sampler_logps=logps)


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
    double: bool = True,
    lora: LoRA | None = None,
    recompute: bool = False,
    turned: bool = False,
    read: dict[str, bool] | None = None,
    **options,
) -> dict[str, Tensor]:
    """Weights and metrics after one phase of sixteen prompts, or after one step on eight pairs of a file."""
    loss = LOSSES[name]()
    if keep_zeros:
        loss.drops_zero_advantages = False
    L.seed_everything(0, verbose=False)
    settings = {"lora": lora, "gradient_checkpointing": recompute, "max_mismatch": 100, **(read or {})}
    module = Module(model, loss, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), **settings)
    module.double_precision = double
    if offline is None:
        data = RolloutData(
            Source(prompts),
            reward=even_first_digit,
            prompts_per_phase=16,
            group_size=2 if name in GROUPS_OF_TWO else 4,
            updates_per_phase=updates,
            resample_ties=resample,
        )
    else:
        data = PreferenceData(Preferences(offline), batch_size=8)
    keep = Keep()
    callbacks = [ScriptedRollout(max_tokens=12), *callbacks, keep]
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=callbacks, **options)
    with (
        another_reference(model, folder),
        mock.patch("lit_grpo.data.rollouts.step_batches", turned_and_padded if turned else step_batches),
    ):
        trainer.fit(module, datamodule=data)
    metrics = {name: value for name, value in trainer.callback_metrics.items() if name in METRICS}  # on every rank
    return keep.weights | metrics


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
    model: str, many_prompts: str, tmp_path: Path, loss: str, updates: int
):
    whole = train(model, many_prompts, tmp_path, loss, keep_zeros=True, updates=updates)
    for accumulate in (1, 2, 4):
        cut = train(model, many_prompts, tmp_path, loss, updates=updates, accumulate_grad_batches=accumulate)
        assert furthest(whole, cut) < 1e-12


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_accumulation_changes_nothing_offline(model: str, pairs: str, tmp_path: Path, loss: str):
    whole = train(model, "", tmp_path, loss, offline=pairs)
    for accumulate in (2, 4):
        cut = train(model, "", tmp_path, loss, offline=pairs, accumulate_grad_batches=accumulate)
        assert furthest(whole, cut) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_order_and_padding_of_micro_batches_change_nothing(model: str, many_prompts: str, tmp_path: Path, loss: str):
    whole, turned = (
        train(model, many_prompts, tmp_path, loss, updates=2, accumulate_grad_batches=4, turned=turned)
        for turned in (False, True)
    )
    assert furthest(whole, turned) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_the_update_is_not_nothing(model: str, many_prompts: str, tmp_path: Path, loss: str):
    moved = train(model, many_prompts, tmp_path, loss)
    assert furthest(dict(full_weights(load_policy(model))), moved) > 1e-4


def test_clipping_is_that_of_torch(model: str, many_prompts: str, tmp_path: Path):
    """The step of a clipped gradient has the norm asked for, and the direction of the gradient."""
    start = dict(full_weights(load_policy(model)))
    steps = []
    for clip in (None, 0.01):
        found = train(model, many_prompts, tmp_path, "grpo kl", gradient_clip_val=clip)
        steps.append(torch.cat([(found[n] - start[n]).flatten() for n in start if n != "lm_head.weight"]))
    whole, clipped = steps
    assert whole.norm() > 0.1
    torch.testing.assert_close(clipped, whole / whole.norm() * 0.01, rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [18, 18 * 7])
def test_chunk_size_of_the_log_probs_changes_nothing(
    monkeypatch, model: str, many_prompts: str, tmp_path: Path, chunk: int
):
    import lit_grpo.logprobs

    loss = "grpo batch, entropy, tis"
    whole = train(model, many_prompts, tmp_path, loss)
    monkeypatch.setattr(lit_grpo.logprobs, "CHUNK_LOGITS", chunk)
    assert furthest(whole, train(model, many_prompts, tmp_path, loss)) < 1e-12


class FSDPOnCPU(FSDPStrategy):
    """FSDP1, for which Lightning and torch want a GPU."""

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        device = torch.device("cpu")
        with enable_wrap(wrapper_cls=FullyShardedDataParallel, device_id=device, **self.kwargs):
            yield


LAYOUTS = {
    2: {
        "ddp": (2, lambda: "ddp"),
        "fsdp": (2, lambda: FSDPOnCPU(process_group_backend="gloo")),
        "fsdp2": (2, lambda: "fsdp2"),
        "tensor": (1, lambda: ModelParallelStrategy(1, 2, process_group_backend="gloo")),
    },
    4: {
        "ddp": (4, lambda: "ddp"),
        "fsdp2": (4, lambda: "fsdp2"),
        "fsdp2 x tensor": (2, lambda: ModelParallelStrategy(2, 2, process_group_backend="gloo")),
    },
}
"""By the number of processes: how many parts the data are in, and the strategy."""


CHANGES: dict[str, dict[str, Any]] = {
    "turned": {"turned": True},
    "ties kept": {"keep_zeros": True},
    "two updates": {"updates": 2},
}
"""Of a run with a loss, by name; but for the last, they are not to change what it makes."""


def cases(job: dict[str, str], cache: str) -> dict[str, dict[str, Any]]:
    """Arguments of runs: every loss, and what else must not depend on processes."""
    online, offline = {"prompts": job["many"]}, {"prompts": "", "offline": job["pairs"]}
    return {
        **{loss: online | {"name": loss} for loss in LOSSES},
        **{f"{loss}, {how}": online | {"name": loss} | change for how, change in CHANGES.items() for loss in LOSSES},
        "resampled": online | {"name": "2-grpo", "resample": True},
        "clipped": online | {"name": "grpo kl", "gradient_clip_val": 0.01},
        "recomputed": online | {"name": "grpo kl", "recompute": True},
        "prompts shared": online | {"name": "grpo kl", "read": {"share_prompts": True}},
        "packed": online | {"name": "grpo kl", "read": {"packing": True}},
        "adapters": online | {"name": "grpo kl", "lora": LoRA(r=4, alpha=64)},
        "kto offline": offline | {"name": "kto"},
        "cached": offline | {"name": "dpo", "callbacks": [ReferenceCache(f"{job['folder']}/{cache}")]},
    }


def runs(processes: int, names: Iterable[str], full: bool) -> Iterator[tuple[str, str, bool, int]]:
    """Layouts, names of cases, whether in double precision, and micro-batches; if not ``full``, fewer of them."""
    few = {*itertools.product(("2-grpo", "grpo kl"), CHANGES), ("kto", "turned"), ("dpo", "ties kept")}
    for layout in LAYOUTS[processes]:
        for name in names:
            loss, _, change = name.rpartition(", ")
            if change in CHANGES and (layout in ("fsdp", "tensor") or not (full or (loss, change) in few)):
                continue
            if "tensor" in layout and name not in ("2-grpo", "grpo kl", "dpo", "kto", "resampled", "clipped"):
                continue
            if layout != "fsdp":  # which does not take another precision later
                every = {loss, name} & LOSSES.keys() if full else name in list(LOSSES)[:9]
                all_cuts = every and "tensor" not in layout
                most = 2 if (change, processes) == ("two updates", 4) else 4  # pairs of a process and update
                for accumulate in (n for n in (1, 2, 4) if n <= most) if all_cuts else (2,):
                    yield layout, name, True, accumulate
            roundings_grow = name == "cached" or change == "two updates"
            in_float32 = (layout, processes) in (("fsdp", 2), ("fsdp2", 2)) or (full and "tensor" not in layout)
            if in_float32 and not roundings_grow:
                yield layout, name, False, 2


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("processes", LAYOUTS)
def test_processes_change_nothing(
    processes: int, full: bool, model: str, many_prompts: str, pairs: str, tmp_path: Path
):
    """Real processes make the update of one; they also run equally many passes, or they would hang.

    The exception is KTO on rollouts: its baseline pairs prompts with completions of the same process.
    """
    job = {
        "model": model,
        "many": many_prompts,
        "pairs": pairs,
        "folder": str(tmp_path),
        "processes": processes,
        "full": full,
    }
    subprocess.run([sys.executable, __file__, json.dumps(job)], check=True, timeout=3000, env=ENVIRONMENT)
    split, start = torch.load(tmp_path / "split.pt"), dict(full_weights(load_policy(model)))
    alone = cases(job, "one.safetensors")
    for (name, double), same in itertools.groupby(
        sorted(runs(processes, alone, full), key=lambda run: run[1:3]), lambda run: run[1:3]
    ):
        plain = {key: value for key, value in alone[name].items() if key not in ("turned", "keep_zeros", "read")}
        whole = train(model, folder=tmp_path, double=double, **plain)
        update = furthest({key: whole[key] for key in start}, start)
        tolerance = 1e-12 if double else 1e-6 * max(1.0, update)
        for run in same:
            difference = furthest(whole, split[run])
            one_part = LAYOUTS[processes][run[0]][0] == 1
            depends = alone[name]["name"] == "kto" and "offline" not in alone[name] and not one_part
            assert (difference < tolerance) != depends, (run, difference, update)


def test_a_cache_of_the_reference_changes_no_more_than_its_float32(model: str, pairs: str, tmp_path: Path):
    plain = train(model, "", tmp_path, "dpo", offline=pairs)
    cache = ReferenceCache(str(tmp_path / "reference.safetensors"))
    assert 0 < furthest(plain, train(model, "", tmp_path, "dpo", offline=pairs, callbacks=[cache])) < 1e-6


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    several, found = cases(job, "several.safetensors"), {}
    for run in runs(job["processes"], several, job["full"]):
        layout, name, double, accumulate = run
        strategy = LAYOUTS[job["processes"]][layout][1]()
        options = {"devices": job["processes"], "strategy": strategy, "accumulate_grad_batches": accumulate}
        found[run] = train(job["model"], folder=Path(job["folder"]), double=double, **several[name], **options)
    if rank() == 0:
        torch.save(found, Path(job["folder"]) / "split.pt")
