"""Adapters, and policies as Hugging Face folders: trained, saved, exported, evaluated."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENVIRONMENT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from lit_grpo.__main__ import main
from lit_grpo.engines import full_weights
from lit_grpo.errors import UserError
from lit_grpo.export import save_pretrained
from lit_grpo.lora import LoRA, adapters_off
from lit_grpo.losses import LossInputs, LossOutput, TwoGRPO
from lit_grpo.module import PolicyModule
from lit_grpo.policy import Policy, load_policy, load_tokenizer
from lit_grpo.quickstart import small_qwen

LORA = "--model.lora={r: 4, alpha: 64}"


@pytest.fixture
def command(model: str, many_prompts: str) -> list[str]:
    """Two phases of a real run, at a rate that moves weights."""
    return [
        "fit", f"--model.model={model}", "--model.loss=GRPO", "--model.loss.beta=0.1", "--model.optimizer=AdamW",
        "--model.optimizer.lr=1e-2", "--data=RolloutData", f"--data.train.path={many_prompts}", "--data.group_size=4",
        f"--data.val.path={many_prompts}", "--data.prompts_per_phase=8", "--trainer.num_sanity_val_steps=0",
        "--data.reward=test_invariance.even_first_digit", "--rollout.max_tokens=4", "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu", "--checkpoint.every_n_phases=1",
    ]  # fmt: skip


class Remembers(TwoGRPO):
    """A loss with a state of its own."""

    def __init__(self, **shared: Any) -> None:
        super().__init__(**shared)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: LossInputs) -> LossOutput:
        self.seen += 1
        return super().forward(inputs)


@pytest.mark.parametrize("lora", [True, False])
def test_a_loss_may_have_a_state(lora: bool, model: str, many_prompts: str, tmp_path: Path):
    command = [
        "fit", f"--model.model={model}", "--model.loss=test_export.Remembers", "--data=RolloutData",
        f"--data.train.path={many_prompts}", "--data.reward=test_invariance.even_first_digit",
        "--data.prompts_per_phase=8", "--rollout.max_tokens=4", "--trainer.accelerator=cpu",
        f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last", *(["--model.lora={r: 2}"] if lora else []),
    ]  # fmt: skip
    for phases in (2, 3):
        main([*command, f"--trainer.max_epochs={phases}"])
    held = torch.load(tmp_path / "run" / "checkpoints" / "phase-00003.ckpt", weights_only=True)
    assert held["state_dict"]["loss.seen"] == 3
    main(["export", str(tmp_path / "run"), str(tmp_path / "exported")])
    assert any((tmp_path / "exported").glob("*.safetensors"))


def merged_by_peft(model: str, folder: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    names = expected.keys() - {"lm_head.weight"}  # tied
    assert names == found.keys() - {"lm_head.weight"}
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


class TestAdapters:
    def test_they_begin_by_changing_nothing_and_are_all_that_trains(self, model: str):
        policy = load_policy(model, lora=LoRA())
        assert_same(dict(full_weights(policy)), dict(full_weights(load_policy(model))))
        layers = {name.split(".lora_")[0] for name, p in policy.named_parameters() if p.requires_grad}
        assert {name for name, p in policy.named_parameters() if p.requires_grad and ".lora_" not in name} == set()
        assert len(layers) == 7 * len(policy.lm.model.layers)  # every linear layer but the head

    def test_the_layers_can_be_named(self, model: str):
        policy = load_policy(model, lora=LoRA(targets=["q_proj"]))
        assert all("q_proj" in name for name, p in policy.named_parameters() if p.requires_grad)
        with pytest.raises(UserError, match=r"model.lora.targets: .*no_such_layer"):
            load_policy(model, lora=LoRA(targets=["no_such_layer"]))
        with pytest.raises(UserError, match=r"model.lora.targets: .*lm_head stands outside the decoder layers"):
            load_policy(model, lora=LoRA(targets=["q_proj", "lm_head"]))
        with pytest.raises(UserError, match=r"model.lora.r: expected a whole number >= 1, got 0"):
            LoRA(r=0)

    def test_what_the_engine_could_not_be_given_is_refused(self, tmp_path: Path):
        """Experts that are one parameter have adapters of another kind."""
        sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        config = Qwen3MoeConfig(**sizes, **heads, num_experts=2, num_experts_per_tok=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"experts of Qwen3MoeForCausalLM is no linear layer"):
            load_policy(str(tmp_path), lora=LoRA())

    def test_switched_off_they_leave_the_model_and_go_on_training(self, model: str):
        policy, plain = load_policy(model, lora=LoRA(r=4)), load_policy(model)
        for name, p in policy.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(p)
        tokens, mask = torch.tensor([[3, 4, 5]]), torch.tensor([[True, True]])
        with adapters_off(policy.lm):
            torch.testing.assert_close(policy(tokens, mask)[0], plain(tokens, mask)[0])
        logps, _ = policy(tokens, mask)
        assert (logps - plain(tokens, mask)[0]).abs().max() > 0.01
        logps.sum().backward()
        assert all(p.grad is not None for name, p in policy.named_parameters() if ".lora_" in name)

    def test_without_peft_it_is_said_how_to_get_it(self, model: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(UserError, match=r'adapters need peft. Install it with pip install "lit-grpo\[lora\]"'):
            load_policy(model, lora=LoRA())


def test_processes_that_do_not_write_keep_nothing(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy, held = load_policy(model), []

    def gathered(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in policy.lm.state_dict().items():
            assert sum(seen() is not None for seen in held) <= 1
            copy = tensor.clone()
            held.append(weakref.ref(copy))
            yield name, copy
            del copy

    monkeypatch.setattr("lit_grpo.export.full_weights", gathered)
    save_pretrained(policy, load_tokenizer(model), tmp_path / "out", merge=False, write=False)
    assert len(held) == len(policy.lm.state_dict())
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_model_are_warned_of(model: str):
    module, of_another = PolicyModule(model, lora=LoRA()), {}
    PolicyModule(model, lora=LoRA()).on_save_checkpoint(of_another)
    of_another["policy"]["model"] = "/elsewhere/model"
    with pytest.warns(UserWarning, match=r"adapters were trained on '/elsewhere/model', this run has"):
        module.on_load_checkpoint(of_another)


def test_a_run_with_adapters_is_saved_exported_and_evaluated(
    command: list[str], model: str, many_prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    main([*command, LORA, f"--run_dir={run}"])
    assert {path.name for path in (run / "pretrained").glob("adapter*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    checkpoint = torch.load(run / "checkpoints" / "phase-00002.ckpt", weights_only=True)
    assert all(".lora_" in name for name in checkpoint["state_dict"])
    assert checkpoint["policy"]["model"] == model
    assert checkpoint["policy"]["lora"] == {"r": 4, "alpha": 64, "targets": []}

    main(["export", str(run), str(tmp_path / "adapters")])
    main(["export", str(run / "checkpoints" / "phase-00002.ckpt"), str(tmp_path / "merged"), "--merge"])
    adapters = load_file(run / "pretrained" / "adapter_model.safetensors")
    assert_same(load_file(tmp_path / "adapters" / "adapter_model.safetensors"), adapters)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert_same(merged, merged_by_peft(model, run / "pretrained"))
    start = load_policy(model).lm.state_dict()
    assert (merged["model.layers.0.mlp.up_proj.weight"] - start["model.layers.0.mlp.up_proj.weight"]).abs().max() > 1e-3
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert lm.config.eos_token_id == load_policy(model).lm.config.eos_token_id
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(AutoTokenizer.from_pretrained(model))

    test = ["test", "--data=PromptData", f"--data.val.path={many_prompts}", "--rollout.max_tokens=4"]
    main([*test, f"--model.model={tmp_path / 'merged'}", f"--run_dir={tmp_path / 'of_merged'}"])
    of_checkpoint = [f"--model.model={model}", LORA, f"--ckpt_path={run}", f"--run_dir={tmp_path / 'of_checkpoint'}"]
    main([*test, *of_checkpoint])
    scores = [
        json.loads((tmp_path / of / "results" / "table.json").read_text()) for of in ("of_merged", "of_checkpoint")
    ]
    assert scores[0]["benchmarks"] == scores[1]["benchmarks"]

    for wrong, said in (
        (
            ["test", *test[1:], f"--model.model={run / 'pretrained'}", f"--run_dir={tmp_path / 'x'}"],
            "holds adapters only",
        ),
        (["export", str(run), str(tmp_path / "merged")], "merged' is not empty"),
        (["export", str(tmp_path / "nowhere"), str(tmp_path / "y")], "nowhere' is neither a checkpoint"),
        (["export", str(run / "pretrained"), str(tmp_path / "y2")], "pretrained' is neither a checkpoint"),
        (["export", str(run), str(tmp_path / "merged" / "config.json" / "y")], "OUT: cannot write"),
        (["export", str(run), str(tmp_path / "y"), f"--model={tmp_path}"], "say where it lies now with --model"),
        ([*command, "--model.lora={r: 8}", f"--run_dir={tmp_path / 'z'}", f"--ckpt_path={run}"], "run with model.lora"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    for nothing in ("y", "y2"):
        assert not (tmp_path / nothing).exists()


def test_an_export_that_fails_leaves_nothing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    main([*command, f"--run_dir={tmp_path / 'run'}"])
    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        with pytest.raises(SystemExit) as stop:
            main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert stop.value.code == 2
    assert re.search(r"OUT: cannot write '.*out': .*No space left on device. Make room", capsys.readouterr().err)
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    main(["export", str(tmp_path / "run"), "."])
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"num_hidden_layers": 1}, r"is \[128\]; here it is missing"),
        ({"num_hidden_layers": 4}, r"is missing; here it is \[128\]"),
        ({"intermediate_size": 64}, r"is \[128, 256\]; here it is \[128, 64\]"),
    ],
)
def test_a_model_that_is_another_is_not_written(
    size: dict[str, int], said: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    module = PolicyModule(model)
    held: dict[str, Any] = {"state_dict": {f"policy.{k}": x for k, x in load_policy(model).state_dict().items()}}
    module.on_save_checkpoint(held)
    torch.save(held, tmp_path / "phase-00001.ckpt")
    shutil.copytree(model, tmp_path / "other")
    small_qwen(**{"vocab_size": module.vocab_size} | size).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "phase-00001.ckpt"), str(tmp_path / "out"), f"--model={tmp_path / 'other'}"])
    assert re.search(rf"'.*other' is not the model of '.*ckpt', in which policy.\S+ {said}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.vllm
@pytest.mark.parametrize("lora", [False, True])
def test_two_processes_share_train_save_export_and_evaluate(
    lora: bool, command: list[str], model: str, many_prompts: str, tmp_path: Path
):
    """FSDP2, and a vLLM in each process."""
    run, lit_grpo = tmp_path / "run", [sys.executable, "-m", "lit_grpo"]
    two = ["--trainer.strategy=fsdp2", "--trainer.devices=2", "--trainer.accelerator=cpu", "--rollout=VLLMRollout"]
    two += [LORA] if lora else []
    subprocess.run([*lit_grpo, *command, *two, f"--run_dir={run}"], check=True, env=ENVIRONMENT, timeout=300)
    assert (run / "checkpoints" / "phase-00002.ckpt").is_dir()
    main(["export", str(run), str(tmp_path / "exported"), *(["--merge"] if lora else [])])
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    if lora:
        assert_same(exported, merged_by_peft(model, run / "pretrained"))
    else:
        assert_same(exported, load_file(run / "pretrained" / "model.safetensors"))
    start = load_policy(model).lm.state_dict()
    assert (
        exported["model.layers.0.mlp.up_proj.weight"] - start["model.layers.0.mlp.up_proj.weight"]
    ).abs().max() > 1e-3

    test = ["test", f"--model.model={model}", "--data=PromptData", f"--data.val.path={many_prompts}"]
    test += ["--rollout.max_tokens=4", f"--ckpt_path={run}", f"--run_dir={tmp_path / 'evaluated'}"]
    subprocess.run([*lit_grpo, *test, *two], check=True, env=ENVIRONMENT, timeout=300)
    alone = [f"--model.model={tmp_path / 'exported'}", f"--run_dir={tmp_path / 'alone'}", "--rollout=VLLMRollout"]
    main([*test, *alone, "--ckpt_path=null", "--trainer.accelerator=cpu"])
    tables = [json.loads((tmp_path / of / "results" / "table.json").read_text()) for of in ("evaluated", "alone")]
    assert tables[0]["benchmarks"] == tables[1]["benchmarks"]
