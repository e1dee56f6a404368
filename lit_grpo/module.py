"""The LightningModule: policy, frozen reference, and one training step for every loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_grpo.data.types import Answers, Batch
from lit_grpo.distributed import data_rank
from lit_grpo.errors import UserError
from lit_grpo.lora import LoRA, adapters_off
from lit_grpo.losses import Loss, LossInputs, LossOutput, TwoGRPO, diagnostics
from lit_grpo.metrics import Scores
from lit_grpo.policy import Policy, load_config, load_policy, load_reference, load_tokenizer, stop_token_ids
from lit_grpo.settings import keep_to, settings_of
from lit_grpo.sharding import grad_norm, shares_out, to_cpu
from lit_grpo.tally import Tally

MOST_SKIPPED = 5
"""Updates in a row whose gradient is not finite."""


class PolicyModule(L.LightningModule):
    """A policy that trains with any loss on any batch.

    Args:
        model: folder or hub id of a causal language model with its tokenizer.
        loss: the objective; 2-GRPO if not given.
        lora: train low-rank adapters instead of the weights; the reference is then the model without them.
        optimizer: of the policy's parameters. Adam without weight decay at 1e-6, the rate of most RL recipes.
        lr_scheduler: stepped once per optimizer step; constant if not given.
        gradient_checkpointing: recompute activations in the backward pass, for less memory and about a third more time.
        attention: implementation by its name in ``transformers``, such as ``flash_attention_2``; if not given, what
            that chooses.
        packing: read the rows of a micro-batch one after the other, without padding. Wants ``flash_attention_2``, as
            others take the square of all rows' length together.
        share_prompts: read the prompt of completions that train together once. For prompts that are not much shorter
            than completions; wants the attention ``sdpa``.
        compile: have ``torch.compile`` take the decoder. The first micro-batch is read plainly too, in this case and
            with the three above, and the run stops if log-probs differ by more than ``max_mismatch``.
        correct_at: reward from which a held-out completion counts as correct in Mean@k and Pass@k.
        pass_at: the k of Pass@k; powers of two and all samples of a prompt if not given.
        max_mismatch: the run stops if, before the first update of a phase, sampler and trainer disagree by more than
            this in the mean absolute log-prob of a token: then the engine does not run the policy. Up to about 0.04 is
            normal in bfloat16, 1e-5 in float32. If not given, 0.001 in float32 on a CPU, else 0.1.
        old_policy: whose log-probs later updates of a phase compare with: those that the ``sampler`` gave, or the
            ``trainer``'s own, which cost one more forward pass of these updates.
        offload_reference: keep the reference in the memory of the CPU, and have it score a phase's rollouts in one go.
        log_entropy: whether the policy's entropy is computed and logged. Losses with an entropy bonus do so anyway.
    """

    def __init__(
        self,
        model: str,
        loss: Loss | None = None,
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        attention: str | None = None,
        packing: bool = False,
        share_prompts: bool = False,
        compile: bool = False,
        correct_at: float = 1.0,
        pass_at: list[int] | None = None,
        max_mismatch: float | None = None,
        offload_reference: bool = False,
        log_entropy: bool = False,
        old_policy: Literal["sampler", "trainer"] = "sampler",
    ) -> None:
        super().__init__()
        self.log_entropy, self.old_policy, self.lora = log_entropy, old_policy, lora
        self.model_name, self.pass_at, self.offload_reference = model, pass_at, offload_reference
        self.loss: Loss = TwoGRPO() if loss is None else loss
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.gradient_checkpointing, self.correct_at, self.max_mismatch = (
            gradient_checkpointing,
            correct_at,
            max_mismatch,
        )
        if packing and share_prompts:
            raise UserError("model.share_prompts: rows that are packed cannot share prompts. Leave one of the two out.")
        self.attention, self.packing, self.compiled = attention, packing, compile
        self.share_prompts = share_prompts
        self.config = load_config(model)
        self.tokenizer = load_tokenizer(model)
        self.stop_token_ids = stop_token_ids(model, self.tokenizer)
        self.policy: Policy | None = None
        self.reference: Policy | Callable[..., Any] | None = None
        self.reference_is_cached = False
        self.kl_baseline: Tensor | None = None
        self.skipped_in_a_row = 0
        self.grad_norm: Tensor | None = None
        self.logps: Tensor | None = None
        """Of the latest micro-batch, ``[N, T - 1]`` without gradient, for callbacks to look at."""
        self.tally = Tally()
        self.seconds_scoring = 0.0
        """Taken by log-probs without gradient since a callback set it to 0."""
        self.tokens_scored = self.tokens_forwarded = 0
        """Read for log-probs without and with gradient since then, prompts and padding included."""
        self.settings: dict[str, Any] = {}
        """Of the optimizer and the schedule, as they began."""
        self.settings_before: dict[str, Any] | None = None
        """Those of the checkpoint that training goes on from."""

    @property
    def context(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", 2**31))

    @property
    def vocab_size(self) -> int:
        """Tokens that have an embedding."""
        return int(self.config.get_text_config().vocab_size)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            rank_zero_info(f"Loss: {self.loss}")
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise UserError(
                f"trainer.precision: {self.trainer.precision} would round every update of the weights, most of them to"
                f" nothing. Use {self.trainer.precision.replace('true', 'mixed')}."
            )
        if self.max_mismatch is None:
            exact = self.trainer.precision == "32-true" and self.trainer.strategy.root_device.type == "cpu"
            self.max_mismatch = 1e-3 if exact else 0.1
        data = self.trainer.datamodule
        if self.offload_reference and stage == "fit":
            self.check_offload()
        n = getattr(data, "samples_per_prompt", 1)
        pass_at = self.pass_at or [2**i for i in range(1, n.bit_length()) if 2**i < n] + [n]
        if bad := [k for k in pass_at if not 1 <= k <= n]:
            raise UserError(
                f"model.pass_at: Pass@{bad[0]} needs from 1 to data.init_args.samples_per_prompt, {n}, completions of"
                " each prompt. Raise that, or leave it out."
            )
        keys = data.held_out(stage) if hasattr(data, "held_out") else []
        majority = getattr(data, "answers_are_read", False)
        self.scores = nn.ModuleDict({key: Scores(n, pass_at, majority) for key in keys})

    def check_offload(self) -> None:
        """Refuse to keep a reference elsewhere that is needed in between, or is not there."""
        for reason, advice in (
            (not self.loss.needs_reference, "the loss reads no reference"),
            (self.lora, "with model.lora the reference is the policy without its adapters"),
            (self.loss.needs_kl_baseline, "the loss needs it in every step, for its KL baseline"),
            (
                not hasattr(self.trainer.datamodule, "prompts_per_phase"),
                "use the callback ReferenceCache with these data",
            ),
            (isinstance(self.trainer.strategy, FSDPStrategy), "fsdp cannot move it; use fsdp2"),
        ):
            if reason:
                raise UserError(f"model.offload_reference: {advice}. Leave it out.")

    def configure_model(self) -> None:
        if self.policy is not None:  # Lightning may call this twice
            return
        strategy = self.trainer.strategy
        self.policy = load_policy(self.model_name, self.gradient_checkpointing, self.lora, strategy)
        needed = self.loss.needs_kl_baseline or (self.loss.needs_reference and not self.reference_is_cached)
        if needed and self.trainer.state.fn == "fit":
            self.reference = self.without_adapters if self.lora else load_reference(self.model_name, strategy)
        if self.compiled and shares_out(strategy):
            raise UserError("model.compile: it was never tried where processes share the model out. Leave it out.")
        for model in (self.policy, self.reference):
            for part in model.modules() if isinstance(model, nn.Module) else ():
                if isinstance(part, Policy):  # fsdp has it wrapped
                    part.speed_up(self.attention, self.packing, self.share_prompts, self.compiled)
        self.unproven = self.attention is not None or self.packing or self.share_prompts or self.compiled

    def without_adapters(self, *batch: Any, **options: Any) -> Any:
        """What the model says whose adapters are trained."""
        assert self.policy is not None
        with adapters_off(self.policy.lm):
            return self.policy(*batch, **options)

    def configure_optimizers(self) -> Any:
        assert self.policy is not None
        try:
            optimizer = self.make_optimizer([p for p in self.policy.parameters() if p.requires_grad])
        except (TypeError, ValueError) as error:
            raise UserError(f"model.optimizer: {error}.") from error
        schedule = None if self.make_scheduler is None else self.make_scheduler(optimizer)
        self.settings = settings_of(optimizer, schedule)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.policy is not None
        if batch.mismatched is not None:
            self.kl_baseline = self.estimate_kl_baseline(batch.mismatched)
        ref_logps = batch.ref_logps
        if ref_logps is None and self.reference is not None:
            ref_logps = self.logps_of(self.reference, batch)
        entropy_wanted = self.loss.needs_entropy or self.log_entropy
        before = self.policy.tokens_read
        logps, entropy = self.policy(batch.tokens, batch.mask, batch.temperature, entropy_wanted, batch.places)
        self.tokens_forwarded += self.policy.tokens_read - before
        self.logps = logps.detach()
        if self.unproven and self.trainer.strategy.reduce_boolean_decision(
            self.policy.is_put_to_the_test(batch.tokens, batch.mask), all=False
        ):
            self.compare_with_plain(logps.detach(), batch)
        if batch_idx == 0 and batch.sampler_logps is not None:
            mismatch = self.check_mismatch(logps.detach(), batch)
            self.log_dict(
                {f"train/sampler_{name}": value for name, value in mismatch.items()},
                on_step=False,
                on_epoch=True,
                sync_dist=True,
                batch_size=1,
            )

        inputs = LossInputs(
            logps,
            batch.mask,
            batch.advantages.to(logps.dtype),
            old_logps=batch.old_logps if batch.on_policy or batch.old_logps is not None else batch.sampler_logps,
            ref_logps=ref_logps,
            sampler_logps=batch.sampler_logps,
            entropy=entropy,
            kl_baseline=self.kl_baseline,
            step=self.trainer.global_step,
            total_rows=batch.total_rows,
            total_tokens=batch.total_tokens,
        )
        output = self.loss(inputs)
        if not isinstance(output, LossOutput):
            raise UserError(
                f"model.loss: {type(self.loss).__name__}.forward returned {type(output).__name__}, expected LossOutput."
            )
        if output.loss.ndim:
            raise UserError(
                f"model.loss: {type(self.loss).__name__}.forward returned a loss of shape {list(output.loss.shape)},"
                " expected a scalar; see aggregate in lit_grpo.losses."
            )
        self.tally.add({"loss": output.loss.detach(), **diagnostics(inputs), **output.metrics})
        # The loss is divided by the whole step's counts already: undo what Lightning and the strategy divide by.
        return output.loss * self.trainer.accumulate_grad_batches * data_rank(self.trainer)[1]

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.trainer.is_last_batch:
            self.log_tally()

    def on_train_epoch_end(self) -> None:
        self.log_tally()  # of an epoch that was cut short

    def log_tally(self) -> None:
        """Log what the micro-batches since the last time add up to."""
        reduce = self.trainer.strategy.reduce
        same_data = self.trainer.world_size // data_rank(self.trainer)[1]
        found = self.tally.summed_up(
            lambda values, how: reduce(values, reduce_op=how), self.trainer.accumulate_grad_batches / same_data
        )
        self.log_dict({f"train/{name}": x for name, x in found.items()}, on_step=False, on_epoch=True, batch_size=1)

    def logps_of(self, model: Any, batch: Batch) -> Tensor:
        """Log-probs of a batch by the policy or the reference, without gradient, in a training step or outside."""
        reader: Any = self.policy if self.lora else model
        start, before = time.perf_counter(), reader.tokens_read
        with torch.no_grad(), self.trainer.strategy.precision_plugin.forward_context():
            logps, _ = model(batch.tokens, batch.mask, batch.temperature, places=batch.places)
        self.seconds_scoring += time.perf_counter() - start
        self.tokens_scored += reader.tokens_read - before
        return logps

    def compare_with_plain(self, logps: Tensor, batch: Batch) -> None:
        """Read a micro-batch plainly too, once.

        Raises:
            UserError: if those of a row differ by more than ``max_mismatch`` on average.
        """
        assert self.policy is not None
        assert self.max_mismatch is not None
        ledger = self.seconds_scoring, self.tokens_scored
        with self.policy.plainly():
            differences = (logps - self.logps_of(self.policy, batch)).abs().sum(-1) / batch.mask.sum(-1)
        self.seconds_scoring, self.tokens_scored = ledger
        difference = differences.max()  # of a row, as few rows may be read wrongly
        if not difference <= self.max_mismatch:
            options = {
                "attention": self.attention, "packing": self.packing, "share_prompts": self.share_prompts,
                "compile": self.compiled,
            }  # fmt: skip
            keys = [f"model.{key}" for key, used in options.items() if used]
            raise UserError(
                f"{', '.join(keys)}: log-probs differ from the plain path's by {difference.item():.3g} on a row's"
                f" average, above model.max_mismatch {self.max_mismatch}. Leave it out, or choose another"
                " model.attention."
            )
        rank_zero_info(f"Checked against the plain path: log-probs of a row differ by {difference.item():.1g} at most.")
        self.unproven = False

    def estimate_kl_baseline(self, batches: list[Batch]) -> Tensor:
        """Mean log-ratio of policy to reference over mismatched completions of all processes."""
        assert self.policy is not None
        assert self.reference is not None
        total = torch.zeros(2, device=self.device, dtype=torch.float64)
        for batch in batches:
            log_ratio = self.logps_of(self.policy, batch) - self.logps_of(self.reference, batch)
            total += torch.stack([log_ratio.sum(), log_ratio.new_tensor(len(log_ratio))])
        total = self.trainer.strategy.reduce(total, reduce_op="sum")
        return total[0] / total[1]

    def check_mismatch(self, logps: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Compare the policy's log-probs with those of the engine that was to run it.

        Returns:
            Means over the completion tokens: ``mismatch``, the absolute difference; ``prob_ratio``, the larger over the
            smaller of the two probabilities; ``kl`` of sampler and policy (k3).

        Raises:
            UserError: if they are further apart than ``max_mismatch``, though this policy is to have sampled the batch.
        """
        assert batch.sampler_logps is not None
        assert self.max_mismatch is not None
        difference = (logps - batch.sampler_logps)[batch.mask]
        mismatch = difference.abs().mean()
        if mismatch.isnan():
            raise UserError(
                "The policy's log-probs are NaN: its weights were ruined by an earlier update. Lower the learning rate."
            )
        if batch.on_policy and mismatch > self.max_mismatch:
            raise UserError(
                f"The engine does not run the current policy: the log-probs of the tokens it sampled differ from the"
                f" trainer's by {mismatch.item():.3g} on average, more than model.max_mismatch {self.max_mismatch}. See"
                ' "Engine out of sync" in docs/troubleshooting.md.'
            )
        return {
            "mismatch": mismatch,
            "prob_ratio": difference.abs().exp().mean(),
            "kl": (difference.exp() - 1 - difference).mean(),
        }

    def on_train_epoch_start(self) -> None:
        """Score the rollouts of later updates before the first one moves the policy, if that is asked for."""
        assert self.policy is not None
        for batch in self.trainer.datamodule.sampled_batches() if self.old_policy == "trainer" else []:
            if not batch.on_policy:
                batch.old_logps = self.logps_of(self.policy, batch.to(self.device)).to(batch.tokens.device)
        if self.offload_reference:
            assert isinstance(self.reference, Policy)
            self.reference.to(self.device)
            for batch in self.trainer.datamodule.sampled_batches():
                batch.ref_logps = self.logps_of(self.reference, batch.to(self.device)).to(batch.tokens.device)
            to_cpu(self.reference)

    def on_train_start(self) -> None:
        self.tally = Tally()
        if self.settings_before is not None:
            optimizer, schedule = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
            keep_to(self.settings, self.settings_before, optimizer, schedule)
        if self.offload_reference:
            assert isinstance(self.reference, Policy)
            to_cpu(self.reference)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm, and leave out an update that would ruin the weights.

        Raises:
            UserError: if several in a row would.
        """
        assert self.policy is not None
        self.grad_norm = norm = grad_norm(self.policy)
        finite = bool(norm.isfinite())  # on all processes alike: they have one gradient
        scaled = self.trainer.precision == "16-mixed"  # the scaler leaves updates out, some while it searches
        self.skipped_in_a_row = 0 if finite or scaled else self.skipped_in_a_row + 1
        if finite:
            self.log("train/grad_norm", norm, on_step=False, on_epoch=True, batch_size=1)
        elif not scaled:
            optimizer.zero_grad(set_to_none=True)  # the step then changes nothing
        self.log("train/skipped_updates", float(not finite), on_step=False, on_epoch=True, reduce_fx="sum")
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise UserError(
                f"The gradient was {norm.item()} in {MOST_SKIPPED} updates in a row, up to phase {self.current_epoch}."
                " They were left out, so the weights are as before. Lower model.optimizer's lr, or look for what the"
                " loss divides by."
            )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm under every strategy: those of Lightning do not all know how."""
        if gradient_clip_algorithm == "value" or not gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        assert self.policy is not None
        assert self.grad_norm is not None
        if self.grad_norm > gradient_clip_val:
            factor = gradient_clip_val / self.grad_norm.item()
            for parameter in self.policy.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def score(self, key: str, answers: Answers) -> None:
        """Count a batch of held-out prompts."""
        scores: Any = self.scores[key]
        ballots: list[dict[str, int]] = [{} for _ in answers.samples]
        votes = [
            [-1 if s.parsed is None else ballot.setdefault(s.parsed, len(ballot)) for s in samples]
            for ballot, samples in zip(ballots, answers.samples, strict=True)
        ]
        rewards = [[s.reward for s in samples] for samples in answers.samples]
        scores.update(  # types are given because a rank may have none of the last prompts
            torch.tensor(rewards, dtype=torch.float32, device=self.device).reshape(-1, scores.n),
            torch.tensor(votes, dtype=torch.int64, device=self.device).reshape(-1, scores.n),
            torch.tensor(answers.places, dtype=torch.int64, device=self.device),
            self.correct_at,
        )

    def validation_step(self, answers: Answers, batch_idx: int) -> None:
        self.score("val", answers)

    def on_validation_epoch_end(self) -> None:
        scores: Any = self.scores["val"]
        self.log_dict({f"val/{name}": mean for name, (mean, _) in scores.compute().items()})

    def test_step(self, answers: Answers, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.score(list(self.scores)[dataloader_idx], answers)

    def on_test_epoch_end(self) -> None:
        """Log each benchmark's scores with the half-widths of their intervals, and the means over benchmarks."""
        sets: dict[str, Any] = dict(self.scores.items())
        results = [scores.compute() for scores in sets.values()]
        average = {
            name: (
                sum(found[name][0] for found in results) / len(results),
                sum(found[name][1] ** 2 for found in results) ** 0.5 / len(results),
            )
            for name in results[0]
        }
        for key, found in [*zip(sets, results, strict=True), ("test", average)]:
            for name, (mean, ci) in found.items():
                self.log_dict({f"{key}/{name}": mean, f"{key}/{name}_ci": ci})

    def predict_step(self, answers: Answers, batch_idx: int) -> None:
        """Nothing is left to compute: the engine has answered, and the sample table writes the answers down."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        folder = Path(self.model_name)
        model = str(folder.resolve()) if folder.is_dir() else self.model_name
        checkpoint["policy"] = {
            "model": model,
            "lora": self.lora and asdict(self.lora),
            "settings": self.settings,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        before: dict[str, Any] = {}
        self.on_save_checkpoint(before)
        now, then = before["policy"], checkpoint.get("policy", before["policy"])
        if then["lora"] != now["lora"]:
            raise UserError(
                f"ckpt_path: the checkpoint is of a run with model.lora {then['lora']}, this one has {now['lora']}."
            )
        if then["model"] != now["model"]:
            what = "adapters were trained on" if self.lora else "policy, which this run goes on with, began as"
            rank_zero_warn(
                f"model.model: the checkpoint's {what} {then['model']!r}, this run has {now['model']!r}. That is right"
                " only if it is the same model in another place."
            )
        self.settings_before, self.skipped_in_a_row = then["settings"], then["skipped_in_a_row"]

    def changes(self, name: str) -> bool:
        """Whether training changes what has this name in a state dict."""
        return not name.startswith("reference.") and (
            self.lora is None or ".lora_" in name or not name.startswith("policy.")
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What training changes: neither the reference, nor what adapters change, which have their own folder."""
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if self.changes(k)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what ``state_dict`` gave; the rest stays as it is."""
        own = {k: v for k, v in super().state_dict().items() if not self.changes(k)}
        return super().load_state_dict({**own, **state_dict}, strict, assign)
