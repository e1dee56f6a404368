"""What goes wrong between processes: unequal work, one that hangs, dies or is told to end; and loading in shares."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import ENVIRONMENT, quiet_trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from test_invariance import ScriptedRollout, even_first_digit, rank
from transformers import AutoModelForCausalLM, Glm4MoeConfig, GPT2Config, GPT2LMHeadModel

import lit_grpo.policy
from lit_grpo.data import RolloutData, Sample, Source
from lit_grpo.engines import Deadline, full_weights
from lit_grpo.errors import UserError
from lit_grpo.lora import LoRA
from lit_grpo.losses import GRPO
from lit_grpo.module import PolicyModule
from lit_grpo.policy import load_policy, load_reference
from lit_grpo.sharding import FSDP2, split_layers

CALLS = []


def eventful(samples: list[Sample]) -> list[float]:
    """Ties on the second process, to which something happens in the second phase."""
    CALLS.append(len(samples))
    if rank() == 1 and len(CALLS) == 3:  # the first call is a check, on gold answers
        if os.environ.get("EVENT") == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("EVENT") == "told":
            os.kill(os.getpid(), signal.SIGTERM)
    return [0.0] * len(samples) if rank() == 1 else even_first_digit(samples)


@pytest.fixture
def command(model: str, many_prompts: str, tmp_path: Path) -> list[str]:
    """Three phases in two processes that share the model; every micro-batch and checkpoint needs both."""
    return [
        "-m", "lit_grpo", "fit", f"--model.model={model}", "--model.optimizer=AdamW", "--model.optimizer.lr=1e-3",
        "--data=RolloutData", f"--data.train.path={many_prompts}", "--data.prompts_per_phase=16",
        "--data.reward=test_distributed.eventful", "--data.updates_per_phase=2",
        "--rollout.max_tokens=4", "--trainer.max_epochs=3", "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--trainer.strategy=fsdp2", "--trainer.accumulate_grad_batches=3", "--checkpoint.every_n_phases=1",
        f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last",
    ]  # fmt: skip


def run(arguments: list[str], **environment: str) -> tuple[int, str]:
    """Exit code and words of a command that must come to its end."""
    process = subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=200
    )
    return process.returncode, process.stdout + process.stderr


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").glob("*"))


def test_work_is_equal_where_one_process_has_nothing_but_ties(command: list[str], tmp_path: Path):
    """Started as torchrun does on every node. With unequal numbers of passes the processes would wait for ever."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    code, said = run([*torchrun, "--rdzv-endpoint=localhost:0", *command])
    assert code == 0, said
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        shares = [float(row["train/informative_share"]) for row in csv.DictReader(file)]
    assert len(shares) == 3
    assert all(0 < share <= 0.5 for share in shares)  # the second process has none
    assert checkpoints(tmp_path) == ["phase-00002.ckpt", "phase-00003.ckpt"]


def test_a_process_that_dies_ends_the_run_which_then_goes_on(command: list[str], tmp_path: Path):
    code, said = run(command, EVENT="dies")
    assert code != 0
    assert "phase-00001.ckpt is kept. To go on, repeat the command with" in said
    assert checkpoints(tmp_path) == ["phase-00001.ckpt"]
    code, said = run(command)
    assert code == 0, said
    assert "Going on from" in said
    assert checkpoints(tmp_path) == ["phase-00002.ckpt", "phase-00003.ckpt"]


