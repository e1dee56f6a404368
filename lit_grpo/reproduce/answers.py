"""What the runs say, as sentences made of their numbers alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from lit_grpo.reports.figures import draw
from lit_grpo.reports.intervals import Interval, over_seeds
from lit_grpo.reports.page import Answer, write_page
from lit_grpo.reports.results import Run, scores_of
from lit_grpo.reports.table import label, make_rows, markdown, paired, write_tables
from lit_grpo.reproduce.signal import SignalToNoise

PAPER = {"score": 0.976, "rollouts": 0.125, "seconds": 0.21}
"""What 2-GRPO keeps of 16-GRPO's score, and takes of its rollouts and its time, in the abstract of arXiv 2510.00977."""

LAST = 3
"""Validations at the end of a run whose mean is its score: at a constant rate one alone is uncertain."""

Number = Callable[[Run], float]


def rollouts(run: Run) -> float:
    """Completions drawn."""
    return run.reached("rollouts")[-1]


def seconds(run: Run) -> float:
    """Of training, without validation."""
    return run.reached("seconds")[-1]


def rows_trained(run: Run) -> float:
    """Completions that were forwarded."""
    return run.total("rows_trained") or 0.0


def tokens_trained(run: Run) -> float:
    """Their tokens."""
    return run.reached("tokens_trained")[-1]


COSTS = {"rollouts": rollouts, "rows trained": rows_trained, "tokens trained": tokens_trained, "seconds": seconds}


@dataclass
class Numbers:
    """Comparisons of two configurations, over the seeds that both have."""

    configs: dict[str, list[Run]]
    score: str
    """Name in the log of Mean@k."""

    def after(self, run: Run) -> float:
        """Mean@k in the end, of the last validations but the first of all."""
        return fmean(row[self.score] for row in run.held_out[1:][-LAST:])

    def gain(self, run: Run) -> float:
        """What training added to Mean@k."""
        return self.after(run) - run.held_out[0][self.score]

    def unrest(self, name: str) -> float:
        """By how much Mean@k changes from one of the last validations to the next, mean over seeds."""
        curves = [[row[self.score] for row in run.held_out[-LAST - 1 :]] for run in self.configs[name]]
        return fmean(abs(one - other) for curve in curves for one, other in itertools.pairwise(curve))

    def over(self, ours: str, theirs: str, statistic: Callable[[list[tuple[Run, Run]]], float]) -> Interval | None:
        """A statistic of pairs of runs with its interval."""
        pairs = paired(self.configs[ours], self.configs[theirs])
        return over_seeds(lambda drawn: statistic([pairs[i] for i in drawn]), len(pairs)) if pairs else None

    def share(self, ours: str, theirs: str, number: Number) -> Interval | None:
        """One's mean over that of the other; None if that is not above 0 for all resamples."""

        def of(pairs: list[tuple[Run, Run]]) -> float:
            whole = sum(number(other) for _, other in pairs)
            return sum(number(one) for one, _ in pairs) / whole if whole > 0 else float("nan")

        return self.over(ours, theirs, of)

    def less(self, ours: str, theirs: str) -> Interval | None:
        """Mean@k in the end, one's less that of the other."""
        return self.over(ours, theirs, lambda pairs: fmean(self.after(one) - self.after(other) for one, other in pairs))

    def less_at_equal_rollouts(self, ours: str, theirs: str) -> Interval | None:
        """Mean@k when both had drawn as many rollouts as that which drew fewer, between validations by a line."""

        def difference(one: Run, other: Run) -> float:
            least = min(rollouts(one), rollouts(other))
            found, others = (float(np.interp(least, *run.curve(self.score, "rollouts"))) for run in (one, other))
            return found - others

        return self.over(ours, theirs, lambda pairs: fmean(difference(*pair) for pair in pairs))

    def arrives(self, name: str, bound: float) -> tuple[float, float] | None:
        """Rollouts and seconds at the first validation whose mean over seeds has this Mean@k; None if none has."""
        runs = self.configs[name]
        means = map(fmean, zip(*(run.curve(self.score, "rollouts")[1] for run in runs), strict=True))
        at = next((i for i, mean in enumerate(means) if mean >= bound), None)
        if at is None:
            return None
        drawn, took = (fmean(run.curve(self.score, axis)[0][at] for run in runs) for axis in ("rollouts", "seconds"))
        return drawn, took

    def differs(self, ours: str, theirs: str, found: Interval | None) -> str:
        """A difference of Mean@k in words."""
        if found is None:
            return f"{ours} and {theirs} have no seed in common"
        points = f"{100 * abs(found.value):.1f}"
        place = "above" if found.value > 0 else "below"
        text = f"{ours} is level with {theirs}" if points == "0.0" else f"{ours} is {points} points {place} {theirs}"
        if found.low is None or found.high is None:
            return f"{text}, of one seed, which says nothing of chance"
        included = "includes" if found.low <= 0 <= found.high else "excludes"
        return f"{text}{ends(found, 100)}: the interval {included} no difference"

    def scores(self, *names: str) -> str:
        """Mean@k in the end of each, in percent."""
        found = [f"{name} {100 * fmean(map(self.after, self.configs[name])):.1f}" for name in names]
        return f"{label(self.score)} in the end, in percent: {', '.join(found)}."

    def costs(self, ours: str, theirs: str) -> str:
        """What one took, as shares of what the other took."""
        found = [of_the(self.share(ours, theirs, number), name) for name, number in COSTS.items()]
        return f"Compared with {theirs}, {ours} takes {', '.join(found)}."


