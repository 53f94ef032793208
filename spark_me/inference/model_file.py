"""What a file says of a model: its tensors and, where it is a checkpoint of ours, class names and test images."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from spark_me.config_data import INTERPOLATIONS, LARGEST_AREA, STATISTICS, DataConfig
from spark_me.data.transforms import CentreCrop
from spark_me.dense import build_network
from spark_me.errors import UserError, install_text, shown
from spark_me.inference.view import View, crop_view, recipe_view
from spark_me.weights.canonical import Weights, dense_state, to_canonical
from spark_me.weights.download import is_url, local_file
from spark_me.weights.files import bare_state, read_content, stated_encoder
from spark_me.weights.layouts import RESNET
from spark_me.weights.models import PUBLISHED, list_models
from spark_me.weights.strict import require_numbers

OURS = "spark_me."
"""How the format of the trainer's checkpoints begins. Of each version, what is needed is checked by itself."""


class ModelFile(NamedTuple):
    """A model on the disk."""

    where: str
    """For messages."""
    source: str
    """Path or URL."""
    weights: Weights
    classes: list[str] | None
    """Names of a fine-tuned classifier's classes; None in any other file."""
    view: View
    """How its test images are made."""

    @property
    def in_channels(self) -> int:
        """Channels of its images."""
        return self.weights.in_channels

    @property
    def num_classes(self) -> int | None:
        """Of its classifier; None where it has none."""
        return self.weights.num_classes

    def network(self, *, classifier: bool) -> nn.Module:
        """The dense network in evaluation mode, on the CPU, with its classifier or without.

        Raises:
            UserError: if a library is missing that it needs.
        """
        network = build_network(self.weights.encoder, self.num_classes if classifier else None, self.in_channels)
        network.load_state_dict(dense_state(self.weights, classifier), strict=True)
        return network.eval()


def read_model(source: str | os.PathLike[str], *, raw: bool = False) -> ModelFile:
    """Read weights of any known layout.

    Args:
        source: a name of published weights (downloaded once), or path or URL of a file: any known layout, or a
            checkpoint of pretraining or fine-tuning.
        raw: of a fine-tuning checkpoint, the weights themselves and not their moving average (EMA).

    Raises:
        UserError: for an unknown name, a file that cannot be read, or one that contradicts itself.
        WeightsError: if its tensors are not those of a model.
    """
    where = str(source)
    address = _address(source)
    path = local_file(address)
    content = read_content(path)
    ours = isinstance(content, Mapping) and str(content.get("format", "")).startswith(OURS)
    state = _state(content, ours and not raw, where)
    require_numbers(state, where)
    weights = to_canonical(state, where, likely=stated_encoder(path, content))
    if not ours:
        return ModelFile(where, address, weights, None, _recipe_view(weights, where))
    view = _configured_view(_parse(content.get("config"), where), weights.in_channels, where)
    return ModelFile(where, address, weights, _class_names(content, weights, where), view)


def _address(source: str | os.PathLike[str]) -> str:
    name = str(source)
    if name in PUBLISHED:
        return PUBLISHED[name].url
    if is_url(name) or os.path.exists(name) or Path(name).suffix or os.sep in name:
        return name  # reading says what is wrong with it
    if name in list_models():
        raise UserError(
            f"{name}: no weights were published by this name: give a file, or one of {', '.join(PUBLISHED)}"
        )
    close = difflib.get_close_matches(name, PUBLISHED, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"give a file or one of {', '.join(PUBLISHED)}"
    raise UserError(f"{name}: neither a file nor the name of published weights: {hint}")


def _state(content: Any, averaged: bool, where: str) -> dict[str, Tensor]:
    if averaged and content.get("ema") is not None:
        content = content["ema"]
    state = bare_state(content, where)
    state.pop("n_averaged", None)  # a counter of torch's own averaging
    return state


def _class_names(content: Mapping[str, Any], weights: Weights, where: str) -> list[str] | None:
    classes, count = content.get("classes"), weights.num_classes
    if classes is None or count is None:
        return None
    if not isinstance(classes, list | tuple):
        raise UserError(f"{where}: holds no list of class names: use an earlier checkpoint")
    if len(classes) != count:
        raise UserError(f"{where}: names {len(classes)} classes, its classifier has {count}: fine-tune again")
    return [str(name) for name in classes]


def _recipe_view(weights: Weights, where: str) -> View:
    try:
        return recipe_view(weights.in_channels, resnet=RESNET.has(weights.architecture.encoder))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _parse(config: Any, where: str) -> Mapping[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError:
        raise UserError(f"{where}: its configuration needs PyYAML: {install_text('inference')}") from None
    try:
        parsed = yaml.safe_load(config)
    except (yaml.YAMLError, AttributeError, ValueError, RecursionError):  # no text, a 99th of May, a deep nest
        parsed = None
    if not isinstance(parsed, Mapping) or not all(isinstance(parsed.get(key), Mapping) for key in ("model", "data")):
        raise UserError(f"{where}: holds no configuration that can be read: use an earlier checkpoint")
    return parsed


def _configured_view(config: Mapping[str, Any], channels: int, where: str) -> View:
    """Of fine-tuning: its test crop. Of pretraining: what the loss on held-out images was measured on."""
    model, data = config["model"], config["data"]
    options = {key: data[key] for key in ("interpolation", "mean", "std", "nodata") if data.get(key) is not None}
    settings = DataConfig(**options)
    if not isinstance(settings.interpolation, str) or settings.interpolation not in INTERPOLATIONS:
        raise UserError(
            f"{where}: data.interpolation={shown(settings.interpolation)} is not known: use the spark_me it is from"
        )
    if not _are_numbers([0 if settings.nodata is None else settings.nodata], 1):
        raise UserError(f"{where}: data.nodata={shown(settings.nodata)} is no number: use another checkpoint")
    statistics = [values or STATISTICS.get(channels, ((), ()))[0] for values in (settings.mean, settings.std)]
    if not all(_are_numbers(values, channels) for values in statistics):
        raise UserError(f"{where}: data.mean and data.std are not of its {channels} channels: use another checkpoint")
    resize, crop, size = data.get("test_resize"), data.get("test_crop"), model.get("image_size")
    if _are_sides([resize, crop]):
        return crop_view(settings, channels, resize, crop)
    if _are_sides(size):
        return View(channels, settings, (size[0], size[1]), CentreCrop(size, settings.interpolation))
    raise UserError(
        f"{where}: says neither data.test_crop nor model.image_size, of {LARGEST_AREA} pixels at most: use another "
        "checkpoint"
    )


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(value, int | float) for value in values)


def _are_sides(values: Any) -> bool:
    whole = _are_numbers(values, 2) and all(isinstance(value, int) and value > 0 for value in values)
    return whole and values[0] * values[1] <= LARGEST_AREA
