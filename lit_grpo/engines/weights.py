"""The policy's weights as an engine wants them, whatever strategy holds them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from lit_grpo.errors import UserError

WHOLE_COPY = re.compile(r"(.+)\.(?:modules_to_save\.([^.]+)|original_module)\.")
"""The two forms of a module that ``peft`` trains as a whole."""

WRAPPERS = re.compile(
    r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\."
    r"|base_model\.model\.|base_layer\.|modules_to_save\.[^.]+\.|original_module\."
)
"""What strategies, compilation and adapters put into names."""


def canonical_name(name: str) -> str:
    """The Hugging Face name of a parameter.

    >>> canonical_name("lm.base_model.model.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return WRAPPERS.sub("", name).removeprefix("lm.")


def full_weights(policy: nn.Module, bucket_mib: int = 512) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor); all ranks must iterate together.

    A tied head is yielded under its own name too: vLLM keeps sampling from the old head if it is left out. Low-rank
    adapters are merged into the weights they adapt, on a copy. Sharded tensors are gathered a bucket at a time, with
    FSDP1 a unit at a time, so that a second copy of the whole model never exists.

    Args:
        policy: a :class:`~lit_grpo.policy.Policy`, or a language model alone.
        bucket_mib: most gathered weights that exist at once, in MiB; a tensor that is larger comes alone.
    """
    adapted = {canonical_name(name): m for name, m in policy.named_modules() if hasattr(m, "get_delta_weight")}
    copied = {canonical_name(name): m for name, m in policy.named_modules() if hasattr(m, "modules_to_save")}
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for stored_name, tensor in stored_tensors(policy):
        copy = WHOLE_COPY.match(stored_name)
        if ".lora_" in stored_name or (copy and copy[2] != copy_in_use(copied[canonical_name(copy[1])])):
            continue
        name = canonical_name(stored_name)
        if name.endswith(".weight") and (layer := adapted.get(name.removesuffix(".weight"))):
            tensor = merged(layer, tensor)
        needed = tensor.numel() * tensor.element_size()
        if bucket and size + needed > bucket_mib * 2**20:
            yield from arrived(bucket)
            bucket, size = [], 0
        if isinstance(tensor, DTensor):
            placements = [Replicate()] * tensor.device_mesh.ndim
            tensor = tensor.redistribute(placements=placements, async_op=tensor.is_cuda).to_local()  # gloo crashes
        bucket.append((name, tensor))
        size += needed
    yield from arrived(bucket)


def full_adapters(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) of a policy's low-rank adapters; all ranks must iterate together."""
    for stored_name, tensor in stored_tensors(policy):
        if ".lora_" in stored_name:
            yield canonical_name(stored_name), tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def arrived(bucket: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Wait for each tensor that is still being gathered."""
    return ((name, t.wait() if isinstance(t, AsyncCollectiveTensor) else t) for name, t in bucket)


def stored_tensors(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as the strategy holds them; those of FSDP1, which has no other form, gathered unit by unit."""
    units = {canonical_name(name): m for name, m in policy.named_modules() if isinstance(m, FullyShardedDataParallel)}
    if not units:
        yield from policy.state_dict().items()
    for prefix, unit in units.items():
        inner = tuple(f"{other}." for other in units if other != prefix and other.startswith(prefix))
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            for name, parameter in unit.named_parameters(prefix, remove_duplicate=False):
                if not canonical_name(name).startswith(inner):
                    yield name, parameter.detach().clone()
    for prefix, module in policy.named_modules() if units else ():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def copy_in_use(module: Any) -> str | None:
    """Which copy ``peft`` runs of a module that it trains as a whole; None for the one from before."""
    return None if module.disable_adapters else module.active_adapters[0]


def merged(module: Any, weight: Tensor) -> Tensor:
    """A weight with those of its low-rank adapters that are switched on.

    Raises:
        UserError: if one is weight-decomposed (DoRA) or has a bias, and so is more than a change of the weight.
    """
    sign, adapters = (1, module.active_adapters) if not module.disable_adapters else (1, [])
    if module.merged:  # the weight holds them already
        sign, adapters = -1, module.merged_adapters if module.disable_adapters else []
    for adapter in (adapter for adapter in adapters if adapter in module.r):
        if module.use_dora.get(adapter) or module.lora_bias.get(adapter):
            raise UserError(
                "model: DoRA adapters, or those with a bias, cannot be merged for the engine. Use plain LoRA (use_dora"
                " and lora_bias: false)."
            )
        weight = weight + sign * module.get_delta_weight(adapter).to(weight.dtype)
    return weight
