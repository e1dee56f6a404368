"""Loading a language model as a policy or reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.initialization import no_init_weights

from lit_grpo.errors import UserError
from lit_grpo.logprobs import completion_logps
from lit_grpo.lora import LoRA, add_adapters, draw_adapters
from lit_grpo.sharding import decoder_layers, parameters_without_memory, reader, share_out, shares_out
from lit_grpo.side_by_side import side_by_side


class Policy(nn.Module):
    """A causal language model that answers with the log-probs of given completions.

    Args:
        lm: any ``transformers`` causal language model.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self.config = lm.config.get_text_config()
        self.divisor, self.softcap = logits_divisor(self.config), logits_softcap(self.config)
        self.plain_attention = lm.config._attn_implementation
        self.packing = self.sharing = False
        self.tokens_read = 0
        """So far, prompts and padding included."""

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs ``[N, T - 1]`` of the tokens under ``mask``, and entropies if they are wanted.

        See :func:`~lit_grpo.logprobs.completion_logps`.

        ``tokens`` are padded at the right, so that causal attention never reaches padding from a real token and no
        attention mask is needed.
        """
        read = self.packed if self.packing else self.beside_each_other if self.sharing else self.padded
        hidden = read(tokens[:, :-1], mask)  # of the last token, nobody asks what follows
        head = self.lm.get_output_embeddings()
        return completion_logps(hidden, tokens, mask, head, temperature * self.divisor, self.softcap, entropy, places)

    @torch.no_grad()
    def check_against_logits(self) -> None:
        """See to it that log-probs in train mode are those of the logits that the model gives in eval mode.

        Raises:
            UserError: if it makes logits of hidden states in a way that is not known here, or differently while it
                trains, or if they are NaN.
        """
        name = type(self.lm).__name__
        tokens = (torch.arange(4) % self.lm.get_input_embeddings().num_embeddings)[None]
        mask, head = torch.ones(1, 3, dtype=torch.bool), self.lm.get_output_embeddings()
        hidden = getattr(self.lm.base_model(tokens[:, :-1], use_cache=False), "last_hidden_state", None)
        if hidden is None:
            raise UserError(f"model.model: {name} has no decoder that gives hidden states. Choose another model.")
        ours, _ = completion_logps(hidden, tokens, mask, head, self.divisor, self.softcap)
        self.lm.eval()
        theirs = self.lm(tokens[:, :-1], use_cache=False).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
        self.lm.train()
        if theirs.isnan().any():
            raise UserError(f"model.model: the log-probs of {name} are NaN. Its weights are broken; save them again.")
        difference = (ours - theirs[..., 0]).abs().max().item()
        if not difference < 1e-3:
            raise UserError(
                f"model.model: log-probs of {name} differ by up to {difference:.2g} from those that would be trained,"
                " as it scales, caps or transforms its logits in a way that is not known here, or draws random numbers"
                " while it trains. Choose another model, or teach logits_divisor or logits_softcap in"
                " lit_grpo/policy.py."
            )

    def padded(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Hidden states ``[N, T - 1, H]`` of as many tokens."""
        return self.decoded(tokens)

    def decoded(self, tokens: Tensor, **options: Tensor) -> Tensor:
        """What the decoder makes of ``tokens``."""
        self.tokens_read += tokens.numel()
        hidden: Tensor = self.lm.base_model(tokens, use_cache=False, **options).last_hidden_state
        return hidden

    def packed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """As ``padded``, reading all rows as one without padding; positions that begin again say where a row does."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        real = places <= torch.where(mask, places, 0).amax(-1, keepdim=True)
        hidden = self.decoded(tokens[real][None], position_ids=places[real][None])[0]
        return hidden.new_zeros(*tokens.shape, hidden.shape[-1]).index_put((real,), hidden)

    def beside_each_other(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """As ``padded``, reading the prompt of rows that follow each other and have the same once."""
        layout = side_by_side(tokens, mask)
        hidden = self.decoded(layout.tokens, attention_mask=layout.attends, position_ids=layout.positions)
        return hidden.flatten(0, 1).index_select(0, layout.places.flatten()).view(*tokens.shape, -1)

    def speed_up(self, attention: str | None, packing: bool, share_prompts: bool, compiled: bool) -> None:
        """Compute in another way, from which log-probs come out the same.

        Args:
            attention: the implementation, by its name in ``transformers``.
            packing: whether rows are read without padding between them.
            share_prompts: whether a prompt is read once for several rows.
            compiled: whether ``torch.compile`` takes the decoder.

        Raises:
            UserError: if the model does not have that attention, or one that cannot share prompts, or rows of which
                would see each other packed.
        """
        self.packing, self.sharing = packing, share_prompts
        if attention is not None:
            try:
                self.lm.set_attn_implementation(attention)
            except (ValueError, ImportError) as error:
                raise UserError(f"model.attention: {error}") from error
        kinds = set(getattr(self.config, "layer_types", None) or [])
        if packing and (kinds - ATTENTIONS or getattr(self.lm, "_is_stateful", False)):
            raise UserError(
                f"model.packing: layers of {type(self.lm).__name__} carry a state from one token to the next, and so"
                " from one packed row to the next. Leave it out."
            )
        windows = kinds - {"full_attention"} or (not kinds and getattr(self.config, "sliding_window", None))
        if share_prompts and (self.config._attn_implementation != "sdpa" or windows):
            raise UserError(
                "model.share_prompts: it needs the attention sdpa in every layer, without sliding windows; this model"
                f" has {self.config._attn_implementation}{' with layers of other kinds' if windows else ''}."
                " Leave it out."
            )
        if compiled:
            self.lm.base_model.compile(dynamic=True)

    def is_put_to_the_test(self, tokens: Tensor, mask: Tensor) -> bool:
        """Whether a wrong attention would show in these rows: where none is packed or shares a prompt, it would not."""
        if self.sharing:
            return len(side_by_side(tokens[:, :-1], mask).tokens) < len(tokens)
        return not self.packing or len(tokens) > 1

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """A row at a time, with the attention that the model came with, and not compiled."""
        before, self.packing, self.sharing = (self.packing, self.sharing), False, False
        attention = self.lm.config._attn_implementation
        if attention != self.plain_attention:
            self.lm.set_attn_implementation(self.plain_attention)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.packing, self.sharing = before
            if attention != self.plain_attention:
                self.lm.set_attn_implementation(attention)


ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers, by their name in ``transformers``, that look at rows by their positions and keep no state."""