def percent(found: Interval | None) -> str:
    """A share as people read it."""
    return "an undefined share" if found is None else f"{100 * found.value:.1f} %{ends(found, 100)}"


def of_the(found: Interval | None, what: str) -> str:
    """A share of something, or how many times as much where it is more than twice.

    >>> of_the(Interval(0.125, None, None), "rollouts"), of_the(Interval(8.0, 7.9, 8.1), "rollouts")
    ('12.5 % of the rollouts', '8.0 times the rollouts [7.9, 8.1]')
    """
    if found is None or found.value <= 2:
        return f"{percent(found)} of the {what}"
    return f"{found.value:.1f} times the {what}{ends(found)}"


def ends(found: Interval, unit: float = 1.0) -> str:
    """The interval in brackets, nothing for a single seed."""
    return "" if found.low is None or found.high is None else f" [{found.low * unit:.1f}, {found.high * unit:.1f}]"


def kept(n: Numbers) -> list[str]:
    """Gain and costs of smaller groups at equal prompts."""
    sizes = ("2-GRPO", "4-GRPO", "8-GRPO")
    found = [n.scores("16-GRPO", *sizes)]
    for name in sizes:
        share = percent(n.share(name, "16-GRPO", n.gain))
        found += [f"{name} keeps {share} of 16-GRPO's gain. {n.costs(name, '16-GRPO')}"]
    return found


def reaches(n: Numbers) -> list[str]:
    """2-GRPO against the numbers of the paper, plainly, and what may keep it from them."""
    shares = {
        what: n.share("2-GRPO", "16-GRPO", number)
        for what, number in (("score", n.after), ("rollouts", rollouts), ("seconds", seconds))
    }
    of_gain = n.share("2-GRPO", "16-GRPO", n.gain)
    every = all(reached(share, what) for what, share in shares.items())
    found = ["Yes, all three." if every else "No, not all three."]
    found += [f"The {what}: {verdict(share, what)}." for what, share in shares.items()]
    found.append(f"The gain, which is harder, as the score does not begin at 0: {verdict(of_gain, 'score')}.")
    for name in ("16-GRPO", "2-GRPO", "2-GRPO_same_rate"):
        run, trained = n.configs[name][0], fmean(map(rows_trained, n.configs[name]))
        updates = len(run.phases) * run.settings.get("data.init_args.updates_per_phase", 1)
        found.append(
            f"{name} makes {updates:,} updates on {trained:,.0f} rows with a gradient, and in the end changes by"
            f" {100 * n.unrest(name):.1f} points from one validation to the next."
        )
    found[-1] += f" It ends at {percent(n.share(name, '16-GRPO', n.after))} of 16-GRPO's score."
    return found


def reached(found: Interval | None, what: str) -> bool:
    """Whether a share of 16-GRPO's is as good as in the paper: of the score at least that, of costs at most."""
    if found is None:
        return False
    return found.value >= PAPER[what] if what == "score" else found.value <= PAPER[what]


