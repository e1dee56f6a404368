"""The report as one page that needs nothing beside it."""

from __future__ import annotations

import base64
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lit_grpo.reports.results import Run
from lit_grpo.reports.table import NOTES, Row, difference_table, main_table

PACKAGES = ("lit-grpo", "torch", "lightning", "transformers", "vllm")


@dataclass
class Answer:
    """What numbers say to a question."""

    question: str
    sentences: list[str]
    table: list[list[str]] = field(default_factory=list)
    """Header and rows; may be empty."""

    picture: Path | None = None
    """PNG."""


def write_page(
    configs: dict[str, list[Run]],
    rows: list[Row],
    first: str,
    scores: tuple[str, str],
    path: Path,
    picture: Path | None = None,
    answers: Sequence[Answer] = (),
    reading: Sequence[str] = (),
) -> None:
    """Write ``report.html``: answers, tables, curves, what was run and where the report was made.

    Args:
        configs: runs of each, one a seed.
        rows: of the tables.
        first: name of the configuration that others are compared with.
        scores: names of Mean@k and Pass@k in the log.
        path: of the page.
        picture: PNG of the curves, if they are not those of the answers.
        answers: to what the runs were made for.
        reading: how to read them.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = templates.get_template("report.html.jinja").render(
        heading=", ".join(configs) if len(configs) <= 4 else f"{first} and {len(configs) - 1} others",
        first=first,
        tables=[main_table(rows, first, scores), difference_table(rows, first, scores)],
        notes=NOTES,
        picture=picture and embedded(picture),
        reading=reading,
        answers=[(answer, answer.picture and embedded(answer.picture)) for answer in answers],
        settings=settings_table(configs),
        folders={name: [str(run.folder) for run in runs] for name, runs in configs.items()},
        facts=facts(),
    )
    path.write_text(page, encoding="utf-8")


def embedded(picture: Path) -> str:
    """A picture as base64."""
    return base64.b64encode(picture.read_bytes()).decode()


def settings_table(configs: dict[str, list[Run]]) -> list[list[str]]:
    """Header and a row for each key that is not the same in all configurations."""
    settings = [runs[0].settings for runs in configs.values()]
    keys = sorted({key for found in settings for key in found})
    differing = [key for key in keys if any(found.get(key) != settings[0].get(key) for found in settings)]
    return [["key", *configs], *([key, *(value(found, key) for found in settings)] for key in differing)]


def value(settings: dict[str, Any], key: str) -> str:
    """A setting as YAML has it, empty where there is none."""
    found = settings.get(key, "")
    return found if isinstance(found, str) else json.dumps(found)


def facts() -> dict[str, str]:
    """Where and when the report was made."""
    processor, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "processor": f"{processor}, {os.cpu_count()} cores",
    }
    if torch.cuda.is_available():
        found["GPU"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
