"""What is measured of a backend: its model, and a pass from images and mask to the gradients of all parameters."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import spark_me
from spark_me import sparse
from spark_me.bench.case import Case
from spark_me.decoder import Decoder
from spark_me.dense import strip
from spark_me.encoder import sparsify
from spark_me.errors import UserError
from spark_me.masked_dense import MaskedDense
from spark_me.masking import upsample_visible
from spark_me.networks import dense_network
from spark_me.trace import Trace, graph_of_maps, normalises_by_layer, trace


def headless(name: str) -> Trace:
    """A network by name, without the parameters behind its last map."""
    traced = trace(dense_network(name))
    strip(traced.network, {*traced.state_names})
    return traced


def dense_encoder(name: str) -> nn.Module:
    """The ordinary dense encoder: images [B, 3, H, W] → its maps [B, C_i, H/s_i, W/s_i]."""
    traced = headless(name)
    return fx.GraphModule(traced.network, graph_of_maps(traced))


def masked_encoder(name: str) -> MaskedDense:
    """The dense simulation of masking: (images, visible) → its maps, zero where hidden."""
    traced = headless(name)
    return MaskedDense(traced.network, traced.taps)


class MaskedDenseSparK(nn.Module):
    """The whole method on the simulation; parameters are named as in `spark_me.spark.SparK`, the encoder's below
    `encoder.network`.
    """

    def __init__(self, traced: Trace, in_channels: int = 3, decoder_width: int = 512) -> None:
        """
        Args:
            traced: the dense network; it is the simulation's own.
            in_channels: C of the images.
            decoder_width: channels of the decoder at its deepest scale.
        """
        super().__init__()
        self.patch_size = traced.strides[-1]
        self.encoder: nn.Module = MaskedDense(traced.network, traced.taps)
        self.decoder = Decoder(decoder_width, self.patch_size, in_channels)
        norm = _LayerNorm if normalises_by_layer(traced.network) else nn.BatchNorm2d
        self.densify = nn.ModuleList(
            MaskedDensify(width_in, width_out, 3 if level else 1, norm)
            for level, (width_in, width_out) in enumerate(zip(traced.channels[::-1], self.decoder.widths))
        )

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """The pretraining loss of images [B, C, H, W] with visible bool [B, fh, fw]."""
        prediction = self.predict(images, visible)
        size = self.patch_size
        # unfold orders a patch as [C, P, P]; the mean over a patch does not depend on the order
        targets = functional.unfold(images, size, stride=size)
        predictions = functional.unfold(prediction, size, stride=size)
        mean = targets.mean(dim=1, keepdim=True)
        variance = (targets - mean).square().sum(dim=1, keepdim=True) / (targets.shape[1] - 1)
        errors = (predictions - (targets - mean) / torch.sqrt(variance + 1e-6)).square().mean(dim=1)
        hidden = ~visible.flatten(1)
        return (errors * hidden).sum() / hidden.sum()

    def predict(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normalised pixels [B, C, H, W]."""
        features = self.encoder(images, visible)
        return plain_decode(self.decoder, [f(x, visible) for f, x in zip(self.densify, reversed(features))])


