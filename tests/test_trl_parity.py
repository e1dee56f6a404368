"""Our losses against TRL 1.16.0: value and gradient, on random log-probs in float32.

TRL's own loss methods run, on trainers whose ``__init__`` never did. Only advantages and mismatch weights, which TRL
computes in the middle of generation, are its formulas, written down again with their source named.

Equal here, setting for setting:

===========================================================  ===========================================================
TRL                                                          ours
===========================================================  ===========================================================
GRPO ``grpo``; ``bnpo``, ``dapo``                            ``GRPO``; with ``aggregation="token_mean"``, ``DAPO``
``dr_grpo`` with ``max_completion_length``                   ``DrGRPO`` with ``length``
``cispo`` with ``epsilon_high``                              ``CISPO`` with ``max_ratio``
``importance_sampling_level="sequence"``; with ``luspo``     ``GSPO``; with ``aggregation="sequence_sum"``
``delta`` of at least ``1 + epsilon_high``                   ``dual_clip``
``use_bias_correction_kl`` false, true                       ``kl`` ``k3``, ``k3_ratio``
``entropy_coef`` with ``bnpo`` or ``dapo``                   ``entropy_bonus`` with ``aggregation="token_mean"``
``vllm_importance_sampling_mode`` ``*_truncate``             ``tis_level`` with ``tis_clip``
``scale_rewards`` ``group``, ``batch``, ``none``             ``scale`` ``sample``, ``batch``, ``none``; ``epsilon=1e-4``
RLOO                                                         ``RLOO``
DPO ``sigmoid``, ``robust``, ``sigmoid_norm``, ``hinge``     ``DPO``, ``Hinge``
DPO ``ipo``; online DPO ``ipo``                              ``IPO``; with ``log_ratios="sum"``
CPO ``sigmoid`` with ``label_smoothing``                     ``DPO`` with ``label_smoothing``, the reference's log-probs 0
KTO ``kto``, ``apo_zero_unpaired``                           ``KTO``, ``APOZero``
CPO ``simpo``                                                ``SimPO``
ORPO, but for its likelihood term                            ``ORPO``
===========================================================  ===========================================================

Different on purpose:

- Denominators. Ours are rows and tokens of the whole optimizer step. TRL averages each micro-batch and divides by
  their number, which differs where micro-batches have different rows (or, for ``bnpo``, tokens); ``dapo`` and ``cispo``
  divide by the tokens of the generation batch, scaled to one step.
- Standard deviation. The default here is ``population`` without epsilon; TRL's is ``sample`` with 1e-4.
- Ties are found by comparing rewards, and their advantage is exactly 0; TRL's is rounding divided by 1e-4. Tied pairs
  are dropped; online DPO trains on them as if the first were better.
- Log-ratios are clamped to +-20 before they are exponentiated; TRL's are not.
- KL. At the level of sequences TRL's correction multiplies k3 by the sequence's ratio, ``k3_ratio`` by each token's.
  TRL's RLOO subtracts a k1 KL from the reward, ours adds an estimate to the loss.
- Entropy. TRL's bonus is a mean over the tokens of a micro-batch whatever the loss; ours has the loss's aggregation.
- ``delta`` bounds the ratio before the clip, ``dual_clip`` the loss after it: not the same below ``1 + epsilon_high``.
- CISPO's bound is 5 by default; TRL's is ``epsilon_high`` itself, whose default of 0.2 is a distance from 1.
- ``label_smoothing`` does nothing for TRL's DPO ``sigmoid``; ours is cDPO, which in TRL only CPO has.
- IPO takes the mean over tokens, as TRL's DPO does, and the sum on request, as TRL's online DPO does.
- TRL's ``apo_zero`` sums over the two of a pair, ``APOZero`` is the mean over completions: half of it.
- TRL's ``sft`` term is the mean over chosen tokens; ``SFT`` beside a pairwise loss divides by all tokens of the pairs.
- KTO's baseline is the mean over the whole step, TRL's over a micro-batch of all ranks. Both are at least 0.
- ORPO's likelihood term is a mean over completions of their mean over tokens; TRL's is over all tokens of a micro-batch,
  the prompts' too. Completions which are certain are clamped; TRL's odds are infinite.

TRL has no ``Reinforce``, ``k2``, schedules and advantages of ``TwoGRPO``.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

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
    APOZero,
    DrGRPO,
    Hinge,
    Loss,
    LossInputs,
    SimPO,
    TwoGRPO,
    WeightedSum,
)

if not os.environ.get("CI"):
    pytest.importorskip("trl", reason="TRL is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.online_dpo import OnlineDPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.utils import FusedCausalLMOutput, nanstd

SEEDS = pytest.mark.parametrize("seed", range(3))
CLIP_METRICS = {"clip_fraction_low", "clip_fraction_high", "tis_clip_fraction", "weight_clip_fraction"}


def same(ours: Tensor, trl: Tensor, *leaves: Tensor) -> None:
    """Equal in float32, and so are the gradients, which are not zero."""
    assert ours.dtype == trl.dtype == torch.float32
    torch.testing.assert_close(ours, trl, rtol=1e-6, atol=1e-6)
    for leaf in leaves:
        mine, theirs = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, trl))
        assert mine.any()
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


class Rows:
    """Random completions of 1 to ``width`` tokens; log-probs are 0 outside the mask."""

    def __init__(self, seed: int, rows: int = 16, width: int = 7, lengths: Tensor | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        if lengths is None:
            lengths = torch.randint(1, width + 1, (rows,), generator=self.generator)
            lengths[:2] = torch.tensor([1, width])
        self.mask = torch.arange(width) < lengths[:, None]
        self.logps = ((-0.05 - torch.rand(rows, width, generator=self.generator)) * self.mask).requires_grad_()
        self.advantages = torch.randn(rows, generator=self.generator)

    def near(self, distance: float, shift: float = 0.0) -> Tensor:
        """Log-probs of another policy."""
        noise = torch.randn(self.mask.shape, generator=self.generator)
        return (self.logps.detach() + shift + distance * noise) * self.mask


def bare(trainer: type, **attributes: Any) -> Any:
    """A trainer of TRL with these attributes and no others: to read one that is missing is an error."""
    identity = lambda x, **_: x  # noqa: E731
    model = torch.nn.Module()
    model.is_gradient_checkpointing = False
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=identity, gather_for_metrics=identity, reduce=identity
    )
    common = {
        "accelerator": accelerator,
        "model": model,
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    built = trainer.__new__(trainer)
    vars(built).update(common | attributes)
    return built


class TestAdvantages:
    @staticmethod
    def trl(rewards: Tensor, scale_rewards: str) -> Tensor:
        """trl/trainer/grpo_trainer.py, lines 2762 to 2787, ``sum_then_normalize`` with one reward function."""
        group_size, flat = rewards.shape[1], rewards.flatten()
        std = nanstd(flat.view(-1, group_size), dim=1).repeat_interleave(group_size, dim=0)
        if scale_rewards == "batch":
            std = nanstd(flat).expand_as(flat)
        advantages = flat - torch.nanmean(flat.view(-1, group_size), dim=1).repeat_interleave(group_size, dim=0)
        if scale_rewards != "none":
            advantages = advantages / (std + 1e-4)
        return advantages.view_as(rewards)

    @staticmethod
    def rewards(seed: int, group_size: int, kind: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if kind == "real":
            return torch.randn(6, group_size, generator=generator)
        rewards = torch.randint(0, 2, (6, group_size), generator=generator).float()
        rewards[0], rewards[1], rewards[2, 0], rewards[2, 1] = 0, 1, 0, 1
        return rewards

    @SEEDS
    @pytest.mark.parametrize("group_size", [2, 4, 8])
    @pytest.mark.parametrize("kind", ["real", "0 or 1, with ties"])
    @pytest.mark.parametrize(
        ("loss", "scale_rewards"),
        [
            (GRPO(scale="sample", epsilon=1e-4), "group"),
            (GRPO(scale="batch", epsilon=1e-4), "batch"),
            (GRPO(scale="none"), "none"),
            (DrGRPO(length=8), "none"),
        ],
        ids=["group", "batch", "none", "DrGRPO"],
    )
    def test_grpo(self, loss: Loss, scale_rewards: str, kind: str, group_size: int, seed: int):
        rewards = self.rewards(seed, group_size, kind)
        same(loss.select(rewards)[1], self.trl(rewards, scale_rewards))

    @SEEDS
    @pytest.mark.parametrize("group_size", [2, 4, 8])
    def test_default_differs_by_the_bessel_factor(self, group_size: int, seed: int):
        rewards, factor = self.rewards(seed, group_size, "real"), math.sqrt(1 - 1 / group_size)
        ours = GRPO(epsilon=1e-4 * factor).select(rewards)[1]
        same(ours * factor, self.trl(rewards, "group"))

    @pytest.mark.parametrize("scale", ["sample", "population", "none"])
    def test_ties_are_exactly_0_here_and_rounding_there(self, scale: str):
        rewards = torch.full((1, 7), 0.1)
        trl = self.trl(rewards, "none" if scale == "none" else "group")
        assert trl.any()
        assert trl.abs().max() < 1e-3
        assert not GRPO(scale=scale, epsilon=1e-4).select(rewards)[1].any()

    @SEEDS
    @pytest.mark.parametrize("group_size", [2, 4, 8])
    @pytest.mark.parametrize("kind", ["real", "0 or 1, with ties"])
    def test_rloo(self, kind: str, group_size: int, seed: int):
        """trl/trainer/rloo_trainer.py, lines 1685 to 1690."""
        rewards = self.rewards(seed, group_size, kind)
        baselines = (torch.nansum(rewards, dim=1, keepdim=True) - rewards) / (group_size - 1)
        same(RLOO().select(rewards)[1], rewards - baselines)


ACCUMULATION = 2
CLIPS = {"clip_low": 0.1, "clip_high": 0.28}
EPSILONS = {"epsilon_low": 0.1, "epsilon_high": 0.28}
TIGHT = {"clip_low": 0.05, "clip_high": 0.08}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08}

POLICY_GRADIENT: dict[str, tuple[Loss, dict[str, Any]]] = {
    "grpo": (GRPO(**CLIPS), EPSILONS),
    "grpo, same clips": (GRPO(), {}),
    "2-GRPO": (TwoGRPO(**CLIPS), EPSILONS),
    "bnpo": (GRPO(aggregation="token_mean"), {"loss_type": "bnpo"}),
    "dapo": (DAPO(), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": (DrGRPO(length=20, **CLIPS), {"loss_type": "dr_grpo", "max_completion_length": 20, **EPSILONS}),
    "cispo": (CISPO(max_ratio=1.2), {"loss_type": "cispo", "epsilon_high": 1.2}),
    "gspo": (GSPO(**TIGHT), SEQUENCE),
    "luspo": (GSPO(aggregation="sequence_sum", **TIGHT), {"loss_type": "luspo", **SEQUENCE}),
    "delta": (GRPO(dual_clip=1.4, **CLIPS), {"delta": 1.4, **EPSILONS}),
    "dapo, delta": (DAPO(dual_clip=1.4), {"loss_type": "dapo", "delta": 1.4, "epsilon_high": 0.28}),
    "gspo, delta": (GSPO(dual_clip=1.2, **TIGHT), {"delta": 1.2, **SEQUENCE}),
    "k3": (GRPO(beta=0.1), {"beta": 0.1}),
    "k3, dapo": (DAPO(beta=0.1), {"beta": 0.1, "loss_type": "dapo", "epsilon_high": 0.28}),
    "k3, cispo": (CISPO(beta=0.1, max_ratio=1.2), {"beta": 0.1, "loss_type": "cispo", "epsilon_high": 1.2}),
    "k3, gspo": (GSPO(beta=0.1, **TIGHT), {"beta": 0.1, **SEQUENCE}),
    "k3_ratio": (GRPO(beta=0.1, kl="k3_ratio"), {"beta": 0.1, "use_bias_correction_kl": True}),
    "k3_ratio, dr_grpo": (
        DrGRPO(length=20, beta=0.1, kl="k3_ratio"),
        {"loss_type": "dr_grpo", "max_completion_length": 20, "beta": 0.1, "use_bias_correction_kl": True},
    ),
    "entropy, bnpo": (GRPO(entropy_bonus=0.3, aggregation="token_mean"), {"entropy_coef": 0.3, "loss_type": "bnpo"}),
    "entropy, dapo": (DAPO(entropy_bonus=0.3), {"entropy_coef": 0.3, "loss_type": "dapo", "epsilon_high": 0.28}),
    "tis": (GRPO(tis_clip=1.2), {"vllm_importance_sampling_mode": "token_truncate"}),
    "tis, k3": (GRPO(tis_clip=1.2, beta=0.1), {"vllm_importance_sampling_mode": "token_truncate", "beta": 0.1}),
    "tis, sequence": (
        GRPO(tis_clip=1.2, tis_level="sequence"),
        {"vllm_importance_sampling_mode": "sequence_truncate"},
    ),
    "tis, dapo": (
        DAPO(tis_clip=1.2),
        {"vllm_importance_sampling_mode": "token_truncate", "loss_type": "dapo", "epsilon_high": 0.28},
    ),
}


def trl_grpo(inputs: LossInputs, settings: dict[str, Any]) -> Tensor:
    """``GRPOTrainer._compute_loss``: the share of one of two micro-batches of a step."""
    settings = {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0} | settings
    level = settings.pop("importance_sampling_level", "token")
    mismatch = settings.pop("vllm_importance_sampling_mode", None)
    delta, corrected = settings.pop("delta", None), settings.pop("use_bias_correction_kl", False)
    entropy = torch.zeros_like(inputs.logps) if inputs.entropy is None else inputs.entropy
    trainer = bare(
        GRPOTrainer,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=corrected, steps_per_generation=ACCUMULATION),
        current_gradient_accumulation_steps=ACCUMULATION,
        importance_sampling_level=level,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=mismatch is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled="entropy_coef" in settings,
        use_adaptive_entropy=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (inputs.logps, entropy, None),
        **settings,
    )
    trainer.accelerator.sync_gradients = False
    ids = torch.zeros_like(inputs.mask, dtype=torch.int64)
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": inputs.mask.long(),
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old_logps,
        "ref_per_token_logps": inputs.ref_logps,
        "num_items_in_batch": torch.tensor(inputs.total_tokens),
    }
    if mismatch:
        # trl/trainer/grpo_trainer.py, lines 2661 to 2685
        old = inputs.logps.detach() if inputs.old_logps is None else inputs.old_logps
        gap = (old - inputs.sampler_logps) * inputs.mask
        gap = gap.sum(-1, keepdim=True) if mismatch == "sequence_truncate" else gap
        batch["importance_sampling_ratio"] = torch.exp(gap).clamp(max=1.2)
    return trainer._compute_loss(trainer.model, batch)


class TestGRPO:
    @staticmethod
    def inputs(seed: int, rows: int = 16, off_policy: bool = True) -> LossInputs:
        drawn = Rows(seed, rows)
        return LossInputs(
            drawn.logps,
            drawn.mask,
            drawn.advantages,
            old_logps=drawn.near(0.4) if off_policy else None,
            ref_logps=drawn.near(0.5),
            sampler_logps=drawn.near(0.3),
            entropy=(2 * torch.rand(drawn.mask.shape, generator=drawn.generator)).requires_grad_(),
        )

    @SEEDS
    @pytest.mark.parametrize("off_policy", [True, False], ids=["old log-probs", "on-policy"])
    @pytest.mark.parametrize(("loss", "settings"), POLICY_GRADIENT.values(), ids=POLICY_GRADIENT)
    def test_loss(self, loss: Loss, settings: dict[str, Any], off_policy: bool, seed: int):
        inputs = self.inputs(seed, off_policy=off_policy)
        inputs.total_rows *= ACCUMULATION
        inputs.total_tokens *= ACCUMULATION
        ours = loss(inputs)
        same(ours.loss, trl_grpo(inputs, settings), inputs.logps, *[inputs.entropy] * loss.needs_entropy)
        clipped = {name: fraction[0] for name, fraction in ours.metrics.items() if name in CLIP_METRICS}
        assert bool(clipped) == (off_policy or loss.tis_clip is not None)
        assert all(clipped.values())

    @SEEDS
    @pytest.mark.parametrize("case", ["grpo", "dapo", "dr_grpo", "cispo"])
    def test_step_cut_into_micro_batches(self, case: str, seed: int):
        """Which have different numbers of tokens."""
        loss, settings = POLICY_GRADIENT[case]
        whole = self.inputs(seed, rows=32)
        fields = ("logps", "mask", "advantages", "old_logps", "ref_logps", "entropy")
        parts = [
            replace(whole, **{name: getattr(whole, name)[half] for name in fields})
            for half in (slice(0, 16), slice(16, 32))
        ]
        assert parts[0].mask.sum() != parts[1].mask.sum()
        same(loss(whole).loss, sum(trl_grpo(part, settings) for part in parts), whole.logps)


class TestRLOO:
    @SEEDS
    @pytest.mark.parametrize("off_policy", [True, False], ids=["old log-probs", "on-policy"])
    def test_loss(self, off_policy: bool, seed: int):
        rows = Rows(seed)
        old = rows.near(0.3) if off_policy else None
        ours = RLOO(**CLIPS)(LossInputs(rows.logps, rows.mask, rows.advantages, old))
        trainer = bare(
            RLOOTrainer,
            _get_per_token_logps_and_entropies=lambda *_, **__: (rows.logps, torch.zeros_like(rows.logps), None),
            **EPSILONS,
        )
        ids = torch.zeros_like(rows.mask, dtype=torch.int64)
        batch = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": torch.ones_like(ids[:, :1]),
            "completion_ids": ids,
            "completion_mask": rows.mask.long(),
            "advantages": rows.advantages,
            "old_logps": (rows.logps.detach() if old is None else old).sum(-1),
        }
        same(ours.loss, trainer._compute_loss(trainer.model, batch), rows.logps)
        clipped = {name: fraction[0] for name, fraction in ours.metrics.items() if name in CLIP_METRICS}
        assert all(clipped.values())
        assert bool(clipped) == off_policy


class Fused:
    """A model with TRL's fused head. The first token of a batch tells whose log-probs it gets."""

    training = True
    is_gradient_checkpointing = False

    def __init__(self, *logps: Tensor) -> None:
        self.logps = logps

    def __call__(self, input_ids: Tensor, labels: Tensor, **_: Any) -> FusedCausalLMOutput:
        labelled = labels[:, 1:] != -100
        logps = torch.where(labelled, self.logps[input_ids[0, 0]], 0)
        zeros = torch.zeros_like(logps)
        return FusedCausalLMOutput(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=labelled)


