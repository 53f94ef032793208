"""Files that could not be read: listed in the run directory, and too many of them stop the run."""

from collections.abc import Callable, Iterable

from spark_me.errors import UserError


class UnreadableImage(Exception):
    """An image that cannot be used, with the reason."""


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
        self._write("".join(f"{path}\t{reason}\n" for path, reason in sorted(self.reasons.items())))
        if len(self.reasons) > self.most:
            path, reason = next(iter(new.items()))
            raise UserError(
                f"{len(self.reasons)} of {self.files} images are unreadable (see unreadable.txt in run.dir), the last "
                f"is {path} ({reason}): repair or remove them, or raise data.max_unreadable={self.share}"
            )
