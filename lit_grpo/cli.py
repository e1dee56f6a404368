"""The composition root: YAML to trainer, module, data and callbacks. The one place that imports everything."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.callbacks.timer import Interval
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from callbacks import (  # noqa: F401
    Checkpoints,
    HFRollout,
    LearningCurve,
    Ledger,
    Outliers,
    PhaseProgress,
    ReferenceCache,
    Results,
    Rollout,
    SampleTable,
    SavePretrained,
    StopOnSignal,
    TheoryMonitor,
    VLLMRollout,
    Whereabouts,
)
from callbacks.checkpoint_files import checkpoints_in, damage, is_between_phases, latest_whole
from callbacks.checkpoints import LastCheckpoint, Resume
from callbacks.stop_on_signal import stopping
from lit_grpo import data, losses  # noqa: F401  their short names in YAML are those of what is imported
from lit_grpo.csv_log import CSVLog
from lit_grpo.engines import Stopped
from lit_grpo.errors import UserError
from lit_grpo.export import export, new_folder
from lit_grpo.module import PolicyModule


def forget_settings_of_another_loss() -> None:
    """Let a new ``model.loss`` start from its own defaults.

    jsonargparse keeps settings whose names the new class knows as well. But the ``beta`` of DPO is no ``beta`` of
    SimPO, and would give 2-GRPO a KL term.
    """
    from jsonargparse import _typehints
    from jsonargparse._util import import_object

    keep_common = _typehints.discard_init_args_on_class_path_change

    def discard(parser_or_action: Any, before: Any, now: Any) -> None:
        if before and "init_args" in before and before["class_path"] != now["class_path"]:
            new = import_object(now["class_path"])
            if isinstance(new, type) and issubclass(new, losses.Loss):
                before["init_args"] = type(before["init_args"])()
        keep_common(parser_or_action, before, now)

    _typehints.discard_init_args_on_class_path_change = discard


forget_settings_of_another_loss()


STOPPED = 128 + signal.SIGTERM
"""Exit code after a checkpoint was saved because a signal asked for it."""


class Parser(LightningArgumentParser):
    """Ends with the message alone: the usage line of a parser with 200 options would hide it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if cut := re.search(r"'(top_p|top_k|min_p)' is not accepted$", message):
            message += (
                f"\nRollouts are drawn from the whole distribution: with {cut[1]} they would not be the policy's own."
                f" Held-out prompts may have it: rollout.init_args.evaluation.{cut[1]}."
            )
        named = "data.init_args.test: benchmarks have names; give them as {my_benchmark: {path: ...}}"
        if 'Parser key "test"' in message and named not in message:
            message += f"\n{named}, on the command line as --data.test='{{my_benchmark: {{path: ...}}}}'."
        noise = r"\s*(Does not validate against any|Subtypes:|Errors:|- Expected a <class 'NoneType'>|Given value)"
        raise UserError("\n".join(line for line in message.splitlines() if not re.match(noise, line))) from ex


