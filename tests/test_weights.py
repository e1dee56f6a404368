"""Weights for the engine: Hugging Face names and full tensors, from every form in which a policy is held."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT
from torch import Tensor, nn

from lit_grpo.engines import full_weights
from lit_grpo.errors import UserError
from lit_grpo.policy import Policy, load_policy
from lit_grpo.sharding import decoder_layers


def unlike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> set[str]:
    """Names that only one side has, or whose tensors differ."""
    both = found.keys() & expected.keys()
    return (found.keys() ^ expected.keys()) | {n for n in both if (found[n] - expected[n]).abs().max() > tolerance}


def test_a_tied_head_has_its_own_name(model: str):
    lm = load_policy(model).lm
    found = dict(full_weights(lm))
    assert not unlike(found, lm.state_dict())
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()


def test_names_are_those_of_the_language_model(model: str):
    policy = load_policy(model)
    assert not unlike(dict(full_weights(policy)), policy.lm.state_dict())
    policy.lm.model.layers[0] = torch.compile(policy.lm.model.layers[0])
    assert not unlike(dict(full_weights(policy)), dict(full_weights(load_policy(model))))


class TestAdapters:
    @pytest.fixture
    def adapted(self, model: str) -> nn.Module:
        """Adapters with values of their own on every linear layer, and a norm that is trained as a whole."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, modules_to_save=["norm"])
        lm = get_peft_model(load_policy(model).lm, adapters)
        with torch.no_grad():
            lm.base_model.model.model.norm.modules_to_save.default.weight.mul_(1.5)
        return lm

    def test_they_are_merged_as_peft_would(self, adapted: nn.Module, model: str):
        expected = copy.deepcopy(adapted).merge_and_unload().state_dict()
        before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
        found = dict(full_weights(adapted))
        assert not unlike(found, expected, 1e-6)
        assert not unlike(before, adapted.state_dict())  # merged on a copy
        start = load_policy(model).lm.state_dict()
        changed = {name for name in start if not torch.equal(start[name], found[name])}
        assert changed == {name for name in start if name.endswith("proj.weight")} | {"model.norm.weight"}

    def test_merged_or_switched_off_they_are_not_added(self, model: str):
        policy = with_adapters(load_policy(model))
        merged = dict(full_weights(policy))
        layers = [module for module in policy.modules() if hasattr(module, "get_delta_weight")]
        for layer in layers:
            layer.merge()
        assert not unlike(dict(full_weights(policy)), merged, 1e-6)
        for layer in layers:
            layer.unmerge()
            layer.enable_adapters(False)
        assert not unlike(dict(full_weights(policy)), dict(full_weights(load_policy(model))), 1e-6)

    def test_merged_and_then_switched_off_they_are_taken_out(self, model: str):
        """As peft does in the forward pass that follows."""
        policy = with_adapters(load_policy(model))
        layers = [module for module in policy.modules() if hasattr(module, "get_delta_weight")]
        for layer in layers:
            layer.merge()
            layer.enable_adapters(False)
        found = {name: tensor.clone() for name, tensor in full_weights(policy)}
        assert not unlike(found, dict(full_weights(load_policy(model))), 1e-6)
        policy.lm(torch.tensor([[3, 4]]))
        assert not unlike(found, dict(full_weights(policy)), 1e-6)

    def test_a_whole_module_is_the_one_that_runs(self, adapted: nn.Module, model: str):
        start = load_policy(model).lm.state_dict()
        adapted.add_adapter("other", adapted.peft_config["default"])
        with torch.no_grad():
            adapted.base_model.model.model.norm.modules_to_save.other.weight.fill_(9)
        assert torch.equal(dict(full_weights(adapted))["model.norm.weight"], 1.5 * start["model.norm.weight"])
        adapted.set_adapter("other")
        assert (dict(full_weights(adapted))["model.norm.weight"] == 9).all()
        with adapted.disable_adapter():
            assert not unlike(dict(full_weights(adapted)), start, 1e-6)

    @pytest.mark.parametrize("more", ["use_dora", "lora_bias"])
    def test_what_is_more_than_a_change_of_weights_is_refused(self, model: str, more: str):
        from peft import LoraConfig

        policy = load_policy(model)
        policy.lm.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], **{more: True}))
        with pytest.raises(UserError, match="DoRA adapters, or those with a bias, cannot be merged"):
            list(full_weights(policy))


@pytest.mark.parametrize("bucket_mib", [1, 2**20])
def test_no_more_than_a_bucket_is_gathered_at_once(bucket_mib: int, monkeypatch: pytest.MonkeyPatch):
    """Tensors of 0.3, 0.5, 0.9 and 1.5 MiB, the last of which is larger than a bucket."""
    gathered = []

    def arrived(bucket: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        gathered.append([round(tensor.numel() * 4 / 2**20, 1) for _, tensor in bucket])
        yield from bucket

    monkeypatch.setattr("lit_grpo.engines.weights.arrived", arrived)
    layers = [nn.Linear(1, int(mib * 2**18), bias=False) for mib in (0.3, 0.5, 0.9, 1.5)]
    assert len(list(full_weights(nn.Sequential(*layers), bucket_mib))) == 4
    assert gathered == ([[0.3, 0.5], [0.9], [1.5]] if bucket_mib == 1 else [[0.3, 0.5, 0.9, 1.5]])


def fsdp1(policy: Policy) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    layers = policy.lm.model.layers
    for i, layer in enumerate(layers):
        layers[i] = FullyShardedDataParallel(layer, **options)
    return FullyShardedDataParallel(policy, **options)


def fsdp2(policy: Policy) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in [*decoder_layers(policy.lm).values(), policy]:
        fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    return policy


def with_adapters(policy: Policy) -> Policy:
    from peft import LoraConfig

    torch.manual_seed(0)
    policy.lm.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return policy


def with_buffer(policy: Policy) -> Policy:
    """Some models keep a bias of their routers, or a scale of their layers, as such."""
    policy.lm.model.layers[0].register_buffer("layer_scalar", torch.tensor([0.5, 2.0]))
    return policy


SHARDED: dict[str, Callable[[Policy], nn.Module]] = {
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "fsdp1, adapters": lambda policy: fsdp1(with_adapters(policy)),
    "fsdp2, adapters": lambda policy: fsdp2(with_adapters(policy)),
}


def test_every_process_gathers_what_all_share_out(model: str, tmp_path: Path):
    ranks = [
        subprocess.Popen([sys.executable, __file__, json.dumps([model, str(tmp_path), rank])], env=ENVIRONMENT)
        for rank in range(2)
    ]
    assert [process.wait(timeout=200) for process in ranks] == [0, 0]
    plain = dict(full_weights(with_buffer(load_policy(model))))
    adapted = dict(full_weights(with_buffer(with_adapters(load_policy(model)))))
    assert "model.layers.0.layer_scalar" in plain
    for rank in range(2):
        for name, (held, found) in torch.load(tmp_path / f"{rank}.pt").items():
            assert not unlike(found, adapted if "adapters" in name else plain, 1e-6), name
            assert held < 0.6 * sum(tensor.numel() for tensor in plain.values()), name


if __name__ == "__main__":
    model, folder, rank = json.loads(sys.argv[1])
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {}
    for name, shared_out in SHARDED.items():
        policy = shared_out(with_buffer(load_policy(model)))
        held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in policy.parameters())
        weights = list(full_weights(policy, bucket_mib=1))
        assert len(dict(weights)) == len(weights)
        found[name] = held, dict(weights)
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
