"""Errors that are for the user: one line that says what, where, and what to do next; and text that is safe to print."""

from collections.abc import Sequence

LONGEST_MESSAGE, LONGEST_NAME = 4000, 80
"""Characters that are shown of an error, and of a name that comes from outside."""


class UserError(Exception):
    """Bad input or a bad environment. The command line prints the message alone and exits with `exit_code`.

    The message is one line without control characters, whatever names of files and tensors or words of other programs
    were put into it: a terminal obeys some of them, and Python prints it, too, where nobody catches it.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        lines = (line.strip() for line in str(message).splitlines())
        super().__init__(shorten(printable(" ".join(line for line in lines if line)), LONGEST_MESSAGE))


class EngineError(UserError):
    """MinkowskiEngine is missing, does not build, or computes wrongly."""

    exit_code = 1


def install_text(group: str) -> str:
    """What to do about a missing package of an optional group of setup.py. spark_me is on no package index."""
    return f'run `pip install -e ".[{group}]"` in the folder of spark_me\'s setup.py'


def first_line(error: BaseException) -> str:
    """What an error of another library says, in a line; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(text: object, longest: int = LONGEST_NAME) -> str:
    """A name from outside, as it may be printed or drawn: what cannot be printed is replaced, its middle is cut."""
    return printable(shorten(str(text), longest))


def printable(text: str) -> str:
    """A text with every character replaced that a terminal may obey, or that is none.

    Names of files, classes and tensors may hold line breaks, escape codes, marks that turn the direction of writing,
    and bytes that are no text.
    """
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def listed(items: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """The first items, and how many more there are."""
    rest = len(items) - most
    return separator.join(items[:most]) + (f" and {rest} more" if rest > 0 else "")


def shorten(text: str, longest: int) -> str:
    """Cut a text in its middle: file names differ at their ends."""
    if len(text) <= longest:
        return text
    kept = longest - 1
    return f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"
