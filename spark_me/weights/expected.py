"""Which tensors a model holds, names and shapes, and strictness: every one of them is there, and no other.

Names are canonical: of the dense network, `encoder.` before what its maps depend on and `head.` before the rest; beside
them `densify.` and `decoder.` as in `spark_me.spark.SparK`. No name of the one kind of decoder is one of the other's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from spark_me.decoder import ConvNeXtDecoder, Decoder
from spark_me.errors import UserError, listed, shown
from spark_me.networks import ENCODERS, OF_TIMM, TIMM, empty_network, list_encoders, makes_classifier
from spark_me.trace import normalises_by_layer, trace

Shape = tuple[int, ...]
ENCODER, HEAD = "encoder.", "head."
SPARK = ("densify.", "decoder.")
"""How the names begin of what SparK adds."""
COUNTER = "num_batches_tracked"
_CLASSES = 1009
"""Of the networks that are asked for shapes: as many channels has no layer, so that a classifier's show."""
_BLOCK = ("densify.projection.", "densify.mask_token", "decoder.block.", "decoder.prediction.")
"""How they begin of what SparK adds with FCMAE's decoder."""
_LAST = ("decoder.projection.", "decoder.prediction.")
_WIDTHS = ("decoder.blocks.0.conv1.weight", "decoder.blocks.0.norm1.weight", "densify.projection.weight")
"""Tensors whose first size is the decoder's width."""
_WIDTH, _WIDEST = 512, 1 << 16


