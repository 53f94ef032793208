"""From sparse features to the decoder's dense maps (paper, section 3.3: "densifying")."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spark_me import sparse
from spark_me.sparse import SparseTensor


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
