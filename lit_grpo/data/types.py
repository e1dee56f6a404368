"""What travels through a run. Read this file and you know the pipeline.

A *prompt* becomes a *group* of completions with rewards; groups become the rows of a *batch*. Online, the engine wrote
the completions and a reward function scored them. Offline, somebody else did: a preference pair is a group of two
scored 1 and 0, a labelled completion is a group of one scored 1 or 0, a demonstration is a group of one scored 1.

Example: the prompt ``12+34=`` and two completions ``46<eos>`` and ``40<eos>``, of which the first is right::

    Group([1, 2, 10, 3, 4, 15], [Completion([4, 6, 0]), Completion([4, 0, 0])], rewards=[1.0, 0.0])

As rows of a batch (T = 9; the mask has T - 1 = 8 columns, column t speaks of token t + 1)::

    tokens      1 2 10 3 4 15 4 6 0      mask  0 0 0 0 0 1 1 1      advantages  +1
                1 2 10 3 4 15 4 0 0            0 0 0 0 0 1 1 1                  -1
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

SIDE_BY_SIDE = 4
"""Completions that share their prompt where it is read once, at most."""


@dataclass
class Completion:
    """Tokens that followed a prompt. They are trained as they are: never decoded and encoded again."""

    token_ids: list[int]
    """Ends with an end-of-sequence id unless truncated."""

    logps: list[float] | None = None
    """The sampler's log-prob of each token, at the sampling temperature. None where nobody sampled (offline data)."""

    truncated: bool = False
    """True if it was cut off at a limit and not by an end-of-sequence id."""

    ref_logps: list[float] | None = None
    """The reference's log-prob of each token, where it was computed beforehand."""


@dataclass
class Group:
    """One prompt, its completions and their rewards."""

    prompt_ids: list[int]
    completions: list[Completion]
    rewards: list[float]
    """NaN where a completion was not drawn, and another one stands in its place."""


@dataclass
class Sample:
    """One completion as text: what a reward function reads."""

    prompt: str
    completion: str
    answer: str
    """The gold answer of the data set; empty where it has none."""

    num_tokens: int
    truncated: bool
    tolerance: float = 0.0
    """By which a number may differ from the gold answer."""

    messages: list[dict[str, str]] | None = None
    """The prompt as chat messages, where the policy's chat template made its text."""

    reward: float | None = None
    """Filled in after scoring."""

    parsed: str | None = None
    """The answer that the reward found in the completion, the same text for equal answers; for majority votes."""

    parts: dict[str, float] = field(default_factory=dict)
    """What else the reward has to say of the completion; its means are logged as ``reward_<name>``."""


@dataclass
class Answers:
    """Held-out prompts with their completions: one batch of validation, test or predict."""

    places: list[int]
    """Of the prompts in their set."""

    samples: list[list[Sample]]
    """Of each prompt, equally many."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Answers:
        """Itself, text has no device; Lightning calls this."""
        return self


@dataclass
class Batch:
    """N rows, right-padded to T tokens: one micro-batch.

    Column t of every ``[N, T - 1]`` tensor speaks of token t + 1.
    """

    tokens: Tensor
    """[N, T] int64. Padding stands at the right, where causal attention never looks from a real token."""

    mask: Tensor
    """[N, T - 1] bool, True where token t + 1 belongs to the completion."""

    advantages: Tensor
    """[N] float, signed: what the loss made of the rewards; [N, L] for a sum of L losses."""

    sampler_logps: Tensor | None
    """[N, T - 1] float, 0 outside the mask. None for data that nobody sampled."""

    on_policy: bool
    """True if the policy that trains on this batch is exactly the one that sampled it."""

    temperature: float
    """At which the completions were sampled, and at which log-probs are taken."""

    total_rows: int
    """Rows of the whole optimizer step, over all its micro-batches and ranks, rows that were dropped included."""

    total_tokens: int
    """Completion tokens of the same rows."""

    ref_logps: Tensor | None = None
    """[N, T - 1] float, 0 outside the mask: of the reference, where they were computed beforehand."""

    old_logps: Tensor | None = None
    """[N, T - 1] float, 0 outside the mask: of the old policy, where the trainer computed them itself."""

    mismatched: list[Batch] | None = None
    """On the first micro-batch of a step, where the loss wants ``kl_baseline``: prompts of the step with completions of
    other prompts."""

    places: Tensor | None = field(default=None, init=False)
    """[n] int64: where the mask, flattened, is True; found when a batch is moved, while no GPU has to be waited for."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; Lightning calls this. No GPU is waited for: memory is pinned first."""

        def move(x: Tensor) -> Tensor:
            to_gpu = torch.device(device).type == "cuda" and x.device.type == "cpu"
            return x.pin_memory().to(device, non_blocking=True) if to_gpu else x.to(device)

        tensors: dict[str, Any] = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        places = tensors.pop("places", None)
        moved = replace(
            self,
            **tensors,
            mismatched=self.mismatched and [batch.to(device) for batch in self.mismatched],
        )
        moved.places = move(self.mask.flatten().nonzero().squeeze(-1)) if places is None else places
        return moved
