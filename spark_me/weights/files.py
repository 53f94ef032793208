"""Checkpoint files: read without running code, written atomically, with a model card."""

import hashlib
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spark_me.errors import UserError, first_line, shown
from spark_me.files import atomic_write, check_output, is_file
from spark_me.weights.layouts import LAYOUTS, Layout

SAFETENSORS = ".safetensors"
SUFFIXES = (".pth", ".pt", SAFETENSORS)
PICKLE = ".pkl"
"""Only ever written: reading it would run what is in it."""
# Under which entries files keep their state dict; none of them is the name of a tensor.
WRAPPERS = ("state_dict", "model", "module")
DEEPEST = 8
"""Entries that are looked for within each other; a file may hold one that holds itself."""
CARD = "spark_me"
"""Where a .pth file keeps its model card."""
DIGEST = "tensors_sha256"
"""Where a .safetensors file keeps the digest of its tensors."""
ARCHIVE_ERRORS = (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error)
"""What Python raises for damaged archives."""
END = struct.Struct("<4s4H2LH")
"""An archive's last record, which ends with the length of a comment behind it."""
END_MARK = b"PK\5\6"
FOLDER = 0x10
"""The attribute by which an archive's entry says that it is one."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The bare state dict of a file, on the CPU; nothing in the file is run.

    Raises:
        UserError: if the file is missing, damaged, no checkpoint, or holds more than plain data.
    """
    return bare_state(read_content(path), str(path))


def read_content(path: Path) -> Any:
    """All that a file holds, on the CPU; nothing in the file is run.

    Raises:
        UserError: as `read_state`, but for any plain content.
    """
    if not is_file(path):
        raise UserError(f"{path}: no such file")
    try:
        require_weights(path)
        require_sound(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): check its mode, or give another file") from None
    if path.suffix == SAFETENSORS:
        package = _safetensors()
        return _reading(path, lambda: _load_safetensors(package, path))
    return _reading(path, lambda: torch.load(path, map_location="cpu", weights_only=True))


def require_weights(path: Path) -> None:
    """Refuse exported programs, which are no checkpoints.

    Raises:
        UserError: saying what the file is.
    """
    kind = None
    names = _members(path)
    if any("/code/" in name for name in names):
        kind = "a TorchScript program"
    elif any(name.endswith(("/archive_format", "/models/model.json")) for name in names):
        kind = "a program of torch.export"
    elif path.suffix == ".onnx":
        kind = "an ONNX program"
    if kind is not None:
        raise UserError(f"{path}: is {kind}, no file of weights: give the checkpoint that it was exported from")


