"""The one exception for everything a user can put right."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

INTERRUPTED = "interrupted; the same command goes on where this one was"
DISK_FULL = "the disk is full; free some of it, and run the same command again: it goes on"


class UserError(Exception):
    """A mistake in the settings or the data: what was expected, what was found, what to do.

    The message is one line. Every command prints it without a traceback and exits with status 2.
    """


class MissingLibrary(UserError, ImportError):
    """A library that only an extra of this package brings is not installed."""


def disk_full(error: Exception) -> bool:
    """Tell whether a file could not be written because its disk is full.

    Not every library hands the system's number on.
    """
    full = {errno.ENOSPC, errno.EDQUOT}
    words = {os.strerror(number) for number in full} | {"database or disk is full"}
    return getattr(error, "errno", None) in full or any(word in str(error) for word in words)


def line_of(error: Exception) -> str | None:
    """Give the line that tells a user's mistake, or a full disk; None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    return DISK_FULL if disk_full(error) else None


@contextmanager
def one_line(told: Callable[[str], str] = str) -> Iterator[None]:
    """End the program with one line and status 2 where a user's mistake leaves this context.

    That is a `UserError`, or a full disk. Every command's main function runs in it:
    ``@one_line()``.

    Args:
        told: makes the line of the message.
    """
    try:
        yield
    except Exception as error:
        if (message := line_of(error)) is None:
            raise
        print(f"error: {told(message)}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def pipeline_extra(extra: str = "pipeline") -> Iterator[None]:
    """Import inside this context what only the extra ``pipeline``, or another one, brings.

    Args:
        extra: its name.

    Raises:
        MissingLibrary: a library is missing; the line says how to get it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        if library == "tttlab":  # a part of this package is no library
            raise
        raise MissingLibrary(
            f"this needs the library {library}, which is not installed; "
            f'run: pip install "ttt-lab[{extra}]"'
        ) from error


def choices(name: str, allowed: Iterable[str]) -> str:
    """Name the legal choices, the most similar one first (``did you mean 'steps'? allowed: …``)."""
    allowed = sorted(allowed)
    similar = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    return f"{hint}allowed: {', '.join(allowed)}"
