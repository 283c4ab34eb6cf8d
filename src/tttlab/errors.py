"""The one exception for everything a user can put right."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the settings or the data, told in one line: what was expected, what was found, what to do.

    The stage scripts print it without a traceback and exit with status 2.
    """


def choices(found: str, allowed: Iterable[str]) -> str:
    """Name the legal choices, the likely intended one first (``did you mean 'steps'? allowed: …``)."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(found, allowed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(allowed)}"
