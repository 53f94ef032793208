"""`spark-me export`: a model for use elsewhere, checked against the network before it is written."""

import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spark_me.config.data import statistics_of
from spark_me.downstream.classifier import IMAGENET_CLASSES, ModelFile, imagenet_classes, read_model
from spark_me.errors import UserError, install_text, printable
from spark_me.files import atomic_write, check_output
from spark_me.networks import patch_size_of
from spark_me.weights.files import check_target
from spark_me.weights.transfer import write_weights

METADATA_FILE = "spark_me.json"
"""The entry of a TorchScript or torch.export archive that holds the metadata."""
ONNX_LIMIT = 2**31
"""Bytes that a file of ONNX may have."""


class Exported(NamedTuple):
    """An exported program."""

    content: bytes
    """Of its file."""
    run: Callable[[Tensor], Tensor]
    """Runs the program in `content`, as loaded again: images [B, C, H, W] → output [B, …]."""


def to_onnx(network: nn.Module, images: Tensor, output: str, metadata: Mapping[str, str]) -> Exported:
    """ONNX, run by onnxruntime; the metadata are properties of the model.

    Args:
        network: in evaluation mode, on the CPU.
        images: [B, C, H, W] with B > 1; other batches may have another B.
        output: its name.
        metadata: texts.

    Raises:
        UserError: if a package is missing, or the weights do not fit into one file.
    """
    onnxruntime = _packages("onnx", "onnxscript", "onnxruntime")[-1]
    if sum(parameter.nbytes for parameter in network.parameters()) >= ONNX_LIMIT:
        raise UserError("the weights exceed ONNX's 2 GiB a file: use --to torch-export")
    with _quiet():
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            dynamic_shapes=_batch_is_dynamic(),
            input_names=["images"],
            output_names=[output],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return Exported(content, lambda batch: torch.from_numpy(session.run([output], {"images": batch.numpy()})[0]))


def trace(network: nn.Module, images: Tensor, output: str, metadata: Mapping[str, str]) -> Exported:
    """TorchScript, traced; the arguments are those of `to_onnx`, and outputs have no names."""
    file = BytesIO()
    with _quiet(), torch.no_grad():
        torch.jit.save(
            torch.jit.trace(network, (images,), check_trace=False),
            file,
            _extra_files={METADATA_FILE: json.dumps(dict(metadata))},
        )
        loaded = torch.jit.load(BytesIO(file.getvalue()), map_location="cpu")
    return Exported(file.getvalue(), loaded)


def export_program(network: nn.Module, images: Tensor, output: str, metadata: Mapping[str, str]) -> Exported:
    """A torch.export program; the arguments are those of `to_onnx`, and outputs have no names."""
    file = BytesIO()
    with _quiet():
        program = torch.export.export(network, (images,), dynamic_shapes=_batch_is_dynamic())
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(dict(metadata))})
        loaded = torch.export.load(BytesIO(file.getvalue())).module()
    return Exported(file.getvalue(), loaded)


def _batch_is_dynamic() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings, which are about their own insides; what comes out is compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _packages(*names: str) -> list[Any]:
    try:
        return [importlib.import_module(name) for name in names]
    except ModuleNotFoundError as error:
        raise UserError(f"ONNX needs {', '.join(names)}: {install_text('export')}") from error


LAYOUTS = ("torchvision", "timm")
PROGRAMS: Mapping[str, tuple[Callable[..., Exported], tuple[str, ...]]] = {
    "onnx": (to_onnx, (".onnx",)),
    "torchscript": (trace, (".pt", ".ts")),
    "torch-export": (export_program, (".pt2",)),
}
"""By name: what exports, and the suffixes of its files."""
TOLERANCE = 1e-4
"""Largest absolute difference to the network that an exported program may have."""
BATCHES = (1, 3)
"""That a program is checked on; it is exported with another."""


class ExportError(UserError):
    """An exported program does not compute what the network computes."""

    exit_code = 1