def tokens(mask: Tensor, first: int = 0) -> dict[str, Tensor]:
    """Prompts of one token and completions of as many as the mask has."""
    completions = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()
    attention = completions.clone()
    attention[:, 0] = 1
    return {
        "input_ids": torch.full_like(completions, first),
        "attention_mask": attention,
        "completion_mask": completions,
    }


def chunked(interleaved: Tensor) -> Tensor:
    """Our rows of pairs in TRL's order: all chosen, then all rejected."""
    return torch.cat([interleaved[0::2], interleaved[1::2]])


def pairs(rows: Rows, loss: Loss, **fields: Tensor) -> LossInputs:
    rewards = torch.tensor([[1.0, 0.0]]).expand(len(rows.mask) // 2, 2)
    index, advantages = loss.select(rewards)
    assert index.equal(torch.tensor([[0, 1]]).expand_as(index))
    return LossInputs(rows.logps, rows.mask, advantages.flatten(0, 1), **fields)


def trl_dpo(rows: Rows, ref: Tensor, *loss_types: str, weights: tuple[float, ...] = (1.0,), **settings: Any) -> Tensor:
    trainer = bare(
        DPOTrainer,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ref_model=Fused(chunked(ref)),
        precompute_ref_logps=False,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        loss_types=loss_types,
        loss_weights=weights,
        **({"label_smoothing": 0.1} | settings),
    )
    return trainer._compute_loss(Fused(chunked(rows.logps)), tokens(chunked(rows.mask)), False)


class TestDPO:
    @SEEDS
    @pytest.mark.parametrize(
        ("loss", "loss_type", "factor"),
        [
            (DPO(beta=0.3), "sigmoid", 1),  # TRL's label_smoothing of 0.1 does nothing here
            (DPO(beta=0.3, label_smoothing=0.1, smoothing="robust"), "robust", 1),
            (DPO(beta=0.3, log_ratios="mean"), "sigmoid_norm", 1),
            (Hinge(beta=0.3), "hinge", 1),
            (IPO(beta=0.3), "ipo", 1),
            (APOZero(beta=0.3), "apo_zero", 2),
        ],
        ids=lambda value: value if isinstance(value, str) else None,
    )
    def test_loss(self, loss: Loss, loss_type: str, factor: int, seed: int):
        rows = Rows(seed)
        ref = rows.near(1.0)
        ours = loss(pairs(rows, loss, ref_logps=ref)).loss
        same(factor * ours, trl_dpo(rows, ref, loss_type, beta=0.3), rows.logps)

    @SEEDS
    def test_sft_term(self, seed: int):
        rows = Rows(seed)
        ref = rows.near(1.0)
        weight = 0.1 * (rows.mask.sum() / rows.mask[0::2].sum()).item()
        loss = WeightedSum([DPO(beta=0.3), SFT()], [1.0, weight])
        ours = loss(pairs(rows, loss, ref_logps=ref)).loss
        same(ours, trl_dpo(rows, ref, "sigmoid", "sft", weights=(1.0, 0.1), beta=0.3), rows.logps)

    @SEEDS
    @pytest.mark.parametrize(
        ("loss", "loss_type"),
        [(DPO(beta=0.3), "sigmoid"), (IPO(beta=0.3, log_ratios="sum"), "ipo")],
        ids=["sigmoid", "ipo"],
    )
    def test_online(self, loss: Loss, loss_type: str, seed: int):
        """``OnlineDPOTrainer.training_step`` on sampled pairs, which TRL and ``select`` put in order by themselves."""
        rows = Rows(seed)
        ref, rewards = rows.near(1.0), torch.rand(8, 2, generator=rows.generator)
        index, advantages = loss.select(rewards)
        assert 0 < index[:, 0].sum() < 8
        order = (index + 2 * torch.arange(8)[:, None]).flatten()
        ours = loss(LossInputs(rows.logps[order], rows.mask[order], advantages.flatten(), ref_logps=ref[order])).loss

        policy, reference, losses = Fused(), Fused(), []
        policy.train = lambda: None
        ids = torch.zeros_like(rows.mask, dtype=torch.int64)
        trainer = bare(
            OnlineDPOTrainer,
            args=SimpleNamespace(
                use_vllm=False,
                missing_eos_penalty=None,
                loss_type=loss_type,
                torch_empty_cache_steps=None,
                optim="adamw",
                n_gpu=1,
                gradient_accumulation_steps=1,
            ),
            _beta=0.3,
            eos_token_ids=[0],
            ref_model=reference,
            processing_class=SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),
            reward_funcs=[],
            stats=defaultdict(list),
            _generate=lambda *_: (ids[:, :1], ids[:, :1] + 1, ids, chunked(rows.mask).long(), None),
            _forward=lambda model, *_: chunked(rows.logps if model is policy else ref),
            _calculate_rewards_from_functions=lambda **_: rewards.T.flatten(),
        )
        trainer.accelerator.backward = losses.append
        trainer.training_step(policy, {"prompt": [""] * 8})
        same(ours, losses[0], rows.logps)


