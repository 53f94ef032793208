"""Configurations: a YAML file, the files it inherits from, and overrides from the command line, checked."""

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spark_me.config.data import statistics_of
from spark_me.config.tasks import FREE_KEYS, AnyConfig, FinetuneConfig, PretrainConfig
from spark_me.config.text import Plain, parse_value, parse_yaml, read_yaml
from spark_me.errors import UserError, first_line, shown
from spark_me.initial_weights import INITIAL_WEIGHTS

COMMAND_LINE = "on the command line"
SCHEMAS: Mapping[str, type[AnyConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
"""By task, which is also the command and the folder of its files in configs/."""
SECTIONS = {"base", "weights", "model", "data", "optim", "train", "run"}
"""What may stand at the top of a file of any task."""
ALTERNATIVES = (
    ("train.epochs", "train.steps"),
    ("optim.base_lr", "optim.lr"),
    ("optim.warmup_epochs", "optim.warmup_share"),
    ("data.held_out", "data.val_root", "data.val_split"),
)
"""Several ways to say one thing: a layer that uses one takes the others away from the layers below."""
PATHS = ("weights", "model.init_from", "data.root", "data.val_root", "run.dir", "run.resume")
"""Keys in whose values `~` is the home directory."""
UNUSED = {"data.held_out": 0}
"""What says that one of them is not used, where that is not null."""
ON_THE_LINE = ("data.allow_pipe",)
"""Keys that only whoever types the command may set: they let a configuration do what a stranger's must not."""
SIZES = ("model.image_size",)
"""Keys of [height, width], where a number is the side of a square."""

SUFFIXES = (".yaml", ".yml")
"""What the name of a file ends in that another one inherits from."""

Layer: TypeAlias = dict[str, Any]
"""What one file or the command line says, of `spark_me.config.text`'s values."""
C = TypeVar("C", PretrainConfig, FinetuneConfig)


@overload
def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, unchecked: Collection[str] = ()
) -> PretrainConfig: ...


@overload
def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, unchecked: Collection[str] = (), schema: type[C]
) -> C: ...


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, unchecked: Collection[str] = (), schema: Any = PretrainConfig
) -> AnyConfig:
    """Read a configuration.

    A file may start from another one with `base: other.yaml`, relative to itself. Later layers win:
    defaults, base, file, overrides. `data.allow_pipe=true` is for overrides alone. Paths in values are relative to the
    working directory, or begin with `~`.

    Args:
        path: a YAML file with the sections model, data, optim, train, run.
        overrides: `key=value` with dotted keys and YAML values, for example `train.epochs=100`; where the key is text,
            all behind the first `=` as it is.
        unchecked: dotted keys whose range does not matter to the caller.
        schema: what it configures: pretraining, or fine-tuning.

    Raises:
        UserError: for a file that is missing or no YAML, an unknown key, a value of a wrong type or range.
    """
    layers = [*_read_layers(Path(path), ()), (COMMAND_LINE, _parse_overrides(overrides, schema))]
    config: AnyConfig = _resolve(layers, schema, unchecked)
    return config


@overload
def parse_config(text: str, source: str) -> PretrainConfig: ...


@overload
def parse_config(text: str, source: str, schema: type[C]) -> C: ...


def parse_config(text: str, source: str, schema: Any = PretrainConfig) -> AnyConfig:
    """Read back what `to_yaml` wrote; `source` says where it was, for the messages. It allows no commands.

    Raises:
        UserError: as `load_config`.
    """
    config: AnyConfig = _resolve([(f"in {source}", parse_yaml(text, source))], schema, ON_THE_LINE)
    return config


def _resolve(layers: list[tuple[str, Layer]], schema: type[C], unchecked: Collection[str] = ()) -> C:
    merged = OmegaConf.structured(schema)
    origins: dict[str, str] = {}
    for origin, layer in layers:
        _check_keys(layer, origin, schema)
        values = _spelled_out({key: _settled(key, value, schema) for key, value in _leaves(layer)}, schema)
        origins |= dict.fromkeys(values, origin)
        for key, value in values.items():
            if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
                raise UserError(f"{key} ({origin}): holds lists or sections in a list: give plain values")
        try:
            for key, value in values.items():
                OmegaConf.update(merged, key, value)
        except OmegaConfBaseException as error:
            raise UserError(_describe_type_error(error, origin)) from None
    try:
        config: C = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # text with ${ in place of a number is looked at only here
        raise UserError(_describe_type_error(error, origins.get(_key_of(error), "by default"))) from None
    _check_values(config, origins, unchecked)
    if isinstance(config, PretrainConfig):
        # What a run records must not depend on a later version's defaults. Fine-tuning has them from its weights.
        config.data.mean, config.data.std = statistics_of(config.data, config.model.in_channels)
        # Said twice is said once: what earlier versions recorded names the default of model.init.
        if config.model.zero_init_residual == INITIAL_WEIGHTS[config.model.init].zero_init_residual:
            config.model.zero_init_residual = None
    return config