class Architecture:
    """An encoder and the dense network that it is of; that is traced when it is first asked which part is the encoder.

    Attributes:
        name: of the encoder, as `spark_me.networks` knows it; of one that it does not know, its class.
        in_channels: of the images.
        library: torchvision or timm; dense of all other networks.
        shapes: of the network's tensors, in the order of its state dict.
        image_weight: name of the weight whose inputs are the image's channels.
        classifier: names of the tensors whose first size is the number of classes.
    """

    def __init__(self, name: str, network: nn.Module, in_channels: int, library: str, *, named: bool = True) -> None:
        self.name, self.in_channels, self.library, self._named = name, in_channels, library, named
        self.shapes = shapes_of(network)
        self.image_weight = next(
            (f"{path}.weight" for path, each in network.named_modules() if isinstance(each, nn.Conv2d)), ""
        )
        self.classifier = frozenset(name for name, shape in self.shapes.items() if shape[:1] == (_CLASSES,))
        self._network: Any = network

    def of_images(self, image: Tensor | None) -> "Architecture":
        """The same of images of as many channels as `image_weight` is of in a file; its size says it."""
        if image is None or not self._named:
            return self
        channels = image.numel() * self.in_channels / math.prod(self.shapes[self.image_weight])
        return architecture_of(self.name, int(channels)) if channels >= 1 and channels == int(channels) else self

    @cached_property
    def encoder(self) -> frozenset[str]:
        """Names of the tensors that the network's maps depend on."""
        return frozenset(self.shapes if self._is_sparse else self._traced.state_names)

    @property
    def ends(self) -> bool:
        """Whether it is known what follows the maps; else that may be anything."""
        return len(self.encoder) < len(self.shapes)

    def canonical(self, name: str) -> str | None:
        """The canonical name of a tensor of the network; None for one that it does not have."""
        if name in self.encoder:
            return ENCODER + name
        beside = not self.ends and name.partition(".")[0] not in {each.partition(".")[0] for each in self.encoder}
        return HEAD + name if beside or name in self.shapes else None

    def part_of(self, name: str) -> str:
        """Of what a canonical name is: encoder, neck (what is between that and the classifier), classifier; densify and
        decoder of the UNet, block of FCMAE's decoder and its mask token.
        """
        if name.startswith(_BLOCK):
            return "block"
        part, _, rest = name.partition(".")
        if part != "head":
            return part
        return "classifier" if rest in self.classifier or not self.ends else "neck"

    def texts(self) -> dict[str, str]:
        """The parts that a checkpoint may lack, in words; densifying comes and goes with the decoder."""
        neck = self.shapes.keys() - self.encoder - self.classifier
        norm = all(len(self.shapes[name]) < 2 for name in neck)
        return {
            "decoder": "decoder with mask tokens",
            "block": "block decoder with mask token",
            "neck": "final norm" if norm else "layers before the classifier",
            "classifier": "classifier head",
        }

    def classes(self, tensors: Mapping[str, Tensor]) -> int | None:
        """How many classes there are, by canonical tensors; None without a classifier."""
        ends = [tensors[HEAD + name] for name in self.shapes if name in self.classifier and HEAD + name in tensors]
        return next((_first_size(tensor) for tensor in ends), None)

    def expected(self, tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
        """Canonical names and shapes of a model with the parts, decoder width and classes of these tensors."""
        parts = {self.part_of(name) for name in tensors}
        parts |= {"encoder", *(["neck"] if "classifier" in parts else [])}
        classes = self.classes(tensors)
        network = {str(self.canonical(name)): shape for name, shape in self.shapes.items()}
        expected = {
            name: (classes, *shape[1:]) if classes is not None and self.part_of(name) == "classifier" else shape
            for name, shape in network.items()
            if self.part_of(name) in parts
        }
        if not self.ends:  # nobody knows better
            expected |= {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(HEAD)}
        width = next((_first_size(tensors[name]) for name in _WIDTHS if name in tensors), _WIDTH)
        if parts & {"densify", "decoder"}:
            expected |= self._unet(width)
        if "block" in parts:
            expected |= self._block(width)
        return expected

    def _unet(self, width: int) -> dict[str, Shape]:
        scales, by_layer = self._scales, normalises_by_layer(self._network)
        patch_size = scales.strides[-1]
        possible = 0 < width <= _WIDEST and width % patch_size == 0
        with torch.device("meta"):
            decoder = Decoder(width if possible else _WIDTH, patch_size, self.in_channels)
            levels = enumerate(zip(reversed(scales.channels), decoder.widths))
            densify = nn.ModuleList(_densify(*sizes, 3 if level else 1, by_layer) for level, sizes in levels)
        return shapes_of(nn.ModuleDict({"densify": densify, "decoder": decoder}))

    def _block(self, width: int) -> dict[str, Shape]:
        width = width if 0 < width <= _WIDEST else _WIDTH
        with torch.device("meta"):
            decoder = ConvNeXtDecoder(width, self._scales.strides[-1], self.in_channels)
            densify = nn.Module()  # with the tensors of `spark_me.densify.DensifyDeepest`, which needs MinkowskiEngine
            densify.projection = nn.Conv2d(self._scales.channels[-1], width, 1)
            densify.mask_token = nn.Parameter(torch.empty(1, width, 1, 1))
        return shapes_of(nn.ModuleDict({"densify": densify, "decoder": decoder}))

    @property
    def _scales(self) -> Any:
        return self._network if self._is_sparse else self._traced

    @property
    def _is_sparse(self) -> bool:
        return hasattr(self._network, "total_stride")

    @cached_property
    def _traced(self) -> Any:
        return trace(self._network, self.in_channels)


@lru_cache(maxsize=64)
def architecture_of(name: str, in_channels: int = 3) -> Architecture:
    """That of an encoder by name; its dense network is built without values.

    Raises:
        UserError: for an unknown name or a missing library; when it is traced, for one that cannot become sparse.
    """
    ends = makes_classifier(name)
    network = empty_network(name, in_channels, _CLASSES if ends else None)
    library = "timm" if name.startswith(TIMM) or name in OF_TIMM else "torchvision"
    found = Architecture(name, network, in_channels, "dense" if name in _registered() else library)
    if not ends:  # as in `spark_me.dense.build_network`
        channels = found._traced.channels[-1]
        found.shapes = {key: shape for key, shape in found.shapes.items() if key in found.encoder}
        found.shapes |= {"fc.weight": (_CLASSES, channels), "fc.bias": (_CLASSES,)}
        found.classifier = frozenset(("fc.weight", "fc.bias"))
    return found


def architecture_in(network: nn.Module) -> Architecture | None:
    """That of a sparse encoder or a dense network, whatever it is; None if it has no convolution.

    Raises:
        UserError: if it is no convnet that can become sparse.
    """
    first = next((each for each in network.modules() if isinstance(each, nn.Conv2d)), None)
    if first is None:
        return None
    name = getattr(network, "network", type(network).__name__)
    found = Architecture(name, network, first.in_channels, "dense", named=False)
    head = [name.rpartition(".") for name in found.shapes if name not in found.encoder]
    found.classifier = frozenset(f"{path}.{leaf}" for path, _, leaf in head if path == head[-1][0])  # it comes last
    return found


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """Of a module's tensors, in the order of its state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _registered() -> set[str]:
    return {*list_encoders()} - ENCODERS.keys()


def _first_size(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def _densify(channels: int, width: int, kernel_size: int, by_layer: bool) -> nn.Module:
    """Holds the tensors of `spark_me.densify.Densify`, which needs MinkowskiEngine."""
    part = nn.Module()
    part.norm = nn.LayerNorm(channels) if by_layer else nn.BatchNorm2d(channels)
    part.mask_token = nn.Parameter(torch.empty(1, channels, 1, 1))
    if kernel_size > 1 or channels != width:  # equal widths need no projection at the deepest scale
        part.projection = nn.Conv2d(channels, width, kernel_size)
    return part


LISTED = 12
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
COUNTERS = (COUNTER, "n_averaged")
"""How the names of integers end: batches that a norm has seen, and what torch's averaging has taken in."""


class WeightsError(UserError):
    """A checkpoint does not fit. The message lists the first keys, the attributes all of them.

    Attributes:
        missing: names that are needed and not there.
        unexpected: names that are there and not needed.
        mismatched: name → (shape found, shape needed).
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[str],
        unexpected: Sequence[str],
        mismatched: Mapping[str, tuple[Shape, Shape]],
    ) -> None:
        super().__init__(message)
        self.missing = list(missing)
        self.unexpected = list(unexpected)
        self.mismatched = dict(mismatched)

    def __reduce__(self) -> tuple[Any, ...]:
        # Processes that train together exchange their errors.
        return type(self), (str(self), self.missing, self.unexpected, self.mismatched)


def check_tensors(
    found: Mapping[str, Shape],
    needed: Mapping[str, Shape],
    where: str,
    *,
    architecture: Architecture,
    causes: Sequence[str] = (),
    label: Callable[[str], str] = str,
) -> None:
    """Compare what is there with what is needed.

    Args:
        found, needed: canonical name → shape.
        where: the start of the message: the file, and what it should fit.
        architecture: whose names they are.
        causes: what the caller knows to be the cause: it is said in place of the lists.
        label: how a name is written in the message.

    Raises:
        WeightsError: listing missing keys, unexpected keys, and shapes that differ, with the likely cause. Its
            attributes have them all.
    """
    missing = [label(name) for name in needed if name not in found]
    unexpected = [label(name) for name in found if name not in needed]
    mismatched = {name: (found[name], needed[name]) for name in needed if found.get(name, needed[name]) != needed[name]}
    shapes = [f"{shown(label(name))} is {show(a)}, needed is {show(b)}" for name, (a, b) in mismatched.items()]
    problems = [
        f"{len(items)} {what}: {listed(items, LISTED, separator)}"
        for what, items, separator in (
            ("missing", [*map(shown, missing)], ", "),
            ("unexpected", [*map(shown, unexpected)], ", "),
            ("of another shape", shapes, "; "),
        )
        if items
    ]
    if problems:
        likely = ", ".join(_shape_causes(mismatched, architecture))
        said = f"{'; '.join(problems)}" + (f"; likely cause: {likely}" if likely else "")
        message = f"{where}: {', '.join(causes) or said}"
        labelled = {label(name): shapes for name, shapes in mismatched.items()}
        raise WeightsError(message, missing, unexpected, labelled)


def require_numbers(state: Mapping[str, Tensor], where: str, like: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """Refuse tensors that are no weights: counters of norms are integers, all else is real, floating and finite.

    Args:
        state: name → tensor; of those without values (on the meta device) only the type is looked at.
        where: the file, for messages.
        like: tensors by name whose types are right, too.

    Raises:
        UserError: naming the first that is none.
    """
    for name, tensor in state.items():
        counter = name.endswith(COUNTERS) and tensor.dtype in INTEGERS
        same = name in like and like[name].dtype == tensor.dtype
        if not (tensor.dtype in FLOATS or counter or same):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{where}: {shown(name)} is of {kind}, where weights are real numbers: take another file")
        if tensor.dtype in FLOATS and not tensor.is_meta and not tensor.isfinite().all():
            raise UserError(f"{where}: {shown(name)} is not finite: take an earlier checkpoint, or another file")


def show(shape: Shape) -> str:
    """A shape for people: 64×3×7×7."""
    return shown("×".join(map(str, shape))) or "a scalar"


def _shape_causes(mismatched: Mapping[str, tuple[Shape, Shape]], architecture: Architecture) -> list[str]:
    """What differences of shape usually come from, each with what to do."""
    causes = {}
    for name, (found, needed) in mismatched.items():
        part = architecture.part_of(name)
        is_image = name == ENCODER + architecture.image_weight
        if is_image and len(found) == 4:
            causes["channels"] = f"another number of image channels (in_channels={found[1]} would fit)"
        elif is_image or (name.startswith(_LAST) and found[:1] != needed[:1]):
            causes.setdefault("channels", "another number of image channels (in_channels)")
        elif part in ("densify", "decoder", "block"):
            causes["width"] = "another decoder width (decoder_width)"
        elif part == "classifier" and found and needed:
            causes["classes"] = f"a classifier of {found[0]} classes instead of {needed[0]}"
        else:
            causes["blocks"] = "other blocks or widths (a variant such as Wide ResNet, or another encoder)"
    return list(causes.values())
