"""Settings of the optimizer and its schedule, which a command line gives and a checkpoint must not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lit_grpo.errors import UserError


def plain(value: Any) -> Any:
    """Of settings, what is numbers, text or nothing, in lists and dictionaries; of others in a list, their kind."""
    simple = (bool, int, float, str, type(None))
    if isinstance(value, Mapping):
        kept = {key: x for key, x in value.items() if isinstance(x, (*simple, list, tuple, Mapping))}
        return {key: plain(x) for key, x in kept.items() if key not in ("params", "base_lrs", "_last_lr")}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return value if isinstance(value, simple) else type(value).__name__


def settings_of(optimizer: Optimizer, schedule: Any) -> dict[str, Any]:
    """As they begin; of the schedule only where there is one."""
    settings = {"class": type(optimizer).__name__, "optimizer": plain(optimizer.param_groups[0])}
    return settings if schedule is None else settings | {"lr_scheduler": plain(schedule.state_dict())}


def keep_to(now: dict[str, Any], before: dict[str, Any], optimizer: Optimizer, schedule: Any) -> None:
    """Have an optimizer that took over a checkpoint's state go on with this run's settings.

    Args:
        now: settings of this run.
        before: those of the run that the checkpoint is of.
        optimizer: whose state was taken over.
        schedule: of its rate, if there is one.

    Raises:
        UserError: if the schedule was another, or the optimizer.
    """
    if before["class"] != now["class"]:
        raise UserError(
            f"model.optimizer: the run that the checkpoint is of had {before['class']}, whose state says nothing to"
            f" {now['class']}. Leave it as it was, or begin a run from what `lit-grpo export` writes."
        )
    old, new = before.get("lr_scheduler"), now.get("lr_scheduler")
    if old != new:
        keys = [key for key in (old or {}) | (new or {}) if (old or {}).get(key) != (new or {}).get(key)]
        raise UserError(
            f"model.lr_scheduler: the run that the checkpoint is of had another schedule ({', '.join(keys)}), and"
            " none can be changed halfway. Leave it as it was, or begin a run from what `lit-grpo export` writes."
        )
    old, new = before["optimizer"], now["optimizer"]
    if schedule is not None and old["lr"] == 0 != new["lr"]:
        raise UserError(
            "model.optimizer.lr: the run that the checkpoint is of had a schedule of the rate 0, which says nothing of"
            f" where one of {new['lr']} would be by now. Leave it, or begin a run from what `lit-grpo export` writes."
        )
    for key in (key for key in new if key in old and new[key] != old[key]):
        rank_zero_info(f"model.optimizer: {key} was {old[key]}, and is {new[key]} from here on")
        for group in optimizer.param_groups:
            if key == "lr" and schedule is not None:
                group["lr"], group["initial_lr"] = group["lr"] * new["lr"] / old["lr"], new["lr"]
            else:
                group[key] = new[key]
        if key == "lr" and hasattr(schedule, "base_lrs"):
            schedule.base_lrs = [new["lr"]] * len(schedule.base_lrs)