class TestKTO:
    @staticmethod
    def trl(rows: Rows, ref: Tensor, labels: Tensor, other: Rows | None, other_ref: Tensor | None, **settings: Any):
        paired = other is not None
        trainer = bare(
            KTOTrainer,
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            ref_model=Fused(ref, other_ref),
            precompute_ref_logps=False,
            calculate_KL=paired,
            **settings,
        )
        mismatched = {f"KL_{key}": value for key, value in tokens(other.mask, 1).items()} if paired else {}
        policy = Fused(rows.logps, other.logps if paired else None)
        return trainer._compute_loss(policy, tokens(rows.mask) | mismatched | {"label": labels}, False)

    @staticmethod
    def labels(rows: Rows, kind: str) -> Tensor:
        return {"mixed": rows.advantages > 0, "good": rows.advantages < 9, "bad": rows.advantages > 9}[kind]

    @SEEDS
    @pytest.mark.parametrize("kind", ["mixed", "good", "bad"])
    @pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.7)])
    @pytest.mark.parametrize("shift", [-0.5, 0.5], ids=["positive KL", "negative KL, clamped"])
    def test_kto(self, shift: float, weights: tuple[float, float], kind: str, seed: int):
        rows, other = Rows(seed), Rows(seed + 100, width=9)
        ref, other_ref, labels = rows.near(1.0), other.near(0.3, shift), self.labels(rows, kind)
        baseline = (other.logps - other_ref).sum(-1).mean()
        assert (baseline > 0) == (shift < 0)
        loss = KTO(0.3, *weights)
        advantages = loss.select(labels[:, None].float())[1][:, 0]
        ours = loss(LossInputs(rows.logps, rows.mask, advantages, ref_logps=ref, kl_baseline=baseline)).loss
        settings = {"loss_type": "kto", "desirable_weight": weights[0], "undesirable_weight": weights[1]}
        same(ours, self.trl(rows, ref, labels, other, other_ref, beta=0.3, **settings), rows.logps)
        assert torch.autograd.grad(ours, other.logps, allow_unused=True) == (None,)

    @SEEDS
    @pytest.mark.parametrize("kind", ["mixed", "good", "bad"])
    @pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.7)])
    def test_apo_zero_unpaired(self, weights: tuple[float, float], kind: str, seed: int):
        rows = Rows(seed)
        ref, labels = rows.near(1.0), self.labels(rows, kind)
        loss = APOZero(0.3, *weights)
        advantages = loss.select(labels[:, None].float())[1][:, 0]
        ours = loss(LossInputs(rows.logps, rows.mask, advantages, ref_logps=ref)).loss
        settings = {"loss_type": "apo_zero_unpaired", "desirable_weight": weights[0], "undesirable_weight": weights[1]}
        same(ours, self.trl(rows, ref, labels, None, None, beta=0.3, **settings), rows.logps)


