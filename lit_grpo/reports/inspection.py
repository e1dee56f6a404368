"""What a policy wrote, looked at closely: the samples of one phase of a run as text and as a page."""

from __future__ import annotations

import argparse
import base64
import io
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from lit_grpo.errors import UserError
from lit_grpo.files import read_jsonl

Row = dict[str, Any]
"""A line of a file in ``samples/``: the fields of :class:`~lit_grpo.data.types.Sample`, or those of ``Outliers``."""

SHOWN = 5
"""Completions of each list."""

N_GRAM = 4
"""Words."""


@dataclass
class Inspection:
    """What is found in the samples of a phase."""

    title: str
    lists: dict[str, list[Row]]
    """Completions by what they were chosen for, at most five each; lists of outliers only where some were written."""

    components: list[tuple[str, float, float, float]]
    """Name of the reward or of a part of it, mean, standard deviation, share above 0."""

    lengths: list[tuple[int, int, int, float, float]]
    """Fifths of the completions by length: shortest and longest in tokens, how many, mean reward, share cut off."""

    duplicates: float
    """Share of completions which another one of the same prompt equals."""

    common: list[tuple[str, int]]
    """The texts that were written most often, to whatever prompt, and how often; none that was written once."""

    repetition: float
    """Mean over completions of the share of their 4-grams of words that were there before."""

    points: list[tuple[int, float]]
    """Length in tokens and reward of each completion."""

    def text(self) -> str:
        """As the terminal shows it."""
        lines = [self.title, "", f"{'reward and parts':24}{'mean':>10}{'sd':>10}{'> 0':>8}"]
        lines += [f"{name:24}{mean:10.3f}{sd:10.3f}{share:8.0%}" for name, mean, sd, share in self.components]
        lines += ["", f"{'tokens':>12}{'completions':>13}{'reward':>10}{'cut off':>9}"]
        lines += [f"{f'{a}-{b}':>12}{n:13}{mean:10.3f}{cut:9.0%}" for a, b, n, mean, cut in self.lengths]
        lines += ["", f"{self.duplicates:.0%} equal another completion of their prompt;"]
        lines += [f"{self.repetition:.1%} of a completion's {N_GRAM}-grams of words were there before."]
        for text, count in self.common:
            lines.append(f"{count:6} x {short(text)}")
        for name, rows in self.lists.items():
            lines += ["", name, *([] if rows else [f"{'none':>12}"])]
            lines += [f"{row['shown']:>12}  {short(row['prompt'], 40)} -> {short(row['completion'])}" for row in rows]
        return "\n".join(lines)

    def page(self) -> str:
        """As HTML that needs nothing beside it."""
        templates = Environment(loader=PackageLoader("lit_grpo.reports", "."), autoescape=True, trim_blocks=True)
        picture = base64.b64encode(draw(self.points)).decode()
        return templates.get_template("inspection.html.jinja").render(found=self, picture=picture, n_gram=N_GRAM)


def inspect(samples: list[Row], outliers: list[Row], title: str) -> Inspection:
    """Find what is worth looking at.

    Args:
        samples: of one phase, at least one.
        outliers: what ``Outliers`` wrote of the same phase, if it did.
        title: of the report.
    """
    rewards = {"reward": [row["reward"] or 0.0 for row in samples]}
    for part in sorted({part for row in samples for part in row["parts"]}):
        rewards[part] = [row["parts"][part] for row in samples if part in row["parts"]]
    counts = Counter((row["prompt"], row["completion"]) for row in samples)
    texts = Counter(row["completion"] for row in samples)
    repeated = [row | {"repetition": repetition(row["completion"])} for row in samples]
    lists = {
        "Best": top(samples, lambda row: row["reward"] or 0.0, "{:.3g}"),
        "Worst": top(samples, lambda row: row["reward"] or 0.0, "{:.3g}", largest=False),
        f"Most repeated {N_GRAM}-grams": top(
            [row for row in repeated if row["repetition"]], lambda row: row["repetition"], "{:.0%}"
        ),
    }
    if outliers:
        clipped = [row for row in outliers if row["outside_clip"]]
        lists |= {
            "Most tokens outside the clip range": top(clipped, lambda row: row["outside_clip"], "{:.0%}"),
            "Largest mismatch of sampler and trainer": top(outliers, lambda row: row["mismatch"], "{:.2g}"),
        }
    return Inspection(
        title,
        lists,
        [(name, statistics.mean(x), statistics.pstdev(x), share(v > 0 for v in x)) for name, x in rewards.items()],
        by_length(samples),
        share(counts[row["prompt"], row["completion"]] > 1 for row in samples),
        [(text, count) for text, count in texts.most_common(SHOWN) if count > 1],
        statistics.mean(row["repetition"] for row in repeated),
        [(row["num_tokens"], row["reward"] or 0.0) for row in samples],
    )


def share(holds: Any) -> float:
    """Of how many a condition holds."""
    return statistics.mean(map(float, holds))


