"""Several configurations over several seeds: made, ended, gone on with, read, and reported."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ENVIRONMENT
from matplotlib import pyplot

from lit_grpo.__main__ import main
from lit_grpo.csv_log import read_metrics
from lit_grpo.reports.compare import alone_in
from lit_grpo.reports.figures import draw
from lit_grpo.reports.intervals import over_seeds, spread
from lit_grpo.reports.results import AXES, is_finished, read_run, read_runs
from lit_grpo.reports.running import Job

PHASES = 4


@pytest.fixture
def configs(model: str, many_prompts: str, tmp_path: Path) -> list[str]:
    """A config, and one with an overlay."""
    source = {"path": many_prompts}
    whole = {
        "model": {"model": model, "loss": "TwoGRPO", "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}},
        "data": {
            "class_path": "RolloutData",
            "init_args": {"train": source, "val": source, "prompts_per_phase": 8, "reward": "test_invariance.even_first_digit"},
        },
        "rollout": {"class_path": "HFRollout", "init_args": {"max_tokens": 4}},
        "trainer": {"accelerator": "cpu", "max_epochs": PHASES, "check_val_every_n_epoch": 2},
        "checkpoint": {"every_n_phases": 1},
    }  # fmt: skip
    overlay = {"data": {"class_path": "RolloutData", "init_args": {"group_size": 4}}, "model": {"loss": "GRPO"}}
    for name, config in (("two", whole), ("four", overlay)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    two, four = tmp_path / "two.yaml", tmp_path / "four.yaml"
    return [str(two), f"{two}+{four}"]


def no_run(*_: Any) -> None:
    raise AssertionError("a run was begun")


def test_killed_and_gone_on_with_it_makes_each_run_once_and_reports(
    configs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    command = ["compare", *configs, "--seeds", "0", "1", "--out", str(out), "--jobs", "2"]
    log = out / "runs" / "two" / "seed-0" / "metrics.csv"
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_grpo", *command], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not log.exists() and process.poll() is None:
        time.sleep(0.05)
    with pytest.raises(SystemExit) as stop:  # not by two commands at once
        main(command)
    assert stop.value.code == 2
    assert "is at work" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Stopped. The same command goes on" in said
    assert not is_finished(out / "runs" / "four" / "seed-1")
    with alone_in(out):  # nobody is left who holds it
        pass

    main(command)
    said = capsys.readouterr().out
    assert re.search(r"\[4/4\] .*: Mean@4 0\.\d+ -> 0\.\d+ in \d+ s of training\n", said)
    for name, group_size in (("two", 2), ("four", 4)):
        for seed in (0, 1):
            run = read_run(out / "runs" / name / f"seed-{seed}")
            assert [row["epoch"] for row in run.phases] == list(range(PHASES))
            assert run.reached("rollouts") == [8 * group_size * phase for phase in range(PHASES + 1)]
            assert run.reached("prompts") == [8 * phase for phase in range(PHASES + 1)]
            assert run.seed == seed
    found = json.loads((out / "table.json").read_text())
    assert [(row["name"], row["seeds"]) for row in found["configs"]] == [("two", [0, 1]), ("four", [0, 1])]
    for row in found["configs"]:
        run = read_run(out / "runs" / row["name"] / "seed-1")
        assert row["mean_after"]["values"][1] == run.held_out[-1]["val/mean_at_4"]
        problems = run.mean_of_problems()
        assert len(problems) == 64
        assert sum(problems.values()) / 64 == pytest.approx(run.held_out[-1]["val/mean_at_4"])
    assert len((out / "curves.png").read_bytes()) > 20_000

    monkeypatch.setattr(Job, "start", no_run)
    page = (out / "report.html").read_text()
    main(command)
    assert "4 of 4 runs have finished before" in capsys.readouterr().out
    assert "group_size" in page
    outside = re.findall(r"""(?:src|href|url|@import|xlink)\s*[=(:]\s*["']?(?!data:)([^"')\s>]+)""", page)
    assert not outside
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", page)

    with pytest.raises(SystemExit):
        main([*command, "--", "--model.optimizer.lr=0.5"])
    assert "model.optimizer.init_args.lr is 0.001 in one, 0.5 in the other" in capsys.readouterr().err


def test_a_run_that_fails_is_shown_and_the_others_are_reported(
    configs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fake_run(tmp_path / "made" / "seed-0", 0, [0.25, 0.5])
    (tmp_path / "bad.yaml").write_text("data: {class_path: RolloutData, init_args: {reward: test_cli.raises}}")
    bad = f"bad={configs[0]}+{tmp_path / 'bad.yaml'}"
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(tmp_path / "made"), bad, "--seeds", "3", "--out", str(tmp_path / "out")])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "bad, seed 3: failed with exit code" in said
    assert "division by zero" in said
    assert "| made | 0 | 0.250 | 0.500 | 0.250 |" in said


def fake_run(folder: Path, seed: int, mean: list[float], right: list[int] | None = None, **settings: Any) -> Path:
    """A finished run of two phases with hand-made numbers.

    Args:
        mean: Mean@2 before and after.
        right: of two samples of each problem, how many are right in the end.
        settings: of the rollout data.
    """
    (folder / "samples").mkdir(parents=True)
    init_args = {"group_size": 2, "prompts_per_phase": 4} | settings
    config = {
        "seed_everything": seed,
        "run_dir": str(folder),
        "trainer": {"max_epochs": 2},
        "model": {"correct_at": 1.0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"init_args": init_args}}))
    rows = [
        {"step": 0, "val/mean_at_2": mean[0], "val/pass_at_1": mean[0], "val/pass_at_2": 0.5},
        {"step": 0, "epoch": 0, "train/reward": 0.2, "train/rollouts": 8, "train/seconds": 3, "train/seconds_generate": 1.5,
         "train/seconds_other": 0.5, "train/rows_trained": 4, "train/tokens_trained": 10, "train/informative_share": 0.5},
        {"step": 1, "epoch": 1, "val/mean_at_2": mean[1], "val/pass_at_1": mean[1], "val/pass_at_2": 0.75},
        {"step": 1, "epoch": 1, "train/reward": 0.4, "train/rollouts": 16, "train/seconds": 7, "train/seconds_generate": 2.5,
         "train/seconds_other": 0.5 + seed, "train/rows_trained": 2, "train/tokens_trained": 6, "train/informative_share": 0.25},
    ]  # fmt: skip
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "ledger.json").write_text("{}")
    samples = [
        {"prompt": f"{i}", "answer": "a", "reward": float(j < count)}
        for i, count in enumerate(right or [])
        for j in range(2)
    ]
    (folder / "samples" / "val-00002.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (folder / "samples" / "val-00000.jsonl").write_text("")
    return folder


def test_numbers_of_the_table_are_those_worked_by_hand(tmp_path: Path):
    for name, before, after, right in (
        ("a", (0.1, 0.2), (0.5, 0.4), ([1, 1], [1, 1])),  # gains 0.4, 0.2
        ("b", (0.1, 0.2), (0.6, 0.5), ([2, 2], [2, 1])),  # gains 0.5, 0.3
    ):
        for seed in (0, 1):
            fake_run(tmp_path / name / f"s{seed}", seed, [before[seed], after[seed]], right[seed], template=name)
    states = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    main(["compare", str(tmp_path / "a"), f"second={tmp_path / 'b'}", "--out", str(tmp_path / "out")])
    assert {path: path.read_bytes() for path in states} == states
    first, second = json.loads((tmp_path / "out" / "table.json").read_text())["configs"]

    def numbers(found: dict[str, Any]) -> list[float]:
        return [number for value in found.values() for number in (value if isinstance(value, list) else [value])]

    half = 12.706 * 0.05 * 2**0.5 / 2**0.5  # deviation of two numbers 0.1 apart, over the root of two
    assert numbers(first["mean_after"]) == pytest.approx([0.45, half, 0.5, 0.4])
    assert numbers(first["gain"]) == pytest.approx([0.3, 12.706 * 0.1, 0.4, 0.2])
    assert numbers(first["pass_after"]) == [0.75, 0, 0.75, 0.75]
    assert first["seconds"]["values"] == [5, 6]  # without the 7 seconds of the clock
    assert (first["rollouts"]["mean"], first["rows_trained"]["mean"], first["tokens_trained"]["mean"]) == (16, 6, 16)
    assert first["informative_share"]["mean"] == 0.375
    assert first["share_of_gain"] is None
    # Resamples of seeds: (0, 0), (0, 1), (1, 0), (1, 1), with shares 0.5 / 0.4, 0.8 / 0.6 twice, 0.3 / 0.2
    assert numbers(second["share_of_gain"]) == pytest.approx([0.8 / 0.6, 1.25, 1.5])
    assert numbers(second["difference"]) == pytest.approx([0.1, 0.1, 0.1])
    # Problems: means over seeds 1 and 0.75, against 0.5 and 0.5
    assert numbers(second["over_problems"]) == pytest.approx([0.375, 0.25, 0.5])
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["share_of_gain_low"]) == pytest.approx(1.25)
    assert rows[0]["share_of_gain_low"] == ""
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| second | 0, 1 | 0.150 ± 0.635 | 0.550 ± 0.635 | 0.400 ± 1.271 | 133.3 [125.0, 150.0] |" in table
    assert "template" in (tmp_path / "out" / "report.html").read_text()


