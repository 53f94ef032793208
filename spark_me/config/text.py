"""What people write, as plain values: YAML without its surprises, and the values of `key=value`.

Of YAML, configurations need mappings, lists and scalars. An unquoted scalar keeps its text beside its value, so that
the key decides: `run.dir: 2024_01` is a folder of that name, though it would be a number for `train.steps`. There are
no tags, anchors, merged keys or interpolations: a file from someone else says what it says.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spark_me.errors import UserError

LONGEST = 100_000
"""Characters of a configuration; one with every key has 4,000."""


class Plain(NamedTuple):
    """An unquoted scalar."""

    text: str
    value: None | bool | int | float | str


class _Loader(yaml.SafeLoader):
    """Composes nodes and constructs nothing. Numbers are those of YAML 1.2: 1e-3 is one, 1:30 and 0x1F are not."""

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            kind = "anchors (&, *) are" if getattr(event, "anchor", None) else "tags (!) are"
            raise yaml.MarkedYAMLError(problem=f"{kind} not known here", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_VALUES: dict[str, tuple[str, Callable[[str], None | bool | int | float]]] = {
    "null": (r"null|Null|NULL|~|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[a-zA-Z])", "", text)),
    ),
}
"""Of unquoted scalars by kind: what they look like, and their values; all others are text."""
for _kind, (_pattern, _) in _VALUES.items():
    _Loader.add_implicit_resolver(f"!{_kind}", re.compile(rf"^(?:{_pattern})$"), None)


def read_yaml(path: Path, *, quoting: bool = True) -> dict[str, Any]:
    """The content of a configuration file; `quoting` as for `parse_yaml`.

    Raises:
        UserError: if it cannot be read, or is no YAML mapping.
    """
    try:
        if not quoting and path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file: correct the `base` that leads to it")
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)  # a device never ends
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file: check the path, or the `base` that leads to it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot be read: it is no UTF-8 text, as configurations are") from None
    except (OSError, ValueError) as error:  # the latter for what is no path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}: check the path and its mode") from None
    return parse_yaml(text, str(path), quoting=quoting)


def parse_yaml(text: str, source: str, *, quoting: bool = True) -> dict[str, Any]:
    """Nested dictionaries and lists whose leaves are `Plain` or, where quoted, text.

    Args:
        text: a YAML document.
        source: where it is from, for messages.
        quoting: whether messages may hold parts of the text.

    Raises:
        UserError: if it is no YAML, or no mapping.
    """
    content = _parse(text, source, quoting=quoting)
    if content is None or content == Plain("", None):
        return {}
    if not isinstance(content, dict):
        kind = "list" if isinstance(content, list) else "single value"
        raise UserError(f"{source}: must hold sections (model, data, optim, train, run), not a {kind}")
    return content


def parse_value(text: str, source: str) -> Any:
    """The value of `key=value`, like those of `parse_yaml`.

    Raises:
        UserError: if it is no YAML.
    """
    content = _parse(text, source)
    return Plain("", None) if content is None else content


def _parse(text: str, source: str, *, quoting: bool = True) -> Any:
    if len(text) > LONGEST:
        raise UserError(f"{source}: is longer than any configuration ({LONGEST} characters): check what it is")
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _plain(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).partition("\n")[0]
        said = f": {problem}" if quoting else ""
        raise UserError(f"{place}: no valid YAML{said}: correct that line") from None
    except RecursionError:
        raise UserError(f"{source}: no valid YAML: nested too deeply: a configuration has two levels") from None


def _plain(node: Any) -> Any:
    if isinstance(node, yaml.MappingNode):
        return dict(_items(node))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if node.style is not None:  # quoted, or a block of text
        return node.value
    kind = node.tag.removeprefix("!")
    if kind not in _VALUES:
        return Plain(node.value, node.value)
    try:
        return Plain(node.value, _VALUES[kind][1](node.value))
    except ValueError as error:  # integers of thousands of digits
        raise yaml.MarkedYAMLError(problem=str(error).partition(";")[0], problem_mark=node.start_mark) from None


def _items(node: yaml.MappingNode) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or not key.value:
            raise yaml.MarkedYAMLError(problem="a key has to be a name", problem_mark=key.start_mark)
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"found duplicate key {key.value}", problem_mark=key.start_mark)
        seen.add(key.value)
        yield key.value, _plain(value)
