"""DAPO (arXiv 2503.14476)."""

from __future__ import annotations

from typing import Any

from lit_grpo.losses.base import Aggregation
from lit_grpo.losses.grpo import GRPO


class DAPO(GRPO):
    """GRPO with a higher upper clip, the mean over tokens, and no gradient from truncated completions.

    The paper's soft penalty on long answers is a reward: :class:`~lit_grpo.rewards.LengthPenalty`.

    Args:
        clip_high: as in :class:`GRPO`; the paper's "clip-higher".
        aggregation: as in :class:`GRPO`.
        mask_truncated: whether completions cut off at ``max_tokens`` get advantage 0 ("overlong filtering").
        grpo: arguments of :class:`GRPO`.

    Reference:
        DAPO, arXiv 2503.14476. Its dynamic sampling is a matter of the data, not of the loss.

    Example:
        >>> DAPO()
        DAPO(aggregation=token_mean, beta=0.0, kl=k3, entropy_bonus=0.0, tis_level=token, masks_truncated=True, \
clip_low=0.2, clip_high=0.28, scale=population, epsilon=0.0)
    """

    def __init__(
        self,
        clip_high: float = 0.28,
        aggregation: Aggregation = "token_mean",
        mask_truncated: bool = True,
        **grpo: Any,
    ) -> None:
        super().__init__(clip_high=clip_high, aggregation=aggregation, mask_truncated=mask_truncated, **grpo)
