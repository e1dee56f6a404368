"""Packed rows and compiled decoders give what the plain path gives, or the run stops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import quiet_trainer
from loss_cases import LOSSES, make_inputs
from test_invariance import even_first_digit
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from callbacks import HFRollout
from lit_grpo.data import RolloutData, Source
from lit_grpo.data.collate import Row, collate
from lit_grpo.data.types import Completion
from lit_grpo.engines import full_weights
from lit_grpo.errors import UserError
from lit_grpo.logprobs import completion_logps
from lit_grpo.losses import DPO, GRPO, Loss, TwoGRPO, diagnostics
from lit_grpo.module import PolicyModule
from lit_grpo.policy import Policy, load_policy
from lit_grpo.side_by_side import Layout, side_by_side
from lit_grpo.tally import Tally

SIZES: dict[str, Any] = {
    "vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma2, with sliding windows and soft caps": lambda: Gemma2Config(**SIZES, sliding_window=4),
}


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Of different lengths; after the last token that counts, anything may stand."""
    tokens = torch.randint(16, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 11, dtype=torch.bool)
    for row, (start, end) in enumerate([(2, 11), (1, 3), (5, 9), (4, 5)]):
        mask[row, start:end] = True
    return tokens, mask


def rows_of_three_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Six completions of the first, one of the second, which begins as the first does, and two of the third."""
    draw = torch.Generator().manual_seed(0)
    prompts = [[5, 6, 7]] * 6 + [[5, 6]] + [[7, 5, 6, 8]] * 2
    tokens = torch.randint(16, (9, 12), generator=draw)
    mask = torch.zeros(9, 11, dtype=torch.bool)
    for row, (prompt, length) in enumerate(zip(prompts, [4, 1, 9, 2, 3, 1, 5, 8, 1], strict=True)):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, len(prompt) - 1 :][:length] = True
    return tokens, mask


def logps_and_gradients(policy: Policy, rows: Callable[[], tuple[torch.Tensor, torch.Tensor]] = rows) -> list[Any]:
    tokens, mask = rows()
    policy.zero_grad()
    logps, entropy = policy(tokens, mask, 0.8, entropy=True)
    weights = torch.rand(mask.shape, dtype=logps.dtype, generator=torch.Generator().manual_seed(1))
    (weights * (logps + entropy)).sum().backward()
    return [logps.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_do_not_see_each_other(name: str, attention: str):
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(MODELS[name]())).double()
    policy.speed_up(attention, packing=False, share_prompts=False, compiled=False)
    plain = logps_and_gradients(policy)
    policy.speed_up(None, packing=True, share_prompts=False, compiled=False)
    read: list[torch.Size] = []
    policy.lm.base_model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape))
    torch.testing.assert_close(logps_and_gradients(policy), plain, rtol=0, atol=1e-6)  # norms compute in float32
    assert read == [(1, 11 + 3 + 9 + 5)]
    with policy.plainly():  # with sdpa
        exactly = 0 if attention == "sdpa" else 1e-6
        torch.testing.assert_close(logps_and_gradients(policy), plain, rtol=0, atol=exactly)
    assert (policy.packing, policy.lm.config._attn_implementation) == (True, attention)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rows_that_share_a_prompt_do_not_see_each_other(name: str):
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(MODELS[name]())).double()
    plain = logps_and_gradients(policy, rows_of_three_prompts)
    policy.speed_up(None, packing=False, share_prompts=True, compiled=False)
    read: list[torch.Tensor] = []
    policy.lm.base_model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    torch.testing.assert_close(logps_and_gradients(policy, rows_of_three_prompts), plain, rtol=0, atol=1e-6)
    tokens, _ = rows_of_three_prompts()
    (shared,) = read  # of n completion tokens n - 1 are read
    assert shared.shape == (4, 3 + 3 + 0 + 8 + 1)
    assert shared[0].tolist() == [5, 6, 7, *tokens[0, 3:6], *tokens[2, 3:11], tokens[3, 3]]
    assert shared[1].tolist() == [5, 6, 7, *tokens[4, 3:5], *[0] * 10]
    assert shared[2].tolist() == [5, 6, *tokens[6, 2:6], *[0] * 9]
    assert shared[3].tolist() == [7, 5, 6, 8, *tokens[7, 4:11], *[0] * 4]
    with policy.plainly():
        torch.testing.assert_close(logps_and_gradients(policy, rows_of_three_prompts), plain, rtol=0, atol=0)


def test_a_model_that_cannot_share_prompts_is_named():
    windows = Policy(AutoModelForCausalLM.from_config(MODELS["gemma2, with sliding windows and soft caps"]()))
    with pytest.raises(UserError, match=r"model.share_prompts: .* has sdpa with layers of other kinds"):
        windows.speed_up("sdpa", packing=False, share_prompts=True, compiled=False)
    with pytest.raises(UserError, match=r"model.share_prompts: .* this model has eager\. Leave it out"):
        Policy(AutoModelForCausalLM.from_config(MODELS["llama"]())).speed_up("eager", False, True, False)
    inside = Gemma3Config(text_config={**SIZES, "sliding_window": 4})  # has its kinds of layers in text_config
    with pytest.raises(UserError, match=r"model.share_prompts: .* has sdpa with layers of other kinds"):
        Policy(AutoModelForCausalLM.from_config(inside)).speed_up("sdpa", False, True, False)
    unnamed = Policy(AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=4)))  # has no layer_types
    with pytest.raises(UserError, match=r"model.share_prompts: .* has sdpa with layers of other kinds"):
        unnamed.speed_up(None, packing=False, share_prompts=True, compiled=False)


def test_a_model_whose_layers_carry_a_state_is_not_packed():
    """As the short convolutions of LFM2 do, and the linear attention of Qwen3-Next."""
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}
    convolutions = AutoModelForCausalLM.from_config(Lfm2Config(**sizes, layer_types=["conv", "full_attention"]))
    with pytest.raises(UserError, match=r"model.packing: layers of Lfm2ForCausalLM carry a state"):
        Policy(convolutions).speed_up(None, packing=True, share_prompts=False, compiled=False)
    states = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(UserError, match=r"model.packing: layers of MambaForCausalLM carry a state"):
        Policy(states).speed_up(None, packing=True, share_prompts=False, compiled=False)


def test_a_compiled_decoder_gives_the_same(model: str):
    policy = load_policy(model)
    plain = logps_and_gradients(policy)
    policy.speed_up(None, packing=False, share_prompts=False, compiled=True)
    torch.testing.assert_close(logps_and_gradients(policy), plain, rtol=1e-4, atol=1e-5)


class Unwatched(HFRollout):
    def canary(self, *_: Any) -> None:
        """It would notice too, and sooner."""


def fit(
    model: str, prompts: str, folder: Path, group_size: int = 2, micro_batches: int = 1, **settings: Any
) -> dict[str, torch.Tensor]:
    module = PolicyModule(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **settings)
    phase = {"prompts_per_phase": 8, "updates_per_phase": 2, "group_size": group_size}
    data = RolloutData(Source(prompts), reward=even_first_digit, **phase)
    options = {"max_epochs": 2, "accumulate_grad_batches": micro_batches, "callbacks": [Unwatched(max_tokens=4)]}
    quiet_trainer(folder, **options).fit(module, data)
    return dict(full_weights(module.policy))


def test_a_run_is_the_same_with_them(model: str, many_prompts: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    plain = fit(model, many_prompts, tmp_path)
    with caplog.at_level("INFO"):
        packed = fit(model, many_prompts, tmp_path, packing=True)
        shared = fit(model, many_prompts, tmp_path, share_prompts=True)
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    assert sum("Checked against the plain path" in record.getMessage() for record in caplog.records) == 2


def test_shared_prompts_that_are_read_wrongly_stop_the_run(
    model: str, many_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def all_see_all(*rows: torch.Tensor) -> Layout:
        layout = side_by_side(*rows)
        return replace(layout, attends=torch.ones_like(layout.attends))

    monkeypatch.setattr("lit_grpo.policy.side_by_side", all_see_all)
    with pytest.raises(UserError, match=r"model.share_prompts: log-probs differ from the plain path's by"):
        fit(model, many_prompts, tmp_path, share_prompts=True)


@pytest.mark.parametrize(("option", "value"), [("compile", True), ("attention", "eager")])
def test_what_computes_otherwise_is_checked_in_the_first_micro_batch(
    option: str, value: Any, model: str, many_prompts: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO"):
        fit(model, many_prompts, tmp_path, **{option: value})
    assert sum("Checked against the plain path" in record.getMessage() for record in caplog.records) == 1


def test_a_decoder_that_is_compiled_wrongly_stops_the_run(
    model: str, many_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def wrong(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        return lambda *args: [1.5 * x if x.is_floating_point() else x for x in graph(*args)]

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled(module, backend=wrong))
    with pytest.raises(UserError, match=r"model.compile: log-probs differ from the plain path's by"):
        fit(model, many_prompts, tmp_path, compile=True)


def test_an_attention_that_is_wrong_stops_the_run(
    model: str, many_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def wrong(module: Any, query: Any, key: Any, value: torch.Tensor, *args: Any, **options: Any) -> Any:
        return value.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "wrong", wrong)
    with pytest.raises(UserError, match=r"model.attention: log-probs differ from the plain path's by"):
        fit(model, many_prompts, tmp_path, attention="wrong")


def test_one_row_that_is_read_wrongly_is_enough(model: str, monkeypatch: pytest.MonkeyPatch):
    """Though on average over all rows the difference is small."""
    rows = [Row([3, 4], Completion([5, i]), 1.0) for i in range(1, 9)]
    batch = collate(rows, 8, 16)
    module = PolicyModule(model, packing=True, max_mismatch=0.1)
    module.policy = load_policy(model)
    monkeypatch.setattr(PolicyModule, "logps_of", lambda *_: torch.zeros(batch.mask.shape))
    module.compare_with_plain(torch.zeros(batch.mask.shape), batch)
    wrong = torch.where(batch.mask & (torch.arange(8) == 3)[:, None], 0.5, 0.0)
    with pytest.raises(UserError, match=r"differ from the plain path's by 0.5 on a row's average"):
        module.compare_with_plain(wrong, batch)


@pytest.mark.parametrize("loss", [GRPO, DPO])
def test_larger_groups_share_their_prompts(loss: type, model: str, many_prompts: str, tmp_path: Path):
    plain = fit(model, many_prompts, tmp_path, 6, 4, loss=loss())
    shared = fit(model, many_prompts, tmp_path, 6, 4, loss=loss(), share_prompts=True)
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    if loss is GRPO:
        with pytest.raises(
            UserError, match=r"9 micro-batches need at least as many sets of 3 rows .* update has 8 per"
        ):
            fit(model, many_prompts, tmp_path, 6, 9, share_prompts=True, loss=loss())


def test_a_policy_that_is_wrapped_is_sped_up_too(model: str, monkeypatch: pytest.MonkeyPatch):
    """As by fsdp."""
    monkeypatch.setattr("lit_grpo.module.load_policy", lambda *_: torch.nn.Sequential(load_policy(model)))
    trainer = SimpleNamespace(strategy=None, state=SimpleNamespace(fn="fit"))
    monkeypatch.setattr(PolicyModule, "trainer", trainer)
    module = PolicyModule(model, packing=True)
    module.configure_model()
    assert isinstance(module.policy, torch.nn.Sequential)
    assert module.policy[0].packing


def test_packed_rows_share_no_prompt(model: str):
    with pytest.raises(UserError, match=r"model.share_prompts: rows that are packed"):
        PolicyModule(model, packing=True, share_prompts=True)


def test_rows_that_see_each_other_stop_the_run(
    model: str, many_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As where an attention knows nothing of positions that begin again."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    with pytest.raises(UserError, match=r"model.packing: log-probs differ from the plain path's by"):
        fit(model, many_prompts, tmp_path, packing=True)


def test_an_attention_that_is_not_there_is_named(model: str, many_prompts: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"model.attention: .*nonsense"):
        fit(model, many_prompts, tmp_path, attention="nonsense")


def fake_policy() -> Policy:
    """Without values, under ``FakeTensorMode``."""
    return Policy(AutoModelForCausalLM.from_config(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})))


@pytest.mark.parametrize("name", LOSSES)
def test_no_micro_batch_waits_for_the_device(name: str):
    """Where tensors have no values, whoever asks for one, or for a shape that depends on them, raises."""
    loss = LOSSES[name]
    real = make_inputs(loss, rows=4, width=8)
    tokens, places = torch.zeros(4, 9, dtype=torch.int64), real.mask.flatten().nonzero().squeeze(-1)
    with FakeTensorMode() as fake:
        policy = fake_policy()
        tensors = {key: fake.from_tensor(x) for key, x in vars(real).items() if isinstance(x, torch.Tensor)}
        tokens, places = fake.from_tensor(tokens), fake.from_tensor(places)
        logps, entropy = policy(tokens, tensors["mask"], 0.8, loss.needs_entropy, places)
        inputs = replace(real, **tensors | {"logps": logps, "entropy": entropy})
        output = loss(inputs)
        Tally().add({"loss": output.loss.detach(), **diagnostics(inputs), **output.metrics})
        output.loss.backward()
        assert all(p.grad is not None for p in policy.parameters())
        with pytest.raises(DynamicOutputShapeException):  # which shows that it would be noticed
            policy(tokens, tensors["mask"])


@pytest.mark.parametrize("loss", [TwoGRPO(), DPO()])
def test_no_step_waits_for_the_device(loss: Loss, model: str, monkeypatch: pytest.MonkeyPatch):
    """All of ``training_step`` and its backward, where tensors have no values; after the first, which is looked at."""
    module = PolicyModule(model, loss)
    module.unproven, module.max_mismatch = False, 1.0
    trainer = SimpleNamespace(
        global_step=0, accumulate_grad_batches=2, world_size=1,
        strategy=SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=contextlib.nullcontext)),
    )  # fmt: skip
    monkeypatch.setattr(PolicyModule, "trainer", trainer)
    monkeypatch.setattr("lit_grpo.module.data_rank", lambda _: (0, 1))
    pair = [Row([3, 4], Completion([5, 1], [-0.5, -0.5]), sign) for sign in (1.0, -1.0)]
    real = collate(pair, 2, 4).to("cpu")
    with FakeTensorMode() as fake:
        module.policy, module.reference = fake_policy(), fake_policy() if loss.needs_reference else None
        tensors = {key: fake.from_tensor(x) for key, x in vars(real).items() if isinstance(x, torch.Tensor)}
        places = tensors.pop("places")
        batch = replace(real, **tensors)
        batch.places = places
        module.training_step(batch, 1).backward()
        assert all(p.grad is not None for p in module.policy.parameters())
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):  # so it would be noticed
            module.training_step(batch, 0)


def test_a_step_is_told_where_its_tokens_are(
    model: str, many_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told: list[bool] = []

    def watched(*arguments: Any) -> Any:
        told.append(arguments[-1] is not None)
        return completion_logps(*arguments)

    monkeypatch.setattr("lit_grpo.policy.completion_logps", watched)
    fit(model, many_prompts, tmp_path)
    assert told == [False] + [True] * 4  # the first as it is loaded
    batch = collate([Row([3, 4], Completion([5, 1]), 1.0)], 1, 2)
    assert batch.to("cpu").places.tolist() == [1, 2]
    assert replace(batch.to("cpu"), mask=batch.mask).places is None  # never of another mask


@pytest.mark.parametrize(
    ("option", "prompts", "proven"),
    [
        ("packing", [[3, 4]], False),
        ("packing", [[3, 4], [5]], True),
        ("share_prompts", [[3, 4], [5]], False),
        ("share_prompts", [[5], [3, 4], [3, 4]], True),
        ("compile", [[3, 4]], True),
    ],
)
def test_rows_in_which_nothing_could_go_wrong_prove_nothing(
    option: str, prompts: list[list[int]], proven: bool, model: str, monkeypatch: pytest.MonkeyPatch
):
    module = PolicyModule(model, **{option: True})
    module.policy, module.unproven, module.max_mismatch = load_policy(model), True, 1e-3
    module.policy.speed_up(None, module.packing, module.share_prompts, compiled=False)
    compared: list[int] = []
    monkeypatch.setattr(module, "compare_with_plain", lambda logps, batch: compared.append(len(logps)))
    monkeypatch.setattr(
        PolicyModule,
        "trainer",
        SimpleNamespace(
            global_step=0, accumulate_grad_batches=1, world_size=1,
            strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
        ),
    )  # fmt: skip
    monkeypatch.setattr("lit_grpo.module.data_rank", lambda _: (0, 1))
    rows = [Row(prompt, Completion([5, 1]), 1.0) for prompt in prompts]
    module.training_step(collate(rows, len(rows), 2, on_policy=True).to("cpu"), 0)
    assert compared == [len(rows)] * proven
