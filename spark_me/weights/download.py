"""Published files from the web, bounded in size and time; only whole and untampered ones get into torch.hub's cache."""

import hashlib
import http.client
import io
import os
import re
import shutil
import socket
import string
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

import torch

from spark_me.errors import UserError
from spark_me.files import atomic_write, file_in, sha256_of, writing
from spark_me.weights.files import SUFFIXES, read_state

SPAN, PACE = 60.0, 1000
"""In every span of so many seconds, so many bytes a second must come."""
LARGEST_HEAD = 1 << 20
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
        self.left = LARGEST_HEAD

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


TIMEOUT = 30.0
"""Seconds that connecting may take, and every wait for more."""
LARGEST_FILE = 8 * 10**9
"""Bytes of a file whose length the server does not announce."""
SCHEMES = ("https", "http")
BLOCK = 1 << 18
"""Bytes."""
OVERHEAD = 8
"""Bytes that may come for each byte of content: a chunk of one byte has six."""
BY_HAND = "download it by hand and give its path"


def require_web(url: str) -> None:
    """Refuse what is no URL of the web.

    Raises:
        UserError: for another scheme than http and https, no host, or what cannot be taken apart.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{url}: is no URL ({error}): correct it, or give the path of a file") from None
    if parts.scheme not in SCHEMES:
        raise UserError(f"{url}: {parts.scheme}: is not downloaded from, https and http alone: give the path of a file")
    if not host:
        raise UserError(f"{url}: is no URL (it names no host): correct it, or give the path of a file")


def fetch(url: str, file: BinaryIO, name: str) -> None:
    """Write what a URL holds to an open file, with a progress bar on a terminal where tqdm is installed.

    Args:
        url: of the web.
        file: on the disk, empty.
        name: for the bar.

    Raises:
        UserError: if it cannot be had whole, its server stops sending, or it is larger than announced, than the disk
            or, where nothing is announced, than `LARGEST_FILE`.
        OSError: if the file cannot be written.
    """
    require_web(url)
    with _one_line(url):
        # Spaces and letters beyond ASCII, as copied from a browser's address bar.
        request = urllib.request.Request(
            quote(url, safe=string.punctuation), headers={"User-Agent": "spark_me", "Accept-Encoding": "identity"}
        )
        response: BoundedResponse = _opener().open(request, timeout=TIMEOUT)
    with response:
        announced = _announced(response.headers)
        free = shutil.disk_usage(os.path.dirname(file.name)).free
        if announced is not None and announced > free:
            raise UserError(f"{url}: has {announced} bytes, the disk has {free} left: free space, or set TORCH_HOME")
        with _progress(name, announced) as advance:
            for block in _blocks(response, announced, url):
                file.write(block)
                advance(len(block))
        file.flush()


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and from http to http.

    Hubs of models answer with their storage's address, so redirects are needed, to other hosts too. Another scheme
    would read this machine's files, and http after https is open to whoever sits between, against what was asked for.
    """

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        fp.close()  # urllib would read the answer's own content to its end, which may never come
        require_web(newurl)
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise UserError(f"{req.full_url}: leads to {newurl}, which is not encrypted: {BY_HAND}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    # Not urllib's default, which opens files and FTP, too.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        HTTPHandler,
        HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener


def _announced(headers: Message) -> int | None:
    text = str(headers.get("Content-Length", ""))
    return int(text) if text.isdecimal() and len(text) < 19 else None


def _blocks(response: BoundedResponse, announced: int | None, url: str) -> Iterator[bytes]:
    """The content, piece by piece as it comes."""
    most = LARGEST_FILE if announced is None else announced
    response.allow(OVERHEAD * most + LARGEST_HEAD)
    received = 0
    # Whatever follows the announced length is not read; only an answer in chunks can hold more.
    while received != announced or response.chunked:
        with _one_line(url):
            block = response.read1(min(BLOCK, most - received + 1))
        if not block:
            break
        received += len(block)
        if received > most:
            size = f"the {most} bytes that a file of no announced length may have" if announced is None else "announced"
            raise UserError(f"{url}: more is sent than {size}; nothing was kept: {BY_HAND}")
        yield block
    if announced is not None and received < announced:
        raise UserError(
            f"{url}: the download is cut off ({received} of {announced} bytes); nothing was kept: try again"
        )


@contextmanager
def _one_line(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()
            reason = f"HTTP {error.code} {error.reason}"
        else:
            reason = str(error.reason if isinstance(error, URLError) else error) or type(error).__name__
        raise UserError(f"{url}: cannot be downloaded ({reason}); {BY_HAND}") from error


@contextmanager
def _progress(name: str, total: int | None) -> Iterator[Callable[[int], object]]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # loading weights needs torch alone
        yield lambda count: None
        return
    with tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        yield bar.update


# As torch.hub: the digits between the last dash and the suffix start the file's SHA-256.
HASH_PREFIX = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z]+$")
ADDRESS = re.compile(r"(https?|ftps?|file|data):|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def local_file(source: str | os.PathLike[str]) -> Path:
    """A path as it is; a URL as the path of its copy in torch.hub's cache, downloaded once.

    The copy is named after the URL that was given, whatever a server says and wherever it leads.

    Raises:
        UserError: if it is no URL of the web or names no file of weights, or the download fails, is cut off, or has
            another SHA-256 than its name says.
    """
    if not (isinstance(source, str) and is_url(source)):
        return Path(source)
    require_web(source)
    path = _cached_place(source)
    match = HASH_PREFIX.search(path.name)
    prefix = match[1] if match else None
    if not path.is_file():
        try:
            _download(source, path, prefix)
        except BaseException:
            if prefix is None:  # its folder is its own
                with suppress(OSError):  # another process may be fetching it
                    path.parent.rmdir()
            raise
    elif prefix and not sha256_of(path).startswith(prefix):
        raise UserError(f"{path}: its SHA-256 does not start with {prefix}, as its name says: delete it and try again")
    return path


def is_url(source: str) -> bool:
    """Whether a source is an address, not a path; of addresses, those of the web can be downloaded."""
    return ADDRESS.match(source) is not None


def _cached_place(url: str) -> Path:
    """Where the copy of a URL belongs.

    The name of a file whose digest is in it says all, so torch.hub's own copy serves. Any other name may be that of
    several files, so that it lies in a folder of its URL's.

    Raises:
        UserError: if the URL names no file of weights.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = file_in(folder, urlsplit(url).path, SUFFIXES)
    if HASH_PREFIX.search(path.name):
        return path
    return file_in(folder / hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()[:16], path.name, SUFFIXES)


def _download(url: str, path: Path, prefix: str | None) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    # Others may fetch the same at the same time: all are whole.
    with atomic_write(path, alone=False) as file:
        fetch(url, file, path.name)
        part = Path(file.name)
        if prefix and not sha256_of(part).startswith(prefix):
            raise UserError(
                f"{url}: the download is cut off or tampered with (its SHA-256 does not start with {prefix}, as its "
                "name says); nothing was kept"
            )
        # Without a hash in its name a cut-off file would pass: read it before it enters the cache.
        try:
            read_state(part)
        except UserError as error:
            reason = str(error).replace(str(part), path.name)
            raise UserError(f"{url}: the download was not kept: {reason}") from error
