"""Files that could not be read: listed in the run directory, and too many of them stop the run."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from PIL import Image

from spark_me.errors import UserError

LONGEST_REASON = 200
"""Characters: some decoders quote what they could not read."""


class UnreadableImage(Exception):
    """An image that cannot be used, with the reason."""


@contextmanager
def unreadable_if_it_fails() -> Iterator[None]:
    """Turn whatever goes wrong with one image into the reason why it cannot be used.

    Decoders are handed bytes that nobody here wrote. Those of Pillow, tifffile, imagecodecs and numpy raise anything on
    damaged ones, AssertionError, KeyError, RecursionError and MemoryError among them: here, and nowhere else, every
    exception counts. Ctrl-C and the end of the process are none.

    Raises:
        UnreadableImage: with a reason of one line.
    """
    try:
        with warnings.catch_warnings():
            # What else decoders warn of, such as damaged EXIF data, names no file.
            warnings.simplefilter("ignore")
            # Between one and two times its limit of pixels, Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(reason_of(error)) from None


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    # The file's name stands beside the reason.
    text = str(getattr(error, "strerror", None) or error)
    line = " ".join(text.split())
    name = type(error).__name__
    return f"{name}: {line[:LONGEST_REASON]}" if line else name


def as_lines(records: Iterable[tuple[str, str]]) -> str:
    """(name, reason) as sorted lines `name<TAB>reason`; a line break or tab within is written as \\n, \\r or \\t."""
    escaped = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})
    return "".join("\t".join(text.translate(escaped) for text in record) + "\n" for record in sorted(records))


class UnreadableFiles:
    """Reasons by path, with a limit."""

    def __init__(self, reasons: dict[str, str], files: int, share: float, write: Callable[[str], None]) -> None:
        """
        Args:
            reasons: by path; extended in place.
            files: number of files in the data set.
            share: of them that may be unreadable.
            write: replaces the list on the disk by a text.
        """
        self.reasons = reasons
        self.files = files
        self.share = share
        self.most = int(share * files)
        self._write = write

    def add(self, records: Iterable[tuple[str, str]]) -> None:
        """Note files that were skipped.

        Raises:
            UserError: if there are more than accepted.
        """
        new = {path: reason for path, reason in records if path not in self.reasons}
        if not new:
            return
        self.reasons.update(new)
        self._write(as_lines(self.reasons.items()))
        if len(self.reasons) > self.most:
            path, reason = next(iter(new.items()))
            raise UserError(
                f"{len(self.reasons)} of {self.files} images are unreadable (see unreadable.txt in run.dir), the last "
                f"is {path} ({reason}): repair or remove them, or raise data.max_unreadable={self.share}"
            )
