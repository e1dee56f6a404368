"""A run that is stopped and begun again ends where it would have ended: weights, metrics and tokens, bit for bit."""

from __future__ import annotations

import builtins
import contextlib
import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from conftest import ENVIRONMENT
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file

import lit_grpo.module
from callbacks import SavePretrained
from callbacks.checkpoint_files import checkpoints_in, damage, remove
from callbacks.checkpoints import Checkpoints
from lit_grpo.__main__ import main
from lit_grpo.cli import run
from lit_grpo.csv_log import CSVLog, read_metrics
from lit_grpo.data import Sample
from lit_grpo.engines import HFEngine
from lit_grpo.module import PolicyModule


class Counted(Callback):
    """Has a state of its own, as callbacks of users do."""

    def __init__(self) -> None:
        self.phases = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.phases += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (Path(trainer.default_root_dir) / "counted.txt").write_text(f"{self.phases} phases")
        self.phases = -100  # which nobody is to see

    def state_dict(self) -> dict[str, Any]:
        return {"phases": self.phases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.phases = state_dict["phases"]


def left_by(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]], dict[str, str]]:
    """Weights, metrics without what a clock says, and sampled text of a run, with what a callback counted."""
    rows: list[dict[str, str]] = []
    for path in [*sorted(run.glob("metrics-*.csv")), *run.glob("metrics.csv")]:
        with open(path, newline="") as file:
            part = [{k: v for k, v in row.items() if v and "seconds" not in k} for row in csv.DictReader(file)]
        first = min((int(row["step"]) for row in part), default=10**9)
        rows = [row for row in rows if int(row["step"]) < first] + part
    samples = {path.name: path.read_text() for path in [*(run / "samples").iterdir(), run / "counted.txt"]}
    (weights,) = (run / "pretrained").glob("*.safetensors")
    return load_file(weights), rows, samples


def same(run: Path, other: Path) -> bool:
    (weights, metrics, samples), (weights2, metrics2, samples2) = left_by(run), left_by(other)
    assert metrics == metrics2
    assert samples == samples2
    assert weights.keys() == weights2.keys()
    return all(torch.equal(weights[name], weights2[name]) for name in weights)


