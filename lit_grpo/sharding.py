"""Policies that no process holds whole: FSDP, FSDP2 and tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub import snapshot_download
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_grpo.errors import UserError
from lit_grpo.lora import draw_adapters

FILES = "model*.safetensors"

Read = Callable[[str], Tensor]
"""Gives a parameter of a model by its Hugging Face name."""


class FSDP2(ModelParallelStrategy):
    """The model is shared out between all processes (FSDP2), each of which has data of its own."""

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2, description="FSDP2 over all processes")
StrategyRegistry.register(
    "fsdp", FSDPStrategy, description="FSDP1; as FSDP2, each process saves its share", override=True,
    state_dict_type="sharded",
)  # fmt: skip


def shares_out(strategy: Any) -> bool:
    """Whether a strategy of Lightning shares the parameters of a model out."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def share_out(policy: Any, strategy: Any, read: Read) -> Any:
    """Share the parameters of a policy out between the processes of a strategy, a decoder layer at a time.

    Parameters without memory (on the device ``meta``) are read just before, so that a process never holds more than
    one whole layer, or the embeddings, beside its share.

    Returns:
        The policy, or what FSDP1 wraps it in.

    Raises:
        UserError: if tensor parallelism is asked for and the model has no plan, or heads that do not divide.
    """
    if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        split_layers(policy.lm, strategy.device_mesh["tensor_parallel"])
    for number, (name, layer) in enumerate(decoder_layers(policy.lm).items()):
        fill(layer, read, f"{name}.")
        draw_adapters(layer, number)
        policy.lm.set_submodule(name, one_unit(layer, strategy))
    fill(policy, read)
    policy.lm.tie_weights()
    return one_unit(policy, strategy)


def decoder_layers(lm: Any) -> dict[str, nn.Module]:
    """The layers that a language model says should not be split, by name."""
    kinds = lm._no_split_modules or ()
    return {name: module for name, module in lm.named_modules() if type(module).__name__ in kinds}


def one_unit(module: nn.Module, strategy: Any) -> nn.Module:
    """Make a module the unit whose parameters are gathered together, and computed with in bfloat16 if that is wished.

    Gradients are summed, and buffers kept, in float32.
    """
    compute = torch.bfloat16 if strategy.precision_plugin.precision == "bf16-mixed" else None
    if isinstance(strategy, FSDPStrategy):
        if compute is None or strategy.mixed_precision is not None:
            return wrap(module)
        return wrap(module, mixed_precision=MixedPrecision(compute, torch.float32, torch.float32))
    policy = MixedPrecisionPolicy(compute, torch.float32) if compute else MixedPrecisionPolicy()
    mesh = strategy.device_mesh["data_parallel"]
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)  # roots, else, would stay gathered
    return module


def split_layers(lm: Any, mesh: Any) -> None:
    """Split linear layers between the processes of a mesh by the model's own plan, all but the embeddings."""
    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError as error:
        raise UserError("trainer.strategy: tensor parallelism needs transformers 5.19 or newer.") from error
    name = type(lm).__name__
    if getattr(lm, "peft_config", None):
        raise UserError("model.lora: adapters and tensor parallelism do not go together. Use fsdp2, or leave one out.")
    ends = lm.get_input_embeddings(), lm.get_output_embeddings()
    left_out = [key for key, module in lm.named_modules() if module in ends]
    plan = {key: style for key, style in (lm.tp_plan or {}).items() if key not in left_out}
    if not plan:
        raise UserError(
            f"trainer.strategy: {name} has no plan for tensor parallelism (base_model_tp_plan of its configuration)."
            " Use fsdp2."
        )
    for key in ("num_attention_heads", "num_key_value_heads"):
        if getattr(lm.config, key, 0) % mesh.size():
            raise UserError(
                f"trainer.strategy: {key} of {name}, {getattr(lm.config, key)}, does not divide by tensor_parallel_size"
                f" {mesh.size()}."
            )
    apply_tensor_parallelism(lm, mesh, plan)


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Create modules whose parameters are on the device ``meta``; buffers are computed as always."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def fill(module: nn.Module, read: Read, prefix: str = "") -> None:
    """Give the parameters of a module that have no memory their values."""
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        file_name = (prefix + name).removeprefix("lm.").replace("base_layer.", "")  # adapters wrap what they change
        value = torch.empty(parameter.shape) if ".lora_" in name else read(file_name).float()
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, nn.Parameter(value, parameter.requires_grad))


def reader(model: str, names: set[str]) -> Read | None:
    """Reads parameters from the files of a model; None if these do not have them all under their names.

    Args:
        model: folder or hub id.
        names: of the parameters.
    """
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns=FILES))
    files = [safe_open(str(path), "pt") for path in sorted(folder.glob(FILES))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118  it is no dictionary
    return (lambda name: where[name].get_tensor(name)) if names <= where.keys() else None


def to_cpu(model: nn.Module) -> None:
    """Move parameters to the memory of the CPU; buffers stay, which DDP sends around."""
    buffers = [(module, dict(module.named_buffers(recurse=False))) for module in model.modules()]
    model.to("cpu")
    for module, held in buffers:
        module._buffers.update(held)


def grad_norm(policy: Any) -> Tensor:
    """Norm of the gradient, however its parts lie on the processes; all must take part."""
    if isinstance(policy, FullyShardedDataParallel):
        return policy.clip_grad_norm_(torch.inf)
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in policy.parameters():
        if (gradient := parameter.grad) is not None:
            by_mesh.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in by_mesh.values()]
    return torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))
