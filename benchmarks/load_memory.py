"""Memory that loading a model takes in each of two processes that share it (FSDP2), beside loading it whole.

    torchrun --nproc-per-node 2 benchmarks/load_memory.py

Peaks are those of the first process's own memory (files that are mapped are not), looked at every millisecond.
"""

from __future__ import annotations

import tempfile
import threading
import time
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from lit_grpo.policy import load_config, load_policy
from lit_grpo.quickstart import small_qwen
from lit_grpo.sharding import FSDP2


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank, folder = torch.distributed.get_rank(), [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    lm: Any = None
    if rank == 0:
        lm = small_qwen(vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12)
        lm.to(torch.bfloat16).save_pretrained(folder[0])  # as on the hub
        del lm
    torch.distributed.barrier()
    strategy = FSDP2()
    strategy._device_mesh = torch.distributed.init_device_mesh(
        "cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel")
    )
    process, peak, over = psutil.Process(), [0], threading.Event()

    def own() -> int:
        held: Any = process.memory_info()
        return (held.rss - held.shared) // 2**20

    def watch() -> None:
        while not over.wait(0.001):
            peak[0] = max(peak[0], own())

    threading.Thread(target=watch, daemon=True).start()
    load_policy(folder[0], strategy=strategy)  # what is imported at first use
    for name, how in (("shared out", strategy), ("whole", SimpleNamespace())):
        before = peak[0] = own()
        start = time.perf_counter()
        policy = load_policy(folder[0], strategy=how)
        seconds, after = time.perf_counter() - start, own()
        if rank == 0:
            print(f"{name}: {after - before} MiB kept, {peak[0] - before} MiB at most, {seconds:.2f} s")
        del policy
    if rank == 0:
        config = load_config(folder[0])
        total = sum(p.numel() for p in small_qwen(**{k: getattr(config, k) for k in SIZES}).parameters()) * 4 / 2**20
        print(f"weights: {total:.0f} MiB")
    over.set()
    torch.distributed.destroy_process_group()


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")

if __name__ == "__main__":
    main()
