"""The same training by TRL and by us: rollouts per second, tokens trained per second, peak memory.

    python benchmarks/vs_trl.py [--pairs 5] [--only 0 3 ...]     # needs trl, and vllm for the lines that name it

Each run is a process of its own; the two sides alternate, and a ratio is of the two runs of a pair. Both draw G
completions of each of the same number of prompts per step with temperature 1, score them with the same function, and
make one update with AdamW at the same rate in as many micro-batches; no KL term, no evaluation, no checkpoints. The
reward is a coin with pass rate p, by a hash of the completion, which no policy can learn: ties are as frequent as the
theory says throughout. TRL samples with ``model.generate``, we with the engine that a line names.

What each side does with the 512 (or 64) rollouts of a step: TRL trains on all of them, we leave out groups that are
tied, whose gradient is zero, with the denominators of all, and read a prompt once for up to four completions that train
on it (``model.share_prompts``; but in the line "default"). "sampled" and "trained" are completion tokens per step.
TRL also takes the entropy of its tokens for its log, and, as always on a CPU, the log-probs of prompts. Before any
timing, the completions of TRL's own first step are given to our reward, loss and policy: the gradients must agree.
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
ANSWER = "x" * 200
"""Longer than any completion."""

MOST_DIFFERENT = 1e-4
"""Of two gradients, relative to their norm."""


@dataclass
class Work:
    """One line of the table."""

    size: str
    group_size: int
    pass_rate: float
    lengths: str
    """``even``: all completions have ``max_tokens`` tokens. ``long-tailed``: each token is the last at 1 in 32."""

    engine: str
    """Ours."""

    rollouts: int = 512
    max_tokens: int = 16
    micro_batches: int = 4
    steps: int = 6
    share_prompts: bool = True
    """Ours."""

    @property
    def name(self) -> str:
        plain = "" if self.share_prompts else ", default"
        return f"{self.size}, G {self.group_size}, p {self.pass_rate}, {self.lengths}, {self.engine}{plain}"


LONG_TAIL: dict[str, Any] = {"lengths": "long-tailed", "max_tokens": 128}
WORK = [
    Work("0.6 M", 2, 0.5, "even", "HFRollout"),
    Work("0.6 M", 2, 0.2, "even", "HFRollout"),
    Work("0.6 M", 2, 0.8, "even", "HFRollout"),
    Work("0.6 M", 16, 0.5, "even", "HFRollout"),
    Work("0.6 M", 2, 0.5, engine="HFRollout", **LONG_TAIL),
    Work("25 M", 2, 0.5, engine="HFRollout", rollouts=64, steps=3, **LONG_TAIL),
    Work("25 M", 2, 0.5, engine="VLLMRollout", rollouts=64, steps=3, **LONG_TAIL),
    Work("25 M", 16, 0.5, engine="VLLMRollout", rollouts=64, steps=3, **LONG_TAIL),
    Work("0.6 M", 2, 0.5, "even", "HFRollout", share_prompts=False),
]


class Coin:
    """1 with a probability, the same for the same text; counts what it is asked."""

    def __init__(self, rate: float) -> None:
        self.rate, self.asked = rate, 0

    def __call__(self, texts: list[str]) -> list[float]:
        self.asked += len(texts)
        return [float(zlib.crc32(text.encode()) % 10_000 < self.rate * 10_000) for text in texts]


def make_task(folder: Path, work: Work, prompts: int = 1024) -> None:
    """A random model, a tokenizer whose tokens are single letters, and prompts of 8 to 24 of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lit_grpo.quickstart import small_qwen

    torch.manual_seed(0)
    hidden, layers = SIZES[work.size]
    # An end token beyond the vocabulary is never drawn; four of 128 are, at one token in 32.
    ends = [VOCABULARY] if work.lengths == "even" else [0, 1, 2, 3]
    size = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    lm = small_qwen(vocab_size=VOCABULARY, max_position_embeddings=256, eos_token_id=ends, **size)
    lm.generation_config.eos_token_id = ends
    lm.save_pretrained(folder)
    letters = list(string.ascii_letters + string.digits)
    names = [f"<{i}>" for i in range(VOCABULARY - len(letters))] + letters + [f"<{VOCABULARY}>"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<4>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"eos_token": f"<{ends[0]}>", "pad_token": "<5>", "unk_token": "<4>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choices(letters, k=8 + i % 17)), "answer": ANSWER} for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Marks:
    """When each step ended, and how many completion tokens had been sampled and trained on."""

    def __init__(self) -> None:
        self.sampled, self.trained, self.steps = 0, 0, list[tuple[float, int, int]]()

    def step(self) -> None:
        self.steps.append((time.perf_counter(), self.sampled, self.trained))

    def rates(self, work: Work, coin: Coin) -> dict[str, float]:
        """Of all steps but the first, which warms up."""
        assert coin.asked == work.steps * work.rollouts, (coin.asked, work)
        seconds, sampled, trained = (end - start for start, end in zip(self.steps[0], self.steps[-1], strict=True))
        steps = len(self.steps) - 1
        return {
            "rollouts": steps * work.rollouts / seconds,
            "tokens": trained / seconds,
            "sampled": sampled / steps,
            "trained": trained / steps,
            "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def the_loss() -> Any:
    """With TRL's scale of advantages."""
    from lit_grpo import GRPO

    return GRPO(scale="sample", epsilon=1e-4)


def run_ours(folder: Path, work: Work) -> dict[str, float]:
    """One process's training by us."""
    import lightning as L
    from ours import train

    marks, coin = Marks(), Coin(work.pass_rate)

    class Clock(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            marks.trained += int(batch.mask.sum())

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            marks.sampled += int(trainer.callback_metrics["train/tokens"])
            marks.step()

    train(folder, work, the_loss(), coin=coin, callbacks=[Clock()])
    return marks.rates(work, coin)


def trl_trainer(folder: Path, work: Work, coin: Coin, each_batch: Any, callback: Any) -> Any:
    """TRL's trainer of the same work, which shows the inputs of each loss."""
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer

    class Shown(GRPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            each_batch(inputs)
            return super().compute_loss(model, inputs, *arguments, **options)

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        max_steps=work.steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=work.rollouts // work.micro_batches,
        gradient_accumulation_steps=work.micro_batches,
        gradient_checkpointing=False,
        num_generations=work.group_size,
        max_completion_length=work.max_tokens,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="group",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return Shown(
        model=str(folder),
        args=config,
        reward_funcs=lambda completions, **_: coin(completions),
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        callbacks=[callback],
    )


def run_trl(folder: Path, work: Work) -> dict[str, float]:
    """One process's training by TRL."""
    from transformers import TrainerCallback

    marks, coin = Marks(), Coin(work.pass_rate)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            marks.step()

    def count(inputs: Any) -> None:
        marks.trained += int(inputs["completion_mask"].sum())
        marks.sampled = marks.trained  # all of them

    trl_trainer(folder, work, coin, count, Clock()).train()
    return marks.rates(work, coin)


def check_gradient(folder: Path, work: Work) -> dict[str, float]:
    """How far our gradient is from TRL's, relative to its norm, on TRL's first step before anything is clipped."""
    from transformers import TrainerCallback

    from lit_grpo.data.collate import checked_select, make_rows, step_batches
    from lit_grpo.data.types import Completion, Group
    from lit_grpo.losses import LossInputs
    from lit_grpo.policy import load_policy, load_tokenizer

    groups, theirs = dict[tuple[int, ...], Group](), dict[str, torch.Tensor]()
    tokenizer, coin = load_tokenizer(str(folder)), Coin(work.pass_rate)

    def keep(inputs: Any) -> None:
        parts = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        for prompt, prompt_mask, ids, mask in zip(*(inputs[part] for part in parts), strict=True):
            prompt_ids, completion = prompt[prompt_mask.bool()].tolist(), Completion(ids[mask.bool()].tolist())
            group = groups.setdefault(tuple(prompt_ids), Group(prompt_ids, [], []))
            group.completions.append(completion)
            group.rewards += coin([tokenizer.decode(completion.token_ids, skip_special_tokens=True)])

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            theirs.update({name: p.grad.clone() for name, p in model.named_parameters()})

    work.steps = 1
    trainer = trl_trainer(folder, work, Coin(work.pass_rate), keep, Look())
    trainer.args.max_grad_norm = 0.0  # off
    trainer.train()
    loss, policy = the_loss(), load_policy(str(folder))
    policy.speed_up(None, packing=False, share_prompts=work.share_prompts, compiled=False)
    rewards = torch.tensor([group.rewards for group in groups.values()], dtype=torch.float64)
    rows = make_rows(list(groups.values()), *checked_select(loss, rewards), loss)
    total = sum(len(row.completion.token_ids) for row in rows)
    sharing = work.group_size if work.share_prompts else 0
    for batch in step_batches(rows, work.micro_batches, loss, len(rows), total, None, on_policy=True, sharing=sharing):
        logps, _ = policy(batch.tokens, batch.mask)
        loss(LossInputs(logps, batch.mask, batch.advantages, total_rows=len(rows), total_tokens=total)).loss.backward()
    ours = {name: p.grad for name, p in policy.lm.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    return {"difference": (torch.stack([(ours[name] - theirs[name]).norm() for name in theirs]).norm() / norm).item()}


SIDES = {"ours": run_ours, "trl": run_trl, "gradient": check_gradient}


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
    parser.add_argument("--only", nargs="*", type=int, default=range(len(WORK)), help="numbers of lines")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        warnings.simplefilter("ignore")
        print(json.dumps(SIDES[options.side](Path(options.folder), Work(**json.loads(options.work)))))
        return
    columns = f"{'rollouts/s':>14}{'tokens trained/s':>20}{'sampled/step':>18}{'trained/step':>18}{'peak MiB':>16}"
    print(f"{'ours / TRL':52}{columns}  gradient  ratio of rollouts/s")
    for number in options.only:
        work = WORK[number]
        with tempfile.TemporaryDirectory() as folder:
            make_task(Path(folder), work)
            difference = one("gradient", folder, work)["difference"]
            if not difference < MOST_DIFFERENT:
                raise SystemExit(f"{work.name}: our gradient is not TRL's, relative difference {difference:.2g}.")
            pairs = [(one("ours", folder, work), one("trl", folder, work)) for _ in range(options.pairs)]
        middle = {key: [statistics.median(pair[i][key] for pair in pairs) for i in (0, 1)] for key in pairs[0][0]}
        ratios = sorted(ours["rollouts"] / theirs["rollouts"] for ours, theirs in pairs)
        shown = {key: f"{a:,.0f} / {b:,.0f}" for key, (a, b) in middle.items()}
        counts = f"{shown['sampled']:>18}{shown['trained']:>18}{shown['MiB']:>16}  {difference:8.1g}"
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"{number} {work.name:50}{shown['rollouts']:>14}{shown['tokens']:>20}{counts}  {spread}", flush=True)


if __name__ == "__main__":
    main()
