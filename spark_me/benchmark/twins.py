"""The dense networks that a sparse encoder is compared with: the only place to extend for another family."""

from typing import Any

from torch import Tensor, nn

from spark_me.encoders.registry import CONVNEXTS, RESNETS
from spark_me.errors import UserError
from spark_me.masked_dense import MaskedDenseSparK, masked_dense_encoder, plain_decode
from spark_me.masked_dense_convnext import masked_dense_convnext
from spark_me.weights.models import DenseResNet


def dense_encoder(name: str) -> nn.Module:
    """The ordinary dense encoder: images [B, 3, H, W] → four maps [B, C_i, H/s_i, W/s_i]."""
    return _DenseResNet(name) if name in RESNETS else _DenseConvNeXt(name)


def masked_encoder(name: str) -> nn.Module:
    """The dense simulation of masking: (images, visible) → four maps, zero where hidden."""
    return masked_dense_encoder(name)


class DenseSparK(MaskedDenseSparK):
    """The simulation's decoder and loss on an ordinary dense encoder that sees every patch: the step's yardstick."""

    def __init__(self, name: str, decoder_width: int) -> None:
        super().__init__(name, decoder_width=decoder_width)
        self.register_module("encoder", dense_encoder(name))
        for densify in self.densify:
            del densify.mask_token

    def predict(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normalised pixels [B, C, H, W]; nothing is hidden."""
        scales: Any = zip(self.densify, reversed(self.encoder(images)))
        return plain_decode(self.decoder, [densify.projection(densify.norm(x)) for densify, x in scales])


class _DenseResNet(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = DenseResNet(name)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network.feature_maps(images)


class _DenseConvNeXt(nn.Module):
    """The networks that the simulation is made of, run as they are."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = masked_dense_convnext(name)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [images]
        for downsample, blocks in self.network.stages_of():
            features.append(blocks(downsample(features[-1])))
        return features[1:]


def check_twin(name: str) -> None:
    """Refuse an encoder that has no dense twin here.

    Raises:
        UserError: naming those that have.
    """
    twins = [*RESNETS, *CONVNEXTS]
    if name not in twins:
        raise UserError(
            f"encoder {name} has no dense twin to compare with: use --backends fused minkowski, "
            f"or one of {', '.join(twins)}"
        )
