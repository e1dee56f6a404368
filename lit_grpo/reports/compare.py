"""``lit-grpo compare``: several configurations over several seeds, and one report."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_grpo.errors import UserError

if TYPE_CHECKING:
    from lit_grpo.reports.results import Run
    from lit_grpo.reports.running import Job

    Report = Callable[[dict[str, list[Run]], str, Path], None]

OURS = ("--seed_everything", "--run_dir", "--ckpt_path")
"""Options of each run that this command sets."""


@dataclass
class Entry:
    """One of the configurations that are compared."""

    name: str
    files: list[str]
    """To be run, later ones win; empty for runs that have been made."""

    folder: Path
    """Of its runs."""


def compare(args: list[str], write: Report | None = None) -> bool:
    """Run the command line of ``lit-grpo compare``; False if a run failed.

    Args:
        args: of the command line.
        write: what to do with the runs instead of :func:`report`, with its arguments.

    Raises:
        UserError: before any run begins, if a config has a mistake, or a folder holds another run.
    """
    args, extra = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    given = parser().parse_args(args)
    if min(given.seeds) < 0:
        raise UserError(f"--seeds: expected whole numbers >= 0, got {min(given.seeds)}.")
    if given.jobs < 1:
        raise UserError(f"--jobs: expected a whole number >= 1, got {given.jobs}.")
    if bad := {option.split("=")[0] for option in extra} & set(OURS):
        raise UserError(
            f"{bad.pop()}: each run has its own. Give seeds with --seeds, and the folder of all with --out."
        )
    out = given.out.expanduser()
    entries = [entry_of(text, out) for text in given.CONFIG_OR_RUN]
    if twice := [entry.name for i, entry in enumerate(entries) if entry.name in [e.name for e in entries[:i]]]:
        raise UserError(f"CONFIG_OR_RUN: two are called {twice[0]!r}. Name them: NAME=CONFIG.")

    from lit_grpo.reports.results import read_runs
    from lit_grpo.reports.running import Runs

    made = {entry.name: read_runs(entry.folder) for entry in entries if not entry.files}
    common = list(given.common)
    arguments = {e.name: [*(f"--config={file}" for file in [*common, *e.files]), *extra] for e in entries if e.files}
    configs_to_run = {name: parsed(name, of_one) for name, of_one in arguments.items()}
    check_scores(configs_to_run)
    jobs = [
        job
        for entry in entries
        if entry.files
        for job in jobs_of(entry, arguments[entry.name], configs_to_run[entry.name], given.seeds)
    ]
    with alone_in(out) as lock:
        runs = Runs(jobs, given.jobs, lock)
        runs.make()
    for entry in entries:
        finished = [job.folder for job in jobs if job.name == entry.name and job not in runs.failed]
        if finished:
            made[entry.name] = [run for folder in finished for run in read_runs(folder)]
    configs = {entry.name: made[entry.name] for entry in entries if entry.name in made}
    if configs:
        (write or report)(configs, entries[0].name, out)
    return not runs.failed


def parser() -> argparse.ArgumentParser:
    """Of the command line before ``--``."""
    found = argparse.ArgumentParser(
        "lit-grpo compare",
        usage="lit-grpo compare CONFIG_OR_RUN ... [--common FILE ...] [--seeds 0 1 2] [--out FOLDER] [--jobs 1]"
        " [-- --KEY VALUE ...]",
        description="Run configurations over seeds and write a report: table.md, table.csv, table.json, curves.png,"
        " report.html. The same command goes on where it was ended; runs that have finished are not run again."
        " What follows -- goes to every run.",
    )
    found.add_argument(
        "CONFIG_OR_RUN",
        nargs="+",
        help="FILE or FILE+OVERLAY+..., as of fit -c; or the folder of a finished run, or of several, one a seed, which"
        " is only read. NAME=... names it. Others are compared with the first.",
    )
    found.add_argument("--common", nargs="+", default=[], metavar="FILE", help="files that come before those of each")
    found.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of runs")
    found.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of runs and report")
    found.add_argument("--jobs", type=int, default=1, help="runs at once; they share the cores")
    return found


def entry_of(text: str, out: Path) -> Entry:
    """What one argument says.

    Raises:
        UserError: if it names no file and no folder, or its name makes no folder.
    """
    named = "=" in text and not Path(text).expanduser().exists()
    name, rest = text.split("=", 1) if named else ("", text)
    files = [rest] if Path(rest).expanduser().exists() else rest.split("+")
    for file in files:
        if not Path(file).expanduser().exists():
            raise UserError(
                f"CONFIG_OR_RUN: {text!r}: there is no {file!r} here ({Path.cwd()}). Give FILE, FILE+OVERLAY, a run's"
                " folder, or NAME= and one of these."
            )
    path = Path(files[-1]).expanduser()
    name = name or (path.resolve().name if path.is_dir() else path.stem)
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"CONFIG_OR_RUN: {name!r} is no name: letters, digits and . + - _ make one.")
    if len(files) == 1 and path.is_dir():
        return Entry(name, [], path)
    return Entry(name, files, out / "runs" / name)


def jobs_of(entry: Entry, arguments: list[str], config: dict[str, Any], seeds: list[int]) -> list[Job]:
    """The runs of a configuration.

    Raises:
        UserError: if the folder of a run holds another.
    """
    from lit_grpo.reports.results import config_of, first_difference, settings_of
    from lit_grpo.reports.running import Job

    jobs = []
    for seed in dict.fromkeys(seeds):
        folder = entry.folder / f"seed-{seed}"
        before = config_of(folder)
        if before and (difference := first_difference(settings_of(before), settings_of(config))):
            raise UserError(
                f"--out: {str(folder)!r} holds a run of another configuration: {difference}. Choose another --out, or"
                " remove that folder."
            )
        jobs.append(Job(entry.name, seed, folder, arguments, config["trainer"]["max_epochs"]))
    return jobs


def parsed(name: str, arguments: list[str]) -> dict[str, Any]:
    """What the parser of ``lit-grpo fit`` makes of arguments; nothing is instantiated.

    Raises:
        UserError: of the parser, with the name of the configuration.
    """
    import yaml

    from lit_grpo.cli import run

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            run(["fit", *arguments, "--print_config"])
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return yaml.safe_load(said.getvalue())


def check_scores(configs: dict[str, dict[str, Any]]) -> None:
    """See to it that all runs will have the same held-out scores, of their beginning and of their end.

    Raises:
        UserError: if not, or if one would not begin where a run begins.
    """
    from lit_grpo.reports.results import settings_of

    for name, config in configs.items():
        check_score(name, config)
    for key, block in (("samples_per_prompt", "data.init_args"), ("pass_at", "model")):
        found = {name: settings_of(config)[f"{block}.{key}"] for name, config in configs.items()}
        if len({str(value) for value in found.values()}) > 1:
            raise UserError(f"{block}.{key}: {found}. Only runs that measure the same can be compared.")


def check_score(name: str, config: dict[str, Any]) -> None:
    """The same of one configuration."""
    phases, every = config["trainer"]["max_epochs"], config["trainer"]["check_val_every_n_epoch"]
    if not config["data"]["init_args"].get("val"):
        raise UserError(f"{name}: data.init_args.val: there are no held-out prompts, so nothing to compare.")
    if not phases or phases < 1:
        raise UserError(f"{name}: trainer.max_epochs: expected a whole number >= 1, got {phases}.")
    if every and phases % every:
        raise UserError(
            f"{name}: trainer.check_val_every_n_epoch: with {every} the policy after all {phases} phases"
            " (trainer.max_epochs) is not scored. Give a divisor."
        )
    for key, needed in (("num_sanity_val_steps", -1), ("max_steps", -1), ("max_time", None)):
        if config["trainer"][key] != needed:
            raise UserError(
                f"{name}: trainer.{key}: with {config['trainer'][key]} the first or last policy would have no score."
                " Leave it out; trainer.max_epochs says how long a run is."
            )
    if config["ckpt_path"]:
        raise UserError(
            f"{name}: ckpt_path: {config['ckpt_path']!r} cannot be given, as each run goes on with its own."
        )


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[int]:
    """Hold the folder's lock, which runs hold as well, so that none is begun twice; yields its number.

    Raises:
        UserError: if another holds it, or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--out: cannot write to {str(out)!r}: {error.strerror}. Choose another folder.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out: another `lit-grpo compare`, or a run that it began, is at work in {str(out)!r}. Wait for it,"
                " or choose another folder."
            ) from None
        yield file.fileno()


def report(configs: dict[str, list[Run]], first: str, out: Path) -> None:
    """Write tables, curves and page, and print the table.

    Raises:
        UserError: if runs did not measure the same.
    """
    from lit_grpo.reports.figures import draw
    from lit_grpo.reports.page import write_page
    from lit_grpo.reports.results import scores_of
    from lit_grpo.reports.table import make_rows, write_tables

    scores = scores_of([run for runs in configs.values() for run in runs])
    rows = make_rows(configs, first, scores)
    write_tables(rows, first, scores, out)
    draw(configs, scores[0], out / "curves.png")
    write_page(configs, rows, first, scores, out / "report.html", out / "curves.png")
    print(f"\n{(out / 'table.md').read_text(encoding='utf-8')}\nReport: {out / 'report.html'}")
