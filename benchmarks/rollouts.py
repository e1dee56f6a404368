"""Rollouts through the callback against raw vLLM, the share of a phase that weights take, and vLLM against HFEngine.

    python benchmarks/rollouts.py [--repeats 5]

Random Qwen2 models of 0.6 M and 25 M parameters write 512 completions of up to 64 tokens: all 64 of them ("even"), or
each until it meets one of four end tokens of 128 ("uneven", about 27 on average). Both sides of a ratio alternate in
one process on the same prompts and seeds; the table gives medians, with the smallest and largest ratio of any repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from measure import peak_memory
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from callbacks import VLLMRollout
from lit_grpo import GRPO, PolicyModule, RolloutData, Sample
from lit_grpo.data import Source
from lit_grpo.engines import HFEngine, Sampling, VLLMEngine, full_weights
from lit_grpo.quickstart import small_qwen

VOCABULARY, PROMPTS, MAX_TOKENS = 128, 256, 64
SIZES = {"0.6 M": (128, 3), "25 M": (512, 9)}
STOPS = {"even": [0], "uneven": [0, 1, 2, 3]}


def make_model(folder: Path, hidden: int, layers: int) -> Qwen2ForCausalLM:
    """A random model with a tokenizer of 128 symbols, and prompts of 8 to 24 tokens."""
    torch.manual_seed(0)
    size = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    lm = small_qwen(vocab_size=VOCABULARY, max_position_embeddings=256, eos_token_id=0, **size)
    lm.save_pretrained(folder)
    symbols = {chr(0x100 + i): i for i in range(VOCABULARY - 1)} | {"<eos>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(symbols, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=chr(0x100), unk_token="<eos>").save_pretrained(folder)
    texts = ["".join(chr(0x104 + (i * j) % 100) for j in range(8 + i % 17)) for i in range(PROMPTS)]
    rows = [{"prompt": text, "answer": "x"} for text in texts]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lm


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def ratios(repeats: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> list[tuple[float, float]]:
    """Seconds of both, alternating, after one round to warm up."""
    ours(), theirs()
    return [(seconds(ours)[0], seconds(theirs)[0]) for _ in range(repeats)]


def line(name: str, pairs: list[tuple[float, float]], tokens: int) -> None:
    rates = [statistics.median(tokens / side for side in sides) for sides in zip(*pairs, strict=True)]
    found = sorted(theirs / ours for ours, theirs in pairs)
    middle = statistics.median(found)
    print(f"{name:44}{rates[0]:>12,.0f}{rates[1]:>12,.0f}{middle:>8.2f}  ({found[0]:.2f}-{found[-1]:.2f})")


def no_reward(samples: list[Sample]) -> list[float]:
    return [float(i % 2) for i in range(len(samples))]


def generation(folder: Path, lm: Qwen2ForCausalLM, size: str, lengths: str, repeats: int) -> None:
    """Two lines: the data module with our engine against raw vLLM, and our two engines against each other."""
    stops, sampling = STOPS[lengths], Sampling(MAX_TOKENS)
    vllm_engine = VLLMEngine(str(folder), stops if lengths == "uneven" else [], 128)
    hf_engine = HFEngine(lm.config, stops if lengths == "uneven" else [VOCABULARY], 128)
    for engine in (vllm_engine, hf_engine):
        engine.load_weights(full_weights(lm))
    module = PolicyModule(str(folder), GRPO())
    data = RolloutData(Source(str(folder / "prompts.jsonl")), reward=no_reward)
    data.trainer = SimpleNamespace(lightning_module=module, strategy=None, global_rank=0, world_size=1)
    data.prompts["train"] = data.load_prompts(data.train, "train")
    prompts = dict(enumerate(data.prompts["train"]))
    ids = [prompt.token_ids for prompt in prompts.values()]
    seeds = data.seeds("train", 0, list(prompts))

    def raw() -> Any:
        requests = [{"prompt_token_ids": prompt} for prompt in ids]
        return vllm_engine.llm.generate(requests, [vllm_engine.params(2, sampling, s) for s in seeds], use_tqdm=False)

    def ours() -> Any:
        return data.drawn(data.drawing(vllm_engine, sampling, "train", 0, prompts, 2), len(prompts))

    tokens = sum(len(sample.token_ids) for output in raw() for sample in output.outputs)
    line(f"callback / raw vLLM, {size}, {lengths}", ratios(repeats, ours, raw), tokens)
    pairs = ratios(
        repeats,
        lambda: vllm_engine.generate(ids, 2, sampling, seeds),
        lambda: hf_engine.generate(ids, 2, sampling, seeds),
    )
    line(f"vLLM / HFEngine, {size}, {lengths}", pairs, tokens)
    vllm_engine.close()


def sync(folder: Path, lm: Qwen2ForCausalLM, size: str, repeats: int) -> None:
    """The share of a phase that the weights take, in a real run, and their memory."""
    shares = []

    class Shares(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            now = time.perf_counter()
            if trainer.current_epoch:  # the first phase starts the engine
                shares.append(trainer.callback_metrics["train/seconds_sync"].item() / (now - self.start))
            self.start = now

    rollout = VLLMRollout(max_tokens=MAX_TOKENS, cpu_cache_gib=1)
    data = RolloutData(Source(str(folder / "prompts.jsonl")), reward=no_reward, prompts_per_phase=PROMPTS)
    L.Trainer(
        accelerator="cpu",
        max_epochs=repeats + 1,
        accumulate_grad_batches=8,
        callbacks=[rollout, Shares()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(PolicyModule(str(folder), GRPO()), datamodule=data)
    engine = VLLMEngine(str(folder), [0], 128)
    engine.load_weights(full_weights(lm))
    with peak_memory() as peak:
        engine.load_weights(full_weights(lm))
    engine.close()
    weights = sum(p.numel() * p.element_size() for p in lm.parameters()) / 2**20
    print(
        f"sync, {size}: {statistics.median(shares):.2%} of a phase ({min(shares):.2%}-{max(shares):.2%}); peak"
        f" {peak[0]:.0f} MiB beyond what was there, weights {weights:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{'tokens/s':44}{'first':>12}{'second':>12}{'ratio':>8}")
    for size, (hidden, layers) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            lm = make_model(Path(folder), hidden, layers).eval()
            for lengths in STOPS:
                generation(Path(folder), lm, size, lengths, options.repeats)
            sync(Path(folder), lm, size, options.repeats)


if __name__ == "__main__":
    main()
