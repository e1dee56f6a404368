"""The command line as a user meets it: runs from YAML, and every mistake ends with one message and no traceback."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_grpo.__main__ import HELP, main
from lit_grpo.cli import CLI
from lit_grpo.data import Sample

ROOT = Path(__file__).parent.parent


@pytest.fixture
def fit(task: Path, model: str, tmp_path: Path) -> list[str]:
    """A short run: four phases of eight prompts."""
    return [
        "fit",
        f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
        f"--run_dir={tmp_path / 'run'}",
        f"--model.model={model}",
        f"--data.train.path={task / 'train.jsonl'}",
        "--data.reward=test_cli.even",
        "--data.prompts_per_phase=8",
        "--trainer.max_epochs=4",
        "--trainer.check_val_every_n_epoch=2",
    ]


@pytest.fixture
def val(task: Path, tmp_path: Path) -> str:
    rows = (task / "val.jsonl").read_text().splitlines()[:8]
    (tmp_path / "val.jsonl").write_text("\n".join(rows))
    return f"--data.val.path={tmp_path / 'val.jsonl'}"


def even(samples: list[Sample]) -> list[float]:
    return [float(s.completion[:1] in set("02468")) for s in samples]


def half(samples: list[Sample]) -> list[float]:
    return [0.5 for _ in samples]


def huge(samples: list[Sample]) -> list[float]:
    return [10**400 for _ in samples]


def raises(samples: list[Sample]) -> list[float]:
    return [1 / 0 for _ in samples]


def returns_nan(samples: list[Sample]) -> list[float]:
    return [float("nan") for _ in samples]


def returns_too_few(samples: list[Sample]) -> list[float]:
    return [1.0]


def returns_text(samples: list[Sample]) -> list[str]:
    return ["good" for _ in samples]


def rows_of(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


class TestFit:
    @pytest.fixture(scope="class")
    def run(self, task: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("fit")
        (folder / "val.jsonl").write_text("\n".join((task / "val.jsonl").read_text().splitlines()[:8]))
        main(
            [
                "fit",
                f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
                f"--run_dir={folder / 'run'}",
                f"--model.model={model}",
                f"--data.train.path={task / 'train.jsonl'}",
                f"--data.val.path={folder / 'val.jsonl'}",
                "--data.reward=test_cli.even",
                "--data.prompts_per_phase=8",
                "--trainer.max_epochs=4",
                "--trainer.check_val_every_n_epoch=2",
            ]
        )
        return folder / "run"

    def test_everything_is_in_one_folder(self, run: Path):
        names = {path.name for path in run.iterdir()}
        assert {"config.yaml", "metrics.csv", "samples", "checkpoints", "pretrained", "learning_curve.png"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)

    def test_log_has_a_row_per_phase_and_the_untrained_policy_first(self, run: Path):
        rows = rows_of(run)
        phases = [row for row in rows if row.get("train/reward")]
        held_out = [row for row in rows if row.get("val/mean_at_4")]
        assert [int(float(row["train/rollouts"])) for row in phases] == [16, 32, 48, 64]
        assert [float(row["val/rollouts"] or 0) for row in held_out] == [0, 32, 64]
        seconds = [float(row["train/seconds"]) for row in phases]
        assert seconds == sorted(seconds)
        for row in phases:
            assert abs(float(row["train/loss"])) < 1e-6
            assert float(row["train/sampler_mismatch"]) < 1e-4
            assert 0 <= float(row["train/informative_share"]) <= 1
            assert (float(row["train/grad_norm"]) > 0) == (float(row["train/informative_share"]) > 0)

    def test_samples_are_written_with_their_rewards(self, run: Path):
        samples = [json.loads(line) for line in (run / "samples" / "train-00003.jsonl").read_text().splitlines()]
        assert len(samples) == 16
        for sample in samples:
            assert sample["reward"] == even([Sample(**sample)])[0]
            assert sample["prompt"].endswith("=")
        assert len((run / "samples" / "val-00004.jsonl").read_text().splitlines()) == 32

    def test_saved_folder_is_the_trained_model(self, run: Path, model: str):
        trained = AutoModelForCausalLM.from_pretrained(run / "pretrained")
        checkpoint = torch.load(run / "checkpoints" / "phase-00004.ckpt", weights_only=True)
        for name, tensor in trained.state_dict().items():
            assert torch.equal(tensor, checkpoint["state_dict"][f"policy.lm.{name}"])
        start = AutoModelForCausalLM.from_pretrained(model)
        assert not torch.equal(start.lm_head.weight, trained.lm_head.weight)
        assert AutoTokenizer.from_pretrained(run / "pretrained")("1+2=")["input_ids"]

    def test_config_of_the_run_parses_again(self, run: Path, tmp_path: Path):
        cli = CLI(
            ["fit", f"--config={run / 'config.yaml'}", f"--run_dir={tmp_path / 'again'}", "--trainer.max_epochs=0"]
        )
        assert cli.datamodule.prompts_per_phase == 8

    def test_a_finished_run_is_not_overwritten(self, run: Path, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit):
            main(["fit", f"--config={run / 'config.yaml'}", f"--run_dir={run}"])
        said = capsys.readouterr().err
        assert "is not empty: it holds a run (config.yaml, metrics.csv, samples, checkpoints, pretrained)" in said
        assert "--ckpt_path" in said

    def test_resuming_keeps_the_log_and_equals_one_run(self, run: Path, tmp_path: Path):
        """Two phases, then two more from the checkpoint, against the four of ``run``: the same weights, bit for bit."""
        config = [f"--config={run / 'config.yaml'}", f"--run_dir={tmp_path / 'run'}", "--checkpoint.every_n_phases=1"]
        main(["fit", *config, "--trainer.max_epochs=2"])
        main(
            [
                "fit",
                *config,
                "--trainer.max_epochs=4",
                f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'phase-00002.ckpt'}",
            ]
        )
        whole = AutoModelForCausalLM.from_pretrained(run / "pretrained").state_dict()
        halves = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "pretrained").state_dict()
        assert all(torch.equal(whole[name], halves[name]) for name in whole)
        assert (tmp_path / "run" / "metrics-000.csv").exists()
        assert len([row for row in rows_of(tmp_path / "run") if row.get("train/reward")]) == 2

    def test_resuming_does_not_replace_what_the_user_wrote(self, run: Path, tmp_path: Path):
        cli = CLI(
            [
                "fit",
                f"--config={run / 'config.yaml'}",
                f"--run_dir={tmp_path / 'run'}",
                f"--ckpt_path={run}",
                "--model.loss=GRPO",
                "--model.loss.clip_high=0.28",
            ]
        )
        assert (type(cli.model.loss).__name__, cli.model.loss.clip_high) == ("GRPO", 0.28)

    def test_a_checkpoint_from_elsewhere_does_not_open_a_finished_run(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.yaml").write_text("precious")
        checkpoint = run / "checkpoints" / "phase-00004.ckpt"
        for command, folder in (("fit", tmp_path / "other"), ("validate", run)):
            with pytest.raises(SystemExit):
                main([command, f"--config={run / 'config.yaml'}", f"--run_dir={folder}", f"--ckpt_path={checkpoint}"])
            assert "it holds a run" in capsys.readouterr().err
        assert (tmp_path / "other" / "config.yaml").read_text() == "precious"

    def test_config_of_a_resumed_run_repeats_it_from_the_start(self, run: Path, tmp_path: Path):
        config = [f"--config={run / 'config.yaml'}", f"--run_dir={tmp_path / 'run'}", "--data.prompts_per_phase=2"]
        main(["fit", *config, "--trainer.max_epochs=1", "--checkpoint.every_n_phases=1"])
        main(["fit", *config, "--trainer.max_epochs=2", "--ckpt_path=last"])
        assert "ckpt_path: null" in (tmp_path / "run" / "config.yaml").read_text()
        assert (tmp_path / "run" / "config-000.yaml").exists()

    @pytest.mark.parametrize("command", ["validate", "test"])
    def test_validate_and_test_from_the_saved_folder(self, run: Path, tmp_path: Path, command: str):
        main(
            [
                command,
                f"--config={run / 'config.yaml'}",
                f"--run_dir={tmp_path / 'run'}",
                f"--model.model={run / 'pretrained'}",
            ]
        )
        after = float([row for row in rows_of(run) if row.get("val/mean_at_4")][-1]["val/mean_at_4"])
        if command == "validate":  # the same prompts and the same random numbers
            assert float(rows_of(tmp_path / "run")[-1]["val/mean_at_4"]) == after
        else:  # other random numbers
            table = json.loads((tmp_path / "run" / "results" / "table.json").read_text())
            assert abs(table["benchmarks"][0]["mean_at_4"] - after) < 0.3

    def test_predict_writes_completions_of_prompts_without_answers(self, run: Path, tmp_path: Path):
        (tmp_path / "questions.csv").write_text("question\n1+2=\n3+4=\n")
        main(
            [
                "predict",
                f"--config={run / 'config.yaml'}",
                f"--run_dir={tmp_path / 'run'}",
                f"--data.predict={{path: {tmp_path / 'questions.csv'}, prompt: question}}",
            ]
        )
        samples = [
            json.loads(line) for line in (tmp_path / "run" / "samples" / "predict.jsonl").read_text().splitlines()
        ]
        assert [s["prompt"] for s in samples] == ["1+2="] * 4 + ["3+4="] * 4
        assert {s["reward"] for s in samples} == {None}


@pytest.mark.vllm
def test_vllm_trains_validates_and_agrees_with_the_trainer(fit: list[str], val: str, tmp_path: Path):
    main([*fit, val, "--rollout=VLLMRollout", "--rollout.max_tokens=5"])
    phases = [row for row in rows_of(tmp_path / "run") if row.get("train/reward")]
    assert len(phases) == 4
    assert all(float(row["train/sampler_mismatch"]) < 1e-4 for row in phases)


MISTAKES = {
    "unknown key": (["--data.group_sise=2"], r"group_sise"),
    "unknown class": (["--model.loss=TwoGPRO"], r"model.loss.*TwoGPRO"),
    "wrong type": (["--data.prompts_per_phase=many"], r"prompts_per_phase.*many"),
    "missing data file": (["--data.train.path=nowhere.jsonl"], r"data.init_args.train.path: no file 'nowhere.jsonl'"),
    "unknown format": (["--data.train.path={tmp}/data.txt"], r"cannot tell the format of .*data.txt.*\.jsonl"),
    "broken file": (["--data.train.path={tmp}/broken.jsonl"], r"data.init_args.train.path: cannot load .*broken.jsonl"),
    "empty file": (["--data.train.path={tmp}/empty.jsonl"], r"data.init_args.train.*empty.jsonl"),
    "header only": (["--data.train.path={tmp}/header.csv"], r"data.init_args.train.path: .*header.csv.* has no rows"),
    "missing column": (
        ["--data.train.answer=gold"],
        r"no column 'gold'; it has prompt, answer. Name the right one in data.init_args.train",
    ),
    "empty cell": (
        ["--data.train.path={tmp}/hole.jsonl"],
        r"data.init_args.train: row 1 of .*hole.jsonl.* nothing in column 'answer'",
    ),
    "messages without a chat template": (
        ["--data.train.path={tmp}/chat.jsonl"],
        r"row 0 .* holds chat messages.*chat_template to true",
    ),
    "no chat template": (["--data.chat_template=true"], r"data.init_args.chat_template: .* has no chat template"),
    "template without prompt": (["--data.template=hello"], r"data.init_args.template: .*\{prompt\}.*'hello'"),
    "prompt beyond the context": (
        ["--rollout.max_tokens=60"],
        r"rollout.init_args.max_tokens: 60 tokens .* the 6 of the longest prompt .*context of 64",
    ),
    "all prompts too long": (["--data.max_prompt_tokens=2"], r"data.init_args.max_prompt_tokens: all 7844 prompts"),
    "prompts do not divide": (
        ["--data.updates_per_phase=3"],
        r"prompts_per_phase: 8 prompts do not divide .*multiple of 3, such as 9",
    ),
    "too many micro-batches": (
        ["--trainer.accumulate_grad_batches=17"],
        r"accumulate_grad_batches: 17 .* 16 per process",
    ),
    "group of one": (["--data.group_size=1"], r"data.init_args.group_size: TwoGRPO .* 1\. Set group_size to 2"),
    "group of three": (
        ["--data.group_size=3"],
        r"data.init_args.group_size: TwoGRPO .* 3\. Set group_size to 2, or model.loss to GRPO",
    ),
    "group of zero": (["--data.group_size=0"], r"data.init_args.group_size: expected a whole number >= 1, got 0"),
    "temperature 0": (["--rollout.temperature=0"], r"rollout.init_args.temperature: .* above 0, got 0"),
    "reward not found": (["--data.reward=test_cli.nothing"], r"reward.*'test_cli' has no attribute 'nothing'"),
    "reward raises": (
        ["--data.reward=test_cli.raises"],
        r"reward: raises raised ZeroDivisionError: division by zero \(at .*test_cli.py:\d+\)",
    ),
    "reward is NaN": (
        ["--data.reward=test_cli.returns_nan"],
        r"reward: returns_nan returned nan; expected a finite number",
    ),
    "too few rewards": (
        ["--data.reward=test_cli.returns_too_few"],
        r"reward: returns_too_few returned 1 values for 2 samples",
    ),
    "reward is huge": (["--data.reward=test_cli.huge"], r"reward: huge returned 1000.*; expected a finite number"),
    "negative seed": (["--seed_everything=-1"], r"seed_everything: expected a whole number >= 0, got -1"),
    "seed true": (["--seed_everything=true"], r"seed_everything: expected a whole number >= 0, got True"),
    "no such checkpoint": (["--ckpt_path=nowhere.ckpt"], r"ckpt_path: 'nowhere.ckpt' is neither a checkpoint"),
    "no such strategy": (["--trainer.strategy=fdsp"], r"trainer: .*fdsp"),
    "no device": (["--trainer.devices=0"], r"devices='0'"),
    "cut distribution": (
        ["--rollout.top_p=0.9"],
        r"'top_p' is not accepted\s+Rollouts are drawn from the whole .* rollout.init_args.evaluation.top_p.$",
    ),
    "batch of zero": (["--rollout.max_batch_size=0"], r"rollout.init_args.max_batch_size: .* got 0"),
    "table every zero phases": (["--samples.every_n_phases=0"], r"samples.every_n_phases: .* got 0"),
    "bf16-true": (["--trainer.precision=bf16-true"], r"trainer.precision: bf16-true .* Use bf16-mixed"),
    "reward is text": (
        ["--data.reward=test_cli.returns_text"],
        r"reward: returns_text returned 'good'; expected a finite number",
    ),
    "no such model": (["--model.model=nowhere/nothing"], r"model.model: 'nowhere/nothing' is neither a folder"),
    "model without tokenizer": (["--model.model={tmp}/bare"], r"model.model: .*bare' has no tokenizer"),
    "run folder is a file": (["--run_dir={tmp}/data.txt"], r"run_dir: cannot write to .*data.txt"),
}


@pytest.fixture
def bad_files(tmp_path: Path, model: str) -> Path:
    row = {"prompt": "1+2=", "answer": "3"}
    (tmp_path / "data.txt").write_text("text")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1+')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "header.csv").write_text("prompt,answer\n")
    (tmp_path / "hole.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"answer": None}) + "\n")
    (tmp_path / "chat.jsonl").write_text(json.dumps(row | {"prompt": [{"role": "user", "content": "1+2="}]}) + "\n")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).symlink_to(Path(model) / name)
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_message_before_any_weights_are_loaded(
    mistake: str,
    fit: list[str],
    val: str,
    bad_files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    arguments, message = MISTAKES[mistake]
    monkeypatch.setattr("lit_grpo.module.load_policy", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as stop:
        main([*fit, val, *(a.replace("{tmp}", str(bad_files)) for a in arguments)])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in said
    assert re.search(message, said, re.DOTALL), said


def test_a_mistake_does_not_bar_the_folder_to_the_corrected_command(fit: list[str], val: str, tmp_path: Path):
    with pytest.raises(SystemExit):
        main([*fit, val, "--data.train.answer=gold"])
    main([*fit, val, "--trainer.max_epochs=1"])
    assert (tmp_path / "run" / "pretrained").is_dir()


def test_null_on_the_command_line_is_no_column(fit: list[str], val: str, tmp_path: Path):
    main(["validate", *fit[1:], val, "--data.val.answer=null", "--data.reward=test_cli.even"])
    lines = next((tmp_path / "run" / "samples").glob("val-*.jsonl")).read_text().splitlines()
    assert {json.loads(line)["answer"] for line in lines} == {""}


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("test", ["--data.test={sums: {path: nowhere.jsonl}}"], "data.init_args.test.sums.path: no file"),
        ("test", ["--data.test.path=nowhere.jsonl"], "data.init_args.test: benchmarks have names"),
        ("test", ["--data.test={a/b: {path: x}}"], "data.init_args.test: 'a/b' names files and metrics"),
        ("test", ["--data.val=null"], "data.init_args.test: `lit-grpo test` needs prompts"),
        ("validate", ["--data.val=null"], "data.init_args.val: `lit-grpo validate` needs prompts"),
        ("predict", ["--data.predict.path=nowhere.jsonl"], "data.init_args.predict.path: no file"),
    ],
)
def test_mistakes_of_the_other_commands_name_their_keys(
    fit: list[str], val: str, command: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main([command, *fit[1:], val, *options])
    assert message in capsys.readouterr().err


def test_a_user_may_switch_our_callbacks_off(fit: list[str], val: str, tmp_path: Path):
    main(
        [
            *fit,
            val,
            "--trainer.max_epochs=1",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_checkpointing=false",
        ]
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_progress_says_what_a_person_wants_to_know(fit: list[str], val: str, capsys: pytest.CaptureFixture[str]):
    main([*fit, val, "--trainer.max_epochs=2"])
    said = capsys.readouterr().err
    assert re.search(
        r"phase 2/2  reward 0\.\d+, informative \d+%, [\d,]+ tok/s, loss -?0\.000, .*mean_at_4 0\.\d+, 0 s left", said
    )
    assert re.search(
        r"one update per phase: the surrogate is 0 by construction, .* \d+% of groups informative, grad norm \d", said
    )


def test_sampling_of_rollouts_and_of_validation_are_what_was_asked_for(fit: list[str], val: str, tmp_path: Path):
    """The trainer follows the rollouts' temperature, and validation has its own sampling: greedy samples are all alike."""
    options = [
        "--rollout.temperature=0.7",
        "--rollout.evaluation={max_tokens: 3, temperature: 0}",
        "--trainer.max_epochs=2",
    ]
    main([*fit, val, *options])
    phases = [row for row in rows_of(tmp_path / "run") if row.get("train/reward")]
    assert all(float(row["train/sampler_mismatch"]) < 1e-4 for row in phases)
    assert all(float(row["train/seconds"]) > 0 for row in phases)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples" / "val-00002.jsonl").read_text().splitlines()]
    assert len({(s["prompt"], s["completion"]) for s in samples}) == len({s["prompt"] for s in samples}) == 8
    assert max(s["num_tokens"] for s in samples) == 3


