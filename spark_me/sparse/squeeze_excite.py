"""Squeeze-and-excitation, per image over its visible sites."""

from collections.abc import Callable

from torch import nn

from spark_me.sparse.images import global_average, scale_images
from spark_me.sparse.tensor import SparseTensor, stride_of, with_features


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (arXiv 1709.01507): scale the channels of an image by a function of their means.

    Parameters are named and shaped as in `torchvision.ops.SqueezeExcitation` (1×1 convolutions `fc1` and `fc2`): a
    state dict of either loads into the other.
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        scale_activation: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        """
        Args:
            channels: C.
            reduced_channels: width between the two layers.
            activation: dense module between the two layers.
            scale_activation: dense module after them, such as `nn.Sigmoid` or `nn.Hardsigmoid`.
        """
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced_channels, 1)
        self.fc2 = nn.Conv2d(reduced_channels, channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def forward(self, x: SparseTensor) -> SparseTensor:
        squeezed = global_average(x)[:, :, None, None].to(self.fc1.weight.dtype)
        factors = self.scale_activation(self.fc2(self.activation(self.fc1(squeezed))))
        return with_features(x, scale_images(x.F, factors.flatten(1), x.coordinate_manager, stride_of(x)))
