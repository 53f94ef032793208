"""Our changes to MinkowskiEngine's source: read from resources/edits.patch, and applied exactly as declared there."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spark_me.errors import EngineError

EDITS_FILE = Path(__file__).parent / "resources" / "edits.patch"


@dataclass(frozen=True)
class Edit:
    """One replacement in the `files` of a glob, of literal text or of a pattern, as often as `count` says.

    `device` is "cpu" or "cuda" where only such builds need it, else "".
    """

    name: str
    device: str
    reason: str
    files: str
    find: str | re.Pattern[str]
    replace: str
    count: int


def read_edits(text: str) -> Iterator[Edit]:
    """The edits that a text in the form of resources/edits.patch declares, in order."""
    for block in re.split(r"^=== ", text, flags=re.MULTILINE)[1:]:
        head, *changes = re.split(r"^--- ", block, flags=re.MULTILINE)
        title, _, reason = head.strip().partition("\n")
        name, _, device = title.partition(" for ")
        for change in changes:
            where, *lines = change.rstrip("\n").split("\n")
            files, _, options = where.partition(" ")
            sides = {"-": "", "+": ""}
            for line in lines:
                for side in {"": "-+", " ": "-+", "-": "-", "+": "+"}[line[:1]]:
                    sides[side] += line[1:] + "\n"
            find, replace = sides.values()
            if "inline" in options or "regex" in options:
                find, replace = find.removesuffix("\n"), replace.removesuffix("\n")
            flags = sum(getattr(re, flag) for flag in ("MULTILINE", "DOTALL") if flag in options)
            times = re.search(r"(\d+) times", options)
            pattern = re.compile(find, flags) if "regex" in options else find
            yield Edit(name, device, reason, files, pattern, replace, int(times[1]) if times else 1)


EDITS = tuple(read_edits(EDITS_FILE.read_text(encoding="utf-8")))


def edits_for(device: str, edits: Sequence[Edit] = EDITS) -> list[Edit]:
    """Those that a build for "cpu" or "cuda" needs, in order."""
    return [edit for edit in edits if edit.device in ("", device)]


def digest(edits: Sequence[Edit], extra: bytes) -> str:
    """Fingerprint of the edits and of `extra`: changes whenever a build from the same archive would change."""
    state = hashlib.sha256(extra)
    for edit in edits:
        pattern = edit.find if isinstance(edit.find, str) else f"{edit.find.pattern}\0{edit.find.flags}"
        state.update("\0".join((edit.files, pattern, edit.replace, "")).encode())
    return state.hexdigest()


def apply_edits(tree: Path, edits: Sequence[Edit]) -> None:
    """Apply the edits in order to an unpacked source tree.

    Raises:
        EngineError: if one does not occur exactly as often as it declares; that one's files are left as they were.
    """
    for edit in edits:
        edited = {path: _substitute(edit, path.read_text(encoding="utf-8")) for path in sorted(tree.glob(edit.files))}
        if (found := sum(count for _, count in edited.values())) != edit.count:
            raise EngineError(
                f"edit {edit.name!r} of MinkowskiEngine's {edit.files} expects {edit.count} occurrence(s) and finds "
                f"{found}: the source is not the one it was written for; see {EDITS_FILE}"
            )
        for path, (text, count) in edited.items():
            if count:
                path.write_text(text, encoding="utf-8")


def _substitute(edit: Edit, text: str) -> tuple[str, int]:
    if isinstance(edit.find, str):
        return text.replace(edit.find, edit.replace), text.count(edit.find)
    return edit.find.subn(edit.replace, text)
