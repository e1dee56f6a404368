"""Policies as Hugging Face folders: of a run, or of a checkpoint that it wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from lit_grpo.engines import full_adapters, full_weights
from lit_grpo.errors import UserError
from lit_grpo.lora import LoRA
from lit_grpo.policy import Policy, load_policy, load_tokenizer
from lit_grpo.sharding import parameters_without_memory


def save_pretrained(policy: Policy, tokenizer: Any, folder: Path, merge: bool, write: bool = True) -> None:
    """Write what ``transformers`` and vLLM load; all processes that share the policy must take part.

    Args:
        policy: with its adapters, if it has any.
        tokenizer: saved beside it.
        folder: where to.
        merge: whether adapters become part of the weights; else they are written alone, as ``peft`` loads them.
        write: whether this process does so.
    """
    lm = policy.lm
    adapters = bool(getattr(lm, "peft_config", None))
    gathered = full_adapters(policy) if adapters and not merge else full_weights(policy)
    weights = {name: tensor.cpu() for name, tensor in gathered if write}  # of others, none is kept
    if not write:
        return
    for tied, source in ({} if adapters and not merge else lm.all_tied_weights_keys).items():
        weights[tied] = weights[source]  # where they were gathered, each has memory of its own
    if adapters and merge:
        generation_config = lm.generation_config
        with parameters_without_memory():
            lm = AutoModelForCausalLM.from_config(lm.config)
        lm.generation_config = generation_config
    lm.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def new_folder(path: Path) -> Path:
    """The path of a folder that is to be written.

    Raises:
        UserError: if it is a file, or not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"OUT: {str(path)!r} is not empty. Choose another folder.")
    return path


def export(checkpoint: Path, folder: Path, merge: bool = False, model: str | None = None) -> None:
    """Write the policy of a checkpoint, sharded or not, as a Hugging Face folder.

    Args:
        checkpoint: a file, or the folder of a sharded one.
        folder: where to.
        merge: see :func:`save_pretrained`.
        model: where the model lies that the run began with, if no longer where it was.

    Raises:
        UserError: if the checkpoint is of no run, its model is not found or another, or there is no room.
    """
    sharded = checkpoint.is_dir()
    held = torch.load(
        checkpoint / "meta.pt" if sharded else checkpoint, map_location="cpu", mmap=True, weights_only=True
    )
    if "policy" not in held:
        raise UserError(f"CKPT: {str(checkpoint)!r} does not say which model its run began with, so none of ours.")
    name, lora = model or held["policy"]["model"], held["policy"]["lora"]
    try:
        policy, tokenizer = load_policy(name, lora=lora and LoRA(**lora)), load_tokenizer(name)
    except UserError as error:
        raise UserError(f"{error}\nThe run began with this model; say where it lies now with --model.") from error
    trained = {f"policy.{key}": x for key, x in policy.state_dict().items() if lora is None or ".lora_" in key}
    if sharded:
        stored: dict[str, Any] = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        part = "model" if any(key.startswith("model.") for key in stored) else "state_dict"  # of FSDP, of FSDP2
        sizes = {key.removeprefix(f"{part}."): x.size for key, x in stored.items() if key.startswith(f"{part}.")}
    else:
        sizes = {key: x.shape for key, x in held["state_dict"].items()}
    sizes = {key: size for key, size in sizes.items() if key.startswith("policy.")}  # a loss may have a state, too
    for key in sorted(sizes.keys() | trained.keys()):
        if (there := sizes.get(key)) != (here := trained[key].shape if key in trained else None):
            shapes = ["missing" if size is None else list(size) for size in (there, here)]
            raise UserError(
                f"--model: {name!r} is not the model of {str(checkpoint)!r}, in which {key} is {shapes[0]}; here it is"
                f" {shapes[1]}."
            )
    if sharded:
        dcp.load({part: trained}, checkpoint_id=checkpoint, no_dist=True)
    else:
        for key, tensor in trained.items():
            tensor.copy_(held["state_dict"][key])
    folder = folder.resolve()
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        save_pretrained(policy, tokenizer, unfinished, merge)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"OUT: cannot write {str(folder)!r}: {error}. Make room, or choose another folder.") from error
