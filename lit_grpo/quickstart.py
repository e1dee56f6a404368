"""``make quickstart``: from nothing to a trained policy, on a task small enough for a laptop.

No weights are downloaded. A Qwen2 of 0.5 M parameters with a tokenizer of 16 symbols is made on the spot and learns
two-digit addition, then bad habits from unreliable demonstrations (`lit-grpo fit`, loss SFT). That leaves it where a
base model stands: the right answer is one of several that it gives. Then 2-GRPO (`lit-grpo fit`, loss TwoGRPO)
sharpens it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from lit_grpo.errors import UserError, mistakes_end_with_a_message
from lit_grpo.files import read_jsonl

SYMBOLS = "0123456789+=-*"
RIGHT_SHARE = 0.3
NUM_DEMONSTRATIONS, NUM_VAL = 16_384, 256
CONFIGS = Path("configs")


def make_task(folder: Path, seed: int) -> None:
    """Write the tokenizer, a random model, the prompts to train on and to hold out, and offline data.

    Offline data are demonstrations, right ones and unreliable ones; the same unreliable answers with labels; and pairs
    of a right and a wrong answer.

    The problems are all sums of two numbers from 10 to 99; the held-out ones are in no other file.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder / "model")

    set_seed(seed)
    small_qwen(
        vocab_size=len(vocabulary),
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=vocabulary["<eos>"],
        pad_token_id=vocabulary["<pad>"],
    ).save_pretrained(folder / "model")

    draw = random.Random(seed)
    problems = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    draw.shuffle(problems)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in problems]
    write_jsonl(folder / "val.jsonl", rows[:NUM_VAL])
    write_jsonl(folder / "train.jsonl", rows[NUM_VAL:])
    for name, right_share in (("right", 1.0), ("unreliable", RIGHT_SHARE)):
        demonstrations = [
            {"prompt": f"{a}+{b}=", "completion": str(a + b + (0 if draw.random() < right_share else wrong(draw)))}
            for a, b in draw.choices(problems[NUM_VAL:], k=NUM_DEMONSTRATIONS)
        ]
        write_jsonl(folder / f"{name}.jsonl", demonstrations)
    answers = {row["prompt"]: row["answer"] for row in rows}
    labels = [row | {"label": row["completion"] == answers[row["prompt"]]} for row in demonstrations]
    write_jsonl(folder / "labels.jsonl", labels)
    pairs = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + wrong(draw))}
        for a, b in draw.choices(problems[NUM_VAL:], k=NUM_DEMONSTRATIONS)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_benchmarks(folder / "benchmarks", problems[:NUM_VAL])


def write_benchmarks(folder: Path, problems: list[tuple[int, int]]) -> None:
    """Write the held-out sums by what has to be carried, some answers as MATH and GSM8K have them, and differences.

    No data to train on have differences.
    """
    folder.mkdir(exist_ok=True)
    sums: dict[str, list[dict[str, Any]]] = {"no_carry": [], "carry_ones": [], "carry_tens": [], "carry_both": []}
    for i, (a, b) in enumerate(problems):
        ones = a % 10 + b % 10 > 9
        tens = a // 10 + b // 10 + ones > 9
        name = "carry_both" if ones and tens else "carry_ones" if ones else "carry_tens" if tens else "no_carry"
        row = {"unique_id": f"sum-{i:03d}", "problem": f"{a}+{b}=", "answer": str(a + b)}
        if name == "carry_tens":
            row["answer"] = f"{a} and {b} are {a + b}.\n#### {a + b}"
        if name == "carry_both":
            row["answer"] = f"We carry twice, $\\boxed{{{a + b}}}$."
        sums[name].append(row)
    for name, rows in sums.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    differences = [
        {"unique_id": f"difference-{i:03d}", "problem": f"{a}-{b}=", "answer": str(a - b)}
        for i, (a, b) in enumerate(problems[:32])
    ]
    write_jsonl(folder / "differences.jsonl", differences)


