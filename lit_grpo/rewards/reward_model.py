"""Scores of a reward model: a ``transformers`` sequence classifier with one logit."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import TYPE_CHECKING, Any

from lit_grpo.errors import UserError

if TYPE_CHECKING:
    from lit_grpo.data.types import Sample

KEY = "data.init_args.reward.init_args"

log = logging.getLogger(__name__)


class RewardModel:
    """The logit that a reward model gives to a prompt and its completion, as it is: neither scaled nor squashed.

    The model is loaded at the first call, onto the GPU in the precision it was saved in, or onto the CPU in float32.
    Texts with the same tokens are scored once, so that equal completions tie whatever batch they would be in. A text
    that is too long keeps its end, which holds the completion; such texts are counted in ``cut``.

    Args:
        model: folder or hub id of a model that ``AutoModelForSequenceClassification`` loads, with its tokenizer.
        batch_size: texts scored at once; the scores do not depend on it.
        chat_template: whether the model reads prompt and completion as the messages of a user and an assistant, in its
            own chat template. If not, it reads the one text straight after the other.
        max_tokens: longest text in tokens, prompt included. Default: what the model and its tokenizer can read, which
            also bounds a larger number.

    Raises:
        UserError: if a number is below 1; at the first call, if the model cannot be loaded, has no chat template that
            was asked for, no trained score head, or more than one label.
    """

    def __init__(
        self, model: str, batch_size: int = 16, chat_template: bool = False, max_tokens: int | None = None
    ) -> None:
        for key, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise UserError(f"{KEY}.{key}: expected a whole number >= 1, got {value}.")
        self.model, self.batch_size, self.chat_template, self.max_tokens = model, batch_size, chat_template, max_tokens
        self.cut = 0

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model, truncation_side="left")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._cannot_load("tokenizer", error) from error
        if len(tokenizer) == len(tokenizer.all_special_tokens):  # transformers makes an empty one where no files are
            raise UserError(f"{KEY}.model: {self.model!r} has no tokenizer. Save the reward model's into the folder.")
        if self.chat_template and not tokenizer.chat_template:
            raise UserError(
                f"{KEY}.chat_template: is true, but the tokenizer of {self.model!r} has no chat template. Set it to"
                " false."
            )
        return tokenizer

    @functools.cached_property
    def classifier(self) -> Any:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification

        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            with torch.random.fork_rng(devices=[]):  # weights that the files lack are drawn, on the CPU
                classifier, info = AutoModelForSequenceClassification.from_pretrained(
                    self.model, dtype="auto" if device == "cuda" else torch.float32, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise self._cannot_load("weights", error) from error
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"{KEY}.model: {self.model!r} is no reward model: its weights have no score head or lack a part"
                f" ({', '.join(missing[:3])}), which would be random. Expected a trained sequence classifier."
            )
        if classifier.config.num_labels != 1:
            raise UserError(
                f"{KEY}.model: {self.model!r} has {classifier.config.num_labels} labels; expected a reward model, whose"
                " score is one logit (num_labels 1)."
            )
        classifier.config.use_cache = False
        return classifier.eval().to(device)

    @functools.cached_property
    def pad_token_id(self) -> int | None:
        """The id that the model's own config calls padding."""
        return self.classifier.config.get_text_config().pad_token_id

    @functools.cached_property
    def limit(self) -> int:
        """Longest text that is read whole, in tokens."""
        context = getattr(self.classifier.config.get_text_config(), "max_position_embeddings", None)
        return min(n for n in (self.max_tokens, self.tokenizer.model_max_length, context) if n is not None)

    def __call__(self, samples: list[Sample]) -> list[float]:
        rows = self._tokenise(samples)
        distinct = sorted(dict.fromkeys(rows), key=len, reverse=True)  # little padding
        scores: dict[tuple[int, ...], float] = {}
        for start in range(0, len(distinct), self.batch_size):
            part = distinct[start : start + self.batch_size]
            scores.update(zip(part, self._score(part), strict=True))
        return [scores[row] for row in rows]

    def _tokenise(self, samples: list[Sample]) -> list[tuple[int, ...]]:
        texts = [sample.prompt + sample.completion for sample in samples]
        if self.chat_template:
            texts = [
                self.tokenizer.apply_chat_template(
                    [
                        *(s.messages or [{"role": "user", "content": s.prompt}]),
                        {"role": "assistant", "content": s.completion},
                    ],
                    tokenize=False,
                )
                for s in samples
            ]
        encode = functools.partial(self.tokenizer, texts, add_special_tokens=not self.chat_template)
        rows = encode()["input_ids"]
        if too_long := sum(len(row) > self.limit for row in rows):
            if not self.cut:
                log.warning(
                    "%d of %d texts are longer than the %d tokens that the reward model reads: it reads their end (said"
                    " once)",
                    too_long,
                    len(rows),
                    self.limit,
                )
            self.cut += too_long
            rows = encode(truncation=True, max_length=self.limit)["input_ids"]
        return [tuple(row) for row in rows]

    def _score(self, rows: list[tuple[int, ...]]) -> list[float]:
        """The logits of one batch, padded at the right."""
        import torch

        pad = self.pad_token_id
        if pad is None:
            # transformers scores at the last token that is not padding. A model that knows no padding scores at the
            # very last, so the padding must be an id in which no text ends: not even the end-of-sequence id.
            pad = next(i for i in itertools.count() if i not in {row[-1] for row in rows})
            self.classifier.config.get_text_config().pad_token_id = pad
        width, device = max(map(len, rows)), self.classifier.device
        tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with torch.inference_mode():
            return self.classifier(tokens, attention_mask=attention).logits[:, 0].float().tolist()

    def _cannot_load(self, part: str, error: Exception) -> UserError:
        return UserError(
            f"{KEY}.model: cannot load the {part} of {self.model!r}; expected a folder with a sequence classifier of"
            " transformers (config.json, model.safetensors, tokenizer.json), or a model id that can be reached:"
            f" {str(error).splitlines()[0]}"
        )
