"""Fills the generated parts of the pages in this folder from the code; ``--check`` only says whether they are current.

What stands between two markers is generated: the docstring with its formula, the line of YAML, the knobs with their
defaults, the metrics, the reference. The rest of a page is written by hand. A new loss needs a page with the two
headings of PAGE, and its metrics a line in METRICS.
"""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from lit_grpo import losses
from lit_grpo.losses import DPO, SFT, Clipped, DrGRPO, Loss, LossInputs, PolicyGradient, WeightedSum, diagnostics

FOLDER = Path(__file__).parent
to_markdown = runpy.run_path(str(FOLDER.parent / "docstrings.py"))["to_markdown"]
ABSTRACT = {"Loss", "PolicyGradient", "Clipped", "Pairwise"}
NAMES = [n for n, c in vars(losses).items() if inspect.isclass(c) and issubclass(c, Loss) and n not in ABSTRACT]
PAGE = """# {name}

<!-- generated: what -->
<!-- end -->

## When it is right

## When it carries no signal

<!-- generated: use -->
<!-- end -->
"""

YAML = {
    "AdaptiveGRPO": "AdaptiveGRPO # with data.init_args.group_size 3 or more",
    "DrGRPO": "{class_path: DrGRPO, init_args: {length: 1024}} # the same as rollout.init_args.max_tokens",
    "WeightedSum": "{class_path: WeightedSum, init_args: {losses: [DPO, SFT], weights: [1.0, 0.2]}}",
}
REQUIRED = {"DrGRPO": "length", "WeightedSum": "losses"}
INSTANCES: dict[str, Loss] = {"DrGRPO": DrGRPO(length=1024), "WeightedSum": WeightedSum([DPO(), SFT()])}

METRICS = {
    "loss_NAME": "each loss's own share of the sum, unweighted",
    "clip_fraction_low": "tokens whose ratio is below the clip while their advantage is negative: no gradient",
    "clip_fraction_high": "tokens whose ratio is above the clip while their advantage is positive: no gradient",
    "clip_fraction_dual": "tokens whose ratio is above `dual_clip` while their advantage is negative: no gradient",
    "weight_clip_fraction": "tokens whose weight was capped at `max_ratio`; they keep their gradient",
    "clamped_sequences": "completions whose summed log-ratio is beyond ±20, where it is clamped",
    "clamped_odds": "completions so likely that their odds were clamped",
    "tis_weight": "truncated weight for the mismatch of sampler and trainer; with `tis_clip`",
    "tis_clip_fraction": "tokens whose weight was truncated; with `tis_clip`",
    "reward_chosen": "implicit reward of the chosen or desirable completions",
    "reward_rejected": "implicit reward of the rejected or undesirable ones",
    "margin": "implicit reward of the chosen minus that of the rejected completion",
    "reward_accuracy": "share in which the implicit reward agrees with the preference or label",
    "desirable_share": "share of desirable completions",
    "kl_baseline": "the baseline z_0",
    "nll": "negative log-likelihood per imitated token, in nats",
    "kl": "KL divergence to the reference per token (k3), an estimate only where the policy itself sampled",
    "ratio_mean": "ratio of policy to old policy per token; from the second update of a phase on",
    "ratio_min": "the smallest",
    "ratio_max": "the largest",
    "clamped_share": "tokens whose log-ratio to old policy or reference is beyond ±20, clamped if exponentiated",
    "entropy": "of the distribution of each token, in nats; with an entropy bonus or `model.log_entropy`",
}
EVERY_RUN = """
Every run logs besides, under `train/`: `loss`, `grad_norm`, `advantage_mean`, `advantage_std`, `informative_share`,
`completion_tokens`, `truncated_share`; see [concepts](../concepts.md#metrics).
"""


def make(name: str) -> Loss:
    return INSTANCES.get(name) or getattr(losses, name)()


def sections(name: str) -> dict[str, str]:
    """The docstring's prose under "", and what stands under its headings."""
    doc = inspect.getdoc(getattr(losses, name)) or ""
    parts = re.split(r"\n(Args|Reference|Example):\n", "\n" + doc)
    return {"": parts[0].strip()} | {k: inspect.cleandoc(v) for k, v in zip(parts[1::2], parts[2::2], strict=True)}


