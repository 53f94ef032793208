"""Weights that a run starts from, of any known layout, and the record of what they were."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from spark_me.config.data import FinetuneDataConfig, ImagesConfig, statistics_of
from spark_me.config.loading import parse_config
from spark_me.config.tasks import SCRATCH, FinetuneConfig, FinetuneModelConfig
from spark_me.dense import build_network
from spark_me.errors import UserError, printable
from spark_me.files import is_file, sha256_of, write_json
from spark_me.train import distributed
from spark_me.train.checkpoint import FINETUNE, PRETRAIN
from spark_me.train.run_directory import RunDirectory
from spark_me.weights.download import is_url, local_file
from spark_me.weights.files import read_content
from spark_me.weights.models import PUBLISHED
from spark_me.weights.transfer import load_weights


def start_from(weights: str, network: nn.Module, model: FinetuneModelConfig) -> str:
    """Load an encoder's weights into the network of `model`, whose classifier stays new; say what was loaded.

    Every process calls it and reads the file.

    Raises:
        UserError: if there is no such file, or it does not fit the encoder.
    """
    if weights == SCRATCH:
        return "random weights"
    path = locate(weights, "weights=")
    with distributed.raise_together():
        # Whatever classifier the file has is of other classes, so it is loaded into a network that has none.
        encoder = build_network(model.encoder, None, model.in_channels)
        loaded = load_weights(encoder, path)
        network.load_state_dict(encoder.state_dict(), strict=False)
    return f"the encoder in {printable(weights)} ({loaded.layout} layout) and a new classifier"


SEEN = ("train_crop", "test_resize", "test_crop", "mean", "std")
"""Keys of `data` that say how a network sees images."""
DEFAULT_SIDE, SHOWN = 224, 0.95
"""Pixels; and the share of a test image's shorter edge that its centre takes, as in the published recipes."""


def settle_images(
    data: FinetuneDataConfig, channels: int, weights: str, key: str, run: RunDirectory | None = None
) -> None:
    """Fill in what a configuration leaves open of its images, in place, and say where it is from.

    A network is to see images as in its training: a run that goes on takes what it recorded, another one what the
    checkpoint in `weights` was trained on; where that is none of spark_me, 224 pixels, ImageNet's mean and deviation.

    Every process calls it.

    Args:
        data: train_crop, test_resize, test_crop, mean and std.
        channels: of the images.
        weights: a checkpoint, a published name, path or URL; `none` for none.
        key: where they were given, for messages.
        run: the run, if there is one.

    Raises:
        UserError: if the weights cannot be had, or there are no mean and deviation for the images' channels.
    """
    if None not in _settings_of(data).values():
        return
    goes_on = run is not None and run.config_file.is_file()
    path = None if goes_on or weights == SCRATCH else locate(weights, key)
    found: dict[str, Any] = {}
    with distributed.raise_together():
        if distributed.is_main():
            recorded = None if run is None else run.recorded()
            found = _trained_on(path) if recorded is None else _settings_of(recorded.data)
    found = distributed.broadcast(found)
    for name, value in found.items():
        if getattr(data, name) is None:
            setattr(data, name, value)
    data.train_crop = data.train_crop or DEFAULT_SIDE
    data.test_crop = data.test_crop or data.train_crop
    data.test_resize = data.test_resize or round(data.test_crop / SHOWN)
    data.mean, data.std = statistics_of(data, channels)
    if data.test_crop > data.test_resize:
        raise UserError(f"data.test_crop={data.test_crop}: must not exceed data.test_resize={data.test_resize}")
    for name, values in (("mean", data.mean), ("std", data.std)):
        if values is None:
            raise UserError(f"data.{name}=null: {key}{weights} has none: give model.in_channels={channels} values")
        if len(values) != channels:
            raise UserError(
                f"{key}{weights}: was trained on images of {len(values)} channels, not {channels}: set "
                f"model.in_channels={len(values)}"
            )
    if distributed.is_main() and not goes_on:
        like = f"as {printable(str(path))} was trained on" if found else "with ImageNet's mean and deviation"
        print(f"images of {data.train_crop} pixels, tested on {data.test_crop}, {like} unless told otherwise")


def _settings_of(data: ImagesConfig) -> dict[str, Any]:
    return {name: getattr(data, name) for name in SEEN}


def _trained_on(path: Path | None) -> dict[str, Any]:
    """What a checkpoint of spark_me was trained on; empty for any other file and for none."""
    content = {} if path is None else read_content(path)
    task = content.get("format") if isinstance(content, Mapping) else None
    if task not in (f"spark_me.{FINETUNE}", f"spark_me.{PRETRAIN}"):
        return {}
    text = content.get("config")
    if not isinstance(text, str):
        raise UserError(f"{path}: holds no configuration that can be read: use an earlier checkpoint")
    if task == f"spark_me.{FINETUNE}":
        return _settings_of(parse_config(text, str(path), FinetuneConfig).data)
    config = parse_config(text, str(path))
    height, width = config.model.image_size
    # Fine-tuning takes squares: of as many pixels.
    return {"train_crop": round(math.sqrt(height * width)), "mean": config.data.mean, "std": config.data.std}


def locate(source: str, key: str) -> Path:
    """The file of a published name, a path or URL; downloaded if need be. Every process calls it.

    Args:
        source: what was given.
        key: where it was given, for messages.

    Raises:
        UserError: if there is none.
    """
    with distributed.raise_together():
        if distributed.is_main():
            _find(source, key)  # one process downloads, the others find the file in the cache
    with distributed.raise_together():
        return _find(source, key)


def _find(source: str, key: str) -> Path:
    if source in PUBLISHED:
        return local_file(PUBLISHED[source].url)
    path = local_file(source)
    if not is_url(source) and not is_file(path):
        if path.suffix or path.parent.name:
            raise UserError(f"{key}{source}: no such file: check the path")
        raise UserError(
            f"{key}{source}: neither a file nor a published name: give a path, a URL, or one of {', '.join(PUBLISHED)}"
        )
    return path


def load_initial_weights(source: str, model: nn.Module, run: RunDirectory) -> None:
    """Load weights into a model that has not been trained yet; say and record what was found.

    Every process calls it and reads the file.

    Args:
        source: name of published weights, path or URL; of a whole model, or of its encoder alone.
        model: the run's SparK model.
        run: where initial_weights.json is written.

    Raises:
        UserError: if they cannot be had, or are of another encoder.
    """
    path = locate(source, "model.init_from=")
    with distributed.raise_together():
        loaded = load_weights(model, path)
    with distributed.raise_together():
        if distributed.is_main():
            run.create()
            record = {"source": source, "sha256": sha256_of(path), **loaded._asdict()}
            write_json(run.initial_weights, record)
            print(f"weights from {printable(source)}: {loaded.encoder}, {loaded.layout} layout")