def verdict(found: Interval | None, what: str) -> str:
    """A share of 16-GRPO's beside that of the paper, and whether chance may be why."""
    if found is None:
        return "it cannot be said"
    bound = PAPER[what]
    worse = "below" if what == "score" else "above"
    side = f"not {worse}" if reached(found, what) else worse
    chance = found.low is not None and found.high is not None and found.low < bound < found.high
    both = ", which the interval includes" if chance else ""
    return f"{percent(found)} of 16-GRPO's, {side} the {100 * bound:g} % of the paper{both}"


def longer(n: Numbers) -> list[str]:
    """2-GRPO with more phases, and where it comes to what the paper has it keep."""
    name = "2-GRPO_twice_as_long"
    bound = PAPER["score"] * fmean(map(n.after, n.configs["16-GRPO"]))
    found = [
        n.scores("16-GRPO", name),
        f"{n.differs(name, '16-GRPO', n.less(name, '16-GRPO'))}. {n.costs(name, '16-GRPO')}",
    ]
    all_drawn, all_seconds = (fmean(map(number, n.configs["16-GRPO"])) for number in (rollouts, seconds))
    for who in (name, "16-GRPO"):
        head = f"{100 * PAPER['score']:g} % of 16-GRPO's result, {100 * bound:.1f}, is in the mean over seeds"
        if (place := n.arrives(who, bound)) is None:
            found.append(f"{head} not reached by {who}.")
            continue
        drawn, took = place
        shares = f"{100 * drawn / all_drawn:.1f} % of the rollouts and {100 * took / all_seconds:.1f} % of the seconds"
        found.append(f"{head} first reached by {who} after {drawn:,.0f} rollouts: {shares} of 16-GRPO's whole run.")
    return found


def skipping(n: Numbers) -> list[str]:
    """2-GRPO with tied pairs skipped against the same with all rows forwarded."""
    pairs = paired(n.configs["2-GRPO"], n.configs["2-GRPO_all_rows"])
    furthest = max((abs(n.after(one) - n.after(other)) for one, other in pairs), default=0.0)
    return [
        n.costs("2-GRPO", "2-GRPO_all_rows"),
        f"In {label(n.score)}, {n.differs('2-GRPO', '2-GRPO_all_rows', n.less('2-GRPO', '2-GRPO_all_rows'))}.",
        "For the same rollouts the update is the same to rounding. Still runs of one seed end up to"
        f" {100 * furthest:.1f} points apart, as each goes on from its own: so far chance may move a single run at this"
        " rate.",
    ]


def resampling(n: Numbers) -> list[str]:
    """2-GRPO+RS against 2-GRPO and 16-GRPO."""
    found = [n.scores("2-GRPO+RS", "2-GRPO", "16-GRPO")]
    for other in ("2-GRPO", "16-GRPO"):
        difference = n.differs("2-GRPO+RS", other, n.less("2-GRPO+RS", other))
        found += [n.costs("2-GRPO+RS", other), f"In {label(n.score)}, {difference}."]
    return found


def losses(n: Numbers) -> list[str]:
    """Preference losses against 2-GRPO, all on groups of two."""
    found = [n.scores("2-GRPO", "DPO", "IPO", "KTO")]
    for name in ("DPO", "IPO", "KTO"):
        time = of_the(n.share(name, "2-GRPO", seconds), "seconds")
        found += [f"{n.differs(name, '2-GRPO', n.less(name, '2-GRPO'))}. It takes {time} of 2-GRPO."]
    return found


def equal_rollouts(n: Numbers) -> list[str]:
    """Larger groups against 2-GRPO, once with as many prompts and once with as many rollouts."""
    where = {
        "": "At equal prompts",
        "_same_rollouts": "At equal rollouts and one rate for all",
        "_same_rollouts_scaled": "At equal rollouts and a rate that goes with the prompts per update",
    }
    found = [n.scores("2-GRPO", *(f"{size}-GRPO{ending}" for ending in where for size in (4, 8, 16)))]
    for ending, what in where.items():
        for name in (f"{size}-GRPO{ending}" for size in (4, 8, 16)):
            found.append(f"{what}, {n.differs(name, '2-GRPO', n.less(name, '2-GRPO'))}.")
    return found


