"""The grammar of all commands: options in full, a configuration's file and `key=value` in any order on the line."""

import argparse
import difflib
import os
import pkgutil
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import spark_me
from spark_me.errors import UserError

if TYPE_CHECKING:
    from spark_me.config.tasks import FinetuneConfig, PretrainConfig

    C = TypeVar("C", PretrainConfig, FinetuneConfig)

OVERRIDE = re.compile(r"(weights|(model|data|optim|train|run)\.\w+)=")
"""How a key of a configuration with its value begins."""
MISTYPED = re.compile(r"[A-Za-z_][\w.]*=")
"""How one begins whose key is wrong; a path with an equals sign in it has a folder before that."""


class Parser(argparse.ArgumentParser):
    """Options are not abbreviated: `--seed` would be taken for `--seeds`, which means something else."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})


class PrintVersions(argparse.Action):
    """An option that prints the versions that decide what is computed, and exits with 0."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *values: Any) -> None:
        """Print them; the packages are not imported for it."""
        from spark_me.engine import installed_version

        others = [f"{name} {installed_version(name) or 'not installed'}" for name in ("torch", "MinkowskiEngine")]
        print(f"{parser.prog} {spark_me.__version__} ({', '.join(others)}, Python {platform.python_version()})")
        parser.exit()


def add_configuration(parser: argparse.ArgumentParser, task: str, example: str, *, several: bool = False) -> None:
    """Let a command take a configuration: `args.config` (`args.configs` with several) and `args.overrides`.

    Args:
        parser: the command's.
        task: whose keys it has: pretrain or finetune.
        example: a `key=value`, and what it is for.
        several: take more than one configuration.
    """
    parser.usage = f"{parser.prog} CONFIG.yaml{'…' if several else ''} [key=value …] [options]"
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml key=value", help=f"in any order; {example}")
    parser.set_defaults(configured=parser, task=task, several=several)


def called(function: str) -> Callable[[argparse.Namespace], int | None]:
    """What runs a command that is one function, MODULE:NAME: the command's options are its parameters, by name."""
    return partial(_call, function)


def _call(function: str, args: argparse.Namespace) -> int | None:
    options = {name: value for name, value in vars(args).items() if name not in ("command", "action", "run", "group")}
    code: int | None = pkgutil.resolve_name(function)(**options)
    return code


def image_size(sides: Sequence[int], option: str = "--image-size") -> tuple[int, int]:
    """(H, W) of what an option was given.

    Raises:
        UserError: for more than two numbers.
    """
    if len(sides) > 2:
        raise UserError(f"{option} {' '.join(map(str, sides))}: give the side of a square, or H and W")
    return sides[0], sides[-1]


def parse(parser: argparse.ArgumentParser, line: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; argparse itself exits with 2 where it cannot.

    Raises:
        UserError: for an option that is none, a configuration that is missing or one too many.
    """
    # Taken out first: argparse would give them to an option that takes several values, or stop at them.
    overrides = [word for word in line if OVERRIDE.match(word)]
    args, rest = parser.parse_known_args([word for word in line if not OVERRIDE.match(word)])
    if not hasattr(args, "configured"):
        return parser.parse_args(line)  # a command without a configuration
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        raise UserError(_answer_to(unknown[0], line, args))
    # argparse takes the words up to the first option, and leaves those behind it over.
    words = [*args.words, *rest]
    args.overrides = [*overrides, *(word for word in words if MISTYPED.match(word))]
    args.configs = [Path(word) for word in words if not MISTYPED.match(word)]
    if not args.configs:
        command = args.configured.prog
        raise UserError(f"no configuration: name one, for example {command} configs/{args.task}/small.yaml")
    if len(args.configs) > 1 and not args.several:
        names = ", ".join(map(str, args.configs))
        raise UserError(f"more than one configuration ({names}): name one; what is to differ from it is key=value")
    args.config = args.configs[0]
    return args


@contextmanager
def configuration(args: argparse.Namespace, schema: type["C"]) -> Iterator["C"]:
    """The checked configuration of a command that trains, within the group of the processes that train together.

    Alone it is checked before torch is imported, which takes seconds. Of several processes one says what is wrong.

    Raises:
        UserError: as `load_config`.
    """
    from spark_me.config.loading import load_config

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield load_config(args.config, args.overrides, schema=schema)
        return
    from spark_me.train import distributed

    with distributed.process_group():
        with distributed.raise_together():
            config = load_config(args.config, args.overrides, schema=schema)
        yield config


def _answer_to(option: str, line: Sequence[str], args: argparse.Namespace) -> str:
    """What to type in place of an option that does not exist: another option, or `key=value`."""
    from spark_me.config.loading import SCHEMAS, keys_of, nearest_key

    name, equals, value = option.partition("=")
    wanted = name.lstrip("-").replace("-", "_")
    key = nearest_key(wanted, keys_of(SCHEMAS[args.task]))
    options = re.findall(r"--[a-z][a-z-]*", args.configured.format_help())
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.8)
    if near and key.rpartition(".")[2] != wanted.rpartition(".")[2]:
        return f"{name}: no such option: did you mean {near[0]}?"
    if not equals:
        after = [*line[line.index(option) + 1 :], ""][0]
        value = after if after and not after.startswith("-") and Path(after).suffix != ".yaml" else "VALUE"
    return f"{name}: no such option: did you mean {key}={value}? Keys of the configuration are given without dashes"
