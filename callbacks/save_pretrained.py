"""The policy as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
from safetensors import SafetensorError

from callbacks.checkpoints import Checkpoints
from callbacks.stop_on_signal import stopping
from lit_grpo.errors import UserError
from lit_grpo.export import save_pretrained


class SavePretrained(L.Callback):
    """Writes ``pretrained/`` into the run folder when training ends: ``transformers`` and vLLM load it by its path.

    Of a policy with adapters, the adapters alone, which ``peft`` loads. Where they cannot be written, that is said once
    the last checkpoint, which has the policy too, was saved.

    Raises:
        UserError: if they could not be written.
    """

    def __init__(self) -> None:
        self.failed: UserError | None = None

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if stopping(trainer) and trainer.current_epoch != trainer.max_epochs:
            return  # there is only time for a checkpoint
        folder, first = Path(trainer.default_root_dir) / "pretrained", trainer.is_global_zero
        unfinished = folder.with_suffix(".unfinished")
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            save_pretrained(pl_module.policy, pl_module.tokenizer, unfinished, merge=False, write=first)
            if first:
                shutil.rmtree(folder, ignore_errors=True)
                unfinished.rename(folder)
        except (OSError, SafetensorError) as error:
            if first:
                shutil.rmtree(unfinished, ignore_errors=True)
            saves = any(isinstance(callback, Checkpoints) for callback in trainer.callbacks)
            later = f" `lit-grpo export {trainer.default_root_dir} OUT` writes it from the last checkpoint."
            self.failed = UserError(f"pretrained: cannot write {str(folder)!r}: {error}. Make room.{later * saves}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.failed is not None:
            raise self.failed
