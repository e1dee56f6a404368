"""The LightningModule and the policy's log-probs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import quiet_trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from test_invariance import ScriptedRollout, even_first_digit
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma4Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    HyperCLOVAXConfig,
    Llama4TextConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PhimoeConfig,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
    xLSTMConfig,
)

from callbacks import HFRollout
from lit_grpo.data import RolloutData, Source
from lit_grpo.errors import UserError
from lit_grpo.logprobs import completion_logps
from lit_grpo.losses import GRPO, LossInputs, LossOutput, TwoGRPO
from lit_grpo.module import PolicyModule
from lit_grpo.policy import Policy, load_policy, load_reference, load_tokenizer, logits_softcap, stop_token_ids

SIZES: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([[3, 4, 5, 6, 7, 1], [8, 9, 1, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    return tokens, mask


class TestLogps:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_equal_those_of_plain_log_softmax(self, model: str, temperature: float):
        policy = load_policy(model).double()
        tokens, mask = batch()
        plain = (
            (policy.lm(tokens).logits[:, :-1] / temperature).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        )
        torch.testing.assert_close(policy(tokens, mask, temperature)[0], plain * mask, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("config", "key", "value"),
        [
            (GraniteConfig, "logits_scaling", 6.0),
            (CohereConfig, "logit_scale", 0.25),
            (HyperCLOVAXConfig, "logits_scaling", 3.0),
            (Gemma2Config, "final_logit_softcapping", 0.1),
            (RecurrentGemmaConfig, "logits_soft_cap", 0.1),
        ],
    )
    def test_what_models_do_to_logits_after_their_head_is_done(self, config: Any, key: str, value: float):
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config(**SIZES, **{key: value})).double().eval()
        tokens, mask = batch()
        logits = lm(tokens).logits[:, :-1]
        plain = (logits / 0.6).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1) * mask
        torch.testing.assert_close(Policy(lm)(tokens, mask, 0.6)[0], plain, rtol=0, atol=1e-6)
        unscaled = torch.log_softmax(torch.zeros(16), -1)[0].item()
        assert (plain - unscaled * mask).abs().max() > 1e-3  # so that a scale would show

    def test_what_a_model_does_to_its_logits_must_be_known(self, model: str, monkeypatch: pytest.MonkeyPatch):
        load_policy(model)
        forward = Qwen2ForCausalLM.forward

        def scaled(lm: Qwen2ForCausalLM, *args: Any, **options: Any) -> Any:
            found = forward(lm, *args, **options)
            found.logits = found.logits * 1.5
            return found

        monkeypatch.setattr(Qwen2ForCausalLM, "forward", scaled)
        with pytest.raises(
            UserError, match=r"model.model: log-probs of Qwen2ForCausalLM differ by up to .* scales, caps"
        ):
            load_policy(model)

    def test_what_a_model_does_to_its_logits_may_stand_in_its_text_config(self):
        text = {"final_logit_softcapping": 0.1, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
        config = Gemma4Config(text_config={**SIZES, **text, "layer_types": ["full_attention"] * 3})
        lm = AutoModelForCausalLM.from_config(config)
        assert lm.config is not lm.config.get_text_config()
        policy = Policy(lm)
        assert policy.softcap == 0.1
        policy.check_against_logits()

    def test_a_model_with_a_text_config_is_sampled_and_trained(self, model: str, few_prompts: str, tmp_path: Path):
        config = Gemma3Config(text_config=SIZES, eos_token_id=[1, 5])
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        load_tokenizer(model).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "generation_config.json").unlink()
        module = PolicyModule(str(tmp_path / "model"))
        assert module.stop_token_ids == [1, 5]
        fit(module, few_prompts, tmp_path)
        assert module.trainer.callback_metrics["train/sampler_mismatch"] < 1e-5

    def test_xlstm_has_a_name_of_its_own_for_its_cap(self):
        assert logits_softcap(xLSTMConfig(output_logit_soft_cap=12.0)) == 12.0

    def test_weights_that_give_nan_are_broken(self, model: str):
        policy = load_policy(model)
        with torch.no_grad():
            policy.lm.get_output_embeddings().weight[3] = torch.nan
        with pytest.raises(UserError, match=r"model.model: the log-probs of Qwen2ForCausalLM are NaN"):
            policy.check_against_logits()

    def test_a_model_without_a_decoder_is_named(self, tmp_path: Path):
        config = Llama4TextConfig(**SIZES, num_local_experts=2, intermediate_size_mlp=64, attention_chunk_size=4)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"model.model: Llama4ForCausalLM has no decoder that gives hidden states"):
            load_policy(str(tmp_path))

    def test_a_scale_that_a_model_does_not_use_is_not_used(self):
        config = MptConfig(vocab_size=16, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)
        config.logit_scale = "inv_sqrt_d_model"
        Policy(AutoModelForCausalLM.from_config(config)).check_against_logits()

    def test_nothing_random_happens_while_a_policy_trains(self, tmp_path: Path):
        layers = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        for config in (
            MixtralConfig(**SIZES, num_local_experts=4, router_jitter_noise=0.5, attention_dropout=0.5),
            OPTConfig(**layers, vocab_size=16, word_embed_proj_dim=32, layerdrop=0.9),
        ):
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
            policy = load_policy(str(tmp_path))
            assert policy.training
            torch.testing.assert_close(policy(*batch())[0], policy(*batch())[0], rtol=0, atol=0)

    def test_a_model_that_cannot_but_draw_random_numbers_is_refused(self, tmp_path: Path):
        PhimoeConfig(**SIZES).save_pretrained(tmp_path)
        with pytest.raises(UserError, match="PhiMoE draws experts at random while it trains"):
            load_policy(str(tmp_path))

    def test_a_model_that_is_another_while_it_trains_is_refused(self, model: str, monkeypatch: pytest.MonkeyPatch):
        forward = Qwen2ForCausalLM.forward

        def other(lm: Qwen2ForCausalLM, *args: Any, **options: Any) -> Any:
            found = forward(lm, *args, **options)
            found.logits = found.logits * (1.0 if lm.training else 1.5)
            return found

        monkeypatch.setattr(Qwen2ForCausalLM, "forward", other)
        with pytest.raises(UserError, match=r"log-probs of Qwen2ForCausalLM differ"):
            load_policy(model)

    def test_padding_changes_nothing(self, model: str):
        policy = load_policy(model).double()
        tokens, mask = batch()
        short, _ = policy(tokens[1:, :3], mask[1:, :2])
        torch.testing.assert_close(policy(tokens, mask)[0][1, :2], short[0], rtol=0, atol=1e-12)

    def test_gradient_equals_that_of_plain_log_softmax_in_any_chunks(self, monkeypatch: pytest.MonkeyPatch, model: str):
        monkeypatch.setattr("lit_grpo.logprobs.CHUNK_LOGITS", 16 * 2)
        ours, plain = load_policy(model).double(), load_policy(model).double()
        tokens, mask = batch()
        ours(tokens, mask)[0].square().sum().backward()
        logits = plain.lm(tokens).logits[:, :-1]
        (logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1) * mask).square().sum().backward()
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("softcap", [None, 0.5])
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    @pytest.mark.parametrize("chunk", [7, 7 * 3, 2**20])
    def test_all_gradients_are_those_of_autograd(
        self, chunk: int, temperature: float, softcap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch
    ):
        """Of log-probs and entropies, with respect to hidden states, weight and bias."""
        monkeypatch.setattr("lit_grpo.logprobs.CHUNK_LOGITS", chunk)
        head, mask = torch.nn.Linear(4, 7, bias=bias).double(), torch.tensor([[True, False, True, True], [True] * 4])
        hidden, tokens = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True), torch.randint(7, (2, 5))
        leaves = [hidden, *head.parameters()]
        factors = torch.randn(2, 2, 4, dtype=torch.float64)
        found = torch.stack(completion_logps(hidden, tokens, mask, head, temperature, softcap, entropy=True))
        logits = head(hidden)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        dense = (logits / temperature).log_softmax(-1)
        plain = torch.stack([dense.gather(-1, tokens[:, 1:, None]).squeeze(-1), -(dense.exp() * dense).sum(-1)]) * mask
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
        for x, y in ((found, plain), (completion_logps(hidden, tokens, mask, head, temperature, softcap)[0], plain[0])):
            ours, theirs = (
                torch.autograd.grad((z * factors[-len(z) :]).sum(), leaves, retain_graph=True) for z in (x, y)
            )
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    def test_only_what_trains_gets_a_gradient(self):
        """With adapters, the head does not."""
        head = torch.nn.Linear(4, 7).requires_grad_(False)
        hidden = torch.randn(1, 2, 4, requires_grad=True)
        logps, _ = completion_logps(hidden, torch.tensor([[1, 2, 3]]), torch.ones(1, 2).bool(), head)
        logps.sum().backward()
        assert hidden.grad is not None
        assert head.weight.grad is head.bias.grad is None

    def test_under_autocast_the_head_computes_in_bfloat16(self):
        head, hidden = torch.nn.Linear(8, 16, bias=False), torch.randn(1, 8, 8, requires_grad=True)
        tokens, mask = torch.randint(16, (1, 9)), torch.ones(1, 8).bool()
        gradients = []
        for mixed in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                logps, _ = completion_logps(hidden, tokens, mask, head)
            assert logps.dtype == torch.float32
            logits = F.linear(hidden[0].to(torch.bfloat16), head.weight.to(torch.bfloat16)).float()
            plain = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
            assert torch.allclose(logps[0], plain, rtol=0, atol=1e-6) == mixed
            gradients.append(torch.autograd.grad(logps.sum(), [hidden, head.weight]))
        for exact, rounded in zip(*gradients, strict=True):
            assert rounded.dtype == torch.float32
            assert 0 < (exact - rounded).abs().max() < 0.03

    def test_no_completion_token_at_all(self, model: str):
        tokens, _ = batch()
        assert not load_policy(model)(tokens, torch.zeros(2, 5).bool())[0].any()


class TestPolicy:
    def test_dropout_is_off_and_mode_is_train(self, tmp_path: Path, model: str):
        config = GPT2Config(
            vocab_size=16, n_embd=8, n_layer=1, n_head=1, attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5
        )
        GPT2LMHeadModel(config).save_pretrained(tmp_path)
        load_tokenizer(model).save_pretrained(tmp_path)
        policy = load_policy(str(tmp_path))
        assert policy.training
        tokens, mask = batch()
        assert torch.equal(policy(tokens, mask)[0], policy(tokens, mask)[0])

    def test_gradient_checkpointing_gives_the_same_gradient(self, model: str):
        plain, checkpointed = load_policy(model), load_policy(model, gradient_checkpointing=True)
        assert checkpointed.lm.is_gradient_checkpointing
        for policy in (plain, checkpointed):
            policy(*batch())[0].sum().backward()
        for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)

    def test_weights_are_float32(self, model: str, tmp_path: Path):
        load_policy(model).lm.to(torch.bfloat16).save_pretrained(tmp_path)
        assert {p.dtype for p in load_policy(str(tmp_path)).parameters()} == {torch.float32}

    def test_reference_is_frozen_and_in_eval_mode(self, model: str):
        reference = load_reference(model)
        assert not reference.training
        assert not any(p.requires_grad for p in reference.parameters())

    def test_all_stop_ids_are_found(self, tmp_path: Path, model: str):
        load_policy(model).lm.save_pretrained(tmp_path)
        tokenizer = load_tokenizer(model)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
        assert stop_token_ids(str(tmp_path), tokenizer) == [1, 5, 7]


def fit(module: PolicyModule, prompts: str, folder: Path, rollout=None, epochs: int = 1, **data) -> None:
    data = RolloutData(Source(prompts), reward=even_first_digit, prompts_per_phase=8, **data)
    rollout = rollout or HFRollout(max_tokens=6)
    quiet_trainer(folder, max_epochs=epochs, callbacks=[rollout]).fit(module, datamodule=data)


def test_reference_is_loaded_only_if_the_loss_needs_it(model: str, few_prompts: str, tmp_path: Path):
    for loss, needed in ((TwoGRPO(), False), (TwoGRPO(beta=0.1), True)):
        module = PolicyModule(model, loss)
        fit(module, few_prompts, tmp_path)
        assert (module.reference is not None) == needed


def test_kl_is_zero_at_the_first_update_and_the_reference_stays(model: str, few_prompts: str, tmp_path: Path):
    module = PolicyModule(model, TwoGRPO(beta=0.1), optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[HFRollout(max_tokens=6)])
    trainer.fit(module, datamodule=RolloutData(Source(few_prompts), reward=even_first_digit, prompts_per_phase=8))
    assert trainer.callback_metrics["train/kl"].item() == 0
    start = load_policy(model).state_dict()
    assert all(torch.equal(start[name], tensor) for name, tensor in module.reference.state_dict().items())
    assert not all(torch.equal(start[name], tensor) for name, tensor in module.policy.state_dict().items())


def test_checkpoint_leaves_the_reference_out_and_loads_again(model: str, few_prompts: str, tmp_path: Path):
    module = PolicyModule(model, TwoGRPO(beta=0.1))
    data = RolloutData(Source(few_prompts), reward=even_first_digit, prompts_per_phase=8)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[HFRollout(max_tokens=6)])
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    names = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert names
    assert not any(name.startswith("reference.") for name in names)
    again = PolicyModule(model, TwoGRPO(beta=0.1))
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[HFRollout(max_tokens=6)])
    trainer.fit(again, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.current_epoch == 2


def test_an_engine_that_does_not_run_the_policy_stops_the_run(model: str, few_prompts: str, tmp_path: Path):
    """The scripted engine makes its log-probs up."""
    with pytest.raises(UserError, match=r"The engine does not run the current policy.*model.max_mismatch 0.001"):
        fit(PolicyModule(model, TwoGRPO()), few_prompts, tmp_path, ScriptedRollout(max_tokens=6))


def test_a_stale_engine_stops_the_run(model: str, few_prompts: str, tmp_path: Path):
    class Forgetful(HFRollout):
        def make_engine(self, module, context):
            engine = super().make_engine(module, context)
            copy = {name: tensor.clone() for name, tensor in module.policy.lm.state_dict().items()}
            load = engine.load_weights
            engine.load_weights = lambda weights: load(copy.items())  # the first weights, again and again
            return engine

    module = PolicyModule(model, TwoGRPO(), optimizer=lambda p: torch.optim.SGD(p, lr=30.0))
    with pytest.raises(UserError, match="does not run the current policy"):
        fit(module, few_prompts, tmp_path, Forgetful(max_tokens=6), epochs=3)


def test_first_update_is_on_policy_and_later_ones_see_a_ratio(model: str, few_prompts: str, tmp_path: Path):
    seen = []

    class Spy(GRPO):
        def forward(self, inputs):
            seen.append(inputs.old_logps is None)
            return super().forward(inputs)

    fit(PolicyModule(model, Spy()), few_prompts, tmp_path, group_size=4, updates_per_phase=4)
    assert seen == [True, False, False, False]


def test_missing_rollout_callback_is_said(model: str, few_prompts: str, tmp_path: Path):
    data = RolloutData(Source(few_prompts), reward=even_first_digit, prompts_per_phase=8)
    with pytest.raises(UserError, match="no rollout callback has run"):
        quiet_trainer(tmp_path, max_epochs=1).fit(PolicyModule(model, TwoGRPO()), datamodule=data)


def test_fewer_batches_than_a_phase_has_are_refused(model: str, few_prompts: str, tmp_path: Path):
    data = RolloutData(Source(few_prompts), reward=even_first_digit, prompts_per_phase=8)
    trainer = quiet_trainer(
        tmp_path, max_epochs=1, callbacks=[HFRollout(max_tokens=6)], accumulate_grad_batches=4, limit_train_batches=2
    )
    with pytest.raises(UserError, match=r"limit_train_batches 2 .* has 4 micro-batches"):
        trainer.fit(PolicyModule(model, TwoGRPO()), datamodule=data)


def test_scheduler_steps_once_per_update(model: str, few_prompts: str, tmp_path: Path):
    module = PolicyModule(
        model,
        GRPO(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    )
    data = RolloutData(
        Source(few_prompts), reward=even_first_digit, prompts_per_phase=8, group_size=4, updates_per_phase=2
    )
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[HFRollout(max_tokens=6)], accumulate_grad_batches=2)
    trainer.fit(module, datamodule=data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**4


def test_grad_norm_is_that_of_the_update(model: str, few_prompts: str, tmp_path: Path):
    """Plain gradient descent moves the weights by the rate times the gradient."""
    module = PolicyModule(model, TwoGRPO(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))
    data = RolloutData(Source(few_prompts), reward=even_first_digit, prompts_per_phase=8)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[HFRollout(max_tokens=6)], accumulate_grad_batches=2)
    trainer.fit(module, datamodule=data)
    start = dict(load_policy(model).named_parameters())
    moved = torch.cat([(p - start[name]).flatten() for name, p in module.policy.named_parameters()]).norm() / 1e-2
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(moved.item(), rel=1e-3)


@pytest.mark.parametrize("loss", [TwoGRPO(), GRPO(beta=0.01)])
def test_training_raises_the_reward(model: str, few_prompts: str, tmp_path: Path, loss: GRPO):
    """From chance, about 0.3, to near certainty, in forty phases."""
    rewards = []

    class Watch(HFRollout):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            rewards.append(trainer.callback_metrics["train/reward"].item())

    module = PolicyModule(model, loss, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    fit(module, few_prompts, tmp_path, Watch(max_tokens=3), epochs=40, group_size=2 if isinstance(loss, TwoGRPO) else 4)
    assert sum(rewards[:5]) / 5 < 0.6
    assert sum(rewards[-5:]) / 5 > 0.9


@pytest.mark.parametrize("old_policy", ["sampler", "trainer"])
def test_later_updates_compare_with_the_policy_that_sampled(
    model: str, few_prompts: str, tmp_path: Path, old_policy: str
):
    seen = []

    class Spy(GRPO):
        def forward(self, inputs):
            seen.append(inputs)
            return super().forward(inputs)

    module = PolicyModule(model, Spy(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5), old_policy=old_policy)
    fit(module, few_prompts, tmp_path, group_size=4, updates_per_phase=2)
    later = seen[1]
    assert torch.equal(later.old_logps, later.sampler_logps) == (old_policy == "sampler")
    torch.testing.assert_close(
        later.old_logps, later.sampler_logps, rtol=0, atol=1e-5
    )  # HFEngine runs the policy itself
    assert (later.logps - later.old_logps).abs().max() > 1e-4  # which has moved since


class Ruinous(TwoGRPO):
    """Its gradient is not finite in the given updates."""

    def __init__(self, updates: list[int]) -> None:
        super().__init__()
        self.updates = updates

    def forward(self, inputs: LossInputs) -> LossOutput:
        output = super().forward(inputs)
        factor = float("nan") if inputs.step in self.updates else 1.0
        return LossOutput(output.loss * factor, output.metrics)


def test_an_update_that_would_ruin_the_weights_is_left_out(model: str, few_prompts: str, tmp_path: Path):
    weights, skipped = [], []

    class Watch(HFRollout):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            weights.append(torch.cat([p.detach().flatten().clone() for p in pl_module.policy.parameters()]))
            skipped.append(trainer.callback_metrics["train/skipped_updates"].item())

    module = PolicyModule(model, Ruinous([1, 2]), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    fit(module, few_prompts, tmp_path, Watch(max_tokens=3), epochs=4)
    assert skipped == [0, 1, 1, 0]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert weights[3].isfinite().all()


def test_five_such_updates_in_a_row_end_the_run(model: str, few_prompts: str, tmp_path: Path):
    module = PolicyModule(model, Ruinous(list(range(1, 99))))
    with pytest.raises(UserError, match=r"The gradient was nan in 5 updates in a row, up to phase 5. .* Lower"):
        fit(module, few_prompts, tmp_path, epochs=9)
    assert all(parameter.isfinite().all() for parameter in module.policy.parameters())


def test_updates_that_a_scaler_leaves_out_do_not_end_the_run(model: str, few_prompts: str, tmp_path: Path):
    """It leaves out as many as it takes to find its scale."""
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module = PolicyModule(model, Ruinous(list(range(6))), max_mismatch=1)
    trainer = quiet_trainer(tmp_path, max_epochs=7, callbacks=[HFRollout(max_tokens=6)], plugins=[scaler])
    trainer.fit(module, datamodule=RolloutData(Source(few_prompts), reward=even_first_digit, prompts_per_phase=8))
    assert scaler.scaler.get_scale() == 2**16 / 2**6


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_mismatch_weight_is_that_of_a_second_forward(model: str, level: str):
    """The trainer's side of the ratio comes from the forward pass that trains, without its gradient."""
    policy = load_policy(model).double()
    tokens, mask = batch()
    advantages = torch.randn(len(tokens), dtype=torch.float64)
    sampler = (policy(tokens, mask)[0].detach() + 0.3 * torch.randn(mask.shape, dtype=torch.float64)) * mask
    gradients = []
    for forwards in (1, 2):
        policy.zero_grad()
        logps, _ = policy(tokens, mask)
        if forwards == 1:
            loss = GRPO(tis_clip=1.1, tis_level=level)(LossInputs(logps, mask, advantages, sampler_logps=sampler)).loss
        else:
            with torch.no_grad():
                log_weight = (policy(tokens, mask)[0] - sampler) * mask
                if level == "sequence":
                    log_weight = log_weight.sum(-1, keepdim=True)
                weight = log_weight.exp().clamp(max=1.1)
            values = -weight * (logps - logps.detach()).exp() * advantages[:, None] * mask
            loss = (values.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)
