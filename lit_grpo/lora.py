"""Low-rank adapters: a policy that is a frozen model and a small change of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lit_grpo.errors import UserError


@dataclass
class LoRA:
    """Which adapters are trained (arXiv 2106.09685), through ``peft``.

    Args:
        r: rank of the change of each weight.
        alpha: changes are scaled by ``alpha / r``.
        targets: names of the linear layers that get one; all but the head if not given.

    Raises:
        UserError: if a number is below 1.
    """

    r: int = 16
    alpha: int = 32
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key in ("r", "alpha"):
            if (value := getattr(self, key)) < 1:
                raise UserError(f"model.lora.{key}: expected a whole number >= 1, got {value}.")


def add_adapters(lm: Any, lora: LoRA, layers: list[str]) -> None:
    """Freeze a language model and give it adapters, without dropout, that change nothing yet.

    Args:
        lm: a ``transformers`` language model.
        lora: which.
        layers: names of its decoder layers, inside which they must stand.

    Raises:
        UserError: if peft is not installed, or the model has no such layers, or they cannot be merged again.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear, LoraLayer
    except ImportError as error:
        raise UserError('model.lora: adapters need peft. Install it with pip install "lit-grpo[lora]".') from error
    try:
        targets: Any = lora.targets or "all-linear"
        lm.add_adapter(LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM"))
    except ValueError as error:
        raise UserError(f"model.lora.targets: {error}") from error
    for name, module in lm.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, Linear):
            raise UserError(
                f"model.lora.targets: {name} of {type(lm).__name__} is no linear layer, so that its adapter cannot be"
                " merged for the engine. Name linear layers, such as [q_proj, k_proj, v_proj, o_proj]."
            )
        if isinstance(module, LoraLayer) and not name.startswith(tuple(f"{layer}." for layer in layers)):
            raise UserError(f"model.lora.targets: {name} stands outside the decoder layers. Leave it out.")


def draw_adapters(module: nn.Module, number: int) -> None:
    """Draw the adapters of a decoder layer, by the seed of the process and the layer's number alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + number)
        for layer in module.modules():
            if (reset := getattr(layer, "reset_lora_parameters", None)) is not None:
                reset("default", init_lora_weights=True)


@contextmanager
def adapters_off(lm: Any) -> Iterator[None]:
    """Run the model that the adapters change.

    ``disable_adapters`` of transformers and peft would do, but it also freezes the adapters meanwhile, and FSDP1 does
    not forget that.
    """
    layers = [module for module in lm.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
