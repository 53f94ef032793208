"""What is measured: an encoder, a batch, a mask, a device and a precision."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from spark_me import masking
from spark_me.decoder import Decoder
from spark_me.devices import float32_products
from spark_me.errors import UserError
from spark_me.networks import patch_size_of

SCOPES = ("encoder", "step")
"""The encoder alone; the whole pretraining step with densify, decoder and loss."""
DTYPES = ("float32", "tf32", "bfloat16", "float16")
"""Precision of the computation, with parameters in float32: tf32 on GPUs alone, the last two by autocast."""
IN_CHANNELS = 3


@dataclass(frozen=True)
class Case:
    """One measurement's inputs. Stochastic depth is off, so that every backend does the same work."""

    encoder: str = "resnet50"
    batch: int = 8
    image_size: tuple[int, int] = (224, 224)
    """(H, W) in pixels."""
    mask_ratio: float = 0.6
    """Share of hidden patches; 0, everything visible, is for the encoder alone."""
    decoder_width: int = 512
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def patch_size(self) -> int:
        """P, the encoder's total stride."""
        return patch_size_of(self.encoder)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        rows, columns = masking.grid_of(self.image_size, self.patch_size)
        return rows * columns

    @property
    def visible_patches(self) -> int:
        """Patches of an image that stay visible."""
        if self.mask_ratio == 0:
            return self.patches
        return masking.count_visible(masking.grid_of(self.image_size, self.patch_size), self.mask_ratio)

    @property
    def visible_share(self) -> float:
        """Share of the patches that stays visible, as counted in whole patches."""
        return self.visible_patches / self.patches

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within, products take this precision, and cuDNN searches for its best kernels, as shapes do not change."""
        cudnn = torch.backends.cudnn
        before = cudnn.benchmark
        cudnn.benchmark = True
        try:
            with float32_products(tf32=self.dtype == "tf32"):
                yield
        finally:
            cudnn.benchmark = before

    def autocast(self) -> torch.autocast:
        """What the forward pass runs under."""
        short = self.dtype in ("bfloat16", "float16")
        return torch.autocast(self.device, getattr(torch, self.dtype) if short else None, enabled=short)

    def check(self, scopes: Sequence[str]) -> None:
        """Refuse now what would fail later.

        Raises:
            UserError: for anything that does not fit, with the way out.
        """
        if self.batch < 1:
            raise UserError(f"--batch {self.batch}: give at least one image")
        if not 0 <= self.mask_ratio < 1:
            raise UserError(
                f"--mask-ratio {self.mask_ratio:g} is no share of hidden patches: choose one from 0 to below 1"
            )
        if self.batch * self.visible_patches < 2:
            raise UserError(
                "batch norm needs two values and this batch has one visible patch: raise --batch or --image-size"
            )
        if self.mask_ratio == 0 and "step" in scopes:
            raise UserError("mask ratio 0 hides no patch to reconstruct: use --scope encoder, or a larger ratio")
        if "step" in scopes:
            with torch.device("meta"):  # refuses a width that does not fit
                Decoder(self.decoder_width, self.patch_size, IN_CHANNELS)
        _check_device(self.device)
        _check_dtype(self.dtype, self.device)

    def smallest(self) -> "Case":
        """The same on two images of 2×2 patches, half of them visible: enough to load every library."""
        side = 2 * self.patch_size
        return dataclasses.replace(self, batch=2, image_size=(side, side), mask_ratio=0.5)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Noise as images [B, 3, H, W] on the device, visible bool [B, fh, fw] on the CPU, the same at every call."""
        on_device = torch.Generator(self.device).manual_seed(0)
        images = torch.randn(self.batch, IN_CHANNELS, *self.image_size, generator=on_device, device=self.device)
        grid = masking.grid_of(self.image_size, self.patch_size)
        if self.mask_ratio == 0:
            return images, torch.ones(self.batch, *grid, dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        return images, masking.draw_visible(self.batch, grid, self.mask_ratio, generator=generator)


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    if device != "cuda":
        raise UserError(f"unknown device {device!r}: choose auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA device here: use --device cpu")


def _check_dtype(dtype: str, device: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if dtype == "tf32" and device != "cuda":
        raise UserError("--dtype tf32 is a way of GPUs to compute: use --dtype float32 on a CPU")
    if dtype == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"{torch.cuda.get_device_name()} does not compute in bfloat16: use --dtype float16 or float32")
