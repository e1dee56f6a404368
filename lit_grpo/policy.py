"""Loading a language model as a policy or reference."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_grpo.errors import UserError
from lit_grpo.logprobs import completion_logps


class Policy(nn.Module):
    """A causal language model that answers with the log-probs of given completions.

    Args:
        lm: any ``transformers`` causal language model.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self, tokens: Tensor, mask: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs ``[N, T - 1]`` of the tokens under ``mask``, and entropies if they are wanted.

        See :func:`~lit_grpo.logprobs.completion_logps`.

        ``tokens`` are padded at the right, so that causal attention never reaches padding from a real token and no
        attention mask is needed.
        """
        hidden = self.lm.base_model(tokens, use_cache=False).last_hidden_state
        softcap = getattr(self.lm.config, "final_logit_softcapping", None)
        return completion_logps(hidden, tokens, mask, self.lm.get_output_embeddings(), temperature, softcap, entropy)


def shard(policy: Policy, mesh: Any) -> None:
    """Share a policy's parameters out between the processes of a device mesh (FSDP2), one decoder layer at a time."""
    from torch.distributed.fsdp import fully_shard

    for layer in policy.lm.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)


def load_policy(model: str, gradient_checkpointing: bool = False) -> Policy:
    """The policy to train: float32 weights, train mode, dropout off.

    Float32 because at the learning rates of RL an update of a bfloat16 weight rounds to nothing; ``precision:
    bf16-mixed`` computes in bfloat16 all the same. Dropout off because the ratio between two policies means nothing if
    each draws its own mask.

    Raises:
        UserError: if the model cannot be loaded.
    """
    config = load_config(model)
    for name in vars(config):
        if name.endswith(("dropout", "pdrop", "dropout_rate", "dropout_prob")) and isinstance(
            getattr(config, name), float
        ):
            setattr(config, name, 0.0)
    try:
        lm = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.model: cannot load the weights of {model!r}: {error}") from error
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(lm).train()


def load_reference(model: str) -> Policy:
    """The same model, frozen, in eval mode."""
    return load_policy(model).eval().requires_grad_(False)


def load_config(model: str) -> Any:
    """The model's configuration, with an error that names the key and what may stand there."""
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.model: {model!r} is neither a folder with a Hugging Face model (config.json, model.safetensors,"
            f" tokenizer.json) nor a model id that could be reached: {str(error).splitlines()[0]}"
        ) from error


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: if it has none, or one without an end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model.model: {model!r} has no tokenizer that transformers can load ({str(error).splitlines()[0]}). Save"
            " one into the folder with tokenizer.save_pretrained(...)."
        ) from error
    if len(tokenizer) == len(tokenizer.all_special_tokens):  # transformers makes an empty one where no files are
        raise UserError(
            f"model.model: {model!r} has no tokenizer: no tokenizer.json or vocabulary beside its config.json. Save one"
            " into the folder with tokenizer.save_pretrained(...)."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.model: the tokenizer of {model!r} has no end-of-sequence token, so no completion could ever end."
            " Set tokenizer.eos_token and save it again."
        )
    return tokenizer


def stop_token_ids(model: str, tokenizer: Any) -> list[int]:
    """All ids that end a completion: the tokenizer's, the config's and the generation config's (Qwen has two)."""
    ids = [tokenizer.eos_token_id, load_config(model).eos_token_id]
    with contextlib.suppress(OSError):  # a model folder need not have a generation config
        ids.append(GenerationConfig.from_pretrained(model).eos_token_id)
    flat = [i for entry in ids for i in (entry if isinstance(entry, list) else [entry])]
    return sorted({i for i in flat if i is not None})