def to_yaml(config: AnyConfig) -> str:
    """The configuration as YAML that `load_config` reads back, without what only the command line may say."""
    content = OmegaConf.structured(config)
    for key in ON_THE_LINE:
        section, _, name = key.partition(".")
        OmegaConf.set_struct(content[section], False)
        content[section].pop(name, None)
    return OmegaConf.to_yaml(content)


def differing_keys(old: AnyConfig, new: AnyConfig) -> list[str]:
    """Dotted keys that decide the result of a run and differ, as `key: old → new`."""
    old_values, new_values = _flatten(old), _flatten(new)
    return [
        f"{key}: {old_values[key]} → {value}"
        for key, value in new_values.items()
        # As text, because nan differs from itself.
        if key not in FREE_KEYS and str(old_values[key]) != str(value)
    ]


def _read_layers(path: Path, parents: tuple[Path, ...]) -> Iterator[tuple[str, Layer]]:
    """What a file and those it inherits from say, the last of these first.

    A stranger's `base` may lead to any file of this machine: nothing is quoted of it unless it is a configuration.
    """
    if path.resolve() in parents:
        raise UserError(f"{path}: inherits from itself through {parents[-1]}: remove one of the `base` keys")
    layer = read_yaml(path, quoting=not parents)
    if parents and not {key.partition(".")[0] for key in layer} <= SECTIONS:
        sections = ", ".join(sorted(SECTIONS))
        raise UserError(
            f"{path}: holds more than the parts of a configuration ({sections}): correct it, or the `base` of "
            f"{parents[-1]} that leads there"
        )
    base = layer.pop("base", None)
    if base is not None:
        name = base.text if isinstance(base, Plain) else base
        if not isinstance(name, str) or "\0" in name:
            raise UserError(f"{path}: its `base` is no path: name one other configuration")
        if not name.lower().endswith(SUFFIXES):
            raise UserError(f"{path}: its `base` {shown(name)} is no YAML file: name one that ends in .yaml or .yml")
        yield from _read_layers(path.parent / os.path.expanduser(name), (*parents, path.resolve()))
    yield f"in {path}", layer


def _parse_overrides(overrides: Sequence[str], schema: type[AnyConfig]) -> Layer:
    """`key=value` as a layer; a key of text takes all behind the first `=` as it is."""
    layer: Layer = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not key or not equals:
            raise UserError(f"{override}: an override on the command line is key=value, for example train.epochs=100")
        if any("\ud800" <= character <= "\udfff" for character in override):  # how Python keeps other bytes
            raise UserError(
                f"{ascii(override)}: is no UTF-8 text, as configurations are: rename it, or give a link to it"
            )
        literal = key not in keys_of(schema) or str in _types_of(key, schema)
        layer[key] = Plain(text, text) if literal else parse_value(text, f"{override} {COMMAND_LINE}")
    return layer


def keys_of(schema: type[AnyConfig]) -> list[str]:
    """All keys of a task's configuration, dotted, in their order."""
    return list(_flatten(schema()))


def _check_keys(layer: Layer, origin: str, schema: type[AnyConfig]) -> None:
    valid = keys_of(schema)
    sections = {section for key in valid for section in _sections_of(key)}
    for key, _ in _leaves(layer):
        if key in ON_THE_LINE and origin != COMMAND_LINE:
            raise UserError(f"{key} {origin}: is for the command line alone: remove it there, and add {key}=true here")
        if key in valid:
            continue
        if key in sections:
            raise UserError(f"{key} {origin} is a section: give its keys, for example {_any_key_of(key, valid)}")
        for task, other in SCHEMAS.items():
            if key in keys_of(other):
                raise UserError(_describe_other_task(key, origin, task))
        raise UserError(f"unknown key {shown(key)} {origin}: did you mean {nearest_key(key, valid)}?")


