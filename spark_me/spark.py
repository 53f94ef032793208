"""SparK, the method on one screen: mask → encode → densify → decode → loss (arXiv 2301.03580)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from spark_me import masking, sparse
from spark_me.decoder import DECODERS, image_losses, patch_loss
from spark_me.densify import DensifyDeepest, DensifyScales
from spark_me.devices import copy_to
from spark_me.encoder import SparseEncoder
from spark_me.sparse import Pyramid, SparseTensor, VisiblePatches


class Reconstruction(NamedTuple):
    """What `SparK.reconstruct` returns."""

    prediction: Tensor
    """[B, C, H, W], in the units of the images given; at visible patches too."""
    visible: Tensor
    """bool [B, fh, fw], True = kept."""
    loss: Tensor
    """Scalar, as `SparK.forward` returns it."""
    losses: Tensor
    """[B], the loss of each image: the mean over its own hidden patches."""


class SparK(nn.Module):
    """Masked pretraining of a sparse convnet.

    Attributes:
        patch_size: P, the encoder's total stride.
        grid: (fh, fw) of the images that it was built for; other multiples of P work too.
        mask_ratio: share of patches that `forward` hides when it draws the mask itself.
        backend: how sparse layers compute; may be changed at any time, the parameters are the same.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        image_size: tuple[int, int] = (224, 224),
        in_channels: int = 3,
        mask_ratio: float = 0.6,
        decoder_width: int = 512,
        backend: str = "native",
        init: str = "official",
        decoder: str = "unet",
    ) -> None:
        super().__init__()
        self.patch_size = encoder.total_stride
        self.grid = masking.grid_of(image_size, self.patch_size)
        self.mask_ratio = mask_ratio
        self.backend = backend
        masking.count_visible(self.grid, mask_ratio)  # refuse a ratio that leaves or hides no patch now, not later
        self.encoder = encoder
        self.decoder = DECODERS[decoder](decoder_width, self.patch_size, in_channels, init)
        self.densify: nn.Module = (
            DensifyDeepest(encoder.channels[-1], decoder_width)
            if decoder == "block"
            else DensifyScales(encoder.channels, self.decoder.widths, encoder.densify_norm)
        )

    def forward(
        self, images: Tensor, visible: Tensor | VisiblePatches | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """The pretraining loss.

        Args:
            images: [B, C, H, W].
            visible: bool [B, fh, fw]; drawn when None. Best on the CPU even if the images are on a GPU, and `valid`
                too: read back from there, they make the host wait for all work on it. Or `VisiblePatches` on the
                images' device, with a `valid` that is there and not checked: so nothing is copied here.
            valid: bool [B, fh, fw], False where a patch has nodata pixels: it is neither encoded nor in the loss,
                whatever its values. All patches count when None.

        Raises:
            ValueError: if a visible patch is not valid, an image has no visible patch, or there is no image.
        """
        images, patches, hidden = self._prepare(images, visible, valid)
        prediction = masking.patchify(self.predict(images, patches), self.patch_size)
        target, _, _ = self._target(images)
        return patch_loss(prediction, target, hidden.flatten(1))

    def predict(self, images: Tensor, visible: Tensor | VisiblePatches) -> Tensor:
        """Normalised pixels [B, C, H, W], computed from the visible patches alone."""
        return self.decoder(self.densify(self._encode(images, visible)))

    def encode(self, images: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Dense feature maps [B, C_i, H/s_i, W/s_i], shallow to deep, zero at empty sites; all visible when None."""
        if visible is None:
            grid = masking.grid_of(images.shape[-2:], self.patch_size)
            visible = torch.ones(images.shape[0], *grid, dtype=torch.bool)
        return [sparse.to_dense(x) for x in self._encode(images, visible)]

    @torch.no_grad()
    def reconstruct(self, images: Tensor, visible: Tensor | None = None, valid: Tensor | None = None) -> Reconstruction:
        """Predict images [B, C, H, W] in their own units, each patch scaled back by its true mean and deviation.

        `visible` and `valid` are as for `forward`; patches that are not valid come out as about 0.
        """
        images, patches, hidden = self._prepare(images, visible, valid)
        normalised = masking.patchify(self.predict(images, patches), self.patch_size)
        target, mean, deviation = self._target(images)
        grid = masking.grid_of(images.shape[-2:], self.patch_size)
        prediction = masking.unpatchify(normalised * deviation + mean, grid, self.patch_size)
        of_patches = (normalised, target, hidden.flatten(1))
        loss, losses = patch_loss(*of_patches), image_losses(*of_patches)
        return Reconstruction(prediction, patches.visible, loss, losses)

    def _encode(self, images: Tensor, visible: Tensor | VisiblePatches) -> list[SparseTensor]:
        pyramid = Pyramid(visible, self.patch_size, self.backend, images.device)
        return self.encoder(sparse.to_sparse(images, pyramid))

    def _target(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches normalised by their own mean and unbiased variance, and that mean and deviation."""
        patches = masking.patchify(images, self.patch_size)
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        deviation = (variance + 1e-6).sqrt()
        return (patches - mean) / deviation, mean, deviation

    def _prepare(
        self, images: Tensor, visible: Tensor | VisiblePatches | None, valid: Tensor | None
    ) -> tuple[Tensor, VisiblePatches, Tensor]:
        """The images without their nodata, which patches are visible, and which are reconstructed."""
        if not isinstance(visible, VisiblePatches):
            valid = None if valid is None else valid.cpu()
            if visible is None:
                grid = masking.grid_of(images.shape[-2:], self.patch_size)
                visible = masking.draw_visible(images.shape[0], grid, self.mask_ratio, valid=valid)
            visible = visible.cpu()
            if valid is not None and (visible & ~valid).any():
                raise ValueError("a patch with nodata pixels cannot be visible")
            visible = VisiblePatches.of(visible, images.device)
            valid = None if valid is None else copy_to(valid, images.device)
        if valid is None:
            return images, visible, ~visible.visible
        # Filled, not multiplied: a NaN times zero would reach the gradients.
        nodata = masking.upsample_visible(~valid, self.patch_size)[:, None]
        return images.masked_fill(nodata, 0), visible, valid & ~visible.visible
