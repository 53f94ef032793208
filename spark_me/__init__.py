"""spark_me: SparK pretraining of convnets on true sparse convolution.

Importing this package imports neither MinkowskiEngine nor the trainer.
"""

import importlib
from typing import TYPE_CHECKING, Any

from spark_me.errors import EngineError, UserError
from spark_me.networks import list_encoders, register_encoder

if TYPE_CHECKING:
    from torch import nn

    from spark_me.downstream.classifier import inference_model, load_classifier
    from spark_me.encoder import SparseEncoder, sparsify
    from spark_me.spark import SparK
    from spark_me.weights.models import get_model, list_models
    from spark_me.weights.transfer import convert, export_weights, load_weights

__version__ = "0.1.0"
__all__ = [
    "EngineError",
    "SparK",
    "SparseEncoder",
    "UserError",
    "build_model",
    "convert",
    "export_weights",
    "get_model",
    "inference_model",
    "list_encoders",
    "list_models",
    "load_classifier",
    "load_weights",
    "register_encoder",
    "sparsify",
]

# Imported when first used: they need torch, the models torchvision, encoders the engine.
_LAZY = {
    "SparK": "spark_me.spark",
    "SparseEncoder": "spark_me.encoder",
    "convert": "spark_me.weights.transfer",
    "export_weights": "spark_me.weights.transfer",
    "get_model": "spark_me.weights.models",
    "inference_model": "spark_me.downstream.classifier",
    "list_models": "spark_me.weights.models",
    "load_classifier": "spark_me.downstream.classifier",
    "load_weights": "spark_me.weights.transfer",
    "sparsify": "spark_me.encoder",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def build_model(
    encoder: "str | nn.Module",
    *,
    image_size: int | tuple[int, int] = (224, 224),
    in_channels: int = 3,
    mask_ratio: float = 0.6,
    decoder: str = "unet",
    decoder_width: int = 512,
    drop_path: float | None = None,
    backend: str = "native",
    init: str = "official",
    zero_init_residual: bool | None = None,
) -> "SparK":
    """Build a SparK model.

    Args:
        encoder: a name of `list_encoders()`, of torchvision or `timm/NAME`, with random weights; or any dense convnet,
            which keeps its weights and shares them with the model.
        image_size: (H, W) in pixels, multiples of the encoder's total stride; a number for a square.
        in_channels: C of the images.
        mask_ratio: share of patches to hide, in (0, 1).
        decoder: unet, SparK's with skips from all scales; block, FCMAE's, one ConvNeXt V2 block on the deepest map.
        decoder_width: channels of the decoder at its deepest scale; unet's must be a multiple of the total stride.
        drop_path: stochastic depth; None: of a name its published default, of a network what it has.
        backend: how sparse layers compute.
        init: initial weights, as in the paper's own code (official) or in mmpretrain; they differ in the decoder's
            convolutions and in zero_init_residual.
        zero_init_residual: start ResNets' residual branches at zero; False: at full strength, which a run of a few
            thousand steps needs; None: of a name as `init` does, official at zero, of a network as it is.

    Raises:
        UserError: for an unknown encoder, decoder or init, a size, ratio or width that does not fit, no branches that
            could start at full strength, or a network that cannot become sparse.
        EngineError: if MinkowskiEngine is missing.
    """
    from spark_me.decoder import DECODERS
    from spark_me.drop_path import set_drop_path, start_residuals
    from spark_me.encoder import sparsify
    from spark_me.initial_weights import INITIAL_WEIGHTS
    from spark_me.networks import dense_network
    from spark_me.spark import SparK

    if init not in INITIAL_WEIGHTS:
        raise UserError(f"init={init}: must be one of {', '.join(INITIAL_WEIGHTS)}")
    if decoder not in DECODERS:
        raise UserError(f"decoder={decoder}: must be one of {', '.join(DECODERS)}")
    closed = zero_init_residual
    if isinstance(encoder, str):
        network = dense_network(encoder, in_channels, drop_path=drop_path)
        closed = INITIAL_WEIGHTS[init].zero_init_residual if closed is None else closed
    else:
        network = encoder
        if drop_path is not None:
            set_drop_path(network, drop_path)
    if closed is not None and not start_residuals(network, 0.0 if closed else 1.0) and zero_init_residual is False:
        name = encoder if isinstance(encoder, str) else type(encoder).__name__
        raise UserError(f"{name} starts no residual branch at zero: leave out zero_init_residual=false")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    sparse_encoder = sparsify(network, in_channels)
    return SparK(sparse_encoder, size, in_channels, mask_ratio, decoder_width, backend, init, decoder)