class StopAt(Callback):
    """Raises at a hook of a phase."""

    def __init__(self, hook: str, phase: int, error: str = "RuntimeError") -> None:
        def stop(trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == phase and not trainer.sanity_checking:
                raise getattr(builtins, error)("stopped here")

        setattr(self, hook, stop)


HOOKS = ["on_train_epoch_start", "on_train_batch_end", "on_before_optimizer_step", "on_train_epoch_end"]


@pytest.mark.parametrize(
    ("loss", "hook"), [*(("TwoGRPO", hook) for hook in HOOKS), *zip(["GRPO", "DPO", "IPO", "KTO"], HOOKS, strict=True)]
)
def test_stopped_anywhere_it_goes_on_as_if_not(loss: str, hook: str, command: list[str], tmp_path: Path):
    command = [*command, f"--model.loss={loss}", "--ckpt_path=last"]
    main([*command, f"--run_dir={tmp_path / 'whole'}"])
    halved = [*command, f"--run_dir={tmp_path / 'halved'}"]
    with pytest.raises(RuntimeError, match="stopped here"):
        main(
            [*halved, f"--trainer.callbacks+={{class_path: test_resume.StopAt, init_args: {{hook: {hook}, phase: 3}}}}"]
        )
    assert not (tmp_path / "halved" / "checkpoints" / "phase-00004.ckpt").exists()
    main(halved)
    assert same(tmp_path / "whole", tmp_path / "halved")


class Ended(Callback):
    """Kills its process, the first time that training ends in it; or raises an error."""

    def __init__(self, mark: str, error: bool) -> None:
        self.mark, self.error = Path(mark), error

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.mark.exists():
            self.mark.touch()
            if self.error:
                raise RuntimeError("the cup was full")
            os.kill(os.getpid(), signal.SIGKILL)


def random_rewards(samples: list[Sample]) -> list[float]:
    return [float(random.random() + np.random.rand() + torch.rand(()).item() > 1.5) for _ in samples]


def test_rewards_that_draw_are_drawn_again(command: list[str], tmp_path: Path):
    command = [*command, "--data.reward=test_resume.random_rewards", "--ckpt_path=last", "--trainer.max_epochs=4"]
    main([*command, f"--run_dir={tmp_path / 'whole'}"])
    halved = [*command, f"--run_dir={tmp_path / 'halved'}"]
    main([*halved, "--trainer.max_epochs=2"])
    main(halved)
    assert same(tmp_path / "whole", tmp_path / "halved")


def test_killed_when_training_ends_it_does_that_again(command: list[str], tmp_path: Path):
    """What callbacks do then, too: there is no checkpoint of a run that is done before they did it."""
    command = [*command, "--trainer.max_epochs=3", "--data.val=null"]
    mark, run = tmp_path / "mark", tmp_path / "run"
    ended = f"--trainer.callbacks+={{class_path: test_resume.Ended, init_args: {{mark: {mark}, error: false}}}}"
    assert begun([*command, ended], run, wait=False).wait(timeout=200) == -signal.SIGKILL
    assert mark.exists()
    assert not (run / "ledger.json").exists()
    assert begun([*command, ended], run).wait(timeout=200) == 0
    main([*command, f"--run_dir={tmp_path / 'whole'}"])
    assert (run / "ledger.json").exists()
    assert same(tmp_path / "whole", run)


def test_an_error_when_training_ends_leaves_its_checkpoint(command: list[str], tmp_path: Path):
    mark, run = tmp_path / "mark", tmp_path / "run"
    ended = f"--trainer.callbacks+={{class_path: test_resume.Ended, init_args: {{mark: {mark}, error: true}}}}"
    command = [*command, ended, "--trainer.max_epochs=3", "--data.val=null", "--checkpoint.every_n_phases=9"]
    with pytest.raises(RuntimeError, match="the cup was full"):
        main([*command, f"--run_dir={run}"])
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["phase-00003.ckpt"]


def early(**settings: Any) -> str:
    """An argument: training ends where the gradient's norm stops growing, which it does not do for long."""
    settings = {"monitor": "train/grad_norm", "mode": "max", "check_on_train_epoch_end": True} | settings
    return f"--trainer.callbacks+={json.dumps({'class_path': 'EarlyStopping', 'init_args': settings})}"


@pytest.mark.parametrize(
    ("settings", "phases", "others", "then"),
    [
        ({"patience": 2, "min_delta": 1e9}, 3, {"patience": 2, "min_delta": -1e9}, 6),
        ({"stopping_threshold": -1.0}, 1, {"patience": 50}, 6),
        ({"stopping_threshold": -1.0}, 1, {"patience": 50, "min_delta": 1e9, "stopping_threshold": 1e9}, 6),
    ],
)
def test_one_that_was_stopped_early_is_done(
    settings: dict[str, Any], phases: int, others: dict[str, Any], then: int, command: list[str], tmp_path: Path
):
    """Until other settings say otherwise."""
    command = [*command, f"--run_dir={tmp_path}", "--data.val=null", "--ckpt_path=last"]
    main([*command, early(**settings)])
    before = left_by(tmp_path)
    (tmp_path / "ledger.json").unlink()
    main([*command, early(**settings)])
    assert checkpoints_in(tmp_path / "checkpoints")[0].name == f"phase-{phases:05d}.ckpt"
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in left_by(tmp_path)[0].items())
    assert (tmp_path / "ledger.json").exists()
    for _ in range(2):
        main([*command, early(**others)])
        assert checkpoints_in(tmp_path / "checkpoints")[0].name == f"phase-{then:05d}.ckpt"


def test_one_that_is_to_stop_later_does(command: list[str], tmp_path: Path):
    """Lightning does not forget, until ``min_epochs`` are reached, that a callback wanted to stop."""
    command = [*command, early(divergence_threshold=1e9), "--trainer.min_epochs=4", "--data.val=null"]
    command += ["--ckpt_path=last", "--trainer.max_epochs=6"]
    threshold = (
        "--trainer.callbacks+={class_path: test_resume.StopAt, init_args: {hook: on_train_epoch_start, phase: 2}}"
    )
    main([*command, f"--run_dir={tmp_path / 'whole'}"])
    with pytest.raises(RuntimeError, match="stopped here"):
        main([*command, f"--run_dir={tmp_path / 'halved'}", threshold])
    main([*command, f"--run_dir={tmp_path / 'halved'}"])
    assert checkpoints_in(tmp_path / "whole" / "checkpoints")[0].name == "phase-00004.ckpt"
    assert same(tmp_path / "whole", tmp_path / "halved")