def rates(n: Numbers) -> list[str]:
    """The rate that goes with the prompts per update against the same rate and as many updates for all sizes."""
    found = [n.scores("16-GRPO", *(f"{size}-GRPO{rate}" for rate in ("", "_same_rate") for size in (2, 4, 8)))]
    for name in ("2-GRPO", "4-GRPO", "8-GRPO"):
        same = f"{name}_same_rate"
        time = of_the(n.share(name, same, seconds), "seconds")
        found.append(f"{n.differs(name, same, n.less(name, same))}. It takes {time} of that.")
        found.append(f"{n.differs(same, '16-GRPO', n.less(same, '16-GRPO'))}.")
    return found


def adaptive(n: Numbers) -> list[str]:
    """AdaptiveGRPO against others, each pair at the rollouts of the one that drew fewer, between single validations."""
    others = ("2-GRPO", "2-GRPO+RS", "16-GRPO_same_rollouts", "16-GRPO")
    found = [n.scores("Adaptive", *others)]
    for other in others:
        difference = n.differs("Adaptive", other, n.less_at_equal_rollouts("Adaptive", other))
        drawn = [fmean(map(rollouts, n.configs[name])) for name in ("Adaptive", other)]
        parts = [f"{100 * min(drawn) / each:.0f} %" for each in drawn]
        found.append(
            f"After {min(drawn):,.0f} rollouts, {parts[0]} and {parts[1]} of the two runs, by single validations"
            f" {difference}."
        )
    return [*found, n.costs("Adaptive", "2-GRPO")]


@dataclass
class Question:
    """What one asks of the runs."""

    text: str
    answer: Callable[[Numbers], list[str]]
    needs: list[str]
    """Configurations that are compared."""

    figure: str = ""
    """Name of a figure of them, if there is one."""

    not_drawn: tuple[str, ...] = ()
    """Those whose curves are so long that others could not be told apart."""


QUESTIONS = [
    Question(
        "How much of 16-GRPO's gain do smaller groups keep, at what cost?",
        kept,
        ["16-GRPO", "2-GRPO", "4-GRPO", "8-GRPO"],
        "equal_prompts.png",
    ),
    Question(
        "Does 2-GRPO reach 97.6 % of 16-GRPO at 12.5 % of the rollouts and 21 % of the time, as in the paper?",
        reaches,
        ["16-GRPO", "2-GRPO", "2-GRPO_same_rate"],
    ),
    Question(
        "How long does 2-GRPO need to come to 97.6 % of 16-GRPO's result?",
        longer,
        ["16-GRPO", "2-GRPO_twice_as_long"],
        "longer.png",
    ),
    Question("What does skipping tied pairs contribute?", skipping, ["2-GRPO", "2-GRPO_all_rows"]),
    Question(
        "What does replacing tied pairs cost, and what does it bring?",
        resampling,
        ["16-GRPO", "2-GRPO", "2-GRPO+RS"],
        "resampling.png",
    ),
    Question("How do losses compare on groups of two?", losses, ["2-GRPO", "DPO", "IPO", "KTO"], "losses.png"),
    Question(
        "Do larger groups help at equal prompts, and at equal rollouts?",
        equal_rollouts,
        [
            *("16-GRPO", "2-GRPO", "4-GRPO", "8-GRPO"),
            *(f"{size}-GRPO_same_rollouts{rate}" for rate in ("", "_scaled") for size in (4, 8, 16)),
        ],
        "equal_rollouts.png",
        not_drawn=("16-GRPO", "4-GRPO", "8-GRPO"),
    ),
    Question(
        "Does the rate have to go with the prompts per update?",
        rates,
        ["16-GRPO", "2-GRPO", "4-GRPO", "8-GRPO", *(f"{size}-GRPO_same_rate" for size in (2, 4, 8))],
        "rates.png",
    ),
    Question(
        "Does drawing more completions of tied prompts help, at equal rollouts?",
        adaptive,
        ["16-GRPO", "2-GRPO", "2-GRPO+RS", "16-GRPO_same_rollouts", "Adaptive"],
        "adaptive.png",
        not_drawn=("16-GRPO", "2-GRPO+RS"),
    ),
]


