"""What processes tell each other beyond tensors."""

from __future__ import annotations

from typing import Any

import torch


def gather_objects(mine: Any, world: int) -> list[Any]:
    """What every one of ``world`` processes holds, in the order of ranks; all must take part."""
    if world == 1:
        return [mine]
    parts = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    return parts


def gather_dicts(mine: dict[Any, Any], world: int) -> dict[Any, Any]:
    """The entries of all of ``world`` processes, whose keys differ; all must take part."""
    return {key: value for part in gather_objects(mine, world) for key, value in part.items()}
