"""Published files from the web, through torch.hub's cache; only whole and untampered files get there."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import torch

from spark_me.errors import UserError
from spark_me.files import atomic_write, file_in, sha256_of, writing
from spark_me.weights.fetch import fetch, require_web
from spark_me.weights.files import SUFFIXES, read_state

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
    path = _place(source)
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


def _place(url: str) -> Path:
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
