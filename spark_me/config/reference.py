"""The reference of the configuration's keys: what `spark-me config` and docs/configuration.md say.

All of it is read off the schemas. A key's meaning is the docstring below its field; it may end with `Example: VALUE.`,
which is shown as `key=VALUE`.
"""

import ast
import functools
import inspect
import json
import re
import shlex
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from typing import Any

from spark_me.config.tasks import FinetuneConfig, PretrainConfig
from spark_me.errors import UserError

TASKS: dict[str, type] = {"pretraining": PretrainConfig, "fine-tuning": FinetuneConfig}
"""What a configuration is for, and its schema."""
WIDTH = 119
"""Columns of the Markdown page; a backslash may follow."""
NO_BREAK = "\N{NO-BREAK SPACE}"
INTRODUCTION = (
    "The keys of a configuration: set them in the YAML file, or as key=value on the command line, which wins. "
    "`spark-me pretrain` takes those of pretraining; `finetune`, `evaluate` and `compare` take those of fine-tuning."
)
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}
PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


@dataclass(frozen=True)
class Entry:
    """A key as one task has it."""

    type: str
    """In words."""
    default: str
    """As YAML."""
    meaning: str
    example: str
    """A value, as YAML; empty where the docstring gives none."""


@dataclass(frozen=True)
class Key:
    """A key of one or more tasks."""

    name: str
    """With its section: train.epochs."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """By task."""

    @property
    def example(self) -> str:
        """An argument for the command line, quoted where a shell needs it."""
        given = [entry.example for entry in self.entries.values() if entry.example]
        default = next(iter(self.entries.values())).default
        # A switch has one other value. Any other default shows at least how a value is written.
        value = given[0] if given else {"true": "false", "false": "true"}.get(default, default)
        return shlex.quote(f"{self.name}={value}")

    @property
    def section(self) -> str:
        """Empty for a key outside the sections."""
        return self.name.rpartition(".")[0]

    @property
    def tasks(self) -> str:
        """Those that have it, in words."""
        return " and ".join(self.entries)

    def stated(self, attribute: Callable[[Entry], str]) -> str:
        """An attribute, with the tasks where they differ in it: `1600 in pretraining, 300 in fine-tuning`."""
        values = _where_they_differ({task: attribute(entry) for task, entry in self.entries.items()})
        return ", ".join(f"{value} in {task}" if task else value for task, value in values)

    def meanings(self, shorten: Callable[[str], str] = str) -> list[str]:
        """The meaning, in a paragraph for each task where they differ in it."""
        return _paragraphs({task: shorten(entry.meaning) for task, entry in self.entries.items()})


@dataclass(frozen=True)
class Section:
    """A section of one or more tasks; that without a name holds the keys outside the sections."""

    name: str
    about: dict[str, str] = field(default_factory=dict)
    """What it is about, by task."""
    keys: dict[str, Key] = field(default_factory=dict)
    """By name."""


def text_reference(names: Sequence[str], width: int) -> str:
    """What `spark-me config` prints.

    Args:
        names: keys, sections, or keys without their section, to be explained in full; none: a list of all.
        width: columns of the terminal.

    Raises:
        UserError: for a name that there is not.
    """
    sections = _sections()
    if not names:
        return "\n".join(_list(sections, width))
    # By name, as several arguments may mean the same key.
    chosen = {key.name: key for name in names for key in _find(name, sections)}
    return "\n\n".join(_explanation(key, width) for key in chosen.values())


def markdown_reference() -> str:
    """The page docs/configuration.md."""
    lines = ["# Configuration", "", "<!-- Written by `spark-me config --markdown`; edit the docstrings. -->", ""]
    lines.append(_wrap(f"{INTRODUCTION} In a terminal, `spark-me config KEY` explains a key or a section.", WIDTH))
    for section in _sections():
        lines += ["", f"## {section.name or 'Outside the sections'}", ""]
        if section.name:
            lines += [_broken(_wrap(text, WIDTH) for text in _paragraphs(section.about)), ""]
        lines += [_item(key) for key in section.keys.values()]
    return "\n".join(lines)


def docstrings(schema: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, by field; its parents' where it has none itself."""
    found: dict[str, str] = {}
    for ancestor in reversed(schema.__mro__):
        if not is_dataclass(ancestor):
            continue
        for statement, below in pairwise(_definition(ancestor).body):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = _one_line(text)
    return found


def in_words(hint: Any) -> str:
    """The type of a field in words, for example `list of numbers or null`.

    Raises:
        TypeError: for one that there are no words for.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(in_words(argument) for argument in arguments)
    if origin is list and arguments[0] in PLURALS:
        return f"list of {PLURALS[arguments[0]]}"
    if hint not in WORDS:
        raise TypeError(f"{hint}: a type of a key that config/reference.py has no words for")
    return WORDS[hint]


def _sections() -> list[Section]:
    """The keys of all tasks, in the order of the schemas; keys outside the sections come first."""
    found = {"": Section("")}
    for task, schema in TASKS.items():
        for name, part in _parts(schema()):
            section = found.setdefault(name, Section(name))
            section.about[task] = _one_line(ast.get_docstring(_definition(type(part))) or "")
            for key, entry in _entries(part):
                full = f"{name}.{key}".removeprefix(".")
                section.keys.setdefault(full, Key(full)).entries[task] = entry
    return [section for section in found.values() if section.keys]


def _parts(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration and its sections, by name."""
    yield name, config
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from _parts(value, f"{name}.{each.name}".removeprefix("."))