RANDOM = ("dropout", "pdrop", "dropout_rate", "dropout_prob", "layerdrop", "jitter_noise", "jitter_eps")
"""How names of settings end that have a model draw random numbers while it trains."""


def switch_off_noise(config: Any) -> None:
    """Set what has a model draw random numbers while it trains to 0, in its parts too.

    Raises:
        UserError: if it draws others whatever its settings are.
    """
    if config.model_type == "phimoe":
        raise UserError("model.model: PhiMoE draws experts at random while it trains. Choose another model.")
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            switch_off_noise(value)
        if name.endswith(RANDOM) and isinstance(value, float):
            setattr(config, name, 0.0)


def logits_softcap(config: Any) -> float | None:
    """What a model squashes its logits below, before their softmax; None for most."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    return next((cap for name in names if (cap := getattr(config, name, None))), None)


def logits_divisor(config: Any) -> float:
    """What a model divides its logits by, between its head and their softmax: of most 1."""
    scaling = getattr(config, "logits_scaling", None) or 1.0  # Granite, MiniCPM; HyperCLOVA X multiplies
    by = scaling if config.model_type.startswith("hyperclovax") else 1 / scaling
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1; MPT has one that is not used
        by *= (config.model_type != "mpt" and getattr(config, name, None)) or 1.0
    return 1 / by


def load_policy(
    model: str, gradient_checkpointing: bool = False, lora: LoRA | None = None, strategy: Any = None
) -> Policy:
    """The policy to train: float32 weights, train mode, dropout and the noise of routers off.

    Float32 because at the learning rates of RL an update of a bfloat16 weight rounds to nothing; ``precision:
    bf16-mixed`` computes in bfloat16 all the same. Dropout off because the ratio between two policies means nothing if
    each draws its own mask, and so for noise.

    Args:
        model: folder or hub id.
        gradient_checkpointing: recompute activations in the backward pass.
        lora: adapters that are trained instead of the weights.
        strategy: Lightning's; where it shares parameters out, no process ever holds all of them.

    Raises:
        UserError: if the model cannot be loaded.
    """
    config = load_config(model)
    switch_off_noise(config)
    try:
        if not shares_out(strategy):
            policy = prepared(load_lm(model, config), gradient_checkpointing, lora)
            for number, layer in enumerate(decoder_layers(policy.lm).values()):
                draw_adapters(layer, number)
            policy.check_against_logits()
            return policy
        with no_init_weights(), parameters_without_memory():
            lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            lm.tie_weights()
        buffers = {name: buffer for name, buffer in lm.named_buffers() if name in lm.state_dict()}
        read = reader(model, {name for name, _ in lm.named_parameters()} | buffers.keys())
        if read is None:  # old files, whose names from_pretrained translates
            read = load_lm(model, config).state_dict().__getitem__
        for name, buffer in buffers.items():
            buffer.copy_(read(name))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.model: cannot load the weights of {model!r}: {error}") from error
    with parameters_without_memory():
        policy = prepared(lm, gradient_checkpointing, lora)
    return share_out(policy, strategy, read)


def load_lm(model: str, config: Any) -> Any:
    """The language model, in float32."""
    return AutoModelForCausalLM.from_pretrained(model, config=config, dtype=torch.float32)


def prepared(lm: Any, gradient_checkpointing: bool, lora: LoRA | None) -> Policy:
    """The policy that a language model becomes."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if lora is not None:
        add_adapters(lm, lora, list(decoder_layers(lm)))
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(lm).train()


def load_reference(model: str, strategy: Any = None) -> Policy:
    """The same model, frozen, in eval mode."""
    return load_policy(model, strategy=strategy).eval().requires_grad_(False)


def load_config(model: str) -> Any:
    """The model's configuration, with an error that names the key and what may stand there."""
    if (Path(model) / "adapter_config.json").exists():
        raise UserError(
            f"model.model: {model!r} holds adapters only. Write the whole model with `lit-grpo export RUN OUT --merge`,"
            " and name OUT."
        )
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
    config = load_config(model)
    parts = (config, config.get_text_config())
    ids = [tokenizer.eos_token_id, *(getattr(part, "eos_token_id", None) for part in parts)]
    with contextlib.suppress(OSError):  # a model folder need not have a generation config
        ids.append(GenerationConfig.from_pretrained(model).eos_token_id)
    flat = [i for entry in ids for i in (entry if isinstance(entry, list) else [entry])]
    return sorted({i for i in flat if i is not None})