def small_qwen(**settings: Any) -> Any:
    """A random Qwen2 for causal language modelling, of 0.5 M parameters unless the settings of its config differ."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return Qwen2ForCausalLM(Qwen2Config(**(size | heads | {"tie_word_embeddings": True} | settings)))


def wrong(draw: random.Random) -> int:
    """How far a wrong demonstration is off: one of its digits, by up to three."""
    return draw.choice((-1, 1)) * draw.choice((1, 2, 3, 10, 20, 30))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def warm_start(folder: Path, seed: int) -> float:
    """Make the task and fit the demonstrations, once per folder; returns the seconds it took when it was done."""
    record = folder / "warm_start.json"
    if record.exists():
        print(f"Stage 1 of 2: the warm-started model is in {folder} already.")
        return float(json.loads(record.read_text())["seconds"])
    from lit_grpo.cli import run

    if folder.exists():
        shutil.rmtree(folder)  # it was stopped half-way
    print(f"Stage 1 of 2: a new model learns addition, then from demonstrations of which {RIGHT_SHARE:.0%} are right.")
    start = time.perf_counter()
    make_task(folder, seed)
    fit = ["fit", f"--config={CONFIGS / 'quickstart_warmstart.yaml'}", f"--seed_everything={seed}"]
    for name, model, options in (
        ("right", folder / "model", []),
        ("unreliable", folder / "right" / "pretrained", ["--trainer.max_epochs=1", "--model.optimizer.lr=4.0e-4"]),
    ):
        data = folder / f"{name}.jsonl"
        run([*fit, f"--run_dir={folder / name}", f"--model.model={model}", f"--data.train.path={data}", *options])
    seconds = time.perf_counter() - start
    record.write_text(json.dumps({"seconds": seconds}))
    return seconds


def train(task: Path, run_dir: Path, seed: int, extra: list[str]) -> Any:
    """Fit with 2-GRPO; ``extra`` are further arguments of ``lit-grpo fit``."""
    from lit_grpo.cli import run

    print(f"\nStage 2 of 2: 2-GRPO on {run_dir}")
    return run([
        "fit", f"--config={CONFIGS / 'quickstart.yaml'}", f"--seed_everything={seed}", f"--run_dir={run_dir}",
        f"--model.model={task / 'unreliable' / 'pretrained'}",
        f"--data.train.path={task / 'train.jsonl'}", f"--data.val.path={task / 'val.jsonl'}", *extra,
    ])  # fmt: skip


def summarise(run_dir: Path, engine: str, seconds_warm_start: float, seconds_rl: float) -> dict[str, Any]:
    """What the run came to, read from its ``metrics.csv``; also written to ``summary.json``."""
    from lit_grpo.csv_log import read_metrics

    rows = read_metrics(run_dir)
    held_out = [row for row in rows if "val/mean_at_4" in row]
    phases = [row for row in rows if "train/reward" in row]
    if not held_out or not phases:
        raise UserError(
            "The summary needs at least one phase, held-out prompts (data.val) and data.samples_per_prompt 4: leave"
            " these as configs/quickstart.yaml has them."
        )
    summary = {
        f"{metric}_{when}": held_out[i][f"val/{metric}"]
        for metric in ("mean_at_4", "pass_at_4")
        for when, i in (("before", 0), ("after", -1))
    } | {
        "seconds_warm_start": round(seconds_warm_start, 1),
        "seconds_rl": round(seconds_rl, 1),
        "rollouts": int(phases[-1]["train/rollouts"]),
        "informative_share": round(statistics.mean(row["train/informative_share"] for row in phases), 4),
        "engine": engine,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def samples_before_and_after(run_dir: Path, count: int = 5) -> str:
    """What the policy answers to a few held-out problems, four times each."""
    files = sorted((run_dir / "samples").glob("val-*.jsonl"))
    before, after = (read_jsonl(path) for path in (files[0], files[-1]))
    lines = [f"{'four answers to':24}{'before':28}after"]
    for i in range(0, 4 * count, 4):
        cells = [" ".join(sample["completion"] for sample in samples[i : i + 4]) for samples in (before, after)]
        lines.append(f"{before[i]['prompt']:24}{cells[0]:28}{cells[1]}")
    return "\n".join(lines)


def check(extra: list[str]) -> None:
    """Let the second stage's parser read its arguments before the first stage takes its time."""
    from lit_grpo.cli import run

    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        run(["fit", f"--config={CONFIGS / 'quickstart.yaml'}", *extra, "--print_config"])


def next_run_dir(folder: Path) -> Path:
    """``rl-001`` in the folder, or the first number that is free."""
    return next(path for i in range(1, 1000) if not (path := folder / f"rl-{i:03d}").exists())


def main() -> None:
    parser = argparse.ArgumentParser(prog="quickstart", description="Train a small policy with 2-GRPO, from nothing.")
    parser.add_argument("--seed", type=int, default=0, help="of the task, the model and all sampling")
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="where everything is written")
    arguments, extra = parser.parse_known_args()
    if arguments.seed < 0:
        parser.error(f"--seed: expected a whole number >= 0, got {arguments.seed}")
    if not CONFIGS.is_dir():
        sys.exit(f"quickstart: error: no folder configs/ here ({Path.cwd()}). Run it from the root of the repository.")

    with mistakes_end_with_a_message("quickstart"):
        go(arguments.folder, arguments.seed, extra)


def go(folder: Path, seed: int, extra: list[str]) -> None:
    """Both stages, the summary, and where to look next."""
    check(extra)
    task = folder / f"task-seed{seed}"
    run_dir = next_run_dir(folder)
    seconds_warm_start = warm_start(task, seed)
    start = time.perf_counter()
    cli = train(task, run_dir, seed, extra)
    engine = cli.config.fit.rollout.class_path.rsplit(".", 1)[-1]
    summary = summarise(cli.run_dir, engine, seconds_warm_start, time.perf_counter() - start)

    print(f"\n{'held out, 256 problems':24}{'before':>8}{'after':>8}")
    for metric, label in (("mean_at_4", "Mean@4"), ("pass_at_4", "Pass@4")):
        print(f"{label:24}{summary[metric + '_before']:8.3f}{summary[metric + '_after']:8.3f}")
    print(f"\n{samples_before_and_after(run_dir)}")
    print(
        f"""
{summary["rollouts"]:,} rollouts in {summary["seconds_rl"]:.0f} s with {engine} (warm start {seconds_warm_start:.0f} s);
on average {summary["informative_share"]:.0%} of the pairs were informative.

Look next at
  {run_dir}/learning_curve.png
  {run_dir}/samples/        what the policy wrote, with rewards
  {run_dir}/config.yaml     the whole configuration
  {run_dir}/pretrained/     the trained model, for transformers and vLLM
  tensorboard --logdir {run_dir}"""
    )


if __name__ == "__main__":
    main()
