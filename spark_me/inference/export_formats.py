"""ONNX, TorchScript and torch.export programs in memory, with a function that runs what will be written."""

import importlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spark_me.errors import UserError, install_text

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