def export(
    source: str | os.PathLike[str],
    out: Path,
    to: str,
    *,
    image_size: tuple[int, int] | None = None,
    raw: bool = False,
) -> None:
    """Export a classifier (images → logits), or an encoder alone (images → the deepest features, averaged).

    Programs take float32 batches of any size of normalised images, and carry as text what a user needs: class names,
    mean and deviation, image size, encoder. They are run on random images before they are written.

    Args:
        source: what `load_encoder` takes.
        out: file to write.
        to: onnx, torchscript or torch-export for a program; torchvision or timm for a state dict.
        image_size: (H, W) of a program's images; those of the test images when None.
        raw: of a fine-tuning checkpoint, the weights themselves and not their moving average (EMA).

    Raises:
        UserError: if the source cannot be read, `to` cannot hold it or needs a package that is missing, or the file
            cannot be written.
        ExportError: if a program's output differs from the network's by more than 1e-4.
    """
    if to in LAYOUTS:
        if image_size is not None:
            raise UserError(f"--image-size is for programs ({', '.join(PROGRAMS)}): a state dict takes any size")
        check_target(out, to, source)
        file = read_model(source, raw=raw)
        done = write_weights(file.weights, file.source, out, to)
        print(f"{printable(str(out))}: {done.encoder} in {done.layout} layout")
        for note in done.notes:
            print(f"note: {note}")
        return
    _check_program(out, to)
    check_output(out, source)
    file = read_model(source, raw=raw)
    height, width = image_size or file.preprocessing.size
    smallest = patch_size_of(file.weights.encoder)
    if min(height, width) < smallest:
        raise UserError(f"--image-size {height} {width}: must be at least {smallest}, the total stride")
    network = file.network(classifier=file.num_classes is not None)
    make, _ = PROGRAMS[to]
    output = "features" if file.num_classes is None else "logits"
    exported = make(network, torch.randn(2, file.in_channels, height, width), output, metadata(file, (height, width)))
    difference = _compare(network, exported.run, (file.in_channels, height, width))
    with atomic_write(out) as opened:
        opened.write(exported.content)
    print(
        f"{printable(str(out))}: {file.weights.encoder} as {to}, images [B, {file.in_channels}, {height}, {width}] "
        f"→ {output}; largest difference to the network {difference:.1e}"
    )


def metadata(file: ModelFile, image_size: tuple[int, int]) -> dict[str, str]:
    """What a user of a program needs to know, each entry as JSON but for the encoder's name."""
    mean, std = statistics_of(file.preprocessing.data, file.in_channels)
    classes = imagenet_classes() if file.classes is None and file.num_classes == IMAGENET_CLASSES else file.classes
    entries = {"encoder": file.weights.encoder, "mean": json.dumps(mean), "std": json.dumps(std)}
    entries["image_size"] = json.dumps(image_size)
    return entries | ({} if classes is None else {"classes": json.dumps(classes)})


def _check_program(out: Path, to: str) -> None:
    if to not in PROGRAMS:
        raise UserError(f"--to {to}: choose one of {', '.join((*PROGRAMS, *LAYOUTS))}")
    suffixes = PROGRAMS[to][1]
    if out.suffix not in suffixes:
        raise UserError(f"{out}: {to} files end in {' or '.join(suffixes)}")


@torch.no_grad()
def _compare(network: nn.Module, run: Callable[[Tensor], Tensor], shape: tuple[int, int, int]) -> float:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, *shape, generator=generator) for size in BATCHES]
    # torch's maximum keeps a NaN, Python's may lose it.
    difference = torch.stack([_difference(run(images), network(images)) for images in batches]).max().item()
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the exported program differs from the network by {difference:.1e}, more than {TOLERANCE:.0e}: "
            "nothing was written; try another format"
        )
    return difference


def _difference(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual - expected).abs().max() if actual.shape == expected.shape else torch.tensor(torch.inf)