def test_it_is_enough_that_one_process_is_told_to_end(command: list[str], tmp_path: Path):
    code, said = run(command, EVENT="told")
    assert code == 128 + signal.SIGTERM, said
    assert checkpoints(tmp_path) == ["phase-00001.ckpt", "phase-00002.ckpt"]
    assert not (tmp_path / "run" / "pretrained").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_named_and_leaves_nothing_behind(processes: int, command: list[str], tmp_path: Path):
    """Files of more than half a MiB cannot be written, as the weights, and each process's share of them, are."""
    command = [*command, f"--trainer.devices={processes}", *(["--trainer.strategy=auto"] if processes == 1 else [])]
    limited = ["-c", f"ulimit -f 512; exec {shlex.join([sys.executable, *command])}"]
    ended = subprocess.run(["bash", *limited], env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert ended.returncode != 0
    assert re.search(
        r"phase-00001.ckpt': (File too large|the file could not be written whole)\. Make room", ended.stderr
    )
    assert "Traceback" not in ended.stderr
    assert checkpoints(tmp_path) == []


class DiskOfTheFirstIsFull(L.Callback):
    """For what the first process alone writes: single files, or the folder of shares."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        save = torch.save

        def full(held: Any, path: Any, *arguments: Any, **options: Any) -> None:
            if trainer.is_global_zero and isinstance(path, str | Path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save(held, path, *arguments, **options)

        def no_folder(path: Path, *arguments: Any, **options: Any) -> None:
            if trainer.is_global_zero and path.suffix == ".unfinished":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            mkdir(path, *arguments, **options)

        mkdir = Path.mkdir
        if os.environ["FULL"] == "folder":
            Path.mkdir = no_folder
        else:
            torch.save = full


@pytest.mark.parametrize(("strategy", "what"), [("ddp", "file"), ("fsdp2", "file"), ("fsdp2", "folder")])
def test_a_full_disk_of_the_first_process_ends_others_which_do_not_wait_for_it(
    strategy: str, what: str, command: list[str], tmp_path: Path
):
    full = "--trainer.callbacks+=test_distributed.DiskOfTheFirstIsFull"
    code, said = run([*command, full, f"--trainer.strategy={strategy}"], FULL=what)
    assert code == 2
    assert said.count("phase-00001.ckpt': No space left on device. Make room") == 2  # of either process
    assert "Traceback" not in said
    assert checkpoints(tmp_path) == []


LATER = """
from lit_grpo.errors import UserError, mistakes_end_with_a_message
with mistakes_end_with_a_message("it"):
    raise UserError("a mistake")
"""
FIRST = """
import os, subprocess, sys
of_later = os.environ | {"LOCAL_RANK": "1"}
later = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=of_later, stderr=subprocess.PIPE)
later.stderr.readline()  # it has spoken
try:
    print("ends with", later.wait(2))
except subprocess.TimeoutExpired:
    print("waits")
"""


def test_the_first_process_ends_before_others_so_that_it_is_not_killed_in_its_message():
    """Lightning has another one's end kill it."""
    assert run(["-c", FIRST, LATER]) == (0, "waits\n")


def never_returns(samples: list[Sample]) -> list[float]:
    if rank() == 1 and len(samples) > 2:
        time.sleep(1000)
    return even_first_digit(samples)


def test_every_process_says_where_it_is_before_others_give_up(model: str, many_prompts: str, tmp_path: Path):
    code, said = run([__file__, json.dumps({"model": model, "prompts": many_prompts, "folder": str(tmp_path)})])
    assert code != 0
    for number in range(2):
        assert f"Process {number} of 2 has not come on for 27 s: phase 0, sampling" in said
    assert re.search(r"line \d+ in never_returns", said)
    assert "Timed out" in said  # of the one that waited


def fsdp2_of(processes: int) -> FSDP2:
    """The strategy with its mesh, as a Trainer would set it up."""
    strategy, names = FSDP2(), ("data_parallel", "tensor_parallel")
    strategy._device_mesh = torch.distributed.init_device_mesh("cpu", (processes, 1), mesh_dim_names=names)
    return strategy


def test_both_flags_save_shares():
    """Lightning's own ``fsdp`` gathers the whole model, the reference included, in one process."""
    assert StrategyRegistry.get("fsdp")._state_dict_type == "sharded"
    assert isinstance(StrategyRegistry.get("fsdp2"), FSDP2)


