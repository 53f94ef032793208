"""What breaks from outside in the middle of a step, in one line: a data worker that dies, a process that is lost."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError

from spark_me.data.visiting import death_of_worker
from spark_me.errors import UserError


@contextmanager
def named_failures() -> Iterator[None]:
    """Turn torch's errors about other processes into one line that says how to go on.

    Raises:
        UserError: in place of such a RuntimeError; others pass.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        death = death_of_worker(error)
        if death is not None:
            raise UserError(
                f"{death} repeat the command to go on from the last checkpoint, with fewer data.workers if it happens "
                "again; spark-me data check names what a decoder dies of"
            ) from None
        # torch raises some of them with no type of their own.
        if isinstance(error, DistError) or "gloo" in text:
            raise UserError(
                f"another process of this run was lost ({first_line(error)}): what it said last tells why; repeat the "
                "command to go on from the last checkpoint"
            ) from None
        raise


def first_line(error: Exception) -> str:
    """The first line of an error's text, for a message of one line."""
    return str(error).strip().partition("\n")[0].rstrip(" .:")
