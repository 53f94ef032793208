"""From sparse features to the decoder's dense maps (paper, section 3.3: "densifying")."""

import torch
from torch import Tensor, nn

from spark_me import sparse
from spark_me.sparse import SparseTensor


class Densify(nn.Module):
    """One scale: norm over visible sites, a learned mask token at every empty site, a projection to the decoder."""

    def __init__(self, channels: int, width: int, kernel_size: int) -> None:
        """
        Args:
            channels: of the encoder's features.
            width: of the decoder at this scale.
            kernel_size: of the projection, 1 at the deepest scale and 3 elsewhere.
        """
        super().__init__()
        self.norm = sparse.BatchNorm(channels)
        self.mask_token = nn.Parameter(torch.empty(1, channels, 1, 1))
        # The published models project even equal widths, except at the deepest scale.
        identity = kernel_size == 1 and channels == width
        self.projection = (
            nn.Identity() if identity else nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
        )
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if isinstance(self.projection, nn.Conv2d):
            nn.init.trunc_normal_(self.projection.weight, std=0.02)
            nn.init.zeros_(self.projection.bias)

    def forward(self, x: SparseTensor) -> Tensor:
        """Features [N, C] at stride s → [B, width, H/s, W/s]."""
        return self.projection(sparse.to_dense(self.norm(x), fill=self.mask_token.flatten()))
