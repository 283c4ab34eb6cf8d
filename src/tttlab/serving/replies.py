"""What a server sends back: answers as they are, and every error in one line of JSON."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON_TYPE = b"application/json"
PATIENCE = 5.0  # seconds that the rest of a refused body may take
LINE = 400  # most characters of a message
FAILED = "the server failed; its log says why"
CODES = {
    400: "INVALID_PARAMETER_VALUE",  # as MLflow says it
    404: "ENDPOINT_NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    413: "REQUEST_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    429: "RESOURCE_EXHAUSTED",
    503: "TEMPORARILY_UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class Refused(Exception):
    """A request that gets no answer: an HTTP status and a line.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class Reply:
    """What is sent back: answers as they are, and errors in one line of JSON.

    Args:
        send: of ASGI.
        note: is told the status, the code and the line of an error.
    """

    def __init__(self, send: Send, note: Callable[[int, str, str], None]) -> None:
        self._send, self._note = send, note
        self._status, self._error, self._begun = 200, bytearray(), False

    async def pass_on(self, message: Message) -> None:
        """Send a message of MLflow's application; an error once it is complete."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
        if self._status < 400:
            self._begun = True
            await self._send(message)
        elif message["type"] == "http.response.body":
            self._error += message.get("body", b"")
            if not message.get("more_body", False):
                await self.refuse(self._status, *_shorten(bytes(self._error), self._status))

    async def refuse(
        self, status: int, line: str, unread: Receive | None = None, code: str | None = None
    ) -> None:
        """Send an error; ``unread``: gives the rest of a body that is not wanted.

        A client that is still sending would not see an answer on a connection that is closed. So
        the rest is received and thrown away, for some seconds.
        """
        if self._begun:
            return
        self._begun, code = True, code or CODES.get(status, "INTERNAL_ERROR")
        line = re.sub(r"\s+", " ", line).strip()[:LINE]
        self._note(status, code, line)
        content = json.dumps({"error_code": code, "message": line}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
        ]
        if unread:
            headers.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": content, "more_body": True})
        if unread:
            await _discard(unread)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            while (message := await receive())["type"] == "http.request":
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        pass


def _shorten(content: bytes, status: int) -> tuple[str, None, str | None]:
    """Give the line that matters of an error, and MLflow's code for it.

    MLflow puts the data in front and a stack trace behind.
    """
    try:
        told = json.loads(content)
        line = told.get("message") or told.get("detail") or ""
        code = told.get("error_code")
    except (ValueError, AttributeError):
        line, code = content.decode(errors="replace"), None
    if status == 500:  # of no use to a client
        line = FAILED
    return str(line).rpartition("Error: ")[2], None, code
