"""Every change that spark_me makes to MinkowskiEngine's source, and why.

The upstream archive is from 2021. Each edit says what it replaces, how often that must occur, and which targets need
it. An edit that does not apply exactly as declared stops the build: a half-edited engine might compile and be wrong.
`setup.py` is not edited but replaced, by `resources/setup.py`.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spark_me.engine.target import Target
from spark_me.errors import EngineError


def always(target: Target) -> bool:
    """For edits that every target needs."""
    return True


@dataclass(frozen=True)
class Edit:
    """One textual replacement.

    Attributes:
        name: how messages call it.
        files: glob of the files to search, relative to the source tree.
        find: literal text, or a compiled pattern.
        replace: what takes its place; for a pattern it may hold group references.
        count: how many occurrences there are in all the files together.
        reason: why the engine needs it.
        applies: which targets need it.
    """

    name: str
    files: str
    find: str | re.Pattern[str]
    replace: str
    count: int
    reason: str
    applies: Callable[[Target], bool] = always


def apply_edits(tree: Path, edits: Sequence[Edit]) -> None:
    """Apply the edits in order to an unpacked source tree.

    Raises:
        EngineError: if one does not occur exactly as often as it declares; that one's files are left as they were.
    """
    for edit in edits:
        _apply(tree, edit)


def digest(edits: Sequence[Edit], extra: bytes) -> str:
    """Fingerprint of the edits and of `extra`: changes whenever a build from the same archive would change."""
    state = hashlib.sha256(extra)
    for edit in edits:
        pattern = edit.find if isinstance(edit.find, str) else f"{edit.find.pattern}\0{edit.find.flags}"
        state.update("\0".join((edit.files, pattern, edit.replace, "")).encode())
    return state.hexdigest()


def _apply(tree: Path, edit: Edit) -> None:
    changed: dict[Path, str] = {}
    found = 0
    for path in sorted(tree.glob(edit.files)):
        text = path.read_text(encoding="utf-8")
        new, count = _substitute(edit, text)
        if count:
            changed[path] = new
            found += count
    if found != edit.count:
        raise EngineError(
            f"edit {edit.name!r} of MinkowskiEngine's {edit.files} expects {edit.count} occurrence(s) and finds "
            f"{found}: the source is not the one it was written for; see spark_me/engine/edits"
        )
    for path, new in changed.items():
        path.write_text(new, encoding="utf-8")


def _substitute(edit: Edit, text: str) -> tuple[str, int]:
    if isinstance(edit.find, str):
        return text.replace(edit.find, edit.replace), text.count(edit.find)
    return edit.find.subn(edit.replace, text)