def _describe_other_task(key: str, origin: str, task: str) -> str:
    own = next(name for name in SCHEMAS if name != task)
    if origin == COMMAND_LINE:
        return f"{key} {origin} is a key of `spark-me {task}` alone: `spark-me config` lists those of {own}"
    return (
        f"{origin.removeprefix('in ')}: is a configuration of `spark-me {task}` ({key}): give it to that, or take a "
        f"file of configs/{own}"
    )


def _types_of(key: str, schema: type[AnyConfig]) -> tuple[Any, ...]:
    """What a key may hold: `(str, NoneType)`."""
    hint: Any = schema
    for name in key.split("."):
        hint = typing.get_type_hints(hint)[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _settled(key: str, value: Any, schema: type[AnyConfig]) -> Any:
    """A value as its key takes it: text as it was written, anything else by YAML."""
    allowed = _types_of(key, schema)
    if isinstance(value, Plain) and str in allowed:
        value = None if type(None) in allowed and value.text in ("", "null") else value.text
    if isinstance(value, str) and key in PATHS:
        value = os.path.expanduser(value)
    return _literal(value)


def _literal(value: Any) -> Any:
    """A value in which OmegaConf looks for no other key's value, and for no environment variable."""
    if isinstance(value, Plain):
        value = value.value
    if isinstance(value, list):
        return [_literal(item) for item in value]
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", value) if isinstance(value, str) else value


def _spelled_out(values: dict[str, Any], schema: type[AnyConfig]) -> dict[str, Any]:
    """The values of a layer by dotted key, with what they say for short in full."""
    for key in SIZES:
        if type(values.get(key)) is int:  # no bool
            values[key] = [values[key]] * 2
    valid = keys_of(schema)
    for ways in ALTERNATIVES:
        if any(key in values and values[key] != UNUSED.get(key) for key in ways):
            values = {key: UNUSED.get(key) for key in ways if key in valid} | values
    return values


def nearest_key(key: str, valid: list[str]) -> str:
    """The one of the valid keys that a mistyped or misplaced one most likely means."""
    key = key[:100]  # looking takes time in proportion
    by_path = difflib.get_close_matches(key, valid, n=1, cutoff=0.75)
    if by_path:
        return by_path[0]
    # The right name in the wrong section, or without one.
    names = {name.rpartition(".")[2]: name for name in valid}
    by_name = difflib.get_close_matches(key.rpartition(".")[2], names, n=1, cutoff=0.4)
    return names[by_name[0]] if by_name else difflib.get_close_matches(key, valid, n=1, cutoff=0)[0]


def _check_values(config: AnyConfig, origins: Mapping[str, str], unchecked: Collection[str]) -> None:
    values = _flatten(config)
    for key, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if key != "data.nodata" and any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{key}={_show(value)} ({origins.get(key, 'by default')}): must be finite")
    for key, good, expected in config.rules():
        if not good and key not in unchecked:
            raise UserError(f"{key}={_show(values[key])} ({origins.get(key, 'by default')}): {expected}")


def _leaves(layer: Layer) -> Iterator[tuple[str, Any]]:
    """Dotted keys of a layer with their values; a list or an empty section counts as one."""
    for key, value in layer.items():
        if isinstance(value, dict) and value and "." not in key:
            yield from ((f"{key}.{name}", inner) for name, inner in _leaves(value))
        else:
            yield key, value


def _flatten(config: AnyConfig) -> dict[str, Any]:
    return dict(_leaves(asdict(config)))


def _sections_of(key: str) -> Iterator[str]:
    """The sections that a key lies in: of `a.b.c`, `a` and `a.b`."""
    for place, character in enumerate(key):
        if character == ".":
            yield key[:place]


def _any_key_of(section: str, valid: list[str]) -> str:
    return next(key for key in valid if key.startswith(f"{section}."))


def _describe_type_error(error: OmegaConfBaseException, origin: str) -> str:
    problem = re.sub(r"^While dereferencing interpolation .*?': ", "", first_line(error))
    return f"{_key_of(error) or 'value'} ({origin}): {shown(problem, 200)}: give a value of that type"


def _key_of(error: OmegaConfBaseException) -> str:
    return str(error.full_key or "").partition("[")[0]


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
