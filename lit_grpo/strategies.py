"""Strategies with a short name for ``trainer.strategy``, beside Lightning's own."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry


class FSDP2(ModelParallelStrategy):
    """The model is shared out between all processes (FSDP2), each of which has data of its own."""

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2, description="FSDP2 over all processes")