def test_what_counts_as_correct_is_the_users_choice(fit: list[str], val: str, tmp_path: Path):
    main([*fit, val, "--trainer.max_epochs=2", "--data.reward=test_cli.half", "--model.correct_at=0.5"])
    scores = [row for row in rows_of(tmp_path / "run") if row.get("val/mean_at_4")]
    assert {(row["val/mean_at_4"], row["val/reward"]) for row in scores} == {("1.0", "0.5")}


def test_unwritable_run_folder(fit: list[str], val: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if os.geteuid() == 0:
        folder = "/proc/lit_grpo"  # not even root can write there
    else:
        folder = str(tmp_path / "closed" / "run")
        (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(SystemExit):
        main([*fit, val, f"--run_dir={folder}"])
    assert re.search(r"run_dir: cannot write to .* Choose another folder", capsys.readouterr().err)


def test_mistakes_exit_with_code_2_and_no_traceback(fit: list[str], val: str):
    command = [str(Path(sys.executable).parent / "lit-grpo"), *fit, val, "--data.group_size=1"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "tests")})
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert run.stderr.strip().splitlines()[-1].startswith("lit-grpo: error: data.init_args.group_size")


def test_help_of_the_command_names_its_subcommands(capsys: pytest.CaptureFixture[str]):
    main(["--help"])
    assert capsys.readouterr().out.strip() == HELP.strip()
    assert all(f"\n  {command} " in HELP for command in CLI.subcommands())