def top(rows: list[Row], key: Callable[[Row], float], form: str, largest: bool = True) -> list[Row]:
    """The first rows by a number, which they then have under ``shown`` as text; ties go round the prompts."""
    before: Counter[str] = Counter()
    places: list[tuple[float, int, int]] = []
    for row in rows:
        value = key(row)
        places.append((-value if largest else value, before[row["prompt"]], len(places)))
        before[row["prompt"]] += 1
    return [rows[i] | {"shown": form.format(key(rows[i]))} for _, _, i in sorted(places)[:SHOWN]]


def repetition(text: str) -> float:
    """Share of a text's 4-grams of words that stand in it earlier; 0 where it has none.

    >>> repetition("so it is so it is so it is")  # 6 4-grams, 3 of them new
    0.5
    """
    words = text.split()
    grams = [tuple(words[i : i + N_GRAM]) for i in range(len(words) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def by_length(samples: list[Row]) -> list[tuple[int, int, int, float, float]]:
    """Fifths of the completions, see :class:`Inspection`; where many have the same length, they stay together."""
    lengths = sorted(row["num_tokens"] for row in samples)
    starts = sorted({lengths[i * len(lengths) // 5] for i in range(5)})
    table = []
    for first, end in zip(starts, [*starts[1:], lengths[-1] + 1], strict=True):
        part = [row for row in samples if first <= row["num_tokens"] < end]
        longest = max(row["num_tokens"] for row in part)
        mean = statistics.mean(row["reward"] or 0.0 for row in part)
        table.append((first, longest, len(part), mean, share(row["truncated"] for row in part)))
    return table


def short(text: str, width: int = 80) -> str:
    """A text on one line, its middle left out if it is long, without what would steer a terminal."""
    text = "".join(c if c.isprintable() else "·" for c in text.replace("\n", " ↵ "))
    return text if len(text) <= width else f"{text[: width // 2 - 2]} ... {text[3 - width // 2 :]}"


def draw(points: list[tuple[int, float]]) -> bytes:
    """Reward against length as a PNG; larger where more completions are."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("agg")
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    counts = Counter(points)
    most = max(counts.values())
    sizes = [8 + 120 * count / most for count in counts.values()]
    axes.scatter([x for x, _ in counts], [y for _, y in counts], s=sizes, alpha=0.5, linewidths=0)
    axes.set(xlabel="tokens", ylabel="reward")
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def read(run: Path, split: str, number: int | None) -> tuple[list[Row], list[Row], str]:
    """Samples of a run, what ``Outliers`` wrote of them, and a title.

    Args:
        run: its folder.
        split: ``train`` or ``val``.
        number: of the phase, or for ``val`` of updates made; the latest if not given.

    Raises:
        UserError: if there is no such run, or nothing was written then.
    """
    if not run.is_dir():
        raise UserError(f"RUN: {str(run)!r} is no folder (looked from {Path.cwd()}). Give the folder of a run.")
    files = {int(path.stem.split("-")[1]): path for path in sorted((run / "samples").glob(f"{split}-*.jsonl"))}
    if not files:
        raise UserError(
            f"RUN: {str(run)!r} holds no samples/{split}-*.jsonl. Runs write them every samples.every_n_phases phases"
            " (train) and at every validation (val)."
        )
    number = max(files) if number is None else number
    if number not in files:
        written = ", ".join(map(str, files))
        raise UserError(f"--phase: nothing of {split} was written at {number}. There are {written}.")
    outliers = run / "samples" / f"outliers-{number:05d}.jsonl"
    samples = read_rows(files[number])
    if not samples:
        raise UserError(f"RUN: {str(files[number])!r} is empty. Choose another with --phase.")
    what = "rollouts of phase" if split == "train" else "held-out samples after updates:"
    title = f"{run.resolve().name}, {what} {number}: {len(samples)} completions"
    return samples, read_rows(outliers) if split == "train" and outliers.exists() else [], title


def read_rows(path: Path) -> list[Row]:
    """The lines of a file.

    Raises:
        UserError: if one of them is damaged.
    """
    try:
        return read_jsonl(path)
    except ValueError as error:
        raise UserError(f"RUN: {str(path)!r} is damaged ({error}). Choose another with --phase.") from error


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser("lit-grpo inspect", description="Look at what the policy of a run wrote.")
    found.add_argument("RUN", type=Path, help="the folder of a run")
    found.add_argument("--phase", type=int, help="with --split val, the number of updates; the latest if not given")
    found.add_argument("--split", choices=["train", "val"], default="train", help="rollouts or held-out samples")
    return found


def run_inspect(args: list[str]) -> None:
    """Run the command line of ``lit-grpo inspect``."""
    given = parser().parse_args(args)
    run = given.RUN.expanduser()
    found = inspect(*read(run, given.split, given.phase))
    print(found.text())
    page = run / "inspection.html"
    try:
        page.write_text(found.page(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"RUN: cannot write {str(page)!r}: {error.strerror}.") from error
    print(f"\nWrote {page}")
