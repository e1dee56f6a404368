"""Runs as processes, several at once, that can be ended and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch

from lit_grpo.reports.results import is_finished, phases_of, read_run, scores_of
from lit_grpo.reports.table import label

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAID = "output.txt"
"""What a run said, in its folder."""

LAST_LINES = 15


@dataclass
class Job:
    """One run that is wanted."""

    name: str
    seed: int
    folder: Path
    arguments: list[str]
    """Of ``lit-grpo fit``, without those that say which run it is."""

    num_phases: int
    """``trainer.max_epochs``."""

    began: float = field(default=0.0, init=False)
    phases_before: int = field(default=0, init=False)

    def start(self, threads: int, keep_open: int) -> subprocess.Popen[bytes]:
        """Begin the run, or go on with it, in a process of its own that a Ctrl-C in the terminal does not reach."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.began, self.phases_before = time.monotonic(), len(phases_of(self.folder))
        which = [f"--seed_everything={self.seed}", f"--run_dir={self.folder}", "--ckpt_path=last"]
        modules = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}  # those that this process finds
        with open(self.folder / SAID, "ab") as said:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "lit_grpo", "fit", *self.arguments, *which],
                env=os.environ | modules | {"OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[keep_open],
            )

    def pace(self) -> float | None:
        """Seconds a phase since the process began, None before the first."""
        phases = len(phases_of(self.folder)) - self.phases_before
        return (time.monotonic() - self.began) / phases if phases > 0 else None

    def phases_left(self) -> int:
        """How many are still to be done."""
        return max(0, self.num_phases - len(phases_of(self.folder)))


class Runs:
    """Makes all runs that have not finished yet, and says of each in one line what it came to.

    Args:
        jobs: in the order in which they begin.
        at_once: how many processes.
        lock: number of a file that each process keeps open until it ends.
    """

    def __init__(self, jobs: list[Job], at_once: int, lock: int) -> None:
        self.waiting = [job for job in jobs if not is_finished(job.folder)]
        self.at_once, self.lock = at_once, lock
        self.threads = max(1, torch.get_num_threads() // at_once)
        self.count, self.done = len(jobs), len(jobs) - len(self.waiting)
        self.running: list[tuple[Job, subprocess.Popen[bytes]]] = []
        self.failed: list[Job] = []
        self.paces: dict[str, float] = {}
        """Of configurations, seconds a phase."""
        self.told: list[int] = []
        """Signals so far."""
        self.passed_on = 0
        """How many of them runs were told of."""

    def make(self) -> None:
        """Make them; told to end, end the processes, which save where they are, and leave with 128 and the signal."""
        if self.done:
            print(f"{self.done} of {self.count} runs have finished before", flush=True)
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, lambda number, _: self.told.append(number)) for number in heard}
        try:
            while self.running or (self.waiting and not self.told):
                while self.waiting and len(self.running) < self.at_once and not self.told:
                    job = self.waiting.pop(0)
                    self.running.append((job, job.start(self.threads, self.lock)))
                self.pass_on()
                time.sleep(0.1)
                for job, process in list(self.running):
                    if process.poll() is not None:
                        self.running.remove((job, process))
                        if not self.told:
                            self.report(job, process.returncode)
        finally:
            for _, process in self.running:
                os.killpg(process.pid, signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.told:
            print("Stopped. The same command goes on from here.", file=sys.stderr)
            sys.exit(128 + self.told[0])

    def pass_on(self) -> None:
        """Pass signals on: the first has runs save where they are, the next kills them."""
        for nth in range(self.passed_on, len(self.told)):
            if nth == 0:
                print("Ending: runs save where they are. Once more kills them.", file=sys.stderr, flush=True)
            for _, process in self.running:
                process.terminate() if nth == 0 else os.killpg(process.pid, signal.SIGKILL)
        self.passed_on = len(self.told)

    def report(self, job: Job, code: int) -> None:
        """Say what a run came to, and how long the others will take."""
        head = f"{job.name}, seed {job.seed}"
        if code or not is_finished(job.folder):
            self.failed.append(job)
            lines = (job.folder / SAID).read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            print(
                f"{head}: failed with exit code {code}; all it said is in {job.folder / SAID}, and in the end",
                flush=True,
            )
            print("\n".join(f"    {line}" for line in lines), flush=True)
            return
        self.done += 1
        run = read_run(job.folder)
        mean, _ = scores_of([run])
        self.paces[job.name] = job.pace() or self.paces.get(job.name, 0.0)
        print(
            f"[{self.done}/{self.count}] {head}: {label(mean)} {run.held_out[0][mean]:.3f} ->"
            f" {run.held_out[-1][mean]:.3f} in {run.reached('seconds')[-1]:.0f} s of training{self.time_left()}",
            flush=True,
        )

    def time_left(self) -> str:
        """How long the others will take, from seconds a phase so far; where there are none, those of others."""
        ahead = [*self.waiting, *(job for job, _ in self.running)]
        if not ahead:
            return ""
        usual = fmean(self.paces.values())
        seconds = sum(self.paces.get(job.name, usual) * job.phases_left() for job in ahead) / self.at_once
        guessed = " if the configs to come are like these" * bool({job.name for job in ahead} - self.paces.keys())
        return f"; about {f'{seconds / 60:.0f} min' if seconds > 90 else f'{seconds:.0f} s'} left{guessed}"