def of_signal(signal: SignalToNoise, picture: Path) -> Answer:
    """Measured against predicted signal to noise."""
    question = "Does the gradient's signal to noise go with the group size as theory predicts?"
    if not signal.ratios:
        return Answer(question, [f"There are no finished runs of {signal.first} at the fixed policy."])
    sentences = [
        f"Ratios to {signal.first}, at the warm-started policy, which did not change: measured in {signal.phases}"
        f" phases of each, predicted from {signal.groups:,} groups of {signal.completions} completions."
    ]
    for r in signal.ratios:
        head = f"Per {r.unit}, {r.name}"
        if r.measured is None or r.predicted is None or r.measured.low is None or r.measured.high is None:
            sentences.append(f"{head}: too little was measured to say.")
            continue
        low, high, predicted = r.measured.low, r.measured.high, r.predicted.value
        where = "is within" if low <= predicted <= high else "lies below" if predicted < low else "lies above"
        against = "includes no difference" if low <= 1 <= high else "excludes no difference"
        sentences.append(
            f"{head} has {r.measured.value:.2f} times that of {signal.first} [{low:.2f}, {high:.2f}]; the interval"
            f" {against} to it, and the prediction, {predicted:.2f}, {where} the interval."
        )
    signal.draw(picture)
    return Answer(question, sentences, signal.table(), picture)


def answers(configs: dict[str, list[Run]], score: str, signal: SignalToNoise, out: Path) -> list[Answer]:
    """An answer to every question, with its figure; of runs that failed it says so.

    Args:
        configs: runs of each, one a seed.
        score: name in the log of Mean@k.
        signal: what runs at the fixed policy said.
        out: folder of the figures.
    """
    found = []
    for question in QUESTIONS:
        if missing := [name for name in question.needs if name not in configs]:
            found.append(Answer(question.text, [f"There are no runs of {', '.join(missing)}."]))
            continue
        picture = out / question.figure if question.figure else None
        if picture:
            draw({name: configs[name] for name in question.needs if name not in question.not_drawn}, score, picture)
        found.append(Answer(question.text, question.answer(Numbers(configs, score)), picture=picture))
    return [*found, of_signal(signal, out / "signal_to_noise.png")]


def notes(seeds: int) -> list[str]:
    """How to read the intervals."""
    if seeds == 1:
        return ["One seed: nothing here says how far chance may have moved a number."]
    found = [
        f"A score in the end is the mean of the last {LAST} validations (tables have the very last).",
        "[ , ] is the 95 % interval of a bootstrap over seeds, paired where two configurations are compared.",
    ]
    if seeds <= 3:
        found.append(
            f"Of {seeds} seeds it is no more than their range. Where there is no difference, all {seeds} are on one"
            f" side by chance once in {2 ** (seeds - 1)} times."
        )
    return [*found, "Nothing is corrected for the number of comparisons. Points are percentage points."]


def report(configs: dict[str, list[Run]], first: str, out: Path, signal: SignalToNoise) -> None:
    """Write tables, figures, ``answers.md`` and the page, and print the answers.

    Args:
        configs: runs of each, one a seed.
        first: name of the configuration that others are compared with in the tables.
        out: folder.
        signal: what runs at the fixed policy said.
    """
    scores = scores_of([run for runs in configs.values() for run in runs])
    rows = make_rows(configs, first, scores)
    write_tables(rows, first, scores, out)
    found = answers(configs, scores[0], signal, out)
    reading = notes(max(map(len, configs.values())))
    parts = ["# Answers", *reading]
    for answer in found:
        parts += [f"## {answer.question}", "\n".join(f"- {sentence}" for sentence in answer.sentences)]
        parts += [markdown(answer.table).strip()] if answer.table else []
        parts += [f"![{answer.question}]({answer.picture.name})"] if answer.picture else []
    text = "\n\n".join(parts) + "\n"
    (out / "answers.md").write_text(text, encoding="utf-8")
    write_page(configs, rows, first, scores, out / "report.html", answers=found, reading=reading)
    print(f"\n{text}\nReport: {out / 'report.html'}")
