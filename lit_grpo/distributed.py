"""Which process has which data, and what processes tell each other beyond tensors."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch


def data_rank(trainer: L.Trainer) -> tuple[int, int]:
    """This process's place among those that have data of their own, and how many these are.

    Processes that share the layers of a model between them (tensor parallelism) have their data in common.
    """
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    if mesh is None:
        return trainer.global_rank, trainer.world_size
    return mesh["data_parallel"].get_local_rank(), mesh["data_parallel"].size()


def gather_objects(mine: Any, trainer: L.Trainer) -> list[Any]:
    """What the processes that have data of their own hold, in the order of their places; all must take part."""
    parts = all_objects(mine, trainer.world_size)
    return parts[:: trainer.world_size // data_rank(trainer)[1]]


def gather_dicts(mine: dict[Any, Any], trainer: L.Trainer) -> dict[Any, Any]:
    """The entries of all processes, whose keys differ; all must take part."""
    return {key: value for part in gather_objects(mine, trainer) for key, value in part.items()}


def partners(trainer: L.Trainer) -> tuple[int, int]:
    """This process's place among those that have the same data, and how many these are."""
    count = trainer.world_size // data_rank(trainer)[1]
    return trainer.global_rank % count, count


def gather_partners(mine: Any, trainer: L.Trainer) -> list[Any]:
    """What the processes hold that have the same data; all processes must take part, if there are any such."""
    place, count = partners(trainer)
    return [mine] if count == 1 else all_objects(mine, trainer.world_size)[trainer.global_rank - place :][:count]


def all_objects(mine: Any, world: int) -> list[Any]:
    """What each of ``world`` processes holds, in the order of their ranks; all must take part."""
    if world == 1:
        return [mine]
    parts = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    return parts
