"""The policy's weights as an engine wants them, whatever strategy holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "base_model.model.", "base_layer.")
"""What strategies, compilation and adapters put into names."""


def canonical_name(name: str) -> str:
    """The Hugging Face name of a parameter.

    >>> canonical_name("base_model.model.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def full_weights(lm: nn.Module, bucket_mib: int = 512) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor); all ranks must iterate together.

    A tied head is yielded under its own name too: vLLM keeps sampling from the old head if it is left out. Low-rank
    adapters are merged into the weights they adapt, on a copy. Sharded tensors are gathered a bucket at a time, so that
    a second copy of the whole model never exists.

    Args:
        lm: the policy's language model.
        bucket_mib: gathered weights that exist at once, in MiB; at least one tensor.
    """
    adapted = {name: module for name, module in lm.named_modules() if hasattr(module, "get_delta_weight")}
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in lm.state_dict().items():
        if ".lora_" in name:
            continue
        module = adapted.get(name.removesuffix(".base_layer.weight"))
        if module is not None and name.endswith(".base_layer.weight"):
            tensor = merged(module, tensor)
        if isinstance(tensor, DTensor):
            size += tensor.numel() * tensor.element_size()
            tensor = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim, async_op=True).to_local()
        bucket.append((canonical_name(name), tensor))
        if size >= bucket_mib * 2**20:
            yield from bucket
            bucket, size = [], 0
    yield from bucket


def merged(module: Any, weight: Tensor) -> Tensor:
    """A weight with its active low-rank adapters added."""
    for adapter in module.active_adapters:
        weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
    return weight