class TestReferenceFree:
    """Trainers that read logits: those of a vocabulary of two, whose first token has our log-probs."""

    @staticmethod
    def trl(kind: type, rows: Rows, **settings: Any) -> Tensor:
        logps = chunked(torch.where(rows.mask, rows.logps, -1))
        logits = torch.stack([logps, torch.log(-torch.expm1(logps))], -1)
        logits = torch.nn.functional.pad(logits, (0, 0, 0, 1))
        trainer = bare(kind, is_encoder_decoder=False, pad_token_id=0, padding_value=0, **settings)
        batch = {}
        for name, mask in (("chosen", rows.mask[0::2]), ("rejected", rows.mask[1::2])):
            made = tokens(mask)
            batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = made["input_ids"], made["attention_mask"]
            batch[f"{name}_labels"] = made["input_ids"].masked_fill(made["completion_mask"] == 0, -100)
        return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]

    @SEEDS
    @pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (2.5, 0.0), (1.0, 0.7)])
    def test_simpo(self, beta: float, gamma: float, seed: int):
        rows = Rows(seed)
        ours = SimPO(beta, gamma)(pairs(rows, SimPO())).loss
        settings = {"loss_type": "simpo", "cpo_alpha": 0, "alpha": 0.0, "label_smoothing": 0.0}
        same(ours, self.trl(CPOTrainer, rows, beta=beta, simpo_gamma=gamma, **settings), rows.logps)

    @SEEDS
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
    def test_conservative_dpo_without_reference(self, label_smoothing: float, seed: int):
        rows = Rows(seed)
        loss = DPO(beta=0.3, label_smoothing=label_smoothing)
        ours = loss(pairs(rows, loss, ref_logps=torch.zeros(rows.mask.shape))).loss
        settings = {"loss_type": "sigmoid", "cpo_alpha": 0, "alpha": 0.0, "label_smoothing": label_smoothing}
        same(ours, self.trl(CPOTrainer, rows, beta=0.3, **settings), rows.logps)

    @SEEDS
    @pytest.mark.parametrize("beta", [0.1, 1.0])
    def test_orpo_on_chosen_completions_of_one_length(self, beta: float, seed: int):
        """The prompts' only token is not predicted, and the two means over tokens are the same."""
        lengths = torch.randint(1, 8, (16,), generator=torch.Generator().manual_seed(seed))
        lengths[0::2] = 5
        rows = Rows(seed, lengths=lengths)
        same(ORPO(beta)(pairs(rows, ORPO())).loss, self.trl(ORPOTrainer, rows, beta=beta), rows.logps)

    @SEEDS
    @pytest.mark.parametrize("beta", [0.1, 1.0])
    def test_odds_ratio_term_of_orpo(self, beta: float, seed: int):
        """Ragged: the loss without its likelihood term, each library's own."""
        rows = Rows(seed)
        mask = rows.mask[0::2]
        chosen = rows.logps[0::2] * mask
        ours = ORPO(beta)(pairs(rows, ORPO())).loss + (chosen.sum(-1) / mask.sum(-1)).mean()
        same(ours, self.trl(ORPOTrainer, rows, beta=beta) + chosen.sum() / mask.sum(), rows.logps)
