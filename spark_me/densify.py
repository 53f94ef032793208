"""From sparse features to the decoder's dense maps (paper, section 3.3: "densifying")."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from spark_me import sparse
from spark_me.decoder import start_as_convnext
from spark_me.sparse import SparseTensor


class DensifyScales(nn.ModuleList):
    """SparK's: every scale that the encoder and the decoder share, each by its own `Densify`."""

    def __init__(
        self, channels: Sequence[int], widths: Sequence[int], norm: Callable[[int], nn.Module] = sparse.BatchNorm2d
    ) -> None:
        """
        Args:
            channels: of the encoder's maps, shallow to deep.
            widths: of the decoder, deep to shallow.
            norm: from a number of channels, a norm of sparse tensors.
        """
        sizes = enumerate(zip(reversed(channels), widths))
        super().__init__(Densify(*pair, kernel_size=3 if level else 1, norm=norm) for level, pair in sizes)

    def forward(self, features: Sequence[SparseTensor]) -> list[Tensor]:
        """The encoder's features, shallow to deep → maps [B, width, H/s, W/s], deep to shallow."""
        return [densify(x) for densify, x in zip(self, reversed(features))]


class DensifyDeepest(nn.Module):
    """FCMAE's: the deepest scale alone, projected where it is visible, then a mask token of the decoder's width."""

    def __init__(self, channels: int, width: int) -> None:
        """From channels of the encoder's deepest map to the decoder's width."""
        super().__init__()
        self.projection = nn.Conv2d(channels, width, 1)
        self.mask_token = nn.Parameter(torch.empty(1, width, 1, 1))
        start_as_convnext(self.projection)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, features: Sequence[SparseTensor]) -> list[Tensor]:
        """The encoder's features, shallow to deep → one map [B, width, fh, fw]."""
        x = features[-1]
        rows = functional.linear(x.F, self.projection.weight.flatten(1), self.projection.bias)
        return [sparse.to_dense(sparse.with_features(x, rows), fill=self.mask_token.flatten())]


class Densify(nn.Module):
    """One scale: norm over visible sites, a learned mask token at every empty site, a projection to the decoder."""

    def __init__(
        self, channels: int, width: int, kernel_size: int, norm: Callable[[int], nn.Module] = sparse.BatchNorm2d
    ) -> None:
        """
        Args:
            channels: of the encoder's features.
            width: of the decoder at this scale.
            kernel_size: of the projection, 1 at the deepest scale and 3 elsewhere.
            norm: from a number of channels, a norm of sparse tensors.
        """
        super().__init__()
        self.norm = norm(channels)
        self.mask_token = nn.Parameter(torch.empty(1, channels, 1, 1))
        # The published models project even equal widths, except at the deepest scale.
        identity = kernel_size == 1 and channels == width
        self.projection = (
            nn.Identity() if identity else nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
        )
        # As published: the token's distribution is cut at its own deviation, and projections keep torch's defaults.
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, x: SparseTensor) -> Tensor:
        """Features [N, C] at stride s → [B, width, H/s, W/s]."""
        x = self.norm(x)
        if isinstance(self.projection, nn.Identity):
            return sparse.to_dense(x, fill=self.mask_token.flatten())
        # The map is the token everywhere, plus (feature − token) at visible sites. The projection is linear: it
        # needs the visible share of the dense arithmetic for the second part, and next to nothing for the first.
        difference = sparse.with_features(x, x.F - self.mask_token.flatten())
        projected = sparse.convolution_to_dense(difference, self.projection.weight)
        return projected + self._projected_token(*projected.shape[2:])

    def _projected_token(self, height: int, width: int) -> Tensor:
        """The projection of a map that is the token everywhere: [1, width, H/s, W/s]."""
        # With a 3×3 kernel such a map differs at the border only, so a 3×3 map holds every value that there is.
        small = self.mask_token.expand(-1, -1, min(height, 3), min(width, 3))
        rows, columns = (_stretch(length, small.device) for length in (height, width))
        return self.projection(small)[:, :, rows[:, None], columns]


def _stretch(length: int, device: torch.device) -> Tensor:
    """Indices that enlarge an axis of at most 3 to `length`: first, middle …, last."""
    index = torch.arange(length, device=device)
    return index if length <= 3 else (index > 0).long() + (index == length - 1)
