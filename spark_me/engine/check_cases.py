"""The masks, strides and numbers of channels that the engine's layers are checked on."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Masked maps.

    Attributes:
        name: how messages call it.
        visible: bool [B, fh, fw].
        patch_size: P.
        stride: tensor stride of the maps.
        channels: (Cin, Cout); which kernels the engine takes depends on them and on the number of sites.
    """

    name: str
    visible: Tensor
    patch_size: int
    stride: int
    channels: tuple[int, int]

    def mask(self, stride: int, device: str = "cpu") -> Tensor:
        """1 at the active sites of a tensor stride, else 0: float64 [B, 1, H/s, W/s]."""
        side = self.patch_size // stride
        return self.visible[:, None].to(device).repeat_interleave(side, 2).repeat_interleave(side, 3).double()

    def sites(self) -> int:
        """Active sites of the maps, over all images."""
        return int(self.visible.sum()) * (self.patch_size // self.stride) ** 2

    def draw_maps(self) -> Tensor:
        """Random maps [B, Cin, H/s, W/s]: float64 that float32 can hold, with no value twice in a channel of an image.

        Two equal maxima under a kernel would leave open which of them receives the gradient.
        """
        images, _, height, width = self.mask(self.stride).shape
        places = height * width
        generator = torch.Generator().manual_seed(0)
        rank = torch.rand(images, self.channels[0], places, generator=generator).argsort(dim=2)
        maps = (rank.double() - places / 2) / 2 ** (places.bit_length() - 2)
        return maps.view(images, -1, height, width)


def cases_for(device: str) -> tuple[Case, ...]:
    """On the CPU one case of many masks; on a GPU all that brings other kernels into play."""
    mixed = Case("mixed masks", _mixed_masks(), patch_size=8, stride=1, channels=(4, 6))
    if device == "cpu":
        return (mixed,)
    return (
        mixed,
        Case("a single patch", _one_patch(), patch_size=32, stride=2, channels=(16, 16)),
        Case("one full image", torch.ones(1, 2, 3, dtype=torch.bool), patch_size=16, stride=4, channels=(24, 48)),
        Case("empty borders", _empty_borders(), patch_size=32, stride=8, channels=(192, 200)),
        Case("64 images", _random_masks(64, kept=30), patch_size=8, stride=1, channels=(32, 48)),
    )


def _mixed_masks() -> Tensor:
    """bool [5, 3, 4]: all visible, a single corner patch, and three random ones."""
    visible = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    visible[0] = True
    visible[1] = False
    visible[1, -1, -1] = True
    visible[2:, 0, 0] = True
    return visible


def _one_patch() -> Tensor:
    """bool [1, 3, 2] with a single visible patch, at the border."""
    visible = torch.zeros(1, 3, 2, dtype=torch.bool)
    visible[0, 1, 1] = True
    return visible


def _empty_borders() -> Tensor:
    """bool [7, 5, 6]: nothing is visible along the borders, and another share of the rest in every image."""
    share = torch.linspace(0.2, 1, 7)[:, None, None]
    visible = torch.zeros(7, 5, 6, dtype=torch.bool)
    visible[:, 1:-1, 1:-1] = torch.rand(7, 3, 4, generator=torch.Generator().manual_seed(1)) < share
    visible[:, 2, 3] = True
    return visible


def _random_masks(images: int, kept: int) -> Tensor:
    """bool [images, 7, 7] with `kept` visible patches each."""
    rank = torch.rand(images, 49, generator=torch.Generator().manual_seed(2)).argsort(dim=1).argsort(dim=1)
    return (rank < kept).view(images, 7, 7)
