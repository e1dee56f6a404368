"""What a phase costs, in counts that are the same on every machine: passes, tokens, tensors. A guard for speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import quiet_trainer
from test_invariance import ScriptedRollout, even_first_digit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from callbacks import Ledger
from lit_grpo.data import RolloutData, Source
from lit_grpo.losses import DPO, GRPO, Loss, LossInputs, TwoGRPO, diagnostics
from lit_grpo.module import PolicyModule
from lit_grpo.policy import Policy
from lit_grpo.quickstart import small_qwen


class Counted(TorchDispatchMode):
    """Operations, and the elements of the largest tensor that one made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        made = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.largest = max([self.largest, *made])
        return result


def phase(
    model: str, prompts: str, folder: Path, loss: Loss, monkeypatch: pytest.MonkeyPatch, share_prompts: bool = False
) -> tuple[list[tuple[bool, int]], RolloutData]:
    """Each forward pass of a phase in four micro-batches: whether it was the policy's, and tokens with padding."""
    passes: list[tuple[bool, int]] = []
    decoded = Policy.decoded

    def counted(policy: Policy, tokens: torch.Tensor, **more: Any) -> Any:
        passes.append((policy.training, tokens.numel()))
        return decoded(policy, tokens, **more)

    monkeypatch.setattr(Policy, "decoded", counted)
    data = RolloutData(Source(prompts), reward=even_first_digit, prompts_per_phase=64)
    trainer = quiet_trainer(
        folder, max_epochs=1, accumulate_grad_batches=4, callbacks=[Ledger(), ScriptedRollout(max_tokens=12)]
    )
    trainer.fit(PolicyModule(model, loss, max_mismatch=100, share_prompts=share_prompts), data)
    return passes, data


def tokens_of(data: RolloutData, trains: Any, prompts_of_each: int = 2) -> int:
    """Prompt and completion tokens of the groups that ``trains`` says of their rewards, but each row's last token."""
    n = data.group_size
    groups = [data.samples[i : i + n] for i in range(0, len(data.samples), n)]
    return sum(
        prompts_of_each * len(group[0].prompt) + sum(s.num_tokens - 1 for s in group)
        for group in groups
        if trains({s.reward for s in group})
    )


@pytest.mark.parametrize("loss", [TwoGRPO(), GRPO()])
def test_ties_and_padding_cost_nothing(
    loss: Loss, model: str, many_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passes, data = phase(model, many_prompts, tmp_path, loss, monkeypatch)
    assert [policy for policy, _ in passes] == [True] * 4
    trained, all_rows = tokens_of(data, lambda rewards: len(rewards) > 1), tokens_of(data, lambda _: True)
    assert 0 < trained < 0.7 * all_rows
    assert trained <= sum(tokens for _, tokens in passes) < 1.25 * trained


def test_a_prompt_that_is_shared_is_read_once(
    model: str, many_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """But in the first micro-batch, which is also read plainly, and not counted."""
    passes, data = phase(model, many_prompts, tmp_path, TwoGRPO(), monkeypatch, share_prompts=True)
    assert len(passes) == 5
    each_row, each_pair = (tokens_of(data, lambda rewards: len(rewards) > 1, prompts) for prompts in (2, 1))
    read = sum(tokens for _, tokens in passes) - passes[1][1]
    assert each_pair <= read < 1.25 * each_pair < each_row
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert (ledger["tokens_scored"], ledger["tokens_forwarded"]) == (0, read)


def test_a_reference_costs_one_pass_for_each_micro_batch(
    model: str, many_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passes, _ = phase(model, many_prompts, tmp_path, DPO(), monkeypatch)
    assert [policy for policy, _ in passes] == [False, True] * 4
    assert passes[::2] == [(False, tokens) for _, tokens in passes[1::2]]
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["tokens_forwarded"] == ledger["tokens_scored"] == sum(tokens for _, tokens in passes[::2])


def wide() -> Policy:
    """Of a model with more words than weights elsewhere."""
    return Policy(small_qwen(vocab_size=4096, hidden_size=32, intermediate_size=64)).train()


def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch):
    """Of 64 completion tokens, here those of 16 at most, forward and backward; of prompts none."""
    monkeypatch.setattr("lit_grpo.logprobs.CHUNK_LOGITS", 16 * 4096)
    tokens, mask = torch.randint(4096, (4, 33)), torch.arange(32).expand(4, -1) >= 16
    policy = wide()
    with Counted() as plain:
        policy.lm(tokens).logits.log_softmax(-1).sum().backward()
    with Counted() as ours:
        policy(tokens, mask)[0].sum().backward()
    assert plain.largest == 4 * 33 * 4096
    assert ours.largest == 32 * 4096  # the gradient of the embeddings


def test_few_operations_stand_beside_the_model_s():
    """Those of log-probs, loss and metrics of a micro-batch, forward and backward, whatever the model."""
    tokens, mask = torch.randint(4096, (4, 33)), torch.arange(32).expand(4, -1) >= 16
    policy, loss = wide(), GRPO()
    with Counted() as decoder:
        policy.lm.base_model(tokens[:, :-1], use_cache=False).last_hidden_state.sum().backward()
    places = mask.flatten().nonzero().squeeze(-1)
    with Counted() as whole:
        logps, _ = policy(tokens, mask, places=places)
        inputs = LossInputs(logps, mask, torch.ones(4), old_logps=logps.detach(), total_rows=4, total_tokens=64)
        output = loss(inputs)
        diagnostics(inputs)
        output.loss.backward()
    assert whole.operations - decoder.operations <= 160
