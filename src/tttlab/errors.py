"""The one exception for everything a user can put right."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the settings or the data: what was expected, what was found, what to do.

    The message is one line. The stage scripts print it without a traceback and exit with status 2.
    """


def choices(name: str, allowed: Iterable[str]) -> str:
    """Name the legal choices, the most similar one first (``did you mean 'steps'? allowed: …``)."""
    allowed = sorted(allowed)
    similar = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {similar[0]!r}? " if similar else ""
    return f"{hint}allowed: {', '.join(allowed)}"