def _entries(part: Any) -> Iterator[tuple[str, Entry]]:
    """The keys that a part of a configuration holds itself; its values are the defaults."""
    hints, texts = typing.get_type_hints(type(part)), docstrings(type(part))
    own_first = {name: None for ancestor in type(part).__mro__ for name in getattr(ancestor, "__annotations__", ())}
    for name in own_first:
        value = getattr(part, name)
        if is_dataclass(value):
            continue
        meaning, _, example = texts.get(name, "").partition("Example: ")
        yield name, Entry(in_words(hints[name]), _yaml(value), meaning.strip(), example.removesuffix("."))


def _definition(schema: type) -> ast.ClassDef:
    return _classes(schema.__module__)[schema.__name__]


@functools.cache  # a module holds several schemas, and reading it is most of the time that an answer takes
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {statement.name: statement for statement in tree.body if isinstance(statement, ast.ClassDef)}


def _find(name: str, sections: Sequence[Section]) -> list[Key]:
    """The keys that a user means by a key, a section, or a key without its section."""
    keys = [key for section in sections for key in section.keys.values()]
    names = [key.name for key in keys] + [section.name for section in sections if section.name]
    found = [key for key in keys if f"{key.name}.".startswith(f"{name}.") and name in names]
    found = found or [key for key in keys if key.name.rpartition(".")[2] == name]
    if not found:
        from spark_me.config.loading import (
            nearest_key,  # which reads YAML: importing that takes longer than all else here
        )

        raise UserError(f"unknown key {name}: did you mean {nearest_key(name, names)}? `spark-me config` lists all")
    return found


def _list(sections: Sequence[Section], width: int) -> Iterator[str]:
    yield _wrap(f"{INTRODUCTION} `spark-me config KEY` explains a key or a section.", width)
    for section in sections:
        yield ""
        if section.name:
            first, *others = _paragraphs(section.about)
            yield _wrap(f"{section.name}: {first}", width)
            yield from (_wrap(text, width, indent=len(section.name) + 2) for text in others)
        else:
            yield "Outside the sections"
        for key in section.keys.values():
            only = f"; {key.tasks} only" if len(key.entries) < len(TASKS) else ""
            yield ""
            yield _wrap(f"{key.name}  {_type_and_default(key)}{only}", width, indent=2, hanging=6)
            yield from (_wrap(text, width, indent=6) for text in key.meanings(_first_sentence))


def _explanation(key: Key, width: int) -> str:
    rows = {
        "type": key.stated(lambda entry: entry.type),
        "default": key.stated(lambda entry: entry.default),
        "task": key.tasks,
        "section": key.section or "none: it stands at the top of the file",
        "example": key.example,
    }
    lines = [key.name, *(_wrap(text, width, indent=2) for text in key.meanings()), ""]
    lines += [_wrap(f"{name:<9}{text}", width, indent=2, hanging=11) for name, text in rows.items()]
    return "\n".join(lines)


def _item(key: Key) -> str:
    """A key as an item of a Markdown list."""
    default = key.stated(lambda entry: f"`{entry.default}`")
    only = f"{key.tasks} only; " if len(key.entries) < len(TASKS) else ""
    facts = f"{key.stated(lambda entry: entry.type)}; default {default}; {only}for example `{key.example}`"
    paragraphs = (_wrap(text, WIDTH, indent=2) for text in key.meanings())
    return _broken([_wrap(f"- **`{key.name}`**: {facts}", WIDTH, hanging=2), *paragraphs])


def _broken(paragraphs: Iterable[str]) -> str:
    """Markdown in which each paragraph begins a line, by a backslash at the end of the one before."""
    return "\\\n".join(paragraphs)


def _type_and_default(key: Key) -> str:
    return f"{key.stated(lambda entry: entry.type)}; default {key.stated(lambda entry: entry.default)}"


def _where_they_differ(by_task: Mapping[str, str]) -> list[tuple[str, str]]:
    """Tasks and what holds for them; once, without a task, where it is the same for all."""
    first, *others = by_task.values()
    return list(by_task.items()) if any(other != first for other in others) else [("", first)]


def _paragraphs(by_task: Mapping[str, str]) -> list[str]:
    return [f"{task.capitalize()}: {text}" if task else text for task, text in _where_they_differ(by_task)]


def _first_sentence(text: str) -> str:
    first, end, _ = text.partition(". ")
    return first + end.rstrip()


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _wrap(text: str, width: int, *, indent: int = 0, hanging: int | None = None) -> str:
    """A paragraph; `hanging` indents what follows its first line."""
    following = " " * (indent if hanging is None else hanging)
    # What stands between backticks is to be copied: it stays on one line.
    joined = re.sub("`[^`]*`", lambda code: code[0].replace(" ", NO_BREAK), text)
    lines = textwrap.fill(
        joined,
        width,
        initial_indent=" " * indent,
        subsequent_indent=following,
        break_long_words=False,  # nor keys: someone may search for them
        break_on_hyphens=False,
    )
    return lines.replace(NO_BREAK, " ")
