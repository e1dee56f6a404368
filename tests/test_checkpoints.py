"""Checkpoints are whole, kept, checked, and never stronger than the command line."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoint_files import PlainCheckpointIO, checkpoints_in, damage, latest_whole, number
from callbacks.checkpoints import Checkpoints
from lit_grpo.__main__ import main


class TestCheckpoints:
    @pytest.fixture
    def run(self, command: list[str], tmp_path: Path) -> Path:
        main([*command, "--trainer.max_epochs=3", f"--run_dir={tmp_path / 'run'}", "--data.val=null"])
        return tmp_path / "run"

    def test_the_last_two_are_kept_with_one_policy_each(self, run: Path):
        files = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert files == ["phase-00002.ckpt", "phase-00003.ckpt"]
        checkpoint = torch.load(run / "checkpoints" / files[-1], weights_only=True)
        assert all(name.startswith("policy.") for name in checkpoint["state_dict"])

    @pytest.mark.parametrize("damage_done", ["cut off", "a bit", "empty", "no zip"])
    def test_a_damaged_one_is_noticed_and_the_one_before_used(
        self, damage_done: str, run: Path, command: list[str], recwarn: pytest.WarningsRecorder
    ):
        path = run / "checkpoints" / "phase-00003.ckpt"
        content = bytearray(path.read_bytes())
        if damage_done == "a bit":
            content[len(content) // 2] ^= 1
        path.write_bytes({"cut off": content[:-1000], "empty": b"", "no zip": b"x" * 1000}.get(damage_done, content))
        assert damage(path) is not None
        assert latest_whole(run / "checkpoints") == run / "checkpoints" / "phase-00002.ckpt"
        assert any("phase-00003.ckpt' is damaged" in str(warning.message) for warning in recwarn)
        main([*command, "--trainer.max_epochs=3", f"--run_dir={run}", "--data.val=null", "--ckpt_path=last"])
        assert damage(path) is None

    def test_a_full_disk_is_named_and_leaves_nothing_half_written(
        self, run: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        def full(io: PlainCheckpointIO, checkpoint: Any, path: Path, **_: Any) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(PlainCheckpointIO, "save_checkpoint", full)
        with pytest.raises(SystemExit) as stop:
            main([*command, f"--run_dir={run}", "--data.val=null", "--ckpt_path=last"])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "phase-00004.ckpt': No space left on device. Make room" in said
        assert "phase-00003.ckpt' holds: go on with --ckpt_path last" in said
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["phase-00002.ckpt", "phase-00003.ckpt"]

    def test_no_changed_byte_is_missed_or_ends_in_a_traceback(self, run: Path):
        """Everywhere in the file, its directories included, of which torch reads some parts only."""
        path = run / "checkpoints" / "phase-00003.ckpt"
        content, draw = path.read_bytes(), random.Random(0)
        whole = torch.load(path, weights_only=True)["state_dict"]
        noticed = 0
        for place in [draw.randrange(len(content)) for _ in range(60)] + [len(content) - i for i in range(1, 200)]:
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            if damage(path) is None:  # then the byte means nothing
                found = torch.load(path, weights_only=True)["state_dict"]
                assert all(torch.equal(found[name], whole[name]) for name in whole)
            else:
                noticed += 1
        assert noticed > 100

    def test_later_ones_are_put_aside_where_an_earlier_one_is_gone_on_with(
        self, run: Path, command: list[str], caplog: pytest.LogCaptureFixture
    ):
        """They are of another course; neither are they taken for the latest, nor do they push out new ones."""
        earlier = f"--ckpt_path={run / 'checkpoints' / 'phase-00002.ckpt'}"
        stop = "{class_path: test_resume.StopAt, init_args: {hook: on_train_batch_end, phase: 2}}"
        with pytest.raises(RuntimeError, match="stopped here"), caplog.at_level("INFO"):
            main([*command, earlier, f"--run_dir={run}", "--data.val=null", f"--trainer.callbacks+={stop}"])
        there = lambda: sorted(path.name for path in (run / "checkpoints").iterdir())  # noqa: E731
        assert there() == ["phase-00002.ckpt", "phase-00003-aside-1.ckpt"]
        assert any("phase-00002.ckpt is kept" in record.getMessage() for record in caplog.records)
        main([*command, earlier, f"--run_dir={run}", "--data.val=null", "--trainer.max_epochs=3"])
        first = (run / "checkpoints" / "phase-00003-aside-1.ckpt").read_bytes()
        stop = "{class_path: test_resume.StopAt, init_args: {hook: on_train_batch_end, phase: 3}}"
        aside = f"--ckpt_path={run / 'checkpoints' / 'phase-00003-aside-1.ckpt'}"  # whose place another has
        with pytest.raises(RuntimeError, match="stopped here"):
            main([*command, aside, f"--run_dir={run}", "--data.val=null", f"--trainer.callbacks+={stop}"])
        assert there() == ["phase-00002.ckpt", "phase-00003-aside-1.ckpt", "phase-00003-aside-2.ckpt"]
        assert (run / "checkpoints" / "phase-00003-aside-1.ckpt").read_bytes() == first

    def test_if_none_can_be_read_nothing_begins(
        self, run: Path, command: list[str], capsys: pytest.CaptureFixture[str]
    ):
        before = {path: path.read_bytes()[:-1000] for path in (run / "checkpoints").iterdir()}
        for path, content in before.items():
            path.write_bytes(content)
        with pytest.raises(SystemExit):
            main([*command, f"--run_dir={run}", "--ckpt_path=last"])
        assert re.search(
            r"no checkpoint in '.*' can be read. Take, or begin, a run in another", capsys.readouterr().err
        )
        assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before

    def test_the_latest_is_that_of_most_phases(self, tmp_path: Path):
        for name in ("99999", "100000", "00002", "best", "00003-good"):  # the last two are somebody's own
            (tmp_path / f"phase-{name}.ckpt").touch()
        assert [number(path) for path in checkpoints_in(tmp_path)] == [100000, 99999, 2]

    @pytest.mark.parametrize("limit", ["max_steps=3", "max_time={seconds: 1}"])
    def test_none_is_of_the_middle_of_a_phase(self, limit: str, command: list[str], tmp_path: Path):
        run = tmp_path / "run"
        main([*command, "--data.val=null", "--trainer.max_epochs=500", f"--trainer.{limit}", f"--run_dir={run}"])
        assert (run / "pretrained" / "model.safetensors").exists()
        found = checkpoints_in(run / "checkpoints")
        assert all(torch.load(path, weights_only=True)["global_step"] == 2 * number(path) for path in found)
        assert (number(found[0]) == 1) == ("steps" in limit)

    def test_time_counts_from_each_start(self, command: list[str], tmp_path: Path):
        """A job that is queued again would else end at once."""
        command = [*command, "--data.val=null", f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last"]
        command += ["--trainer.max_epochs=500", "--trainer.max_time={seconds: 1}", "--checkpoint.every_n_phases=500"]
        reached = []
        for _ in range(2):
            main(command)
            reached.append(number(checkpoints_in(tmp_path / "run" / "checkpoints")[0]))
        assert 0 < reached[0] < reached[1] < 500

    def test_it_is_written_where_the_model_cannot_be(
        self, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        def full(policy: Any, tokenizer: Any, folder: Path, **_: Any) -> None:
            folder.mkdir()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("callbacks.save_pretrained.save_pretrained", full)
        with pytest.raises(SystemExit) as stop:
            main([*command, "--trainer.max_epochs=2", f"--run_dir={tmp_path / 'run'}", "--data.val=null"])
        assert stop.value.code == 2
        assert re.search(r"cannot write '.*pretrained': .*No space left.*lit-grpo export", capsys.readouterr().err)
        assert (tmp_path / "run" / "checkpoints" / "phase-00002.ckpt").exists()
        assert {path.name for path in (tmp_path / "run").glob("pretrained*")} == set()

    def test_a_model_written_before_stays_where_another_cannot_be(
        self, run: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = (run / "pretrained" / "model.safetensors").read_bytes()
        monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        command = [*command, f"--run_dir={run}", "--ckpt_path=last", "--data.val=null"]
        with pytest.raises(SystemExit):
            main([*command, "--trainer.max_epochs=4", "--trainer.enable_checkpointing=false"])
        assert capsys.readouterr().err.endswith("No space left on device. Make room.\n")
        assert (run / "pretrained" / "model.safetensors").read_bytes() == before

    def test_nothing_goes_through_the_folder_of_temporary_files(
        self, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Which may be small, or in memory."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
        main([*command, "--trainer.max_epochs=1", f"--run_dir={tmp_path / 'run'}", "--data.val=null"])
        assert (tmp_path / "run" / "checkpoints" / "phase-00001.ckpt").exists()

    def test_one_that_could_not_be_read_again_is_not_written(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        with pytest.raises(SystemExit):
            main([*command, f"--run_dir={tmp_path / 'run'}", "--trainer.callbacks+=test_checkpoints.Strange"])
        assert re.search(
            r"could not be loaded again with weights_only=True: .*states of .*Strange", capsys.readouterr().err
        )
        assert list((tmp_path / "run" / "checkpoints").iterdir()) == []

    def test_a_state_that_cannot_be_written_is_named(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        with pytest.raises(SystemExit):
            main([*command, f"--run_dir={tmp_path / 'run'}", "--trainer.callbacks+=test_checkpoints.Unwritable"])
        assert re.search(r"lambda.*The state of a callback may hold numbers", capsys.readouterr().err)

    def test_what_is_kept_is_said_also_where_data_are_not_found(
        self, run: Path, command: list[str], caplog: pytest.LogCaptureFixture
    ):
        with pytest.raises(SystemExit), caplog.at_level("INFO"):
            main([*command, f"--run_dir={run}", "--ckpt_path=last", "--data.train.path=nowhere.jsonl"])
        assert any("phase-00003.ckpt is kept. To go on," in record.getMessage() for record in caplog.records)

    def test_settings_out_of_range(self):
        from lit_grpo.errors import UserError

        for setting in ({"every_n_phases": 0}, {"keep": 0}):
            with pytest.raises(UserError, match=rf"checkpoint.{next(iter(setting))}: expected a whole number >= 1"):
                Checkpoints(**setting)


class TestFlagsHold:
    """What is written on the command line is never replaced by what a checkpoint was made with."""

    def test_those_of_the_optimizer(self, command: list[str], tmp_path: Path):
        command = [part for part in command if "lr_scheduler" not in part] + [f"--run_dir={tmp_path / 'run'}"]
        command += ["--data.val=null", "--ckpt_path=last"]
        main([*command, "--trainer.max_epochs=1"])
        main([*command, "--trainer.max_epochs=2", "--model.optimizer.lr=1e-5", "--model.optimizer.weight_decay=0.5"])
        saved = torch.load(tmp_path / "run" / "checkpoints" / "phase-00002.ckpt", weights_only=True)
        (group,) = saved["optimizer_states"][0]["param_groups"]
        assert (group["lr"], group["weight_decay"]) == (1e-5, 0.5)

    def test_the_rate_of_a_schedule(self, command: list[str], tmp_path: Path):
        command = [*command, f"--run_dir={tmp_path / 'run'}", "--data.val=null", "--ckpt_path=last"]
        main([*command, "--trainer.max_epochs=1"])
        main([*command, "--trainer.max_epochs=2", "--model.optimizer.lr=1e-5"])
        saved = torch.load(tmp_path / "run" / "checkpoints" / "phase-00002.ckpt", weights_only=True)
        (group,) = saved["optimizer_states"][0]["param_groups"]
        steps = 4  # LinearLR goes from a third to the whole in nine
        assert group["lr"] == pytest.approx(1e-5 * (1 / 3 + 2 / 3 * steps / 9))

    def test_a_rate_of_nothing_has_no_schedule(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        command = [*command, f"--run_dir={tmp_path / 'run'}", "--data.val=null", "--ckpt_path=last"]
        main([*command, "--trainer.max_epochs=1", "--model.optimizer.lr=0"])
        with pytest.raises(SystemExit):
            main([*command, "--trainer.max_epochs=2"])
        assert "had a schedule of the rate 0" in capsys.readouterr().err

    def test_a_model_that_does_not_count_is_named(
        self, command: list[str], tmp_path: Path, recwarn: pytest.WarningsRecorder
    ):
        command = [*command, f"--run_dir={tmp_path / 'run'}", "--data.val=null", "--ckpt_path=last"]
        main([*command, "--trainer.max_epochs=1"])
        shutil.copytree(command[1].removeprefix("--model.model="), tmp_path / "other")
        main([*command, "--trainer.max_epochs=2", f"--model.model={tmp_path / 'other'}"])
        said = [str(warning.message) for warning in recwarn if "model.model" in str(warning.message)]
        assert "the checkpoint's policy, which this run goes on with, began as" in said[0]
        assert str(tmp_path / "other") in said[0]

    def test_another_optimizer_is_refused(self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        command = [part for part in command if not part.startswith(("--model.lr_scheduler", "--model.optimizer"))]
        command += [f"--run_dir={tmp_path / 'run'}", "--data.val=null", "--ckpt_path=last"]
        main([*command, "--trainer.max_epochs=1", "--model.optimizer=AdamW", "--model.optimizer.lr=1e-3"])
        with pytest.raises(SystemExit):
            main([*command, "--trainer.max_epochs=2", "--model.optimizer=SGD", "--model.optimizer.lr=1e-3"])
        assert "had AdamW, whose state says nothing to SGD" in capsys.readouterr().err

    def test_another_schedule_is_refused(self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        command = [*command, f"--run_dir={tmp_path / 'run'}", "--data.val=null", "--ckpt_path=last"]
        main([*command, "--trainer.max_epochs=1"])
        other = [part.replace("total_iters: 9", "total_iters: 12") for part in command]
        with pytest.raises(SystemExit) as stop:
            main([*other, "--trainer.max_epochs=2"])
        assert stop.value.code == 2
        assert "model.lr_scheduler: the run that the checkpoint is of had another schedule (total_iters)" in (
            capsys.readouterr().err
        )


class Strange(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"score": np.float64(1.0)}


class Unwritable(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"score": Later()}


class Later:
    """Whose copies are fine, and whose pickles are not."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a lambda cannot be pickled")
