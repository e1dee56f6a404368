"""Memory that gathering a sharded policy's weights takes, by bucket size, in two processes (FSDP2).

    torchrun --nproc-per-node 2 benchmarks/sync_memory.py

Peaks are those of the first process's resident memory, looked at every millisecond.
"""

from __future__ import annotations

import threading
import time

import psutil
import torch
from torch.distributed.fsdp import fully_shard

from lit_grpo.engines import full_weights
from lit_grpo.policy import Policy
from lit_grpo.quickstart import small_qwen
from lit_grpo.sharding import decoder_layers


def main() -> None:
    torch.distributed.init_process_group("gloo")
    lm = small_qwen(vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12)
    total = sum(p.numel() * p.element_size() for p in lm.parameters()) / 2**20
    policy = Policy(lm)
    for module in [*decoder_layers(policy.lm).values(), policy]:
        fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    process, peak, over = psutil.Process(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss / 2**20)

    threading.Thread(target=watch, daemon=True).start()
    for mib in (8, 64, 4096):
        before = peak[0] = process.memory_info().rss / 2**20
        start = time.perf_counter()
        for _, tensor in full_weights(policy, mib):
            tensor.sum()
        seconds = time.perf_counter() - start
        if torch.distributed.get_rank() == 0:
            print(f"bucket_mib {mib}: {peak[0] - before:.0f} MiB for weights of {total:.0f} MiB, {seconds:.2f} s")
    over.set()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
