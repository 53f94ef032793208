"""Brace patterns of shard names: how many names one stands for, known before memory is asked for them."""

import re
from dataclasses import dataclass

MOST_NAMES = 1_000_000
"""More shards than any published data set has."""
MOST_NESTED = 20
"""Braces within braces; expanding recurses once for each."""
NUMBERS = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")
ENDLESS = re.compile(r"-?\d+\.\.-?\d+(?:\.\.-?\d+)?")
"""A range whose numbers are too long for `NUMBERS`."""


@dataclass
class _Group:
    """What stands between two braces, as far as it has been read."""

    start: int
    """Where it begins in the pattern."""
    commas: int = 0
    before: int = 0
    """Names that the alternatives before the last comma stand for."""
    names: int = 1
    """Names that the alternative since then stands for."""


def count_names(pattern: str) -> int:
    """How many names a pattern such as `{00..03}-{a,b}.tar` stands for, at most.

    Raises:
        ValueError: in one line, if braces are not balanced, are nested too deeply, or the names are too many.
    """
    groups = [_Group(0)]
    place = 0
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            place += 1
        elif character == "{":
            groups.append(_Group(place + 1))
            if len(groups) > MOST_NESTED:
                raise ValueError(f"braces are nested more than {MOST_NESTED} deep: write a simpler pattern")
        elif character == "," and len(groups) > 1:
            group = groups[-1]
            group.before, group.names, group.commas = group.before + group.names, 1, group.commas + 1
        elif character == "}":
            if len(groups) == 1:
                raise _unbalanced()
            group = groups.pop()
            groups[-1].names *= _names_of(group, pattern[group.start : place])
        if groups[-1].before + groups[-1].names > MOST_NAMES:
            raise ValueError(f"stands for more than {MOST_NAMES:,} shards: correct its ranges")
        place += 1
    if len(groups) > 1:
        raise _unbalanced()
    return groups[0].names


def _names_of(group: _Group, text: str) -> int:
    if group.commas:
        return group.before + group.names
    numbers = NUMBERS.fullmatch(text)
    if numbers:
        first, last, step = numbers.groups()
        return abs(int(last) - int(first)) // (int(step or 1) or 1) + 1
    if ENDLESS.fullmatch(text):
        return MOST_NAMES + 1
    return 52 if LETTERS.fullmatch(text) else group.names


def _unbalanced() -> ValueError:
    return ValueError("its braces are not balanced: close each { by a }, or write \\{ for one that is part of a name")