class DenseSparK(MaskedDenseSparK):
    """The simulation's decoder and loss on an ordinary dense encoder that sees every patch: the step's baseline."""

    def __init__(self, name: str, decoder_width: int) -> None:
        super().__init__(headless(name), decoder_width=decoder_width)
        self.encoder = dense_encoder(name)
        for densify in self.densify:
            del densify.mask_token

    def predict(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normalised pixels [B, C, H, W]; nothing is hidden."""
        scales: Any = zip(self.densify, reversed(self.encoder(images)))
        return plain_decode(self.decoder, [densify.projection(densify.norm(x)) for densify, x in scales])


class MaskedDensify(nn.Module):
    """Norm over visible sites, the mask token at hidden ones, a projection."""

    def __init__(self, channels: int, width: int, kernel_size: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(channels)
        # not a child: the norm's parameters have one name
        self.__dict__["_masked_norm"] = MaskedDense(self.norm, [("", 1)])
        self.mask_token = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.projection = (
            nn.Identity()
            if kernel_size == 1 and channels == width
            else nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
        )

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """[B, C, h, w] → [B, width, h, w]."""
        mask = upsample_visible(visible, x.shape[2] // visible.shape[1])[:, None]
        if isinstance(self.norm, nn.BatchNorm2d):
            normalised = self.__dict__["_masked_norm"](x, visible)[0]
        else:  # it treats each site by itself: what hidden ones get is replaced by the token
            normalised = self.norm(x)
        return self.projection(torch.where(mask, normalised, self.mask_token.to(normalised.dtype)))


class _LayerNorm(nn.LayerNorm):
    """Of maps [B, C, h, w], over the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def plain_decode(decoder: Decoder, maps: Sequence[Tensor]) -> Tensor:
    """The decoder layer by layer, as it is written in the paper: maps deep to shallow → pixels [B, C, H, W]."""
    x = maps[0]
    block: Any
    for level, block in enumerate(decoder.blocks):
        if 0 < level < len(maps):
            x = x + maps[level]
        x = functional.relu6(block.norm1(block.conv1(block.upsample(x))), inplace=True)
        x = block.norm2(block.conv2(x))
    return decoder.projection(x)


BACKENDS = (*sparse.BACKENDS, "masked_dense", "dense")
"""The sparse ones, their dense simulation, and the dense network without any mask."""
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Loss = Callable[[Tensor, Tensor], Tensor]
"""(images, visible) → scalar."""


class Variant(NamedTuple):
    """A backend, and how a dense one runs."""

    backend: str
    memory_format: str | None
    """A key of `MEMORY_FORMATS`; None for the sparse backends, whose rows know no other order."""
    compiled: bool = False
    """By `torch.compile`."""

    def __str__(self) -> str:
        mode = ", ".join([self.memory_format or "", *["compiled"] * self.compiled])
        return f"{self.backend} ({mode})" if mode else self.backend


def variants_of(backends: Sequence[str], *, compiled: bool = False) -> list[Variant]:
    """What has to run: the dense backends in every mode that may be the fastest one.

    Args:
        backends: of `BACKENDS`.
        compiled: whether they run compiled too, in the memory format that suits compilers.

    Raises:
        UserError: for an unknown backend, or none.
    """
    if not backends:
        raise UserError(f"--backends: give at least one of {', '.join(BACKENDS)}")
    variants = []
    for backend in dict.fromkeys(backends):
        if backend not in BACKENDS:
            close = difflib.get_close_matches(backend, BACKENDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose among {', '.join(BACKENDS)}"
            raise UserError(f"unknown backend {backend!r}: {hint}")
        if backend in sparse.BACKENDS:
            variants.append(Variant(backend, None))
        else:
            variants += [Variant(backend, memory_format) for memory_format in MEMORY_FORMATS]
            variants += [Variant(backend, "channels_last", compiled=True)] * compiled
    return variants


class Workload:
    """A model with random weights and its loss.

    Attributes:
        model: what is trained.
    """

    def __init__(self, case: Case, scope: str, variant: Variant) -> None:
        self._case = case
        # the sparse backends build their pyramid from a mask on the CPU, as training does
        self._mask_device = "cpu" if variant.backend in sparse.BACKENDS else case.device
        self._memory_format = MEMORY_FORMATS[variant.memory_format or "contiguous"]
        self.model, self._loss = _BUILDERS[scope](case, variant.backend)
        _start_norms_at_one(self.model)
        self.model.to(case.device).to(memory_format=self._memory_format)  # type: ignore[call-overload]
        if variant.compiled:
            self.model.compile(dynamic=False)
        self._inputs = self.inputs(case)

    def inputs(self, case: Case) -> tuple[Tensor, Tensor]:
        """The case's images, in this backend's memory format, and mask."""
        images, visible = case.draw()
        return images.contiguous(memory_format=self._memory_format), visible.to(self._mask_device)

    def run(self, inputs: tuple[Tensor, Tensor] | None = None) -> None:
        """One forward and backward pass, of this workload's own inputs when None, finished when it returns."""
        with self._case.computing():
            with self._case.autocast():
                loss = self._loss(*(inputs or self._inputs))
            loss.backward()
        if self._case.device == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad(set_to_none=True)


def _build_encoder(case: Case, backend: str) -> tuple[nn.Module, Loss]:
    """An encoder; its loss is the sum of the means of the four feature scales."""
    if backend == "dense":
        model = dense_encoder(case.encoder)
        return model, lambda images, visible: _sum_of_means(model(images))
    if backend == "masked_dense":
        model = masked_encoder(case.encoder)
        return model, lambda images, visible: _sum_of_means(model(images, visible))
    model = sparsify(dense_network(case.encoder))

    def loss(images: Tensor, visible: Tensor) -> Tensor:
        # a new mask in every step of training: its pyramid and tables belong to the pass
        pyramid = sparse.Pyramid(visible, case.patch_size, backend, images.device)
        return _sum_of_means([x.F for x in model(sparse.to_sparse(images, pyramid))])

    return model, loss


def _build_step(case: Case, backend: str) -> tuple[nn.Module, Loss]:
    if backend == "dense":
        model: nn.Module = DenseSparK(case.encoder, case.decoder_width)
    elif backend == "masked_dense":
        model = MaskedDenseSparK(headless(case.encoder), decoder_width=case.decoder_width)
    else:
        model = spark_me.build_model(
            case.encoder,
            image_size=case.image_size,
            mask_ratio=case.mask_ratio,
            decoder_width=case.decoder_width,
            drop_path=0.0,
            backend=backend,
        )
    return model, model


_BUILDERS: dict[str, Callable[[Case, str], tuple[nn.Module, Loss]]] = {"encoder": _build_encoder, "step": _build_step}


def _sum_of_means(features: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.mean(dtype=torch.float32) for x in features]).sum()


def _start_norms_at_one(model: nn.Module) -> None:
    """Encoders may start a block's last norm at zero; multiplying by zeros could cost less than training does."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            nn.init.ones_(parameter)