class CLI(LightningCLI):
    """LightningCLI with a run folder, a ``rollout`` block, and the callbacks every run has."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            PolicyModule,
            L.LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            trainer_defaults={
                "num_sanity_val_steps": -1,  # validates the untrained policy: the first point of the curve
                "check_val_every_n_epoch": 10,
                "log_every_n_steps": 1,
                "enable_model_summary": False,
            },
            parser_class=Parser,
            parser_kwargs={"prog": "lit-grpo", "description": "RL post-training of language models on Lightning."},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of this run: logs, samples, checkpoints, model. Default: runs/ and the time. It must be empty"
            " or new, unless --ckpt_path resumes it.",
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")  # before a phase begins, so before its rollouts
        parser.add_lightning_class_args(Rollout, "rollout", subclass_mode=True)
        parser.add_lightning_class_args(SampleTable, "samples")
        parser.set_defaults({"rollout": {"class_path": "HFRollout"}})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser: LightningArgumentParser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            parser.set_defaults(verbose=False)  # Results prints a table of its own
        return parser

    def _parse_ckpt_path(self) -> None:
        """Do not let hyper-parameters of a checkpoint replace what the user wrote: ``config.yaml`` is the record."""

    def _set_seed(self) -> None:
        seed = self.config[self.subcommand].seed_everything
        if isinstance(seed, bool) or seed < 0:
            raise UserError(f"seed_everything: expected a whole number >= 0, got {seed}.")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Prepare the run folder, before anything costs time."""
        config = self.config[self.subcommand]
        self.run_dir = Path(config.run_dir or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}").expanduser()
        goes_on = self.subcommand == "test" and (self.run_dir / "results" / "settings.json").exists()  # see Results
        if config.ckpt_path == "last" and not config.run_dir:
            raise UserError("ckpt_path: last is the latest of a run; say of which with --run_dir.")
        if config.ckpt_path == "last" and self.subcommand == "fit":  # which may begin a run, and go on with it
            latest, goes_on = latest_whole(self.run_dir / "checkpoints"), True
            if latest is None and (begun_from := origin(self.run_dir)):
                latest = checkpoint_at(begun_from, "ckpt_path")
            config.ckpt_path = latest and str(latest.resolve())
        elif config.ckpt_path is not None:
            given = self.run_dir if config.ckpt_path == "last" else Path(config.ckpt_path).expanduser()
            config.ckpt_path = str(path := checkpoint_at(given, "ckpt_path").resolve())
            goes_on |= self.subcommand == "fit" and (is_of(self.run_dir, path) or nothing_kept(self.run_dir, path))
        if self.subcommand == "fit" and config.ckpt_path:
            if not is_between_phases(Path(config.ckpt_path)):
                raise UserError(
                    f"ckpt_path: {config.ckpt_path!r} was written by another callback, at a moment from which no run"
                    " goes on as if nothing had happened. Give one of a run's checkpoints/, or begin a run from what"
                    " `lit-grpo export` makes of it."
                )
            rank_zero_info(f"Going on from {config.ckpt_path}")
        if rank_zero_only.rank == 0:
            prepare_run_dir(self.run_dir, goes_on, keep_log=self.subcommand == "test")

    def after_fit(self) -> None:
        """End as a program that was told to, if it was."""
        if stopping(self.trainer):
            sys.exit(STOPPED)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        config["default_root_dir"] = str(self.run_dir)
        if config["logger"] is None:
            where = {"save_dir": str(self.run_dir), "name": "", "version": ""}
            table = [] if self.subcommand == "test" else [CSVLog(**where, flush_logs_every_n_steps=1)]  # see Results
            config["logger"] = [TensorBoardLogger(**where), *table]
        checkpoints = config["enable_checkpointing"] is not False
        if not checkpoints:
            callbacks = [Resume() if isinstance(callback, Checkpoints) else callback for callback in callbacks]
        if self.subcommand == "fit" and self.config.fit.ckpt_path:
            config["num_sanity_val_steps"] = 0  # the curve has its first point
        first: list[L.Callback] = [*(one for one in callbacks if isinstance(one, Resume)), SavePretrained()]
        callbacks = [*(one for one in callbacks if one not in first), LearningCurve(), Results(), StopOnSignal()]
        callbacks += [Outliers(one.every_n_phases) for one in callbacks if isinstance(one, SampleTable)]
        if config["enable_progress_bar"] is not False:
            callbacks = [PhaseProgress(), *callbacks]
        if config["max_time"] is not None:  # Lightning's own timer would stop inside a phase
            callbacks.append(TimeLimit(config["max_time"], interval=Interval.epoch))
            config["max_time"] = None
        callbacks += [LastCheckpoint(one) for one in first if isinstance(one, Checkpoints)]
        given = config["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        config["enable_checkpointing"] = checkpoints and any(isinstance(one, Checkpoint) for one in given)
        config["callbacks"] = [OneRunDir(), *first, *given]
        try:
            return super()._instantiate_trainer(config, [Ledger(), Whereabouts(), *callbacks])
        except ValueError as error:
            raise UserError(f"trainer: {error}") from error


class OneRunDir(L.Callback):
    """Gives all processes the run folder of the first: where it is named by the time, theirs may be a second later."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)


class TimeLimit(Timer):
    """Counts from each start, as a job that is queued again has its time anew."""

    def state_dict(self) -> dict[str, Any]:
        return {}


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` without a checkpoint of the run itself that it went on from, so that it repeats the run.

    Of an evaluation it is written once that has begun, so that a killed one can be begun again.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "test":
            self.config: Any = self.config.clone()
            if self.config.ckpt_path and is_of(Path(trainer.default_root_dir), Path(self.config.ckpt_path)):
                self.config.ckpt_path = None
            super().setup(trainer, pl_module, stage)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (Path(trainer.default_root_dir) / "config.yaml").exists():  # Results sees to it that it is the same
            super().setup(trainer, pl_module, "test")


RUN_FILES = ("config.yaml", "metrics.csv", "samples", "checkpoints", "pretrained", "results")


def is_of(run_dir: Path, checkpoint: Path) -> bool:
    """Whether a run wrote a checkpoint."""
    return checkpoint.resolve().parents[1] == run_dir.resolve()


def origin(run_dir: Path) -> Path | None:
    """The checkpoint of another run that a run began from, if it did."""
    configs = [run_dir / "config.yaml", *sorted(run_dir.glob("config-*.yaml"), reverse=True)]  # the latest first
    latest = next((path for path in configs if path.exists()), None)
    settings = yaml.safe_load(latest.read_text()) if latest else None
    found = settings.get("ckpt_path") if isinstance(settings, dict) else None
    return found and Path(found)


def nothing_kept(run_dir: Path, checkpoint: Path) -> bool:
    """Whether a run began from this checkpoint and has none of its own, so that it begins again."""
    before = origin(run_dir)
    return (
        before is not None and before.resolve() == checkpoint.resolve() and not checkpoints_in(run_dir / "checkpoints")
    )


def checkpoint_at(path: Path, key: str) -> Path:
    """A checkpoint, or the latest of a run.

    Args:
        path: of the checkpoint, or of the run folder.
        key: under which the user gave it.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    for folder in (path / "checkpoints", path):
        if latest := latest_whole(folder, key):
            return latest
    if not path.exists() or (path.is_dir() and path.suffix != ".ckpt"):
        raise UserError(
            f"{key}: {str(path)!r} is neither a checkpoint (run/checkpoints/phase-00050.ckpt) nor the folder of a run"
            f" that has one (looked from {Path.cwd()})."
        )
    if reason := damage(path):
        raise UserError(f"{key}: {str(path)!r} is damaged ({reason}). Choose an earlier one.")
    return path


def prepare_run_dir(folder: Path, goes_on: bool, keep_log: bool = False) -> None:
    """Make the folder and be sure that it can be written.

    Args:
        folder: of the run.
        goes_on: whether the run there is gone on with.
        keep_log: whether its ``config.yaml`` and ``metrics.csv`` stay; else they are put aside under a number.

    Raises:
        UserError: if it holds another run, or cannot be written.
    """
    present = [name for name in RUN_FILES if (folder / name).exists()]
    if present and not goes_on:
        go_on = (
            f", or go on where it stopped with `lit-grpo fit ... --run_dir {folder} --ckpt_path last`"
            if "checkpoints" in present
            else ""
        )
        raise UserError(
            f"run_dir: {str(folder)!r} is not empty: it holds a run ({', '.join(present)}), and nothing of it will be"
            f" overwritten. Choose another folder, or remove this one{go_on}."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
        number = next(i for i in itertools.count() if not any(folder.glob(f"*-{i:03d}.*")))
        for name in set() if keep_log else {"config.yaml", "metrics.csv"} & set(present):
            path = folder / name
            path.rename(path.with_stem(f"{path.stem}-{number:03d}"))
    except OSError as error:
        raise UserError(
            f"run_dir: cannot write to {str(folder)!r}: {error.strerror}. Choose another folder."
        ) from error


def run(args: list[str]) -> CLI:
    """Run one command line and return what it built."""
    keep_quiet()
    sys.path.append(os.getcwd())  # losses and rewards of the user's own; last, so that it shadows nothing
    try:
        return CLI(args)
    except Stopped:
        sys.exit(STOPPED)


def run_export(args: list[str]) -> None:
    """Run the command line of ``lit-grpo export``."""
    parser = argparse.ArgumentParser(
        "lit-grpo export", description="Write a checkpoint's policy for transformers, vLLM."
    )
    parser.add_argument("CKPT", type=Path, help="a checkpoint, or the folder of a run, whose latest is taken")
    parser.add_argument("OUT", type=Path, help="a new folder")
    parser.add_argument(
        "--merge", action="store_true", help="add adapters to the weights, instead of writing them alone"
    )
    parser.add_argument("--model", help="the model that the run began with, if it is no longer where it was")
    given = parser.parse_args(args)
    keep_quiet()
    new = new_folder(given.OUT.expanduser())
    export(checkpoint_at(given.CKPT.expanduser(), "CKPT"), new, given.merge, given.model)
    print(f"Wrote {given.OUT}")


def keep_quiet() -> None:
    """Silence what tells the user nothing: advice on loaders, deprecations between libraries, bars in files."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in (
        "The '.*_dataloader' does not have many workers",
        "Total length of `list` across ranks is zero",  # a run without held-out prompts
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "Experiment logs directory .* exists and is not empty",  # an old metrics.csv was put aside
        "`torch.distributed.reduce_op` is deprecated",  # vLLM's
        "It is recommended to use `self.log",  # vLLM makes a process group of one, which Lightning takes for many
        "LightningCLI's args parameter is intended to run from within Python",
        "torch.distributed is disabled, unavailable or uninitialized",  # export reads shares with one process
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