def test_scores_on_different_problems_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Nor does it matter whether it is a run between them that wrote no samples."""
    for name, problems in (("a", [1, 1]), ("none", []), ("b", [1, 1, 0])):
        fake_run(tmp_path / name / "s", 0, [0.1, 0.5], problems)
    with pytest.raises(SystemExit) as stop:
        main(["compare", *(str(tmp_path / name) for name in ("a", "none", "b")), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert re.search("data.init_args.val: '.*/a/s' and '.*/b/s' were scored on different", capsys.readouterr().err)


def test_a_text_may_hold_what_others_take_for_the_end_of_a_line(tmp_path: Path):
    run = fake_run(tmp_path, 0, [0.1, 0.5])
    row = {"prompt": "a\u2028b\x85", "answer": "\u2029", "reward": 1.0}
    (run / "samples" / "val-00002.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_run(run).mean_of_problems() == {("a\u2028b\x85", "\u2029"): 1.0}


def test_differences_are_paired_by_seed(tmp_path: Path):
    """Seeds that both have, however the folders are called; without any in common there is none."""
    for name, scores in (
        ("a", {0: (0.4, 0), 1: (0.8, 1), 2: (0.1, 1)}),
        ("b", {1: (0.9, 2), 2: (0.5, 2), 3: (0.0, 0)}),
        ("c", {7: (0.5, 2)}),
    ):
        for seed, (score, right) in scores.items():
            fake_run(tmp_path / name / f"z{9 - seed}", seed, [0.0, score], [right, right], template=name)
    main(["compare", *(str(tmp_path / name) for name in "abc"), "--out", str(tmp_path / "out")])
    _, b, c = json.loads((tmp_path / "out" / "table.json").read_text())["configs"]
    assert list(b["difference"].values()) == pytest.approx([0.25, 0.1, 0.4])
    assert b["over_problems"]["value"] == pytest.approx(0.5)  # of seeds 1 and 2
    assert c["difference"] is None
    assert c["over_problems"]["value"] == pytest.approx(1 - 1 / 3)  # of all
    assert c["mean_after"] == {"mean": 0.5, "half_width": None, "values": [0.5]}
    assert (b["seeds"], c["seeds"]) == ([1, 2, 3], [7])


def test_long_curves_are_cut_where_others_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = [read_run(fake_run(tmp_path / name, 0, [0.1, 0.5])) for name in ("short", "long")]
    runs[1].phases[1]["train/rollouts"] = 1600
    monkeypatch.setattr(pyplot, "close", lambda _: None)
    for cut, end in (((), 1600), (("long",), 16)):
        draw({"short": [runs[0]], "long": [runs[1]]}, "val/mean_at_2", tmp_path / "curves.png", cut)
        assert end <= pyplot.gcf().axes[AXES.index("rollouts")].get_xlim()[1] <= 1.1 * end


def test_curves_stand_at_what_was_done_before_each_point(tmp_path: Path):
    run = read_run(fake_run(tmp_path / "run", 0, [0.1, 0.5]))
    assert run.curve("val/mean_at_2", "seconds") == ([0, 5], [0.1, 0.5])
    assert run.curve("train/reward", "seconds") == ([2, 5], [0.2, 0.4])
    assert run.curve("val/mean_at_2", "tokens_trained") == ([0, 16], [0.1, 0.5])
    assert run.curve("train/reward", "prompts") == ([4, 8], [0.2, 0.4])
    run.phases[0]["train/rollouts_per_group"] = 1.5  # ties replaced by two prompts
    assert run.reached("prompts") == [0, 6, 10]


def test_the_bootstrap_over_seeds_is_enumerated():
    """Of three seeds the smallest of 27 resamples has 1 / 27 > 0.025; of five, 78 of 3125 means lie below the bound."""
    values = [0.0, 1.0, 5.0]
    found = over_seeds(lambda drawn: sum(values[i] for i in drawn) / 3, 3)
    assert found is not None
    assert (found.value, found.low, found.high) == (2, 0, 5)
    five = over_seeds(lambda drawn: sum(drawn) / 5, 5)
    assert five is not None
    assert (five.low, five.high) == (0.8, 3.2)
    assert over_seeds(lambda drawn: 1 / min(drawn) if min(drawn) else float("inf"), 2) is None
    assert spread([3.0]).half_width is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "there is no 'nothing.yaml' here"),
        (["{two}", "{two}"], "two are called 'two'"),
        (["{two}", "--seeds", "-1"], "--seeds: expected whole numbers >= 0, got -1"),
        (["{two}", "--jobs", "0"], "--jobs: expected a whole number >= 1, got 0"),
        (["{two}", "--", "--run_dir=x"], "--run_dir: each run has its own"),
        (
            ["{two}", "--", "--trainer.max_epochs=5"],
            "trainer.check_val_every_n_epoch: with 2 the policy after all 5 phases",
        ),
        (["{two}", "--", "--data.val=null"], "two: data.init_args.val: there are no held-out prompts"),
        (["{two}", "--", "--trainer.num_sanity_val_steps=0"], "two: trainer.num_sanity_val_steps: with 0 the first or"),
        (["{two}", "--", "--trainer.max_steps=3"], "two: trainer.max_steps: with 3 the first or last policy would"),
        (["{two}", "other={two}+{eight}"], "data.init_args.samples_per_prompt: {{'two': 4, 'other': 8}}. Only runs"),
        (["{two}", "other={two}+{four}+{typo}"], "other: "),
        (["a/b={two}"], "'a/b' is no name"),
        (["{folder}"], "neither the folder of a run nor one of several"),
        (["{half}"], "this run has not finished (2 phases are done)"),
        (["{mixed}"], "differ in more than the seed: data.init_args.group_size is 2 in one, 4 in the other"),
        (["{same}"], "have the same seed, 0"),
    ],
)
def test_mistakes_cost_nothing(
    arguments: list[str], message: str, configs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr(Job, "start", no_run)
    (tmp_path / "typo.yaml").write_text("trainer: {max_epoch: 3}")
    (tmp_path / "eight.yaml").write_text("data: {class_path: RolloutData, init_args: {samples_per_prompt: 8}}")
    (fake_run(tmp_path / "half", 0, [0.1, 0.2]) / "ledger.json").unlink()
    for folder, settings in (("mixed", {"group_size": 4}), ("same", {})):
        fake_run(tmp_path / folder / "a", 0, [0.1, 0.2])
        fake_run(tmp_path / folder / "b", int(folder == "mixed"), [0.1, 0.2], **settings)
    (tmp_path / "folder").mkdir()
    places = {name: tmp_path / name for name in ("folder", "half", "mixed", "same")}
    places |= {name: tmp_path / f"{name}.yaml" for name in ("two", "four", "typo", "eight")}
    with pytest.raises(SystemExit) as stop:
        main(["compare", f"--out={tmp_path / 'out'}", *(text.format(**places) for text in arguments)])
    assert stop.value.code == 2
    assert message.format() in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_ended_by_a_signal_has_not_finished(tmp_path: Path):
    run = fake_run(tmp_path / "run", 0, [0.1, 0.2])
    assert is_finished(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"trainer": {"max_epochs": 3}}))
    assert not is_finished(run)
    (run / "pretrained").mkdir()  # but one that ended early of itself has
    assert is_finished(run)
    assert len(read_runs(run)) == 1
    assert len(read_metrics(run)) == 4


def test_help_imports_nothing_heavy():
    code = "import sys; from lit_grpo.__main__ import main\ntry: main(['compare', '--help'])\nexcept SystemExit: print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "CONFIG_OR_RUN" in loaded.stdout
    assert not {"torch", "lightning", "matplotlib"} & set(loaded.stdout.split())
