"""What `make reproduce` runs is what it says; one phase of it on the real task; and sentences follow their numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_grpo import quickstart
from lit_grpo.__main__ import main
from lit_grpo.losses import TwoGRPO
from lit_grpo.reports import table
from lit_grpo.reports.compare import check_scores, entry_of, parsed
from lit_grpo.reports.intervals import Interval
from lit_grpo.reports.results import Run, read_run
from lit_grpo.reports.running import Job
from lit_grpo.reproduce import __main__ as reproduce
from lit_grpo.reproduce.answers import QUESTIONS, adaptive, longer, of_signal, reaches, verdict
from lit_grpo.reproduce.numbers import Numbers
from lit_grpo.reproduce.runs import FIXED_RUNS, RUNS, TwoGRPOAllRows, command
from lit_grpo.reproduce.signal import SignalToNoise

ROOT = Path(__file__).parent.parent


def configs_of(runs: dict[str, str]) -> dict[str, Any]:
    """What the parser makes of all runs."""
    arguments = command(runs, Path("out"))
    entries, common = arguments[: arguments.index("--common")], arguments[arguments.index("--common") + 1 : -2]
    found = {}
    for entry in (entry_of(text, Path("out")) for text in entries):
        found[entry.name] = parsed(entry.name, [f"--config={file}" for file in [*common, *entry.files]])
    check_scores(found)
    return found


def sizes(config: dict[str, Any]) -> tuple[int, int, int, float]:
    """Prompts, group size, rollouts per update, rate per prompt of an update."""
    data, optimizer = config["data"]["init_args"], config["model"]["optimizer"]["init_args"]
    prompts, group_size, updates = (data[k] for k in ("prompts_per_phase", "group_size", "updates_per_phase"))
    return prompts, group_size, prompts * group_size // updates, optimizer["lr"] / (prompts / updates)


def test_every_run_is_what_its_name_says(monkeypatch: pytest.MonkeyPatch):
    """Prompts and rollouts per phase, rollouts per update, and the rate, which goes with the prompts per update."""
    monkeypatch.chdir(ROOT)
    found = configs_of(RUNS)
    assert len(found) == 24
    for name in ("2-GRPO", "DPO", "IPO", "KTO"):
        same = found.pop(f"{name}_same_data")
        assert sizes(same) == pytest.approx((15360, 2, 512, 3e-4 / 256))
        assert (same["trainer"]["max_epochs"], same["model"]) == (1, found[name]["model"])
    longer = found.pop("2-GRPO_twice_as_long")
    assert longer["trainer"]["max_epochs"] == 240
    assert all(longer[key] == found["2-GRPO_same_rate"][key] for key in ("model", "data"))
    scaled, same_rate = (3e-4 / 256, 3.75e-5 / 32)
    assert scaled == same_rate  # the paper's 8e-6 / 256 and 1e-6 / 32 are the same as well
    for group_size, name in ((2, "2-GRPO"), (4, "4-GRPO"), (8, "8-GRPO"), (16, "16-GRPO")):
        assert sizes(found[name]) == pytest.approx((256, group_size, 512, scaled))
        if group_size < 16:
            assert sizes(found[f"{name}_same_rate"]) == pytest.approx((256, group_size, 32 * group_size, same_rate))
        if group_size > 2:
            prompts, size, rollouts, rate = sizes(found[f"{name}_same_rollouts"])
            assert (prompts * size, size, rollouts, rate * prompts) == (512, group_size, 512, 3e-4)
            assert sizes(found[f"{name}_same_rollouts_scaled"]) == pytest.approx((prompts, size, 512, scaled))
    assert found["2-GRPO+RS"]["data"]["init_args"]["max_rollouts"] == 256 * 16
    for name in ("DPO", "IPO", "KTO"):
        assert found[name]["model"]["loss"]["class_path"] == f"lit_grpo.losses.{name}"
        assert found[name]["data"] == found["2-GRPO"]["data"]
    all_rows = found["2-GRPO_all_rows"]["model"].pop("loss")
    assert all_rows["class_path"].endswith(".TwoGRPOAllRows")
    assert all_rows["init_args"] == found["2-GRPO"]["model"].pop("loss")["init_args"]
    assert {k: found["2-GRPO_all_rows"][k] for k in ("model", "data")} == {
        k: found["2-GRPO"][k] for k in ("model", "data")
    }
    prompts, size, *_ = sizes(found["Adaptive"])
    assert (prompts, size) == (142, 4)
    assert 2 * prompts < 512 < size * prompts  # as the share of ties has it
    assert {config["trainer"]["max_epochs"] for config in found.values()} == {120}
    assert all(config["model"]["lr_scheduler"]["init_args"]["total_iters"] == 10 for config in found.values())


def test_runs_at_the_fixed_policy_differ_in_their_groups_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    found = configs_of(FIXED_RUNS)
    assert {name: sizes(config)[1] for name, config in found.items()} == {"2-GRPO": 2, "4-GRPO": 4, "8-GRPO": 8, "16-GRPO": 16, "Adaptive": 4}  # fmt: skip
    for name, config in found.items():
        prompts, group_size, rollouts, rate = sizes(config)
        assert rate == 0
        assert config["model"]["optimizer"]["init_args"]["weight_decay"] == 0
        assert config["data"]["init_args"]["updates_per_phase"] == 1
        assert name == "Adaptive" or rollouts == prompts * group_size == 512
        assert config["trainer"]["accumulate_grad_batches"] == 2
        assert [callback["class_path"] for callback in config["trainer"]["callbacks"]] == ["callbacks.TheoryMonitor"]
    assert found["16-GRPO"]["samples"]["every_n_phases"] == 1


def test_all_rows_are_forwarded():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert TwoGRPO().drops_zero_advantages
    assert not TwoGRPOAllRows().drops_zero_advantages
    assert torch.equal(TwoGRPOAllRows().select(rewards)[1], TwoGRPO().select(rewards)[1])


def here(job: Job, *_: Any) -> Any:
    """A run in this process: the same command line."""
    main(["fit", *job.arguments, f"--seed_everything={job.seed}", f"--run_dir={job.folder}", "--ckpt_path=last"])
    return SimpleNamespace(poll=lambda: 0, returncode=0)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole reproduction with one phase of each run, from a model that learned for seconds."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "configs").symlink_to(ROOT / "configs")
    phase = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--data.val.sample=8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(quickstart, "NUM_DEMONSTRATIONS", 2048)
        patch.setattr(Job, "start", here)
        (folder / "small.yaml").write_text("data.init_args: {prompts_per_phase: 48, updates_per_phase: 3}")
        for name in (name for name in RUNS if name.endswith("_same_data")):
            patch.setitem(RUNS, name, f"{RUNS[name]} {folder / 'small.yaml'}")
        patch.setattr("sys.argv", ["reproduce", "--seeds", "0", "--out", "out", "--", *phase])
        reproduce.main()
    return folder / "out"


def of(folder: Path) -> dict[str, float]:
    """The only phase of a run."""
    (row,) = read_run(folder / "seed-0").phases
    return row


def test_costs_are_those_that_follow_from_rewards(done: Path):
    found = {name: of(done / "runs" / name) for name in RUNS}
    assert found["2-GRPO"]["train/rollouts"] * 8 == found["16-GRPO"]["train/rollouts"] == 4096
    pairs = found["2-GRPO"]["train/informative_share"] * 256
    assert 0 < pairs < 128 + 5 * 8  # of 256 pairs half at most are mixed on average, with a deviation of 8 at most
    assert found["2-GRPO"]["train/rows_trained"] == 2 * pairs
    assert found["2-GRPO_all_rows"]["train/rows_trained"] == 512
    assert found["2-GRPO_all_rows"]["train/informative_share"] * 256 == pairs
    replaced = found["2-GRPO+RS"]
    assert 512 < replaced["train/rollouts"] <= 4096
    assert replaced["train/informative_share"] > found["2-GRPO"]["train/informative_share"]


def test_losses_begin_with_the_same_rollouts(done: Path):
    """And go on with those of their own policy."""

    def samples(name: str) -> list[tuple[str, str]]:
        path = done / "runs" / name / "seed-0" / "samples" / "train-00000.jsonl"
        return [(row["prompt"], row["completion"]) for row in map(json.loads, path.read_text().splitlines())]

    assert len(samples("2-GRPO")) == 512
    assert all(samples(name) == samples("2-GRPO") for name in ("DPO", "IPO", "KTO", "2-GRPO_all_rows"))


def test_losses_on_the_same_data_have_all_rollouts_in_common(done: Path):
    runs = [done / "runs" / f"{name}_same_data" / "seed-0" for name in ("2-GRPO", "DPO", "IPO", "KTO")]
    written = [
        [(row["prompt"], row["completion"], row["reward"]) for row in map(json.loads, path.read_text().splitlines())]
        for path in (run / "samples" / "train-00000.jsonl" for run in runs)
    ]
    assert len(written[0]) == 2 * 48 == of(runs[0].parent)["train/rollouts"]
    assert all(samples == written[0] for samples in written)


def test_tied_rows_change_no_update(done: Path, tmp_path: Path):
    weights = [load_file(done / "runs" / name / "seed-0" / "pretrained" / "model.safetensors") for name in ("2-GRPO", "2-GRPO_all_rows")]  # fmt: skip
    before = load_file(done.parent / "runs/quickstart/task-seed0/unreliable/pretrained/model.safetensors")
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=0, atol=1e-5)
    assert max((weights[0][name] - before[name]).abs().max().item() for name in before) > 2.9e-5  # the first rate


def test_larger_groups_of_the_same_completions_are_more_often_mixed(done: Path):
    row = of(done / "fixed_policy" / "runs" / "16-GRPO")
    shares = [row[f"theory/informative_share_g{size}"] for size in (2, 4, 8, 16)]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1


def test_exactly_the_tied_prompts_get_more_completions(done: Path):
    folder = done / "runs" / "Adaptive"
    lines = (folder / "seed-0" / "samples" / "train-00000.jsonl").read_text().splitlines()
    samples = [(row["prompt"], row["reward"]) for row in map(json.loads, lines)]
    pairs = [samples[i : i + 2] for i in range(0, 284, 2)]
    assert all(one[0] == other[0] for one, other in pairs)
    tied = [one[0] for one, other in pairs if one[1] == other[1]]
    assert 0 < len(tied) < 142
    assert [prompt for prompt, _ in samples[284:]] == [prompt for prompt in tied for _ in range(2)]
    assert of(folder)["train/rollouts"] == 284 + 2 * len(tied)
    assert of(folder)["train/extended_share"] == pytest.approx(len(tied) / 142)


def test_a_fixed_policy_stays_as_it_is(done: Path):
    before = load_file(done.parent / "runs/quickstart/task-seed0/unreliable/pretrained/model.safetensors")
    for name in FIXED_RUNS:
        after = load_file(done / "fixed_policy" / "runs" / name / "seed-0" / "pretrained" / "model.safetensors")
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_every_question_has_its_answer(done: Path):
    text = (done / "answers.md").read_text()
    sections = {part.split("\n")[0]: part for part in text.split("\n## ")[1:]}
    assert list(sections)[:-1] == [question.text for question in QUESTIONS]
    assert "signal to noise" in list(sections)[-1]
    for section in sections.values():
        assert re.search(r"^- .*\d", section, re.MULTILINE), section
        assert "There are no runs" not in section
        for picture in re.findall(r"\]\((\S+\.png)\)", section):
            assert (done / picture).stat().st_size > 10_000
    assert all(len({*q.needs} - {*q.not_drawn}) <= 7 for q in QUESTIONS if q.figure)
    assert all({*question.not_drawn, *question.cut} < {*question.needs} for question in QUESTIONS)
    page = (done / "report.html").read_text()
    assert all(question.text.replace("'", "&#39;") in page for question in QUESTIONS)
    assert "One seed: nothing here says" in page
    assert "<h1>16-GRPO and 23 others</h1>" in page
    assert page.count("<img") == sum(bool(question.figure) for question in QUESTIONS) + 1


def run_of(seed: int, score: float, drawn: float = 100, seconds: float = 10, **settings: Any) -> Run:
    """A run of one phase with Mean@4 0.2 before it."""
    row = {"epoch": 0.0, "train/rollouts": drawn, "train/seconds_other": seconds}
    held_out = [{"val/mean_at_4": 0.2}, {"val/mean_at_4": score, "epoch": 0.0}]
    return Run(Path(), seed, settings, [row], held_out)


@pytest.mark.parametrize(
    ("score", "drawn", "seconds", "expected"),
    [
        (0.79, 12.5, 2.0, ["Yes", "not below", "not above", "not above", "not below"]),
        (0.785, 12.5, 2.2, ["No", "not below", "not above", "above", "below"]),
        (0.5, 13.0, 2.0, ["No", "below", "above", "not above", "below"]),
    ],
)
def test_the_verdict_is_that_of_the_numbers(score: float, drawn: float, seconds: float, expected: list[str]):
    """16-GRPO ends at 0.8: 97.6 % of it is 0.7808, of its gain 0.7856."""
    configs = {"16-GRPO": [run_of(0, 0.8)], "2-GRPO": [run_of(0, score, drawn, seconds)]}
    found = reaches(Numbers(configs | {"2-GRPO_same_rate": [run_of(0, 0.4)]}, "val/mean_at_4"))
    assert found[0].startswith(expected[0])
    sides = [*expected[1:], expected[1]]  # by the very last validation, the only one here, as by the mean
    assert all(f" of 16-GRPO's, {side} the " in text for side, text in zip(sides, found[1:6], strict=True))
    assert f"{100 * score / 0.8:.1f} %" in found[1]
    assert "changes by 60.0 points" in found[6]
    assert found[8].endswith("It ends at 50.0 % of 16-GRPO's score.")


def test_a_score_is_the_mean_of_the_last_validations():
    run = run_of(0, 0.5)
    run.held_out += [{"val/mean_at_4": score, "epoch": i} for i, score in enumerate((0.6, 0.9, 0.3), start=1)]
    n = Numbers({"a": [run]}, "val/mean_at_4")
    assert n.after(run) == pytest.approx(0.6)
    assert n.gain(run) == pytest.approx(0.4)
    assert n.unrest("a") == pytest.approx((0.1 + 0.3 + 0.6) / 3)


def test_a_sentence_says_what_its_interval_includes():
    scores = {"a": [0.5, 0.6, 0.7], "mixed": [0.4, 0.65, 0.7], "less": [0.4, 0.5, 0.5], "single": [0.5]}
    runs = {name: [run_of(seed, score) for seed, score in enumerate(found)] for name, found in scores.items()}
    n = Numbers(runs, "val/mean_at_4")
    assert n.differs("mixed", "a", n.less("mixed", "a")).endswith(
        "1.7 points below a [-10.0, 5.0]: the interval includes no difference"
    )
    assert (
        n.differs("a", "less", n.less("a", "less"))
        == "a is 13.3 points above less [10.0, 20.0]: the interval excludes no difference"
    )
    just = Interval(-0.05, -0.1, -0.0004)
    assert n.differs("a", "b", just) == "a is 5.0 points below b [-10.0, 0.0]: the interval includes no difference"
    assert n.differs("single", "a", n.less("single", "a")).endswith("of one seed, which says nothing of chance")
    assert verdict(Interval(0.9, 0.85, 0.97580), "score").endswith(
        "90.0 % [85.0, 97.6] of 16-GRPO's, below the 97.6 % of the paper, which the interval includes"
    )
    assert table.shown(Interval(-0.0001, -0.0002, 0.0003)) == "0.000 [0.000, 0.000]"


def test_at_equal_rollouts_curves_are_read_where_the_shorter_ends():
    """2-GRPO rose from 0.2 to 0.6 within 200 rollouts, so it is at 0.4 after 100."""
    names = ("2-GRPO+RS", "16-GRPO_same_rollouts", "16-GRPO")
    runs = {"Adaptive": [run_of(0, 0.5)], "2-GRPO": [run_of(0, 0.6, 200)]} | {name: [run_of(0, 0.5)] for name in names}
    n = Numbers(runs, "val/mean_at_4")
    assert "10.0 points above 2-GRPO," in adaptive(n)[1]
    assert "level with 16-GRPO," in adaptive(n)[4]


def test_a_result_is_reached_where_the_mean_over_seeds_is():
    """16-GRPO ends at 0.8, so the bound is 0.7808: one seed is above it at once, both together after two phases."""

    def curve(seed: int, scores: list[float]) -> Run:
        epochs = range(len(scores))
        rows = [{"epoch": float(i), "train/rollouts": 10.0 * (i + 1), "train/seconds_other": 2.0} for i in epochs]
        return Run(Path(), seed, {}, rows, [{"val/mean_at_4": x, "epoch": float(i)} for i, x in enumerate(scores)])

    configs = {
        **{f"{size}-GRPO": [run_of(seed, 0.8, 10 * size) for seed in (0, 1)] for size in (4, 8)},
        "16-GRPO": [run_of(seed, 0.8) for seed in (0, 1)],
        "2-GRPO_twice_as_long": [curve(0, [0.79, 0.8, 0.7]), curve(1, [0.5, 0.77, 0.7])],
    }
    n = Numbers(configs, "val/mean_at_4")
    found = longer(n)
    assert found[2].endswith(
        "result, 78.1, is in the mean over seeds first reached by 2-GRPO_twice_as_long after 20 rollouts: 20.0 % of the"
        " rollouts and 40.0 % of the seconds of 16-GRPO's whole run."
    )
    for text, name, drawn in zip(found[3:], ("4-GRPO", "8-GRPO", "16-GRPO"), (40, 80, 100), strict=True):
        assert f"first reached by {name} after {drawn} rollouts" in text
    configs["2-GRPO_twice_as_long"].pop(0)
    assert longer(n)[2].endswith("not reached by 2-GRPO_twice_as_long.")


def fixed_run(
    folder: Path, loss: str, size: int, snr: list[tuple[float, float]], rows: int, won: list[int]
) -> list[Run]:
    """Phases of 16 rollouts with signal and noise as given; ``won`` are winners of each group that was written."""
    (folder / "samples").mkdir(parents=True)
    lines = [json.dumps({"reward": float(i < count)}) for count in won for i in range(size)]
    (folder / "samples" / "train-00000.jsonl").write_text("\n".join(lines) + "\n")
    phases = [
        {"epoch": float(i), "train/rollouts": 16.0 * (i + 1), "train/rows_trained": rows, "theory/gradient_signal": signal, "theory/gradient_noise": noise}
        for i, (signal, noise) in enumerate(snr)
    ]  # fmt: skip
    settings = {"data.init_args.group_size": size, "model.loss.class_path": f"lit_grpo.losses.{loss}"}
    return [Run(folder, 0, settings, phases, [])]


def test_signal_to_noise_by_hand(tmp_path: Path):
    """Pairs: 3 / 6 per 16 rollouts and 4 rows. Groups of four: 6 / 8 per 16 rollouts and 12 rows. All prompts have two
    winners of four, which is what pass rates of 1/2 would have if completions were drawn without putting back."""
    configs = {
        "two": fixed_run(tmp_path / "2", "TwoGRPO", 2, [(2, 6), (4, 6)], 4, []),
        "four": fixed_run(tmp_path / "4", "GRPO", 4, [(6, 6), (6, 10)], 12, [2, 2, 2]),
        "more": fixed_run(tmp_path / "a", "AdaptiveGRPO", 4, [(3, 6), (3, 6)], 8, []),
    }  # fmt: skip
    signal = SignalToNoise()
    signal.read(configs, "two", tmp_path)
    found = {(ratio.name, ratio.unit): ratio for ratio in signal.ratios}
    four = found["four", "rollout"].measured
    assert four is not None
    assert four.value == pytest.approx((6 / 8) / (3 / 6))
    # Resamples: 6 / 6, 6 / 8, 6 / 10 over 2 / 6, 3 / 6, 4 / 6, the extremes with chance 1 / 16 each
    assert (four.low, four.high) == pytest.approx((0.6 / (4 / 6), 1 / (2 / 6)))
    measured = {key: ratio.measured.value for key, ratio in found.items() if ratio.measured}
    assert measured["four", "trained row"] == pytest.approx((6 / 8) / (3 / 6) / 3)
    assert measured["more", "rollout"] == pytest.approx(1)
    predicted = {key: ratio.predicted.value for key, ratio in found.items() if ratio.predicted}
    # Of four, all groups are 2 : 2, c = 1/2, P = 1; of two, two thirds are mixed, c = 1/3, P = 2/3.
    assert predicted["four", "rollout"] == pytest.approx((1 / 4) / (1 / 9 / (2 / 3)))
    assert predicted["four", "trained row"] == pytest.approx(1)
    # Adaptive: a third of the prompts is drawn whole, with advantages 2 x 2 / 4 x (+-1): noise (2 x 2/3 + 4 / 3) / 16,
    # signal 1/3; 2 + 2 / 3 completions.
    assert predicted["more", "rollout"] == pytest.approx((1 / 9) / (8 / 3 / 16) / (8 / 3) / (1 / 6))
    assert (signal.phases, signal.groups, signal.completions) == (2, 3, 4)
    assert json.loads((tmp_path / "signal_to_noise.json").read_text())["first"] == "two"


def test_no_signal_is_no_ratio(tmp_path: Path):
    configs = {
        "two": fixed_run(tmp_path / "2", "TwoGRPO", 2, [(-2, 6), (4, 6)], 4, []),
        "four": fixed_run(tmp_path / "4", "GRPO", 4, [(6, 6), (6, 10)], 12, [4, 0]),
    }
    signal = SignalToNoise()
    signal.read(configs, "two", tmp_path)
    assert all(ratio.measured is None and ratio.predicted is None for ratio in signal.ratios)
    assert signal.table()[1:] == [["four", "rollout", "", ""], ["four", "trained row", "", ""]]
    signal.draw(tmp_path / "empty.png")


def test_where_runs_at_the_fixed_policy_fail_the_others_are_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    made: list[Any] = []

    def compare(args: list[str], write: Any) -> bool:
        made.append(write)
        return len(made) > 1

    monkeypatch.setattr(reproduce, "warm_start", lambda *_, **__: None)
    monkeypatch.setattr(reproduce, "compare", compare)
    monkeypatch.setattr("sys.argv", ["reproduce", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        reproduce.main()
    assert (stop.value.code, len(made)) == (1, 2)
    signal = made[1].keywords["signal"]
    made[0]({"4-GRPO": []}, "2-GRPO", tmp_path)  # what is left of them
    answer = of_signal(signal, tmp_path / "none.png")
    assert answer.sentences == ["There are no finished runs of 2-GRPO at the fixed policy."]
    assert answer.picture is None
