"""Files that are there whole or not at all, and rows of text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another path to write to, which becomes ``path`` when the block ends without an error."""
    unfinished = path.with_name(path.name + ".unfinished")
    yield unfinished
    unfinished.replace(path)


def read_jsonl(path: Path) -> list[Any]:
    """One JSON document a line. Only a newline ends one: texts may hold U+2028 and others that ``splitlines`` knows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