def require_sound(path: Path) -> None:
    """Verify the archive that torch.save writes, before torch takes it as it is: torch checks no checksum.

    Every CRC-32 is computed. Whatever lets two readers of archives see different ones is refused, as are entries
    that would grow when they are read. Files of other kinds pass; what torch wrote before 1.6 has no
    checksums.

    Args:
        path: a file that is there; some megabytes of it are in memory at a time.

    Raises:
        UserError: in one line, if the archive is damaged, or none that torch writes.
        OSError: if it cannot be opened.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # what torch, too, goes by
            return
        size = file.seek(0, os.SEEK_END)
        try:
            problem = _problem_of(file, size)
        except (*ARCHIVE_ERRORS, OSError, RuntimeError) as error:  # the last for what is encrypted
            problem = first_line(error)
    if problem is not None:
        raise UserError(f"{path}: damaged or no checkpoint ({shown(problem, 200)}): fetch or write it again")


def bare_state(content: Any, where: str, *, shapes_alone: bool = False) -> dict[str, Tensor]:
    """Find the state dict in the content of a checkpoint: the content itself, or under a known entry.

    Args:
        content: what a file holds, or a state dict.
        where: the file, for messages.
        shapes_alone: take tensors on the meta device, which have no values; no file may hold them.

    Raises:
        UserError: if there is none.
    """
    # The known entries come first: a trainer may keep other tensors beside its model's.
    depth = 0
    while isinstance(content, Mapping) and depth < DEEPEST:
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None and any(isinstance(value, Tensor) for value in content.values()):
            others = [
                key for key, value in content.items() if not (isinstance(key, str) and _is_plain(value, shapes_alone))
            ]
            if others:
                names = ", ".join(map(shown, others[:12]))
                raise UserError(f"{where}: entries among its tensors that are none, whole and named: {names}")
            return dict(content)
        content, depth = inner, depth + 1
    raise UserError(f"{where}: holds no state dict, neither bare nor under {', '.join(WRAPPERS)}")


def write_state(path: Path, state: Mapping[str, Tensor], layout: Layout, card: Mapping[str, str]) -> None:
    """Write a state dict as the readers of its layout expect it, with its model card. All of the file, or nothing.

    The card is the metadata of a .safetensors file, beside a digest of the tensors, as the format has no checksums; in
    a .pth or .pkl file it is the entry "spark_me" beside the state dict or, where readers expect a bare state dict,
    `_metadata["spark_me"]` of it, which `load_state_dict` leaves alone. A .pkl file holds numpy arrays.

    Raises:
        UserError: for another suffix, or if the file cannot be written.
    """
    check_target(path, layout.name)
    if path.suffix == SAFETENSORS:
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        content = _safetensors().save(tensors, metadata={"format": "pt", DIGEST: _digest_of(tensors), **card})
        with atomic_write(path) as file:
            file.write(content)
        return
    saved: dict[str, Any] = OrderedDict(state)
    if layout.wrapper is None:
        saved._metadata = OrderedDict({CARD: dict(card)})  # type: ignore[attr-defined]
    else:
        saved = {layout.wrapper: saved, **layout.extras, CARD: dict(card)}
    with atomic_write(path) as file:
        if path.suffix == PICKLE:
            pickle.dump(saved | {layout.wrapper: {key: tensor.numpy() for key, tensor in state.items()}}, file)
        else:
            torch.save(saved, file)


def card_of(path: Path, content: Any) -> dict[str, str]:
    """The model card of a file that `spark-me convert` wrote, with its content; empty if it has none."""
    if path.suffix == SAFETENSORS:
        with _safetensors().safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        return {key: value for key, value in metadata.items() if key not in ("format", DIGEST)}
    for place in (content, getattr(content, "_metadata", None)):
        card = place.get(CARD) if isinstance(place, Mapping) else None
        if isinstance(card, Mapping):
            return dict(card)
    return {}


def stated_encoder(path: Path, content: Any) -> str | None:
    """The encoder that a file says it holds: its model card, or the configuration in a checkpoint of ours.

    Args:
        path: the file.
        content: of it.
    """
    stated: Any = card_of(path, content).get("encoder")
    config = content.get("config") if isinstance(content, Mapping) else None
    if stated is None and isinstance(config, str):
        try:
            import yaml

            stated = yaml.safe_load(config)["model"]["encoder"]
        except Exception:  # no YAML here, or none in the file: it says nothing
            return None
    return stated if isinstance(stated, str) else None


def check_target(path: Path, to: str, *inputs: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, or that is read, before any work is done.

    Args:
        path: the file to write.
        to: name of its layout.
        inputs: what is read.

    Raises:
        UserError: for an unknown suffix, and as `check_output`.
    """
    pickled = any(layout.pickled for layout in LAYOUTS if layout.name == to)
    suffixes = (*SUFFIXES, PICKLE) if pickled else SUFFIXES
    if path.suffix not in suffixes:
        raise UserError(f"{path}: cannot tell the format to write: end the name in {' or '.join(suffixes)}")
    check_output(path, *inputs)


def _load_safetensors(package: ModuleType, path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = package.load_file(path)
    with package.safe_open(path, framework="pt") as file:
        stated = (file.metadata() or {}).get(DIGEST)
    if stated is not None and stated != _digest_of(tensors):
        raise ValueError(f"its tensors are not those that were written: {DIGEST} says so")
    return tensors


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode(errors="surrogatepass"))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _members(path: Path) -> list[str]:
    """Names in an archive; none if it is no whole one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except ARCHIVE_ERRORS:
        return []


def _problem_of(file: BinaryIO, size: int) -> str | None:
    """What is wrong with an archive of `size` bytes, in words."""
    file.seek(max(0, size - END.size))
    mark, *_, comment = END.unpack(file.read(END.size))
    if mark != END_MARK or comment:  # a comment may hold a second directory
        return "it does not end where its archive does"
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len({entry.orig_filename.lower() for entry in entries}) < len(entries):  # torch finds them in either case
            return "it holds two entries of one name"
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                return f"it holds compressed entries, which torch does not write: {entry.filename}"
            if entry.external_attr & FOLDER:  # torch would leave their memory as it finds it
                return f"its entry {entry.filename} is marked as a folder"
        if sum(entry.file_size for entry in entries) > size or min(entry.header_offset for entry in entries) != 0:
            return "its entries lie over each other"
        damaged = archive.testzip()
        return None if damaged is None else f"the checksum of its entry {damaged} is wrong"


def _is_plain(value: object, shapes_alone: bool) -> bool:
    """Whether it is a tensor as models hold them, whose numbers are all in the file.

    A view that repeats a few numbers may have any size: networks of that size would be built for it.
    """
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and (shapes_alone if value.is_meta else value.nbytes <= value.untyped_storage().nbytes())
    )


def _reading(path: Path, load: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what is refused in one line or is nobody's concern
            return load()
    except pickle.UnpicklingError as error:
        names = re.search(r"GLOBAL (\S+)", str(error))
        wants = f"loading it would run {shown(names[1])}" if names else "it is damaged, or loading it would run code"
        raise UserError(
            f"{path}: refused, not plain tensors ({wants}): ask its author for a plain state dict or .safetensors"
        ) from error
    except Exception as error:  # a damaged archive raises almost anything
        reason = first_line(error)
        raise UserError(f"{path}: damaged or no checkpoint ({reason}): fetch or write it again") from error


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise UserError("safetensors is not installed: run `pip install safetensors`, or use a .pth file") from error
    return safetensors.torch