def knobs(name: str) -> list[tuple[str, str, str]]:
    """Name, default and meaning of every setting, inherited ones included, as the command line knows them."""
    parser = ArgumentParser()
    parser.add_class_arguments(getattr(losses, name))
    rows = []
    for action in parser._actions[1:]:
        if "." in action.dest or action.dest == "config" or "help" in action.dest:
            continue
        default = "required" if action.dest == REQUIRED.get(name) else f"`{shown(action.default)}`"
        rows.append((action.dest, default, " ".join(to_markdown(str(action.help)).split())))
    return rows


def shown(value: Any) -> str:
    """A default as YAML has it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def metrics(name: str) -> list[str]:
    """Names of what the loss logs when everything is there that it can log about."""
    loss, half = make(name), torch.full((2, 2), 0.5).log()
    if isinstance(loss, PolicyGradient):
        loss.tis_clip = 2.0
    if isinstance(loss, Clipped):
        loss.dual_clip = 3.0
    advantages = loss.select(torch.tensor([[1.0, 0.0]]))[1][0]
    mask = torch.ones(2, 2).bool()
    inputs = LossInputs(half, mask, advantages, half, half, half, half.exp(), torch.tensor(0.1))
    found = list(loss(inputs).metrics)
    if isinstance(loss, WeightedSum):
        found = ["loss_NAME"]
    if not (loss.needs_reference or isinstance(loss, PolicyGradient)):
        inputs.ref_logps = None
    return found + list(diagnostics(inputs))


def generated(name: str) -> dict[str, str]:
    """The generated parts of a loss's page."""
    doc = sections(name)
    what = to_markdown(doc[""])
    rows = "\n".join(f"| `{n}` | {default} | {meaning} |" for n, default, meaning in knobs(name))
    logged = "\n".join(f"| `train/{n}` | {METRICS[n]} |" for n in metrics(name))
    loss = make(name)
    needs = "It needs the reference model" + (" in every step" if loss.needs_kl_baseline else "")
    if not loss.needs_reference:
        may = isinstance(loss, PolicyGradient) and "| `beta` |" in rows
        needs = "It needs no reference model" + (" (unless `beta` is set)" if may else "")
    silent = "rows with advantage 0 are not forwarded" if loss.drops_zero_advantages else "every row is forwarded"
    if isinstance(loss, WeightedSum):
        needs, silent = "It needs what its losses need", "a row is left out if all its losses would leave it out"
    use = f"""## How to use it

```yaml
model:
  loss: {YAML.get(name, name)}
```

{needs}; {silent}.

## Knobs

| `model.loss.init_args.` | default | meaning |
|---|---|---|
{rows}

## Metrics

| name | meaning |
|---|---|
{logged}
{EVERY_RUN}"""
    if "Reference" in doc:
        use += f"\n## Reference\n\n{link(to_markdown(doc['Reference']))}\n"
    return {"what": what, "use": use.strip()}


def link(text: str) -> str:
    """Turn arXiv numbers into links."""
    return re.sub(r"(?:arXiv\s+)?\b(\d{4}\.\d{5})\b", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with what stands between its markers replaced."""
    for key, text in parts.items():
        pattern = rf"(<!-- generated: {key} -->\n).*?(<!-- end -->)"
        page, count = re.subn(pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"expected the marker 'generated: {key}' once, found it {count} times in\n{page[:200]}")
    return page


def index() -> str:
    """The table of all losses."""
    rows = []
    for name in sorted(NAMES, key=str.lower):
        summary = to_markdown(sections(name)[""]).split("\n\n")[0].replace("\n", " ")
        loss = make(name)
        compares = {1: "groups" if isinstance(loss, PolicyGradient) else "single completions", 2: "pairs"}[loss.unit]
        if isinstance(loss, WeightedSum):
            rows.append(f"| [{name}]({name}.md) | {summary} | as its losses | as its losses |")
        else:
            needs = "yes" if loss.needs_reference else "no"
            rows.append(f"| [{name}]({name}.md) | {summary} | {needs} | {compares} |")
    return "\n".join(["| loss | what it is | reference | trains on |", "|---|---|---|---|", *rows])


def pages() -> dict[Path, str]:
    """Every page as it should be."""
    current = {FOLDER / f"{name}.md": generated(name) for name in NAMES} | {FOLDER / "README.md": {"index": index()}}
    return {
        path: fill(path.read_text() if path.exists() else PAGE.format(name=path.stem), parts)
        for path, parts in current.items()
    }


def main() -> None:
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        if stale:
            raise SystemExit(f"not current: {', '.join(p.name for p in stale)}. Run python docs/losses/update.py")
        return
    for path, text in pages().items():
        path.write_text(text)
    print(f"updated {len(stale)} pages")


if __name__ == "__main__":
    main()
