"""Published files from the web, through torch.hub's cache; only whole and untampered files get there."""

import http.client
import os
import re
import tempfile
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch

from spark_me.errors import UserError
from spark_me.files import file_in
from spark_me.weights.files import SUFFIXES, read_state, sha256_of

# As torch.hub: the digits between the last dash and the suffix start the file's SHA-256.
HASH_PREFIX = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z]+$")


def local_file(source: str | os.PathLike[str]) -> Path:
    """A path as it is; a URL as the path of its copy in torch.hub's cache, downloaded once.

    Raises:
        UserError: if the download fails, is cut off, or has another SHA-256 than its name says.
    """
    if not (isinstance(source, str) and is_url(source)):
        return Path(source)
    path = file_in(Path(torch.hub.get_dir()) / "checkpoints", urlparse(source).path, SUFFIXES)
    match = HASH_PREFIX.search(path.name)
    prefix = match[1] if match else None
    if not path.is_file():
        _download(source, path, prefix)
    elif prefix and not sha256_of(path).startswith(prefix):
        raise UserError(f"{path}: its SHA-256 does not start with {prefix}, as its name says: delete it and try again")
    return path


def is_url(source: str) -> bool:
    """Whether a source is to be downloaded."""
    return source.startswith(("http://", "https://"))


def _download(url: str, path: Path, prefix: str | None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            part = Path(folder) / path.name
            torch.hub.download_url_to_file(url, str(part), hash_prefix=prefix, progress=False)
            # Without a hash in its name a cut-off file would pass: read it before it enters the cache.
            read_state(part)
            os.replace(part, path)
    except UserError as error:
        raise UserError(f"{url}: the download was not kept: {str(error).replace(str(part), part.name)}") from error
    except RuntimeError as error:  # torch.hub's word for another hash
        raise UserError(f"{url}: the download is cut off or tampered with ({error}); nothing was kept") from error
    except (URLError, OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: cannot be downloaded ({error}); download it by hand and give its path") from error
