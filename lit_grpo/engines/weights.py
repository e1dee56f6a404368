"""The policy's weights as an engine wants them, whatever strategy holds them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def full_weights(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor), one at a time; all ranks must iterate together.

    A tied head is yielded under its own name too: vLLM keeps sampling from the old head if it is left out.
    """
    for name, tensor in lm.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
