"""What several benchmarks measure with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """MiB that the process took at most beyond what it had."""
    process, found, over = psutil.Process(), [0.0], threading.Event()
    start = process.memory_info().rss

    def watch() -> None:
        while not over.wait(0.001):
            found[0] = max(found[0], (process.memory_info().rss - start) / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
