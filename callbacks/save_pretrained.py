"""The policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from callbacks.stop_on_signal import StopOnSignal
from lit_grpo.export import save_pretrained


class SavePretrained(L.Callback):
    """Writes ``pretrained/`` into the run folder when training ends: ``transformers`` and vLLM load it by its path.

    Of a policy with adapters, the adapters alone, which ``peft`` loads.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        stopping = any(isinstance(callback, StopOnSignal) and callback.stopping for callback in trainer.callbacks)
        if stopping and trainer.current_epoch != trainer.max_epochs:
            return  # there is only time for a checkpoint
        folder = Path(trainer.default_root_dir) / "pretrained"
        save_pretrained(pl_module.policy, pl_module.tokenizer, folder, merge=False, write=trainer.is_global_zero)
