"""HTTP connections that end: whatever a server sends, and wherever in its answer, is bounded in time and size.

Python's own time-out is for each wait, so that a byte at a time keeps a connection open for ever; and it reads any
number of provisional answers before the head, and of lines behind the last chunk.
"""

import http.client
import io
import socket
import time
import urllib.request
from typing import Any

SPAN, PACE = 60.0, 1000
"""In every span of so many seconds, so many bytes a second must come."""
HEAD = 1 << 20
"""Bytes that an answer's head may have; Python itself ends one of 6 MB."""


class BoundedResponse(http.client.HTTPResponse):
    """An answer whose head is bounded at once, and the rest by `allow`."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self._paced = _Paced(self.fp.detach())
        self.fp = io.BufferedReader(self._paced)

    def allow(self, most: int) -> None:
        """Let so many more bytes come."""
        self._paced.left = most


class HTTPHandler(urllib.request.HTTPHandler):
    """urllib's, on such connections."""

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class HTTPSHandler(urllib.request.HTTPSHandler):
    """urllib's, on such connections."""

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _Connection(http.client.HTTPConnection):
    response_class = BoundedResponse


class _SecureConnection(http.client.HTTPSConnection):
    response_class = BoundedResponse


class _Paced(io.RawIOBase):
    """What comes from a socket; a TimeoutError if it is too slow, a ValueError if it is too much."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._start, self._count = time.monotonic(), 0
        self.left = HEAD

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self._raw.readinto(buffer)
        if not count:
            return count
        self.left -= count
        if self.left < 0:
            raise ValueError("the answer is too long")
        self._count += count
        seconds = time.monotonic() - self._start
        if seconds > SPAN:
            if self._count < PACE * seconds:
                raise TimeoutError(f"less than {PACE} bytes a second come")
            self._start, self._count = time.monotonic(), 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