def test_a_checkpoint_callback_of_the_user_s_own(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It is let be, but is of no moment to go on from."""
    mine = f"{{class_path: ModelCheckpoint, init_args: {{dirpath: {tmp_path / 'mine'}}}}}"
    main([*command, f"--run_dir={tmp_path / 'run'}", "--trainer.max_epochs=2", f"--trainer.callbacks+={mine}"])
    assert (tmp_path / "run" / "checkpoints" / "phase-00002.ckpt").exists()
    (written,) = (tmp_path / "mine").iterdir()
    with pytest.raises(SystemExit):
        main([*command, f"--run_dir={tmp_path / 'other'}", f"--ckpt_path={written}"])
    assert "was written by another callback" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    kept = [part for part in command if part.startswith(("--model.model=", "--data.val", "--data.reward"))]
    main(["validate", "--data=PromptData", *kept, "--rollout.max_tokens=4", f"--ckpt_path={written}",
          f"--run_dir={tmp_path / 'other'}"])  # fmt: skip
    main(["export", str(written), str(tmp_path / "exported")])
    assert (tmp_path / "exported" / "model.safetensors").exists()


class LooksAround(Callback):
    """Writes down which checkpoints there are when training ends."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        (folder / "seen.txt").write_text(" ".join(path.name for path in checkpoints_in(folder / "checkpoints")))


def test_a_state_of_files_stays_with_its_run(command: list[str], tmp_path: Path):
    """Lightning's own callback would take the files of another run for its best."""
    for name, before in (("one", []), ("two", [f"--ckpt_path={tmp_path / 'one'}"])):
        mine = {"dirpath": str(tmp_path / name / "mine"), "monitor": "val/mean_at_4", "mode": "max"}
        arguments = f"--trainer.callbacks+={json.dumps({'class_path': 'ModelCheckpoint', 'init_args': mine})}"
        main(
            [
                *command,
                arguments,
                f"--run_dir={tmp_path / name}",
                f"--trainer.max_epochs={2 + 2 * len(before)}",
                *before,
            ]
        )
        assert len(list((tmp_path / name / "mine").iterdir())) == 1


@pytest.mark.usefixtures("told_to_end")
def test_told_to_end_it_saves_before_others_take_their_time(command: list[str], tmp_path: Path):
    command = [*command, "--checkpoint.every_n_phases=9", "--trainer.callbacks+=test_resume.LooksAround"]
    with pytest.raises(SystemExit):
        main([*command, f"--run_dir={tmp_path}", "--data.val=null"])
    assert (tmp_path / "seen.txt").read_text() == "phase-00002.ckpt"


def begun(command: list[str], run: Path, wait: bool = True) -> subprocess.Popen:
    """The run as a process, from its first checkpoint on if ``wait``."""
    arguments = [sys.executable, "-m", "lit_grpo", *command, f"--run_dir={run}", "--ckpt_path=last"]
    with open(run.with_suffix(".log"), "a") as log:
        process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
    while wait and process.poll() is None and not list(run.glob("checkpoints/*.ckpt")):
        time.sleep(0.01)
    return process


def kills(points: int, losses: list[str], command: list[str], tmp_path: Path) -> None:
    """Kill so many runs at random moments, with one loss after the other; a run that was done before does not count."""
    draw, spans, killed = random.Random(points), {}, 0
    for i in range(3 * points):
        loss = losses[i % len(losses)]
        arguments, whole, run = [*command, f"--model.loss={loss}"], tmp_path / loss, tmp_path / f"run-{i}"
        if loss not in spans:
            start = time.perf_counter()
            process = begun(arguments, whole)
            first = time.perf_counter()
            assert process.wait(timeout=300) == 0
            spans[loss] = (first - start, time.perf_counter() - first)
        early = i % 4 == 1  # while it loads, validates, or is in its first phase
        process = begun(arguments, run, wait=not early)
        time.sleep(draw.uniform(0, spans[loss][not early]))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with those that it started
        killed += process.wait() == -signal.SIGKILL
        assert begun(arguments, run).wait(timeout=300) == 0
        assert same(whole, run)
        shutil.rmtree(run)
        if killed == points:
            return
    pytest.fail(f"only {killed} of {3 * points} runs were still going on when they were to be killed")


def test_killed_at_two_random_moments(command: list[str], tmp_path: Path):
    kills(2, ["TwoGRPO"], command, tmp_path)


@pytest.mark.long
def test_killed_at_random_moments_while_two_share_the_model(command: list[str], tmp_path: Path):
    """And so, now and then, while both write their shares of a checkpoint."""
    kills(5, ["TwoGRPO"], [*command, "--trainer.strategy=fsdp2", "--trainer.devices=2"], tmp_path)


@pytest.mark.long
def test_killed_at_twenty_random_moments(command: list[str], tmp_path: Path):
    kills(20, ["TwoGRPO", "GRPO", "DPO", "IPO", "KTO"], command, tmp_path)


class NothingGetsBetter(EarlyStopping):
    def __init__(self, patience: int) -> None:
        super().__init__("train/grad_norm", patience=patience, min_delta=1e9, check_on_train_epoch_end=True)


@pytest.mark.parametrize("then", ["phase-00006.ckpt", None])
def test_a_callback_s_settings_hold(
    then: str | None, command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Lightning's own would go on with those of its state."""
    command = [*command, f"--run_dir={tmp_path}", "--data.val=null", "--ckpt_path=last"]
    early = "--trainer.callbacks+={{class_path: test_resume.NothingGetsBetter, init_args: {{patience: {}}}}}"
    main([*command, early.format(3), "--trainer.max_epochs=2"])
    with caplog.at_level("INFO"):
        main([*command, early.format(50), f"--trainer.enable_checkpointing={str(bool(then)).lower()}"])
    assert checkpoints_in(tmp_path / "checkpoints")[0].name == (then or "phase-00002.ckpt")
    assert max(row["step"] for row in read_metrics(tmp_path)) == 11
    assert any("NothingGetsBetter: patience was 3, and is 50" in record.getMessage() for record in caplog.records)


def test_a_folder_below_home(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for epochs in (1, 2):
        main([*command, "--run_dir=~/run", "--ckpt_path=last", "--data.val=null", f"--trainer.max_epochs={epochs}"])
    assert (tmp_path / "run" / "checkpoints" / "phase-00002.ckpt").exists()


def test_last_is_of_a_run(command: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([*command, "--ckpt_path=last"])
    assert "ckpt_path: last is the latest of a run; say of which with --run_dir" in capsys.readouterr().err


@pytest.mark.parametrize("again", ["the same command", "last"])
def test_a_run_that_began_from_another_does_so_again(
    again: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Where it was ended before it had a checkpoint of its own."""
    command = [*command, "--data.val=null"]
    main([*command, "--trainer.max_epochs=2", f"--run_dir={tmp_path / 'first'}"])
    second = [*command, f"--run_dir={tmp_path / 'second'}", "--trainer.max_epochs=3"]
    begin, stop = (
        f"--ckpt_path={tmp_path / 'first'}",
        "{class_path: test_resume.StopAt, init_args: {hook: on_train_batch_end, phase: 2}}",
    )
    with pytest.raises(RuntimeError, match="stopped here"):
        main([*second, begin, f"--trainer.callbacks+={stop}"])
    with pytest.raises(SystemExit):  # a start that fails in between
        main([*second, "--ckpt_path=last", "--data.train.path=nowhere.jsonl"])
    (first := tmp_path / "first" / "checkpoints").rename(first.with_name("away"))
    with pytest.raises(SystemExit):
        main([*second, "--ckpt_path=last"])
    assert re.search(r"ckpt_path: '.*phase-00002.ckpt' is neither a checkpoint", capsys.readouterr().err)
    first.with_name("away").rename(first)
    main([*second, begin if again == "the same command" else "--ckpt_path=last"])
    assert sorted(path.name for path in (tmp_path / "second" / "samples").glob("train-*")) == ["train-00002.jsonl"]
    assert (tmp_path / "second" / "checkpoints" / "phase-00003.ckpt").exists()
    assert yaml.safe_load((tmp_path / "second" / "config.yaml").read_text())["ckpt_path"].endswith("phase-00002.ckpt")


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_wherever_it_is(
    reason: int, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(reason, os.strerror(reason), "train-00001.jsonl")

    monkeypatch.setattr("callbacks.SampleTable.on_train_epoch_start", full)
    with pytest.raises(SystemExit) as stop:
        main([*command, f"--run_dir={tmp_path / 'run'}", "--data.val=null"])
    assert stop.value.code == 2
    assert f"{os.strerror(reason)}: 'train-00001.jsonl' Make room. Checkpoints" in capsys.readouterr().err


def test_the_log_is_whole_also_where_a_column_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = CSVLog(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    log.log_metrics({"a": 1.0}, step=1)
    before = (tmp_path / "metrics.csv").read_text()
    with monkeypatch.context() as patched:
        patched.setattr("csv.DictWriter.writerows", lambda *_: 1 / 0)  # where a kill would come
        with pytest.raises(ZeroDivisionError):
            log.log_metrics({"b": 2.0}, step=2)
    assert (tmp_path / "metrics.csv").read_text() == before
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("2.0,2\n3.2e-")
    assert read_metrics(tmp_path) == [{"a": 1.0, "step": 1.0}, {"a": 2.0, "step": 2.0}]


def test_it_is_the_log_of_a_run(command: list[str], tmp_path: Path):
    cli = run([*command, f"--run_dir={tmp_path / 'run'}", "--data.val=null", "--trainer.max_epochs=1"])
    assert [type(log) for log in cli.trainer.loggers] == [TensorBoardLogger, CSVLog]


def test_only_the_first_process_touches_the_model_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("pretrained", "pretrained.unfinished"):
        (tmp_path / name).mkdir()
    trainer = SimpleNamespace(callbacks=[], default_root_dir=tmp_path, is_global_zero=False)
    for save in (lambda *_, **__: None, full):
        monkeypatch.setattr("callbacks.save_pretrained.save_pretrained", save)
        SavePretrained().on_train_end(trainer, SimpleNamespace(policy=None, tokenizer=None))
        assert {path.name for path in tmp_path.iterdir()} == {"pretrained", "pretrained.unfinished"}


def test_ctrl_c_says_how_to_go_on(command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    stop = "{class_path: test_resume.StopAt, init_args: {hook: on_train_batch_end, phase: 2, error: KeyboardInterrupt}}"
    run = tmp_path / "run"
    with pytest.raises(SystemExit), caplog.at_level("INFO"):
        main([*command, "--data.val=null", f"--run_dir={run}", f"--trainer.callbacks+={stop}"])
    said = f"phase-00002.ckpt is kept. To go on, repeat the command with --run_dir {run} --ckpt_path last"
    assert any(said in record.getMessage() for record in caplog.records)
    caplog.clear()
    with pytest.raises(SystemExit), caplog.at_level("INFO"):
        main(
            [
                *command,
                "--data.val=null",
                "--checkpoint.every_n_phases=9",
                f"--run_dir={tmp_path / 'short'}",
                f"--trainer.callbacks+={stop}",
            ]
        )
    said = "Nothing is kept (checkpoint.every_n_phases 9). To begin again, repeat the command"
    assert any(said in record.getMessage() for record in caplog.records)


def test_the_same_command_begins_a_run_and_goes_on_with_it(command: list[str], tmp_path: Path):
    """Also where it was killed before there was a checkpoint."""
    command = [*command, "--trainer.max_epochs=2", f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last"]
    with pytest.raises(RuntimeError, match="stopped here"):
        main(
            [
                *command,
                "--trainer.callbacks+={class_path: test_resume.StopAt, init_args: {hook: on_train_start, phase: 0}}",
            ]
        )
    main(command)
    main([*command, "--trainer.max_epochs=3"])
    _, metrics, _ = left_by(tmp_path / "run")
    assert [int(row["epoch"]) for row in metrics if "train/reward" in row] == [0, 1, 2]
    assert (tmp_path / "run" / "config-000.yaml").exists()


TENSOR = "{class_path: ModelParallelStrategy, init_args: {data_parallel_size: 1, tensor_parallel_size: 2}}"
FSDP1 = "{class_path: test_invariance.FSDPOnCPU, init_args: {process_group_backend: gloo, state_dict_type: sharded}}"


@pytest.mark.parametrize(
    ("strategy", "more"),
    [("ddp", ["--model.lora={r: 4}"]), ("fsdp2", []), (FSDP1, []), (TENSOR, [])],
)
def test_two_processes_go_on_as_if_not_stopped(
    strategy: str, more: list[str], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Sharded checkpoints, a reference, and a clipped gradient; nothing but a flag tells the strategies apart."""
    command = [
        sys.executable,
        "-m",
        "lit_grpo",
        *command,
        "--ckpt_path=last",
        "--data.val=null",
        "--model.loss.beta=0.1",
        *more,
    ]
    command += [f"--trainer.strategy={strategy}", "--trainer.devices=2", "--trainer.gradient_clip_val=0.5"]
    command += ["--trainer.max_epochs=4", "--checkpoint.keep=3"]
    subprocess.run([*command, f"--run_dir={tmp_path / 'whole'}"], check=True, env=ENVIRONMENT, timeout=200)
    shutil.copytree(tmp_path / "whole", halved := tmp_path / "halved")
    shutil.rmtree(halved / "pretrained")
    for lost in ("checkpoints/phase-00003", "checkpoints/phase-00004", "samples/train-00002", "samples/train-00003"):
        (path,) = halved.glob(f"{lost}*")
        remove(path)
    subprocess.run([*command, f"--run_dir={halved}"], check=True, env=ENVIRONMENT, timeout=200)
    assert same(tmp_path / "whole", halved)
    checkpoint = tmp_path / "whole" / "checkpoints" / "phase-00004.ckpt"
    assert checkpoint.is_dir() == (strategy != "ddp")
    main(["export", str(checkpoint), str(tmp_path / "exported")])
    (exported,), (saved,) = ((tmp_path / of).glob("*.safetensors") for of in ("exported", "whole/pretrained"))
    weights, expected = load_file(exported), load_file(saved)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    if checkpoint.is_dir():
        alone = [*command[3:], "--trainer.strategy=auto", "--trainer.devices=1", f"--run_dir={tmp_path / 'alone'}"]
        with pytest.raises(SystemExit):
            main([*alone, f"--ckpt_path={checkpoint}", "--trainer.max_epochs=5"])
        assert "shared the model out, which this trainer.strategy does not." in capsys.readouterr().err
        assert damage(checkpoint) is None
        summed = json.loads((checkpoint / "checksums.json").read_text())
        assert summed.keys() == {path.name for path in checkpoint.iterdir()} - {"checksums.json"}
        share = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(share.read_bytes())
        for wrong in (content[: len(content) // 2] + bytes(200) + content[len(content) // 2 + 200 :], content[:-1000]):
            share.write_bytes(wrong)
            assert damage(checkpoint) == f"the checksum of {share.name} is another"
        share.unlink()
        assert "No such file" in str(damage(checkpoint))


def test_with_another_number_of_processes_it_goes_on_within_a_tolerance(command: list[str], tmp_path: Path):
    """That of docs/resume.md: weights 1e-6 apart, relative, all together, and no other token."""
    whole, two = tmp_path / "whole", tmp_path / "two"
    command = [*command, "--data.val=null", "--checkpoint.keep=9"]
    main([*command, f"--run_dir={whole}"])
    command += [f"--run_dir={two}", f"--ckpt_path={whole / 'checkpoints' / 'phase-00002.ckpt'}"]
    command += ["--trainer.strategy=ddp", "--trainer.devices=2"]
    subprocess.run([sys.executable, "-m", "lit_grpo", *command], check=True, env=ENVIRONMENT, timeout=200)
    a, b, start = (
        torch.cat([tensor.flatten().double() for _, tensor in sorted(load_file(path / "model.safetensors").items())])
        for path in (whole / "pretrained", two / "pretrained", Path(command[1].removeprefix("--model.model=")))
    )
    assert (a - start).norm() > 1e-3 * a.norm()
    assert (a - b).norm() < 1e-6 * a.norm()
    files = [two / "samples" / f"train-{phase:05d}.jsonl" for phase in (2, 3, 4, 5)]
    for path in files:
        ours, theirs = (
            sorted((row["prompt"], row["completion"]) for row in map(json.loads, file.read_text().splitlines()))
            for file in (path, whole / "samples" / path.name)
        )
        assert ours == theirs


def test_two_processes_share_what_one_had_whole_in_a_folder_named_by_the_time(command: list[str], tmp_path: Path):
    """A rate of 0 leaves weights as they are, so that what was read can be compared with the file."""
    main([*command, "--trainer.max_epochs=1", f"--run_dir={tmp_path / 'one'}", "--data.val=null"])
    held = torch.load(tmp_path / "one" / "checkpoints" / "phase-00001.ckpt", weights_only=True)["state_dict"]
    command = [sys.executable, "-m", "lit_grpo", *command, f"--ckpt_path={tmp_path / 'one'}", "--data.val=null"]
    command += ["--trainer.strategy=fsdp2", "--trainer.devices=2", "--trainer.max_epochs=2", "--model.optimizer.lr=0"]
    subprocess.run(command, check=True, cwd=tmp_path, env=ENVIRONMENT, timeout=200)
    (run,) = (tmp_path / "runs").iterdir()
    saved = load_file(run / "pretrained" / "model.safetensors")
    assert all(torch.equal(tensor, held[f"policy.lm.{name}"]) for name, tensor in saved.items())
    checkpoint = run / "checkpoints" / "phase-00002.ckpt"
    assert damage(checkpoint) is None
    summed = json.loads((checkpoint / "checksums.json").read_text())
    assert summed.keys() == {path.name for path in checkpoint.iterdir()} - {"checksums.json"}


@pytest.mark.parametrize("moment", ["loading", "validating"])
def test_told_to_end_before_it_begins_it_says_so(
    moment: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is saved, and the exit code is that of a run to go on with."""
    owner, name = (lit_grpo.module, "load_policy") if moment == "loading" else (HFEngine, "_generate")
    original = getattr(owner, name)

    def tell(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*arguments)

    monkeypatch.setattr(owner, name, tell)
    with pytest.raises(SystemExit) as stop:
        main([*command, f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last"])
    assert stop.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_told_to_end_in_the_last_phase_it_is_done(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = PolicyModule.training_step

    def tell(module: PolicyModule, *arguments: Any) -> Any:
        if module.current_epoch == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, *arguments)

    monkeypatch.setattr(PolicyModule, "training_step", tell)
    with pytest.raises(SystemExit):
        main([*command, "--data.val=null", f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last"])
    assert (tmp_path / "run" / "checkpoints" / "phase-00006.ckpt").exists()
    assert (tmp_path / "run" / "pretrained" / "model.safetensors").exists()


@pytest.mark.parametrize("signal_sent", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["sampling", "training"])
def test_told_to_end_it_saves_and_goes_on_as_if_not(
    moment: str, signal_sent: int, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Sampling is given up, so the checkpoint is of the moment before the phase; updates are made to the end."""
    command = [*command, "--checkpoint.every_n_phases=50", "--ckpt_path=last"]
    main([*command, f"--run_dir={tmp_path / 'whole'}"])
    told = [*command, f"--run_dir={tmp_path / 'told'}"]
    with monkeypatch.context() as patch:
        owner, name = (HFEngine, "_generate") if moment == "sampling" else (PolicyModule, "training_step")
        original, calls = getattr(owner, name), []

        def tell(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == 9:
                os.kill(os.getpid(), signal_sent)
            return original(*arguments, **options)

        patch.setattr(owner, name, tell)
        save = Checkpoints.save
        patch.setattr(Checkpoints, "save", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), save(*a)))  # told again
        handler = signal.getsignal(signal_sent)
        with pytest.raises(SystemExit) as stop:
            main(told)
        assert stop.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal_sent) is handler
    assert len(list((tmp_path / "told" / "checkpoints").iterdir())) == 1
    assert not (tmp_path / "told" / "pretrained").exists()
    main(told)
    assert same(tmp_path / "whole", tmp_path / "told")
