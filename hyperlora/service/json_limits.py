"""JSON bodies of strangers: counted before they are parsed.

Parsers build every value, and pydantic an error for each unknown key, before a route sees one.
"""

import json
import re
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

MAX_TOKENS: Final = 10_000
"""Strings, brackets, commas and colons of a body; the largest request has some hundred."""
MAX_DEPTH: Final = 32
MAX_BYTES_BETWEEN_TOKENS: Final = 256 << 10
"""Numbers and spaces of a body."""
_TOKEN_PATTERN: Final = re.compile(
    rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}:,]|[^"\[\]{}:,]++', re.DOTALL
)
"""A string, a sign, or what is between them; possessive, so that it takes linear time."""


class JsonBody:
    """The body of one request, read as a whole and checked before it is passed on.

    Args:
        receive: Receives the messages of the request.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive, self._is_complete = receive, False

    async def receive(self) -> Message:
        """Receive the whole body as one message, then what follows it; see ``check_json``."""
        if self._is_complete:
            return await self._receive()
        body = bytearray()
        more_body = True
        while more_body:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            more_body = message.get("more_body", False)
        self._is_complete = True
        data = bytes(body)
        check_json(data)
        return {"type": "http.request", "body": data, "more_body": False}


def check_json(body: bytes) -> None:
    """Check that a body is small as JSON, without parsing it; it need not be JSON.

    Args:
        body: The whole body.

    Raises:
        HTTPException: 413 for too many or too deep values, 415 for another encoding than UTF-8.
    """
    if not json.detect_encoding(body).startswith("utf-8"):
        raise HTTPException(415, "the body is not UTF-8, JSON in UTF-8 expected: encode it so")
    num_tokens = depth = num_bytes_between = 0
    for match in _TOKEN_PATTERN.finditer(body):
        first = body[match.start()]
        if first not in b'"[]{}:,':
            num_bytes_between += match.end() - match.start()
            if num_bytes_between > MAX_BYTES_BETWEEN_TOKENS:
                raise HTTPException(
                    413,
                    f"the JSON has more than {MAX_BYTES_BETWEEN_TOKENS >> 10} KiB of numbers and "
                    "spaces: leave them out",
                )
            continue
        num_tokens += 1
        depth += (first in b"[{") - (first in b"]}")
        if num_tokens > MAX_TOKENS:
            raise HTTPException(
                413,
                f"the JSON has more than {MAX_TOKENS} strings and signs: "
                "send the fields that /docs names",
            )
        if depth > MAX_DEPTH:
            raise HTTPException(
                413,
                f"the JSON is more than {MAX_DEPTH} levels deep: send the fields that /docs names",
            )
