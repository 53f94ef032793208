"""What is measured: a case (encoder, batch, mask, device, precision), and what each backend computes of it."""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torchvision.models.convnext import LayerNorm2d

import spark_me
from spark_me import masking, sparse
from spark_me.config.training import OptimConfig
from spark_me.decoder import DECODERS, ConvNeXtDecoder, Decoder
from spark_me.dense import strip
from spark_me.devices import float32_products
from spark_me.encoder import sparsify
from spark_me.errors import UserError
from spark_me.masked_dense import MaskedDense
from spark_me.networks import dense_network, patch_size_of
from spark_me.trace import Trace, graph_of_maps, normalises_by_layer, trace
from spark_me.train.schedules import build_optimizer

DTYPES = ("float32", "tf32", "bfloat16", "float16")
"""Precision of the computation, with parameters in float32: tf32 on GPUs alone, the last two by autocast."""
BACKENDS = (*sparse.BACKENDS, "masked_dense", "dense")
"""The sparse ones, their dense simulation, and the dense network without any mask."""
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
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
    decoder: str = "unet"

    @property
    def patch_size(self) -> int:
        """P, the encoder's total stride."""
        return patch_size_of(self.encoder)

    @property
    def grid(self) -> tuple[int, int]:
        """(fh, fw)."""
        return masking.grid_of(self.image_size, self.patch_size)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return math.prod(self.grid)

    @property
    def visible_patches(self) -> int:
        """Those of them that stay visible."""
        return masking.count_visible(self.grid, self.mask_ratio) if self.mask_ratio else self.patches

    def check(self, scopes: Sequence[str]) -> None:
        """Refuse now what would fail later.

        Raises:
            UserError: for anything that does not fit, with the way out.
        """
        if self.batch < 1:
            raise UserError(f"--batch {self.batch}: give at least one image")
        if not 0 <= self.mask_ratio < 1:
            raise UserError(f"--mask-ratio {self.mask_ratio:g} is no share of patches: choose one from 0 to below 1")
        if self.batch * self.visible_patches < 2:
            raise UserError("batch norm needs two values, not one visible patch: raise --batch or --image-size")
        if scopes != ("encoder",):
            if self.mask_ratio == 0:
                raise UserError("mask ratio 0 hides no patch to reconstruct: use --scope encoder, or a larger ratio")
            with torch.device("meta"):  # refuses a width that does not fit
                DECODERS[self.decoder](self.decoder_width, self.patch_size, IN_CHANNELS)
        on_gpu = self.device == "cuda"
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"unknown device {self.device!r}: choose auto, cpu or cuda")
        if on_gpu and not torch.cuda.is_available():
            raise UserError("torch sees no CUDA device here: use --device cpu")
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.dtype == "tf32" and not on_gpu:
            raise UserError("--dtype tf32 is a way of GPUs to compute: use --dtype float32 on a CPU")
        if self.dtype == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported():
            name = torch.cuda.get_device_name()
            raise UserError(f"{name} does not compute in bfloat16: use --dtype float16 or float32")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within, products take this precision, and cuDNN searches for its best kernels, as shapes do not change."""
        cudnn = torch.backends.cudnn
        before, cudnn.benchmark = cudnn.benchmark, True
        try:
            with float32_products(tf32=self.dtype == "tf32"):
                yield
        finally:
            cudnn.benchmark = before

    def autocast(self) -> torch.autocast:
        """What the forward pass runs under."""
        short = self.dtype in ("bfloat16", "float16")
        return torch.autocast(self.device, getattr(torch, self.dtype) if short else None, enabled=short)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Noise as images [B, 3, H, W] on the device, visible bool [B, fh, fw] on the CPU, the same at every call."""
        on_device = torch.Generator(self.device).manual_seed(0)
        images = torch.randn(self.batch, IN_CHANNELS, *self.image_size, generator=on_device, device=self.device)
        if self.mask_ratio == 0:
            return images, torch.ones(self.batch, *self.grid, dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        return images, masking.draw_visible(self.batch, self.grid, self.mask_ratio, generator=generator)


class Variant(NamedTuple):
    """A backend, and how a dense one runs."""

    backend: str
    memory_format: str | None = None
    """A key of `MEMORY_FORMATS`; None for the sparse backends, whose rows know no other order."""
    compiled: bool = False
    """By `torch.compile`."""

    @property
    def mode(self) -> str:
        """How it runs; a dash for the sparse backends, which know one way only."""
        return "-" if self.memory_format is None else self.memory_format + ", compiled" * self.compiled

    def __str__(self) -> str:
        return self.backend if self.memory_format is None else f"{self.backend} ({self.mode})"


def variants_of(backends: Sequence[str], *, compiled: bool = False) -> list[Variant]:
    """What has to run: dense backends in every mode that may be the fastest, also compiled if that is wanted.

    Raises:
        UserError: for an unknown backend.
    """
    variants = []
    for backend in dict.fromkeys(backends):
        if backend not in BACKENDS:
            close = difflib.get_close_matches(backend, BACKENDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose among {', '.join(BACKENDS)}"
            raise UserError(f"unknown backend {backend!r}: {hint}")
        if backend in sparse.BACKENDS:
            variants.append(Variant(backend))
        else:
            variants += [Variant(backend, memory_format) for memory_format in MEMORY_FORMATS]
            variants += [Variant(backend, "channels_last", compiled=True)] * compiled
    return variants


Work = Callable[[Tensor, Tensor], None]
"""What is timed: (images, visible) → nothing."""


def encoder_pass(case: Case, backend: str) -> tuple[nn.Module, Work]:
    """The encoder alone, forward and backward; the loss is the sum of the means of its feature maps."""
    if backend == "dense":
        model = dense_encoder(case.encoder)
        return model, _forward_backward(case, lambda images, visible: sum_of_means(model(images)))
    if backend == "masked_dense":
        traced = headless(case.encoder)
        model = MaskedDense(traced.network, traced.taps)
        return model, _forward_backward(case, lambda images, visible: sum_of_means(model(images, visible)))
    model = sparsify(dense_network(case.encoder))

    def loss(images: Tensor, visible: Tensor) -> Tensor:
        # a new mask in every step of training: its pyramid and tables belong to the pass
        pyramid = sparse.Pyramid(visible, case.patch_size, backend, images.device)
        return sum_of_means([x.F for x in model(sparse.to_sparse(images, pyramid))])

    return model, _forward_backward(case, loss)


def step_pass(case: Case, backend: str) -> tuple[nn.Module, Work]:
    """The pretraining step with densify, decoder and loss, forward and backward."""
    model: nn.Module
    if backend == "dense":
        model = DenseSparK(case.encoder, case.decoder_width, case.decoder)
    elif backend == "masked_dense":
        model = MaskedDenseSparK(headless(case.encoder), decoder_width=case.decoder_width, decoder=case.decoder)
    else:
        model = spark_me.build_model(
            case.encoder,
            image_size=case.image_size,
            mask_ratio=case.mask_ratio,
            decoder=case.decoder,
            decoder_width=case.decoder_width,
            drop_path=0.0,
            backend=backend,
        )
    return model, _forward_backward(case, model)


def training_pass(case: Case, backend: str) -> tuple[nn.Module, Work]:
    """A whole training step: the pretraining step, its gradient clipped, and LAMB, as the default configuration has it.

    At a learning rate of 0, which costs the same and leaves the weights as they are.
    """
    model, forward_backward = step_pass(case, backend)
    optim = OptimConfig()
    optimizer = build_optimizer(model, optim)

    def work(images: Tensor, visible: Tensor) -> None:
        forward_backward(images, visible)
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm or math.inf)
        optimizer.step()

    return model, work


SCOPES: dict[str, Callable[[Case, str], tuple[nn.Module, Work]]] = {
    "encoder": encoder_pass,
    "step": step_pass,
    "training": training_pass,
}
"""How much of training is measured: from a case and a backend, a model and what is timed of it."""


WORK = {
    "encoder": "forward + backward",
    "step": "forward + backward",
    "training": "forward + backward, clipping + LAMB",
}


def _forward_backward(case: Case, loss: Callable[[Tensor, Tensor], Tensor]) -> Work:
    def work(images: Tensor, visible: Tensor) -> None:
        with case.autocast():
            value = loss(images, visible)
        value.backward()

    return work


def sum_of_means(features: Sequence[Tensor]) -> Tensor:
    """A loss that every feature is part of."""
    return torch.stack([x.mean(dtype=torch.float32) for x in features]).sum()


class Workload:
    """A scope's work on a model with random weights.

    Attributes:
        model: what is trained.
    """

    def __init__(self, case: Case, scope: str, variant: Variant) -> None:
        self._case = case
        # the sparse backends build their pyramid from a mask on the CPU, as training does
        self._mask_device = "cpu" if variant.backend in sparse.BACKENDS else case.device
        self._memory_format = MEMORY_FORMATS[variant.memory_format or "contiguous"]
        self.model, self._work = SCOPES[scope](case, variant.backend)
        for name, parameter in self.model.named_parameters():
            # Encoders may start a block's last norm at zero; products with zeros could cost less than training's do.
            if parameter.dim() == 1 and name.endswith("weight"):
                nn.init.ones_(parameter)
        self.model.to(case.device).to(memory_format=self._memory_format)  # type: ignore[call-overload]
        if variant.compiled:
            self.model.compile(dynamic=False)
        self._inputs = self.inputs(case)

    def inputs(self, case: Case) -> tuple[Tensor, Tensor]:
        """The case's images, in this backend's memory format, and mask."""
        images, visible = case.draw()
        return images.contiguous(memory_format=self._memory_format), visible.to(self._mask_device)

    def run(self, inputs: tuple[Tensor, Tensor] | None = None) -> None:
        """Do the work once, on this workload's own inputs when None. A GPU may still be at it when this returns."""
        with self._case.computing():
            self._work(*(inputs or self._inputs))

    def clear(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad(set_to_none=True)


def headless(name: str) -> Trace:
    """A network by name, without the parameters behind its last map."""
    traced = trace(dense_network(name))
    strip(traced.network, {*traced.state_names})
    return traced


def dense_encoder(name: str) -> nn.Module:
    """The ordinary dense encoder: images [B, 3, H, W] → its maps [B, C_i, H/s_i, W/s_i]."""
    traced = headless(name)
    return fx.GraphModule(traced.network, graph_of_maps(traced))


class MaskedDenseSparK(nn.Module):
    """The whole method on the simulation; parameters are named as in `spark_me.spark.SparK`, the encoder's below
    `encoder.network`.
    """

    def __init__(
        self, traced: Trace, in_channels: int = IN_CHANNELS, decoder_width: int = 512, decoder: str = "unet"
    ) -> None:
        """`traced` becomes the simulation's own; the decoder is of `DECODERS`, its width that at its deepest scale."""
        super().__init__()
        self.patch_size = traced.strides[-1]
        self.encoder: nn.Module = MaskedDense(traced.network, traced.taps)
        self.decoder = DECODERS[decoder](decoder_width, self.patch_size, in_channels)
        if decoder == "block":
            self.densify: Any = MaskedProjection(traced.channels[-1], decoder_width)
            return
        norm = partial(LayerNorm2d, eps=1e-6) if normalises_by_layer(traced.network) else nn.BatchNorm2d
        self.densify = nn.ModuleList(
            MaskedDensify(width_in, width_out, 3 if level else 1, norm)
            for level, (width_in, width_out) in enumerate(zip(traced.channels[::-1], self.decoder.widths))
        )

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """The pretraining loss of images [B, C, H, W] with visible bool [B, fh, fw]."""
        size = self.patch_size
        # unfold orders a patch as [C, P, P]; the mean over a patch does not depend on the order
        targets, predictions = (
            functional.unfold(x, size, stride=size) for x in (images, self.predict(images, visible))
        )
        mean = targets.mean(dim=1, keepdim=True)
        variance = (targets - mean).square().sum(dim=1, keepdim=True) / (targets.shape[1] - 1)
        errors = (predictions - (targets - mean) / torch.sqrt(variance + 1e-6)).square().mean(dim=1)
        hidden = ~visible.flatten(1)
        return (errors * hidden).sum() / hidden.sum()

    def predict(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normalised pixels [B, C, H, W]."""
        features = self.encoder(images, visible)
        if isinstance(self.decoder, ConvNeXtDecoder):
            return plain_decode_block(self.decoder, self.densify(features[-1], visible))
        return plain_decode(self.decoder, [f(x, visible) for f, x in zip(self.densify, reversed(features))])


class DenseSparK(MaskedDenseSparK):
    """The simulation's decoder and loss on an ordinary dense encoder that sees every patch: the step's baseline."""

    def __init__(self, name: str, decoder_width: int, decoder: str = "unet") -> None:
        super().__init__(headless(name), decoder_width=decoder_width, decoder=decoder)
        self.encoder = dense_encoder(name)
        for densify in self.densify.modules():
            if hasattr(densify, "mask_token"):
                del densify.mask_token

    def predict(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normalised pixels [B, C, H, W]; nothing is hidden."""
        features = self.encoder(images)
        if isinstance(self.decoder, ConvNeXtDecoder):
            return plain_decode_block(self.decoder, self.densify.projection(features[-1]))
        scales: Any = zip(self.densify, reversed(features))
        return plain_decode(self.decoder, [densify.projection(densify.norm(x)) for densify, x in scales])


class MaskedDensify(nn.Module):
    """Norm over visible sites, the mask token at hidden ones, a projection."""

    def __init__(self, channels: int, width: int, kernel_size: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(channels)
        # not a child: the norm's parameters have one name
        self.__dict__["_masked_norm"] = MaskedDense(self.norm, [("", 1)])
        self.mask_token = nn.Parameter(torch.zeros(1, channels, 1, 1))
        identity = kernel_size == 1 and channels == width
        self.projection = (
            nn.Identity() if identity else nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2)
        )

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """[B, C, h, w] → [B, width, h, w]."""
        mask = masking.upsample_visible(visible, x.shape[2] // visible.shape[1])[:, None]
        if isinstance(self.norm, nn.BatchNorm2d):
            normalised = self.__dict__["_masked_norm"](x, visible)[0]
        else:  # it treats each site by itself: what hidden ones get is replaced by the token
            normalised = self.norm(x)
        return self.projection(torch.where(mask, normalised, self.mask_token.to(normalised.dtype)))


class MaskedProjection(nn.Module):
    """FCMAE's: a projection, then the mask token at hidden positions."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """[B, C, fh, fw] → [B, width, fh, fw]."""
        x = self.projection(x)
        return torch.where(visible[:, None], x, self.mask_token.to(x.dtype))


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


def plain_decode_block(decoder: ConvNeXtDecoder, x: Tensor) -> Tensor:
    """FCMAE's decoder on channels first, layer by layer: a map [B, width, fh, fw] → pixels [B, C, H, W]."""
    block, side = decoder.block, decoder.patch_size

    def at_each(layer: nn.Linear, x: Tensor) -> Tensor:
        return functional.conv2d(x, layer.weight[:, :, None, None], layer.bias)

    def of_channels(vector: Tensor) -> Tensor:
        return vector[:, None, None]

    y = block.dwconv(x)
    y = y - y.mean(dim=1, keepdim=True)
    y = y / (y.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    y = functional.gelu(at_each(block.pwconv1, y * of_channels(block.norm.weight) + of_channels(block.norm.bias)))
    response = y.square().sum(dim=(2, 3), keepdim=True).sqrt()
    relative = response / (response.mean(dim=1, keepdim=True) + 1e-6)
    y = y * (1 + of_channels(block.grn.weight) * relative) + of_channels(block.grn.bias)
    patches = decoder.prediction(x + at_each(block.pwconv2, y))  # a patch's rows, its columns, channels
    return functional.pixel_shuffle(patches.unflatten(1, (side**2, -1)).transpose(1, 2).flatten(1, 2), side)
