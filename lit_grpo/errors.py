"""The one exception that means "the user can fix this"."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in the configuration, the data or the user's own code.

    Its message names the YAML key, what came, what was expected and how to fix it. The command line prints the message
    without a traceback; every other exception is a bug of this project and keeps its traceback.
    """


@contextmanager
def mistakes_end_with_a_message(program: str) -> Iterator[None]:
    """End the program with one line and exit code 2 on a mistake of the user."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # the parser wraps what constructors raise
        while cause is not None and not (is_mistake(cause) or is_full(cause)):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        where = "" if isinstance(cause, UserError | OSError) else "trainer: "
        advice = " Make room. Checkpoints that are there hold: go on with --ckpt_path last." if is_full(cause) else ""
        print(f"{program}: error: {where}{cause}{advice}", file=sys.stderr, flush=True)
        let_the_first_process_end()
        sys.exit(2)


def let_the_first_process_end() -> None:
    """Lightning kills the first process when it finds that another has ended, in the middle of its message or not."""
    first = os.getppid()
    for _ in range(100 if os.environ.get("LOCAL_RANK", "0") != "0" else 0):
        if os.getppid() != first:
            return
        time.sleep(0.1)


def is_mistake(error: BaseException) -> bool:
    """Ours, or what Lightning raises for settings of the trainer that do not go together."""
    return isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException"


def is_full(error: BaseException) -> bool:
    """Whether the disk is, or the user's share of it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