class TestLoading:
    def test_a_model_without_a_plan_cannot_be_split(self, model: str):
        lm = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2))
        with pytest.raises(UserError, match="GPT2LMHeadModel has no plan for tensor parallelism"):
            split_layers(lm, SimpleNamespace(size=lambda: 2))
        with pytest.raises(UserError, match=r"num_attention_heads of Qwen2ForCausalLM, 4, does not divide by .* 3"):
            split_layers(load_policy(model).lm, SimpleNamespace(size=lambda: 3))

    def test_adapters_and_tensor_parallelism_do_not_go_together(self, model: str):
        with pytest.raises(UserError, match=r"model.lora: adapters and tensor parallelism do not go together"):
            split_layers(load_policy(model, lora=LoRA()).lm, SimpleNamespace(size=lambda: 2))

    @pytest.mark.parametrize("names", ["the model's own", "others"])
    def test_processes_read_their_shares_and_never_the_whole(self, names: str, model: str, tmp_path: Path):
        """Unless the files are old, with names that transformers translates."""
        folder = tmp_path / "copy"
        shutil.copytree(model, folder)
        if names == "others":
            from safetensors.torch import load_file, save_file

            held = load_file(folder / "model.safetensors")
            old = {key.removeprefix("model."): tensor for key, tensor in held.items()}
            save_file(old, folder / "model.safetensors", {"format": "pt"})
        job = {"model": str(folder), "folder": str(tmp_path), "load": names}
        ranks = [
            subprocess.Popen([sys.executable, __file__, json.dumps(job | {"rank": i})], env=ENVIRONMENT) for i in (0, 1)
        ]
        assert [process.wait(timeout=200) for process in ranks] == [0, 0]
        plain = dict(full_weights(load_policy(model)))
        total = sum(tensor.numel() for tensor in plain.values())
        for i in (0, 1):
            held, whole_loads, found = torch.load(tmp_path / f"{i}.pt")
            assert all(torch.equal(found[name], plain[name]) for name in plain)
            assert held < 0.6 * total
            assert whole_loads == (names == "others")

    def test_buffers_that_belong_to_the_model_are_read_too(self, tmp_path: Path):
        """As that by which GLM-4-MoE balances its experts."""
        sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        lm = AutoModelForCausalLM.from_config(
            Glm4MoeConfig(**sizes, **heads, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)
        )
        lm.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        lm.save_pretrained(tmp_path / "model")
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            found = dict(full_weights(load_policy(str(tmp_path / "model"), strategy=fsdp2_of(1))))
        finally:
            torch.distributed.destroy_process_group()
        expected = dict(full_weights(load_policy(str(tmp_path / "model"))))
        assert expected["model.layers.1.mlp.gate.e_score_correction_bias"].tolist() == [1, 2, 3, 4]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class TestReferenceInTheMemoryOfTheCPU:
    def train(self, model: str, prompts: str, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
        module = PolicyModule(
            model, GRPO(beta=0.3), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), max_mismatch=100, **settings
        )
        data = RolloutData(Source(prompts), reward=even_first_digit, prompts_per_phase=8, updates_per_phase=2)
        trainer = quiet_trainer(folder, max_epochs=2, callbacks=[ScriptedRollout(max_tokens=12)])
        trainer.fit(module, datamodule=data)
        return dict(full_weights(module.policy))

    def test_it_is_fetched_once_a_phase_and_changes_nothing(
        self, model: str, many_prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        plain = self.train(model, many_prompts, tmp_path)
        moves: list[str] = []

        def reference(*arguments: Any) -> Any:
            policy = load_reference(*arguments)
            to = policy.to
            monkeypatch.setattr(policy, "to", lambda device: moves.append(str(device)) or to(device))
            return policy

        monkeypatch.setattr("lit_grpo.module.load_reference", reference)
        moved = self.train(model, many_prompts, tmp_path, offload_reference=True)
        assert all(torch.equal(moved[name], plain[name]) for name in plain)
        assert len(moves) == 1 + 2 * 2  # away when training starts, there and back in each phase

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"loss": GRPO()}, "the loss reads no reference"),
            ({"loss": GRPO(beta=0.1), "lora": LoRA()}, "the reference is the policy without"),
        ],
    )
    def test_it_is_refused_where_it_makes_no_sense(
        self, settings: dict[str, Any], said: str, model: str, many_prompts: str, tmp_path: Path
    ):
        module = PolicyModule(model, offload_reference=True, **settings)
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ScriptedRollout(max_tokens=12)])
        with pytest.raises(UserError, match=f"model.offload_reference: .*{said}"):
            trainer.fit(module, datamodule=RolloutData(Source(many_prompts), reward=even_first_digit))


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    if "load" in job:
        store = torch.distributed.FileStore(f"{job['folder']}/store", 2)
        torch.distributed.init_process_group("gloo", store=store, rank=job["rank"], world_size=2)
        whole_loads, load_lm = [], lit_grpo.policy.load_lm
        lit_grpo.policy.load_lm = lambda *arguments: whole_loads.append(1) or load_lm(*arguments)
        policy = load_policy(job["model"], strategy=fsdp2_of(2))
        with torch.no_grad():
            policy(torch.tensor([[3, 4, 5]]), torch.tensor([[True, True]]))
        held = sum(p.to_local().numel() for p in policy.parameters())  # shares again, embeddings and head too
        torch.save((held, bool(whole_loads), dict(full_weights(policy))), Path(job["folder"]) / f"{job['rank']}.pt")
        torch.distributed.destroy_process_group()
    else:
        from datetime import timedelta

        from callbacks import Whereabouts

        Deadline.grace = 1.0
        data = RolloutData(Source(job["prompts"]), reward=never_returns, prompts_per_phase=8)
        trainer = quiet_trainer(
            Path(job["folder"]),
            max_epochs=1,
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=30)),
            callbacks=[Whereabouts(), ScriptedRollout(max_tokens=12, timeout=5.0)],
        )
        trainer.fit(PolicyModule(job["model"], max_mismatch=100), datamodule=data)
