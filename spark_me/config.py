"""Configurations: a YAML file, the files it inherits from, and overrides from the command line, checked."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spark_me.config_data import statistics_of
from spark_me.config_finetune import AnyConfig, FinetuneConfig
from spark_me.config_rules import finetune_rules, rules
from spark_me.config_schema import FREE_KEYS, Config
from spark_me.errors import UserError

__all__ = [
    "AnyConfig",
    "Config",
    "FinetuneConfig",
    "differing_keys",
    "keys_of",
    "load_config",
    "nearest_key",
    "parse_config",
    "to_yaml",
]

COMMAND_LINE = "on the command line"
SCHEMAS: Mapping[str, type[AnyConfig]] = {"pretrain": Config, "finetune": FinetuneConfig}
"""By task, which is also the command and the folder of its files in configs/."""
ALTERNATIVES = (
    ("train.epochs", "train.steps"),
    ("optim.warmup_epochs", "optim.warmup_share"),
    ("data.held_out", "data.val_root", "data.val_split"),
)
"""Several ways to say one thing: a layer that uses one takes the others away from the layers below."""
UNUSED = {"data.held_out": 0}
"""What says that one of them is not used, where that is not null."""
SIZES = ("model.image_size",)
"""Keys of [height, width], where a number is the side of a square."""

C = TypeVar("C", Config, FinetuneConfig)


@overload
def load_config(path: str | Path, overrides: Sequence[str] = (), *, unchecked: Collection[str] = ()) -> Config: ...


@overload
def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, unchecked: Collection[str] = (), schema: type[C]
) -> C: ...


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, unchecked: Collection[str] = (), schema: Any = Config
) -> AnyConfig:
    """Read a configuration.

    A file may start from another one with `base: other.yaml`, relative to itself. Later layers win:
    defaults, base, file, overrides. Paths in values are relative to the working directory.

    Args:
        path: a YAML file with the sections model, data, optim, train, run.
        overrides: `key=value` with dotted keys and YAML values, for example `train.epochs=100`.
        unchecked: dotted keys whose range does not matter to the caller.
        schema: what it configures: pretraining, or fine-tuning.

    Raises:
        UserError: for a file that is missing or no YAML, an unknown key, a value of a wrong type or range.
    """
    layers = [*_read_layers(Path(path), ()), (COMMAND_LINE, _parse_overrides(overrides))]
    config: AnyConfig = _resolve(layers, schema, unchecked)
    return config


@overload
def parse_config(text: str, source: str) -> Config: ...


@overload
def parse_config(text: str, source: str, schema: type[C]) -> C: ...


def parse_config(text: str, source: str, schema: Any = Config) -> AnyConfig:
    """Read back what `to_yaml` wrote; `source` says where it was, for the messages.

    Raises:
        UserError: as `load_config`.
    """
    config: AnyConfig = _resolve([(f"in {source}", _parse_yaml(text, source))], schema)
    return config


def _resolve(layers: list[tuple[str, DictConfig]], schema: type[C], unchecked: Collection[str] = ()) -> C:
    merged = OmegaConf.structured(schema)
    origins: dict[str, str] = {}
    for origin, layer in layers:
        _check_keys(layer, origin, schema)
        _spell_out(layer, schema)
        origins |= dict.fromkeys(_leaves(layer), origin)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise UserError(_describe_type_error(error, origin)) from None
    try:
        config: C = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(f"{_first_line(error)}: correct that value") from None
    _check_values(config, origins, unchecked)
    if isinstance(config, Config):
        # What a run records must not depend on a later version's defaults. Fine-tuning has them from its weights.
        config.data.mean, config.data.std = statistics_of(config.data, config.model.in_channels)
    return config


def to_yaml(config: AnyConfig) -> str:
    """The whole configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differing_keys(old: AnyConfig, new: AnyConfig) -> list[str]:
    """Dotted keys that decide the result of a run and differ, as `key: old → new`."""
    old_values, new_values = _flatten(old), _flatten(new)
    return [
        f"{key}: {old_values[key]} → {value}"
        for key, value in new_values.items()
        # As text, because nan differs from itself.
        if key not in FREE_KEYS and str(old_values[key]) != str(value)
    ]


def _read_layers(path: Path, parents: tuple[Path, ...]) -> Iterator[tuple[str, DictConfig]]:
    if path.resolve() in parents:
        raise UserError(f"{path}: inherits from itself through {parents[-1]}: remove one of the `base` keys")
    layer = _read_yaml(path)
    base = layer.pop("base", None)
    if base is not None:
        yield from _read_layers(path.parent / str(base), (*parents, path.resolve()))
    yield f"in {path}", layer


