"""The same training by TRL and by us: rollouts per second, tokens trained per second, peak memory.

    python benchmarks/vs_trl.py [--pairs 5] [--only NAME ...]     # needs trl, and vllm for the rows that name it

Each run is a process of its own; the two sides alternate, and the ratio of a pair is theirs alone. Both sides draw G
completions of each of the same number of prompts per step, score them with the same function, and make one update with
AdamW at the same rate in the same micro-batches; no KL term, no evaluation, no checkpoints. The reward is a coin with
pass rate p for each completion, by a hash of its text, so that ties are as frequent as the theory says: a policy cannot
learn it. What a run is not asked for by its settings it may leave out: TRL trains on tied groups, we do not; that is
the one difference in work, and the column "trained" shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 128
SIZES = {"0.6 M": (128, 3), "25 M": (512, 9)}


@dataclass
class Work:
    """One line of the table."""

    size: str
    group_size: int
    pass_rate: float
    lengths: str
    """``even``: all completions have ``max_tokens`` tokens. ``long-tailed``: each token is the last at 1 in 32."""

    engine: str
    """Ours; theirs is ``model.generate`` always."""

    rollouts: int = 512
    max_tokens: int = 16
    micro_batches: int = 4
    steps: int = 6

    @property
    def name(self) -> str:
        return f"{self.size}, G {self.group_size}, p {self.pass_rate}, {self.lengths}, {self.engine}"


WORK = [
    Work("0.6 M", 2, 0.5, "even", "HFRollout"),
    Work("0.6 M", 2, 0.2, "even", "HFRollout"),
    Work("0.6 M", 2, 0.8, "even", "HFRollout"),
    Work("0.6 M", 16, 0.5, "even", "HFRollout"),
    Work("0.6 M", 2, 0.5, "long-tailed", "HFRollout", max_tokens=128),
    Work("25 M", 2, 0.5, "long-tailed", "HFRollout", rollouts=64, max_tokens=128, steps=3),
    Work("25 M", 2, 0.5, "long-tailed", "VLLMRollout", rollouts=64, max_tokens=128, steps=3),
    Work("25 M", 16, 0.5, "long-tailed", "VLLMRollout", rollouts=64, max_tokens=128, steps=3),
]


def coin(text: str, rate: float) -> float:
    """1 with probability ``rate``, the same for the same text."""
    return float(zlib.crc32(text.encode()) % 10_000 < rate * 10_000)


def make_task(folder: Path, work: Work) -> None:
    """A random model, its tokenizer of one symbol a token, and prompts of 8 to 24 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lit_grpo.quickstart import small_qwen

    torch.manual_seed(0)
    hidden, layers = SIZES[work.size]
    # An end token beyond the vocabulary is never drawn; four of 128 are, at one token in 32.
    stops = [VOCABULARY] if work.lengths == "even" else [0, 1, 2, 3]
    size = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    lm = small_qwen(vocab_size=VOCABULARY, max_position_embeddings=256, eos_token_id=stops, **size)
    lm.generation_config.eos_token_id = stops
    lm.save_pretrained(folder)
    letters = list(string.ascii_letters + string.digits)
    names = [f"<{i}>" for i in range(VOCABULARY + 1 - len(letters))] + letters
    symbols = {name: i for i, name in enumerate(names[:VOCABULARY])} | {"<end>": VOCABULARY}
    tokenizer = Tokenizer(models.WordLevel(symbols, unk_token="<4>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    end = "<end>" if work.lengths == "even" else "<0>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token="<5>", unk_token="<4>"
    ).save_pretrained(folder)
    draw = random.Random(0)
    texts = ["".join(draw.choices(letters, k=8 + i % 17)) for i in range(1024)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": t, "answer": "x"}) + "\n" for t in texts))


def run_ours(folder: Path, work: Work) -> dict[str, float]:
    """One process's training by us."""
    import lightning as L

    from callbacks import HFRollout, VLLMRollout
    from lit_grpo import GRPO, PolicyModule, RolloutData, TwoGRPO
    from lit_grpo.data import Source

    marks, trained = [], [0]

    class Clock(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            trained[0] += int(batch.mask.sum())

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            marks.append((time.perf_counter(), trained[0]))

    loss = TwoGRPO() if work.group_size == 2 else GRPO()
    module = PolicyModule(
        str(folder), loss, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0), max_mismatch=1.0
    )
    data = RolloutData(
        Source(str(folder / "prompts.jsonl")),
        reward=lambda samples: [coin(s.completion, work.pass_rate) for s in samples],
        prompts_per_phase=work.rollouts // work.group_size,
        group_size=work.group_size,
    )
    rollout = (VLLMRollout if work.engine == "VLLMRollout" else HFRollout)(max_tokens=work.max_tokens)
    L.Trainer(
        accelerator="cpu", max_epochs=work.steps, accumulate_grad_batches=work.micro_batches, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[rollout, Clock()],
        gradient_clip_val=1.0,
    ).fit(module, datamodule=data)  # fmt: skip
    return measured(marks, work)


def run_theirs(folder: Path, work: Work) -> dict[str, float]:
    """One process's training by TRL."""
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks, trained = [], [0]

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            marks.append((time.perf_counter(), trained[0]))

    class Counted(GRPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            trained[0] += int(inputs["completion_mask"].sum())
            return super().compute_loss(model, inputs, *arguments, **options)

    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, max_steps=work.steps, learning_rate=1e-5,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, per_device_train_batch_size=work.rollouts // work.micro_batches,
        gradient_accumulation_steps=work.micro_batches, num_generations=work.group_size, beta=0.0,
        max_completion_length=work.max_tokens, temperature=1.0, top_k=0, loss_type="grpo", scale_rewards="group",
        gradient_checkpointing=False,
    )  # fmt: skip
    Counted(
        model=str(folder),
        args=config,
        reward_funcs=lambda completions, **_: [coin(text, work.pass_rate) for text in completions],
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        callbacks=[Clock()],
    ).train()
    return measured(marks, work)


def measured(marks: list[tuple[float, int]], work: Work) -> dict[str, float]:
    """Rates over all steps but the first, which warms up."""
    (start, before), (end, after) = marks[0], marks[-1]
    steps = len(marks) - 1
    return {
        "rollouts": steps * work.rollouts / (end - start),
        "tokens": (after - before) / (end - start),
        "trained": (after - before) / steps,
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def one(side: str, folder: str, work: Work) -> dict[str, float]:
    """A side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", folder, "--work", json.dumps(asdict(work))]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if said.returncode:
        raise SystemExit(f"{side}, {work.name}:\n{said.stderr[-3000:]}")
    return json.loads(said.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="numbers of lines")
    parser.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        warnings.simplefilter("ignore")
        work = Work(**json.loads(options.work))
        print(json.dumps((run_ours if options.side == "ours" else run_theirs)(Path(options.folder), work)))
        return
    print(f"{'':52}{'rollouts/s':>22}{'tokens trained/s':>20}{'trained/step':>18}{'peak MiB':>14}  ratio of rollouts/s")
    for number, work in enumerate(WORK):
        if options.only and str(number) not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            make_task(Path(folder), work)
            pairs = [(one("ours", folder, work), one("trl", folder, work)) for _ in range(options.pairs)]
        middle = {key: [statistics.median(pair[i][key] for pair in pairs) for i in (0, 1)] for key in pairs[0][0]}
        ratios = sorted(ours["rollouts"] / theirs["rollouts"] for ours, theirs in pairs)
        shown = [f"{middle[key][0]:,.0f} / {middle[key][1]:,.0f}" for key in ("rollouts", "tokens", "trained", "MiB")]
        print(
            f"{number} {work.name:50}{shown[0]:>22}{shown[1]:>20}{shown[2]:>18}{shown[3]:>14}"
            f"  {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
