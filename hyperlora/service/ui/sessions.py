"""``Sessions``: which visitor signed in with which API key; in memory only."""

import secrets
import time
from collections.abc import Mapping
from typing import Final

COOKIE_NAME: Final = "hyperlora_session"
LIFETIME_S: Final = 12 * 3600
"""Seconds after which a visitor signs in again."""
_MAX_SESSIONS: Final = 10_000


class Sessions:
    """The sessions of signed-in visitors, whose ids are random numbers."""

    def __init__(self) -> None:
        self._sessions: dict[str, tuple[str, float]] = {}  # key and time of the end, oldest first

    def add(self, key: str) -> str:
        """Begin a session; the oldest one ends if there are too many.

        Args:
            key: API key of the visitor.

        Returns:
            The id of the session, for the visitor's cookie.
        """
        session_id = secrets.token_urlsafe(32)
        while len(self._sessions) >= _MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[session_id] = (key, time.monotonic() + LIFETIME_S)
        return session_id

    def find_key(self, cookies: Mapping[str, str]) -> str | None:
        """Find the API key of a visitor.

        Args:
            cookies: Cookies of the request.

        Returns:
            The key; None if there is no session, or it has ended.
        """
        key, end_time = self._sessions.get(cookies.get(COOKIE_NAME, ""), (None, 0.0))
        return key if time.monotonic() < end_time else None
