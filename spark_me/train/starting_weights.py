"""`weights`: what a fine-tuning run starts from."""

from pathlib import Path

from torch import nn

from spark_me.config_finetune import SCRATCH, FinetuneConfig
from spark_me.errors import UserError
from spark_me.train import distributed
from spark_me.weights.download import is_url, local_file
from spark_me.weights.models import PUBLISHED, build_network
from spark_me.weights.transfer import load_weights


def start_from(network: nn.Module, config: FinetuneConfig) -> str:
    """Load the encoder of `config.weights` into a network, whose classifier stays new; say what was loaded.

    Every process calls it and reads the file.

    Raises:
        UserError: if there is no such file, or it does not fit the encoder.
    """
    if config.weights == SCRATCH:
        return "random weights"
    path = locate(config.weights, "weights=")
    with distributed.agreed():
        # Whatever classifier the file has is of other classes, so it is loaded into a network that has none.
        encoder = build_network(config.model.encoder, None, config.model.in_channels)
        loaded = load_weights(encoder, path)
        network.load_state_dict(encoder.state_dict(), strict=False)
    return f"the encoder in {config.weights} ({loaded.layout} layout) and a new classifier"


def locate(source: str, key: str) -> Path:
    """The file of a published name, a path or URL; downloaded if need be. Every process calls it.

    Args:
        source: what was given.
        key: where it was given, for messages.

    Raises:
        UserError: if there is none.
    """
    with distributed.agreed():
        if distributed.is_main():
            _find(source, key)  # one process downloads, the others find the file in the cache
    with distributed.agreed():
        return _find(source, key)


def _find(source: str, key: str) -> Path:
    if source in PUBLISHED:
        return local_file(PUBLISHED[source].url)
    path = local_file(source)
    if not is_url(source) and not path.is_file():
        raise UserError(
            f"{key}{source}: neither a file nor a published name: give a path, a URL, or one of {', '.join(PUBLISHED)}"
        )
    return path
