"""Fetching a file from the web: over http and https alone, bounded in size and in time."""

import http.client
import os
import shutil
import string
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from typing import IO, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

from spark_me.errors import UserError
from spark_me.weights.connections import HEAD, BoundedResponse, HTTPHandler, HTTPSHandler

TIMEOUT = 30.0
"""Seconds that connecting may take, and every wait for more."""
LARGEST = 8 * 10**9
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
            or, where nothing is announced, than `LARGEST`.
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
    most = LARGEST if announced is None else announced
    response.allow(OVERHEAD * most + HEAD)
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
