"""Peak memory and time of one training step, by how log-probs are taken: plain, by TRL's fused head, by us.

    python benchmarks/memory.py [--repeats 3]     # needs trl

A random Qwen2 with a vocabulary of 151,936 and few layers, so that the head is what counts; four rows of 32 prompt and
256 completion tokens. Each way is a process of its own. Plain and ours take the hidden states of completions alone;
TRL's head is given labels, by which it leaves prompts out on GPUs only. Memory is what the process takes at most in
forward and backward, beyond weights and gradients, which are there before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from measure import peak_memory
from torch import Tensor

from lit_grpo.logprobs import completion_logps
from lit_grpo.losses import GRPO, LossInputs
from lit_grpo.quickstart import small_qwen

VOCABULARY, ROWS, PROMPT, COMPLETION = 151_936, 4, 32, 256


def plain(lm: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    logits = lm.lm_head(lm.model(tokens).last_hidden_state[:, :-1][mask])
    logps = logits.log_softmax(-1).gather(-1, tokens[:, 1:][mask][:, None]).squeeze(-1)
    return torch.zeros(mask.shape).masked_scatter(mask, logps)


def trl(lm: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    labels = tokens.masked_fill(~torch.nn.functional.pad(mask, (1, 0)), -100)
    return lm(tokens, labels=labels, fused_lm_head=True).log_probs


def ours(lm: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    return completion_logps(lm.model(tokens[:, :-1]).last_hidden_state, tokens, mask, lm.lm_head)[0]


WAYS = {"plain": plain, "trl": trl, "ours": ours}


def step(way: str) -> dict[str, Any]:
    """MiB, seconds and the gradient's norm of one step, after one that warms up."""
    torch.manual_seed(0)
    lm = small_qwen(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    if way == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(lm)
    tokens = torch.randint(VOCABULARY, (ROWS, PROMPT + COMPLETION))
    mask = (torch.arange(PROMPT + COMPLETION - 1) >= PROMPT - 1).expand(ROWS, -1)
    advantages = torch.tensor([1.0, -1.0] * (ROWS // 2))

    def run(columns: int) -> None:
        logps = WAYS[way](lm, tokens[:, :columns], mask[:, : columns - 1])
        inputs = LossInputs(logps, mask[:, : columns - 1], advantages, total_rows=ROWS, total_tokens=ROWS * COMPLETION)
        GRPO()(inputs).loss.backward()

    run(PROMPT + 1)
    lm.zero_grad(set_to_none=False)
    start = time.perf_counter()
    with peak_memory() as peak:
        run(PROMPT + COMPLETION)
    seconds = time.perf_counter() - start
    norm = torch.stack([p.grad.norm() for p in lm.parameters()]).norm()
    return {"MiB": peak[0], "seconds": seconds, "norm": norm.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        warnings.simplefilter("ignore")
        print(json.dumps(step(options.way)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            said = subprocess.run([sys.executable, __file__, "--way", way], capture_output=True, text=True)
            if said.returncode:
                raise SystemExit(f"{way}:\n{said.stderr[-3000:]}")
            found[way].append(json.loads(said.stdout.splitlines()[-1]))
    print(f"{'':8}{'MiB':>8}{'of plain':>10}{'seconds':>10}{'of plain':>10}{'gradient norm':>16}")
    base = {key: statistics.median(one[key] for one in found["plain"]) for key in ("MiB", "seconds")}
    for way, runs in found.items():
        middle = {key: statistics.median(one[key] for one in runs) for key in ("MiB", "seconds", "norm")}
        print(
            f"{way:8}{middle['MiB']:>8.0f}{middle['MiB'] / base['MiB']:>10.2f}{middle['seconds']:>10.2f}"
            f"{middle['seconds'] / base['seconds']:>10.2f}{middle['norm']:>16.6f}"
        )


if __name__ == "__main__":
    main()
