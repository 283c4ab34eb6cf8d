"""What a replica of Ray Serve takes of a request over HTTP, and how it refuses one."""

from fastapi import Request

from tttlab.errors import UserError
from tttlab.serving.service import Busy, Late

_DROPPED = 8  # so many times the size that is allowed is still received, and not kept


class TooLarge(UserError):
    """A request has more bytes than is allowed."""


class NoJson(UserError):
    """A request says that it holds something else."""


# The first one that fits counts.
_STATUSES = {
    TooLarge: (413, "INVALID_PARAMETER_VALUE"),
    NoJson: (415, "INVALID_PARAMETER_VALUE"),
    UserError: (400, "INVALID_PARAMETER_VALUE"),
    Late: (504, "DEADLINE_EXCEEDED"),
    Busy: (429, "RESOURCE_EXHAUSTED"),
}


def refusal(error: UserError | Busy) -> tuple[int, dict[str, str]]:
    """Give the status and the body, as MLflow writes it, that tell an error."""
    status, code = next(told for kind, told in _STATUSES.items() if isinstance(error, kind))
    return status, {"error_code": code, "message": " ".join(str(error).split())}


async def receive(request: Request, megabytes: float) -> bytes:
    """Take the body of a request, and drop it where it becomes too large.

    Args:
        request: whose body nobody has read.
        megabytes: most megabytes (10⁶ bytes).

    Raises:
        NoJson: by its header, it holds something else.
        TooLarge: it has more bytes.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise NoJson(f"Content-Type: expected 'application/json', found {kind[:60]!r}")
    limit, body, size = int(megabytes * 1_000_000), bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > _DROPPED * limit:
            break
        # A client that is answered while it still sends sees a broken connection and no answer.
        if size <= limit:
            body += chunk
        else:
            body.clear()
    if size > limit:
        raise TooLarge(
            f"expected a body of at most {megabytes:g} MB, found more; send fewer or smaller images"
        )
    return bytes(body)
