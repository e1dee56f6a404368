"""Rollouts as a person reads them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from lit_grpo.data import Answers, PromptData, RolloutData, Sample
from lit_grpo.distributed import gather_dicts, gather_objects
from lit_grpo.errors import UserError


class SampleTable(L.Callback):
    """Writes completions with their rewards: as text to TensorBoard, as ``samples/*.jsonl`` to the run folder.

    Args:
        every_n_phases: how often rollouts are written; samples of validation and predict always are.
        num_samples: rows of the table in TensorBoard; the file holds all.
    """

    def __init__(self, every_n_phases: int = 10, num_samples: int = 16) -> None:
        if every_n_phases < 1:
            raise UserError(f"samples.every_n_phases: expected a whole number >= 1, got {every_n_phases}.")
        self.every_n_phases, self.num_samples = every_n_phases, num_samples

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if isinstance(trainer.datamodule, RolloutData) and (trainer.current_epoch % self.every_n_phases == 0 or last):
            self.write(trainer, self.rollouts, f"train-{trainer.current_epoch:05d}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and isinstance(data := trainer.datamodule, PromptData):
            self.rollouts = data.samples  # validation will replace them before the epoch ends

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, trainer.datamodule.samples, f"val-{trainer.global_step:05d}")

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Answers, batch_idx: int, *_: Any
    ) -> None:
        """Write the completions of a part, in the order of the prompts."""
        prompts = trainer.datamodule.prompts["predict"]
        part = gather_dicts(dict(zip(batch.places, batch.samples, strict=True)), trainer)
        if trainer.is_global_zero:
            rows = [{"id": prompts[place].id} | asdict(sample) for place in sorted(part) for sample in part[place]]
            self.write_rows(trainer, rows, "predict", "a" if batch_idx else "w")

    def write(self, trainer: L.Trainer, samples: list[Sample], name: str) -> None:
        """Write the samples of all processes; all must take part."""
        samples = [sample for part in gather_objects(samples, trainer) for sample in part]
        if not trainer.is_global_zero:
            return
        self.write_rows(trainer, [asdict(sample) for sample in samples], name, "w")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(f"samples/{name.split('-')[0]}", self.table(samples), trainer.global_step)

    def write_rows(self, trainer: L.Trainer, rows: list[dict[str, Any]], name: str, mode: str) -> None:
        """Write or append to a file of the run."""
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{name}.jsonl", mode, encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def table(self, samples: list[Sample]) -> str:
        """A Markdown table of the first samples."""

        def cell(text: str) -> str:
            return "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", " ↵ ") + "`"

        rows = [
            f"| {s.reward} | {cell(s.prompt)} | {cell(s.completion)} | {cell(s.answer)} |"
            for s in samples[: self.num_samples]
        ]
        return "\n".join(["| reward | prompt | completion | answer |", "|---|---|---|---|", *rows])
