"""What a replica of Ray Serve takes of a request over HTTP, and how it refuses one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request

from tttlab.errors import UserError
from tttlab.runtime.group_size import TooLittleMemory
from tttlab.serving.replies import CODES
from tttlab.serving.service import Busy, Late

_DROPPED = 8  # so many times the size that is allowed is still received, and not kept


class TooLarge(UserError):
    """A request has more bytes than is allowed."""


class NoJson(UserError):
    """A request says that it holds something else."""


class Slow(UserError):
    """The body of a request did not arrive in time."""


# The first one that fits counts.
_STATUSES = {
    TooLarge: 413,
    NoJson: 415,
    Slow: 408,
    TooLittleMemory: 503,
    UserError: 400,
    Late: 504,
    Busy: 429,
}


def refusal(error: UserError | Busy) -> tuple[int, dict[str, str]]:
    """Give the status and the body, as MLflow writes it, that tell an error."""
    status = next(status for kind, status in _STATUSES.items() if isinstance(error, kind))
    return status, {"error_code": CODES[status], "message": " ".join(str(error).split())}


@asynccontextmanager
async def within(seconds: float, error: UserError | Busy) -> AsyncIterator[None]:
    """Raise an error where the context takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise error from None


async def receive(request: Request, megabytes: float, seconds: float) -> bytes:
    """Take the body of a request, and drop it where it becomes too large.

    Args:
        request: whose body nobody has read.
        megabytes: most megabytes (10⁶ bytes).
        seconds: longest time that it may take.

    Raises:
        NoJson: by its header, it holds something else.
        TooLarge: it has more bytes.
        Slow: it takes longer.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise NoJson(f"Content-Type: expected 'application/json', found {kind[:60]!r}")
    limit, body, size = int(megabytes * 1_000_000), bytearray(), 0
    async with within(seconds, Slow(f"the body did not arrive within {seconds:g} s")):
        async for chunk in request.stream():
            size += len(chunk)
            if size > _DROPPED * limit:
                break
            # A client that is answered while it still sends sees a broken connection, no answer.
            if size <= limit:
                body += chunk
            else:
                body.clear()
    if size > limit:
        raise TooLarge(
            f"expected a body of at most {megabytes:g} MB, found more; send fewer or smaller images"
        )
    return bytes(body)