def test_help_of_fit_explains_keys(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--run_dir RUN_DIR Folder of this run" in said
    assert "--model.max_mismatch" in said


def test_print_config_shows_short_names_as_what_they_are(fit: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([*fit, "--print_config"])
    assert stop.value.code == 0
    assert "class_path: lit_grpo.TwoGRPO" in capsys.readouterr().out


def test_two_processes_do_what_one_does(fit: list[str], val: str, tmp_path: Path):
    """The whole command under DDP: the same rewards and scores, and the samples of both processes."""
    script = str(Path(sys.executable).parent / "lit-grpo")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    for devices in (1, 2):
        options = [f"--run_dir={tmp_path / str(devices)}", f"--trainer.devices={devices}", "--trainer.max_epochs=2"]
        command = [script, *fit, val, *options, "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=2"]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert run.returncode == 0, run.stderr
    one, two = rows_of(tmp_path / "1"), rows_of(tmp_path / "2")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for name in ("train/reward", "train/informative_share", "train/rollouts", "train/grad_norm", "val/mean_at_4"):
            assert float(a.get(name) or 0) == pytest.approx(float(b.get(name) or 0), rel=1e-4), name
    names = ["train-00000.jsonl", "val-00002.jsonl"]
    for name in names:
        lines = [sorted((tmp_path / d / "samples" / name).read_text().splitlines()) for d in ("1", "2")]
        assert lines[0] == lines[1]
