"""The policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from callbacks.stop_on_signal import StopOnSignal
from lit_grpo.engines import full_weights


class SavePretrained(L.Callback):
    """Writes ``pretrained/`` into the run folder when training ends: ``transformers`` and vLLM load it by its path."""

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if any(isinstance(callback, StopOnSignal) and callback.stopping for callback in trainer.callbacks):
            return  # there is only time for a checkpoint
        weights = dict(full_weights(pl_module.policy))  # all ranks take part
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / "pretrained"
            pl_module.policy.lm.save_pretrained(folder, state_dict=weights)
            pl_module.tokenizer.save_pretrained(folder)