def _read_yaml(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file: check the path, or the `base` that leads to it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, source: str) -> DictConfig:
    try:
        layer = OmegaConf.create(text)  # by yaml's safe loader, without duplicate keys, with 1e-3 as a number
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{place}: no valid YAML: {getattr(error, 'problem', error)}: correct that line") from None
    if not isinstance(layer, DictConfig):
        raise UserError(f"{source}: must hold sections (model, data, optim, train, run), not a {_kind(layer)}")
    return layer


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not key or not equals:
            raise UserError(f"{override}: an override on the command line is key=value, for example train.epochs=100")
        if any("\ud800" <= character <= "\udfff" for character in override):  # how Python keeps other bytes
            raise UserError(
                f"{ascii(override)}: is no UTF-8 text, as configurations are: rename it, or give a link to it"
            )
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or _first_line(error)
        raise UserError(f"{' '.join(overrides)}: value on the command line is no valid YAML: {problem}") from None


def keys_of(schema: type[AnyConfig]) -> list[str]:
    """All keys of a task's configuration, dotted, in their order."""
    return list(_flatten(schema()))


def _check_keys(layer: DictConfig, origin: str, schema: type[AnyConfig]) -> None:
    valid = keys_of(schema)
    sections = {key.partition(".")[0] for key in valid}
    for key in _leaves(layer):
        if key in valid:
            continue
        if key in sections:
            raise UserError(f"{key} {origin} is a section: give its keys, for example {_any_key_of(key, valid)}")
        for task, other in SCHEMAS.items():
            if key in keys_of(other):
                raise UserError(_describe_other_task(key, origin, task))
        raise UserError(f"unknown key {key} {origin}: did you mean {nearest_key(key, valid)}?")


def _describe_other_task(key: str, origin: str, task: str) -> str:
    own = next(name for name in SCHEMAS if name != task)
    if origin == COMMAND_LINE:
        return f"{key} {origin} is a key of `spark-me {task}` alone: `spark-me config` lists those of {own}"
    return (
        f"{origin.removeprefix('in ')}: is a configuration of `spark-me {task}` ({key}): give it to that, or take a "
        f"file of configs/{own}"
    )


def _spell_out(layer: DictConfig, schema: type[AnyConfig]) -> None:
    """Write in full what a layer says for short."""
    given, valid = set(_leaves(layer)), keys_of(schema)
    for key in SIZES:
        side = OmegaConf.select(layer, key, throw_on_missing=False) if key in given else None
        if type(side) is int:  # no bool
            OmegaConf.update(layer, key, [side, side])
    for ways in ALTERNATIVES:
        if any(key in given and OmegaConf.select(layer, key) != UNUSED.get(key) for key in ways):
            for key in set(ways) & set(valid) - given:
                OmegaConf.update(layer, key, UNUSED.get(key))


def nearest_key(key: str, valid: list[str]) -> str:
    """The one of the valid keys that a mistyped or misplaced one most likely means."""
    by_path = difflib.get_close_matches(key, valid, n=1, cutoff=0.75)
    if by_path:
        return by_path[0]
    # The right name in the wrong section, or without one.
    names = {name.rpartition(".")[2]: name for name in valid}
    by_name = difflib.get_close_matches(key.rpartition(".")[2], names, n=1, cutoff=0.4)
    return names[by_name[0]] if by_name else difflib.get_close_matches(key, valid, n=1, cutoff=0)[0]


def _check_values(config: AnyConfig, origins: Mapping[str, str], unchecked: Collection[str]) -> None:
    values = _flatten(config)
    for key, good, expected in rules(config) if isinstance(config, Config) else finetune_rules(config):
        if not good and key not in unchecked:
            raise UserError(f"{key}={_show(values[key])} ({origins.get(key, 'by default')}): {expected}")


def _leaves(layer: DictConfig) -> list[str]:
    """Dotted keys of a layer; a list or an empty section counts as one."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{name}.")
            else:
                yield name

    return list(walk(OmegaConf.to_container(layer, resolve=False), ""))


def _flatten(config: AnyConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in asdict(config).items():
        values |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return values


def _any_key_of(section: str, valid: list[str]) -> str:
    return next(key for key in valid if key.startswith(f"{section}."))


def _describe_type_error(error: OmegaConfBaseException, origin: str) -> str:
    return f"{error.full_key or 'value'} ({origin}): {_first_line(error)}: give a value of that type"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def _kind(layer: Any) -> str:
    return "list" if isinstance(layer, ListConfig) else type(layer).__name__
