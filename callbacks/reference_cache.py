"""The reference's log-probs of offline data, computed once."""

from __future__ import annotations

import array
import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from lit_grpo.data import PreferenceData
from lit_grpo.data.collate import Row, collate, micro_batches
from lit_grpo.distributed import data_rank, gather_objects
from lit_grpo.errors import UserError
from lit_grpo.files import whole

TOKENS_PER_PASS = 2**14


class ReferenceCache(L.Callback):
    """Computes the reference's log-probs before training and keeps them in a file; later runs read the file.

    In training the reference model then takes neither memory nor time. (KTO needs it all the same, for its baseline.)
    The file belongs to one model, data set and precision, and refuses to serve another.

    Args:
        path: where to keep them, a ``.safetensors`` file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(data := trainer.datamodule, PreferenceData) or not pl_module.loss.needs_reference:
            raise UserError(
                "trainer.callbacks: ReferenceCache keeps the reference's log-probs of PreferenceData for a loss that"
                f" reads them; got {type(data).__name__} and {type(pl_module.loss).__name__}. Leave it out."
            )
        self.rows = [
            Row(group.prompt_ids, completion, 0.0) for group in data.groups for completion in group.completions
        ]
        self.fingerprint = fingerprint(pl_module, str(trainer.precision), self.rows)
        if trainer.is_global_zero:
            self.check_writable()
        if self.path.exists():
            self.read()
            pl_module.reference_is_cached = True

    def check_writable(self) -> None:
        """Find out before the log-probs are computed, not after."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            probe = self.path.with_name(self.path.name + ".unfinished")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"ReferenceCache.path: cannot write {str(self.path)!r}: {error.strerror}.") from error

    def read(self) -> None:
        """Take the log-probs from the file.

        Raises:
            UserError: if it cannot be read or belongs to another run.
        """
        try:
            with safe_open(str(self.path), "pt") as file:
                found, logps = (file.metadata() or {}).get("fingerprint"), file.get_tensor("logps")
        except (SafetensorError, OSError) as error:
            raise UserError(f"ReferenceCache.path: cannot read {str(self.path)!r}: {error}. Remove it.") from error
        if found != self.fingerprint:
            raise UserError(
                f"ReferenceCache.path: {str(self.path)!r} was made from another model, data set or precision. Name"
                " another file, or remove it to compute it anew."
            )
        lengths = [len(row.completion.token_ids) for row in self.rows]
        for row, values in zip(self.rows, logps.split(lengths), strict=True):
            row.completion.ref_logps = values.tolist()
        rank_zero_info(f"Read the reference's log-probs from {self.path}")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not pl_module.reference_is_cached:
            self.compute(trainer, pl_module)
            pl_module.reference_is_cached = True
            if trainer.is_global_zero:
                self.write()
        if not pl_module.loss.needs_kl_baseline:
            pl_module.reference = None

    def compute(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Every process takes its share of the completions, in equally many passes."""
        rank, world = data_rank(trainer)
        mine = self.rows[rank::world]
        tokens = sum(len(row) for row in self.rows)
        passes = max(1, min(len(self.rows), tokens // TOKENS_PER_PASS) // world)
        for part in tqdm(micro_batches(mine, passes), "Reference log-probs", disable=not trainer.is_global_zero):
            batch = collate(part, 1, 1).to(pl_module.device)
            logps = pl_module.logps_of(pl_module.reference, batch)
            lengths = [len(row.completion.token_ids) for row in part]
            for row, values in zip(part, logps[batch.mask].cpu().split(lengths), strict=True):
                row.completion.ref_logps = values.tolist()
        shares = gather_objects([row.completion.ref_logps for row in mine], trainer)
        for other, share in enumerate(shares):
            for row, values in zip(self.rows[other::world], share, strict=True):
                row.completion.ref_logps = values

    def write(self) -> None:
        """Write the file whole or not at all."""
        logps = torch.tensor([x for row in self.rows for x in row.completion.ref_logps or []])
        with whole(self.path) as path:
            save_file({"logps": logps}, path, {"fingerprint": self.fingerprint})


def fingerprint(module: Any, precision: str, rows: list[Row]) -> str:
    """A hash of all that the log-probs depend on, weights on disk included."""
    digest = hashlib.sha256(f"{precision} {getattr(module.config, '_commit_hash', None)}".encode())
    weights = sorted(Path(module.model_name).glob("*.safetensors")) or sorted(Path(module.model_name).glob("*.bin"))
    for path in weights:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if not weights:
        digest.update(module.model_name.encode())
    for row in rows:
        digest.update(array.array("q", [*row.prompt_ids, -1, *row.completion.token_ids, -1]).tobytes())
    return digest.hexdigest()
