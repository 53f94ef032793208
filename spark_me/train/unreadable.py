"""Files that could not be read, on whichever process."""

from spark_me.data.unreadable import UnreadableFiles
from spark_me.train import distributed


def note_unreadable(unreadable: UnreadableFiles, records: list[tuple[str, str]]) -> None:
    """Note every process's (path, reason), so that all come to the same list.

    Raises:
        UserError: if there are more than accepted.
    """
    if distributed.total(len(records))[0]:
        everyones = distributed.everyones(records)
        with distributed.agreed():
            unreadable.add(everyones)
