"""What the runs say, as sentences made of their numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lit_grpo.reports.figures import draw
from lit_grpo.reports.intervals import Interval
from lit_grpo.reports.page import Answer, write_page
from lit_grpo.reports.results import Run, scores_of
from lit_grpo.reports.table import label, make_rows, markdown, paired, rounded, write_tables
from lit_grpo.reproduce.numbers import LAST, Numbers, of_the, percent, rollouts, rows_trained, seconds
from lit_grpo.reproduce.signal import SignalToNoise

PAPER = {"score": 0.976, "rollouts": 0.125, "seconds": 0.21}
"""What 2-GRPO keeps of 16-GRPO's score, and takes of its rollouts and its time, in the abstract of arXiv 2510.00977."""


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
    alone = n.share("2-GRPO", "16-GRPO", lambda run: run.held_out[-1][n.score])
    found.append(f"The score by the very last validation alone: {verdict(alone, 'score')}.")
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
    low, high = (None if end is None else rounded(100 * end, 1) for end in (found.low, found.high))
    chance = low is not None and high is not None and low != high and low <= 100 * bound <= high
    both = ", which the interval includes" if chance else ""
    return f"{percent(found)} of 16-GRPO's, {side} the {100 * bound:g} % of the paper{both}"


def longer(n: Numbers) -> list[str]:
    """2-GRPO with more phases, and where it and larger groups come to what the paper has it keep."""
    name = "2-GRPO_twice_as_long"
    bound = PAPER["score"] * fmean(map(n.after, n.configs["16-GRPO"]))
    found = [
        n.scores("16-GRPO", name),
        f"{n.differs(name, '16-GRPO', n.less(name, '16-GRPO'))}. {n.costs(name, '16-GRPO')}",
    ]
    all_drawn, all_seconds = (fmean(map(number, n.configs["16-GRPO"])) for number in (rollouts, seconds))
    for who in (name, "4-GRPO", "8-GRPO", "16-GRPO"):
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
    """2-GRPO+RS against 2-GRPO, against larger groups of the same prompts, and against 16-GRPO."""
    others = ("2-GRPO", "4-GRPO", "8-GRPO", "16-GRPO")
    found = [n.scores("2-GRPO+RS", *others)]
    for other in others:
        difference = n.differs("2-GRPO+RS", other, n.less("2-GRPO+RS", other))
        found += [n.costs("2-GRPO+RS", other), f"In {label(n.score)}, {difference}."]
    return found


def losses(n: Numbers) -> list[str]:
    """Preference losses against 2-GRPO on groups of two, each on rollouts of its own policy; and against 16-GRPO."""
    found = [n.scores("2-GRPO", *PREFERENCES)]
    for name in PREFERENCES:
        time = of_the(n.share(name, "2-GRPO", seconds), "seconds")
        found += [f"{n.differs(name, '2-GRPO', n.less(name, '2-GRPO'))}. It takes {time} of 2-GRPO."]
    for name in PREFERENCES:
        found += [f"{n.differs(name, '16-GRPO', n.less(name, '16-GRPO'))}. {n.costs(name, '16-GRPO')}"]
    return found


def same_data(n: Numbers) -> list[str]:
    """The same losses on the very same rollouts, all of the warm-started policy; and against training on their own."""
    two, others = "2-GRPO_same_data", [f"{name}_same_data" for name in PREFERENCES]
    found = [f"{n.scores(two, *others)} Of one validation, as these runs have one phase."]
    for name in others:
        time = of_the(n.share(name, two, seconds), "seconds")
        found += [f"{n.differs(name, two, n.less(name, two))}. It takes {time} of {two}."]
    for name in (two, *others):
        own = name.removesuffix("_same_data")
        drawn = fmean(map(rollouts, n.configs[name]))
        difference = n.differs(name, own, n.less_at_equal_rollouts(name, own))
        found += [f"After {drawn:,.0f} rollouts, which {own} draws of its own policy, {difference}."]
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


PREFERENCES = ("DPO", "IPO", "KTO")


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
    """Those that would be too many in the figure."""

    cut: tuple[str, ...] = ()
    """Those that are drawn as far as others go, which could not be told apart otherwise."""


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
        ["16-GRPO", "2-GRPO_twice_as_long", "4-GRPO", "8-GRPO"],
        "longer.png",
    ),
    Question("What does skipping tied pairs contribute?", skipping, ["2-GRPO", "2-GRPO_all_rows"]),
    Question(
        "What does replacing tied pairs cost, and what does it bring?",
        resampling,
        ["16-GRPO", "2-GRPO", "4-GRPO", "8-GRPO", "2-GRPO+RS"],
        "resampling.png",
    ),
    Question(
        "How do losses compare on groups of two?",
        losses,
        ["16-GRPO", "2-GRPO", *PREFERENCES],
        "losses.png",
        cut=("16-GRPO",),
    ),
    Question(
        "How do losses compare on identical rollouts, which the policy before training drew?",
        same_data,
        [*(f"{name}{data}" for data in ("", "_same_data") for name in ("2-GRPO", *PREFERENCES))],
    ),
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
        cut=("16-GRPO", "2-GRPO+RS"),
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
        low, high, predicted = (rounded(x, 2) for x in (r.measured.low, r.measured.high, r.predicted.value))
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
            drawn = {name: configs[name] for name in question.needs if name not in question.not_drawn}
            draw(drawn, score, picture, question.cut)
        sentences = question.answer(Numbers(configs, score))
        if question.cut:
            sentences.append(f"In the figure, {' and '.join(question.cut)} would go on beyond the right edge.")
        found.append(Answer(question.text, sentences, picture=picture))
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
