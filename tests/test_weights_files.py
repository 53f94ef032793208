import os
import pickle
import random
import warnings
import zipfile

import pytest
import torch
from checkpoints import assert_bitwise
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from spark_me.errors import UserError
from spark_me.files import sha256_of
from spark_me.weights.files import (
    bare_state,
    card_of,
    read_content,
    read_state,
    require_sound,
    write_state,
)
from spark_me.weights.layouts import LAYOUTS

CARD = {"source": "a.pth", "encoder": "resnet18"}
BARE = next(layout for layout in LAYOUTS if layout.wrapper is None)
WRAPPED = {layout.wrapper: layout for layout in LAYOUTS if layout.wrapper}


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def nested(depth):
    content = some_state()
    for _ in range(depth):
        content = {"model": content}
    return content


def some_state():
    return {"a.weight": torch.randn(3, 2).t(), "a.num_batches_tracked": torch.tensor(3), "b": torch.randn(2).double()}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("layout", [BARE, *WRAPPED.values()], ids=lambda layout: layout.name)
def test_files_keep_tensors_and_card(tmp_path, suffix, layout):
    state, path = some_state(), tmp_path / f"x{suffix}"
    write_state(path, state, layout, CARD)
    read = read_state(path)
    assert_bitwise({key: read[key] for key in state}, state)  # safetensors has an order of its own
    assert read.keys() == state.keys() and card_of(path, read_content(path)) == CARD
    assert os.listdir(tmp_path) == [path.name]


def test_safetensors_metadata_is_the_card(tmp_path):
    write_state(tmp_path / "x.safetensors", some_state(), BARE, CARD)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert len(metadata.pop("tensors_sha256")) == 64 and metadata == {"format": "pt", **CARD}


def test_safetensors_of_others_state_no_digest(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert_bitwise(read_state(tmp_path / "x.safetensors"), {"a": torch.ones(2)})


def test_bare_files_load_strictly_as_they_are(tmp_path):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    write_state(tmp_path / "x.pth", network.state_dict(), BARE, CARD)
    other = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    other.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)
    assert_bitwise(other.state_dict(), network.state_dict())


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_files_have_the_entry_that_readers_expect(tmp_path, wrapper):
    write_state(tmp_path / "x.pth", some_state(), WRAPPED[wrapper], CARD)
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert content[wrapper].keys() == some_state().keys() and content["spark_me"] == CARD


def test_foreign_files_have_no_card(tmp_path):
    torch.save(some_state(), tmp_path / "x.pth")
    assert card_of(tmp_path / "x.pth", read_content(tmp_path / "x.pth")) == {}


def test_wrappers_of_wrappers_and_other_entries():
    state = some_state()
    assert bare_state({"model": {"module": state}, "rng": torch.zeros(2)}, "x").keys() == state.keys()
    endless = {}
    endless["model"] = endless
    with pytest.raises(UserError, match="holds no state dict"):
        bare_state(endless, "x")


@pytest.mark.parametrize(
    "content, problem",
    [
        ({"epoch": 3, "model": None}, "x: holds no state dict, neither bare nor under state_dict, model, module"),
        ([1, 2], "holds no state dict"),
        ({"a": torch.zeros(1), "note": "hello"}, "entries among its tensors that are none, whole and named: note"),
        ({"a": torch.zeros(1), 7: torch.zeros(1)}, "entries among its tensors that are none, whole and named: 7"),
        ({"model": {"model": None}}, "holds no state dict"),
        (nested(9), "holds no state dict"),
        ({"a": torch.zeros(1), "b": torch.zeros(1).expand(10**12)}, "whole and named: b"),
        ({"a": torch.zeros(1), "b": torch.zeros(2, 2).to_sparse()}, "whole and named: b"),
        ({"a": torch.zeros(1), "b": torch.zeros(2, device="meta")}, "whole and named: b"),
        (
            {"a": torch.zeros(1), "b": torch.quantize_per_tensor(torch.zeros(2), 1, 0, torch.qint8)},
            "whole and named: b",
        ),
    ],
)
def test_contents_without_a_state_dict_are_refused(content, problem):
    with pytest.raises(UserError, match=problem):
        bare_state(content, "x")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_pickles_that_would_run_code_are_refused(tmp_path, protocol, save):
    path, canary = tmp_path / "evil.pth", tmp_path / "executed"
    content = {"state_dict": {"a": Malicious(canary)}}
    if save == "torch":
        torch.save(content, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(UserError, match="evil.pth: refused, not plain tensors .*would run") as error:
        read_state(path)
    assert not canary.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, data",
    [
        ("x.pth", b""),
        ("x.pth", b"PK\x05\x06" + bytes(8) + b"\xff" * 8 + bytes(2)),
        ("x.pth", b"PK\x03\x04"),
        ("x.pth", b"<html>no</html>"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: .*damaged") as error:
        read_state(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_one_line(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write_state(path, {"a": torch.randn(1000)}, BARE, CARD)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged or no checkpoint") as error:
        read_state(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_unknown_suffix_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.pth: no such file"):
        read_state(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="x.onnx: cannot tell the format"):
        write_state(tmp_path / "x.onnx", some_state(), BARE, CARD)
    with pytest.raises(UserError, match="does not exist: create it first"):
        write_state(tmp_path / "no" / "x.pth", some_state(), BARE, CARD)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_failed_write_keeps_the_file_that_was_there(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"x{suffix}"
    write_state(path, some_state(), BARE, CARD)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="cannot be written .*No space left on device.*free space"):
        write_state(path, {"other": torch.zeros(3)}, BARE, CARD)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ts"])
def test_exported_programs_are_called_that(tmp_path, suffix):
    network = nn.Sequential(nn.Linear(2, 3))
    path = tmp_path / f"x{suffix}"
    torch.jit.trace(network, torch.zeros(1, 2)).save(path)
    with pytest.raises(UserError, match=r"is a TorchScript program, no file of weights: give the checkpoint that"):
        read_state(path)
    torch.export.save(torch.export.export(network, (torch.zeros(1, 2),)), tmp_path / "x.pt2")
    (tmp_path / "x.pt2").rename(path)
    with pytest.raises(UserError, match=r"is a program of torch.export, no file of weights"):
        read_state(path)
    path = tmp_path / "x.onnx"
    torch.onnx.export(network, (torch.zeros(1, 2),), path, dynamo=True)
    with pytest.raises(UserError, match=r"x.onnx: is an ONNX program, no file of weights"):
        read_state(path)


def flipped(content, bit):
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def bits_to_flip(content, flips, seed):
    """Half of them anywhere, half in the records that tell readers of archives where everything lies."""
    generator = random.Random(seed)
    directory = max(content.find(b"PK\1\2"), 0)
    starts = [0] * (flips // 2) + [directory] * (flips - flips // 2)
    return [generator.randrange(8 * start, 8 * len(content)) for start in starts]


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    else:
        assert actual == expected


@pytest.mark.parametrize("layout", ["torchvision", "official", "safetensors", "checkpoint"])
def test_no_flipped_bit_loads_with_other_values(tmp_path, layout):
    path = tmp_path / "x.pth"
    if layout == "safetensors":
        path = tmp_path / "x.safetensors"
        write_state(path, some_state(), BARE, CARD)
    elif layout == "checkpoint":
        state = {f"{name}.{entry}": torch.randn(20) for name in "ab" for entry in ("weight", "exp_avg")}
        torch.save({"model": state, "step": 7, "config": "optim: {base_lr: 0.1}", "best": 0.5}, path)
    else:
        write_state(path, some_state(), next(each for each in LAYOUTS if each.name == layout), CARD)
    content, expected = path.read_bytes(), read_content(path)
    refused = 0
    for bit in bits_to_flip(content, flips=300, seed=0):
        path.write_bytes(flipped(content, bit))
        try:
            read = read_content(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert_same(read, expected)
    assert refused > 150


def zip_of(path, entries, method=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # of two entries of one name
        for name, content in entries:
            archive.writestr(name, content)


def marked_as_a_folder(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 38] |= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda path: zip_of(path, [("a/data/0", bytes(1 << 20))], zipfile.ZIP_DEFLATED), "holds compressed entries"),
        (lambda path: zip_of(path, [("a/data/0", b"x"), ("A/DATA/0", b"y")]), "two entries of one name"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "does not end where its archive does"),
        (marked_as_a_folder, "data.pkl is marked as a folder"),
        (lambda path: path.write_bytes(path.read_bytes().replace(bytes(400), bytes(399) + b"x")), "checksum"),
    ],
)
def test_archives_that_torch_does_not_write_are_refused(tmp_path, damage, problem):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(100)}, path)
    require_sound(path)
    damage(path)
    with pytest.raises(UserError, match=f"x.pth: damaged or no checkpoint .*{problem}.*: fetch or write it again"):
        require_sound(path)


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    """As in archives of kilobytes that grow to gigabytes."""
    path = tmp_path / "x.pth"
    zip_of(path, [("a", bytes(1000)), ("b", b"")])
    content = path.read_bytes()
    first, second = (content.index(b"PK\1\2", start) for start in (0, content.index(b"PK\1\2") + 4))
    path.write_bytes(content[:second] + content[first : first + 46] + b"b" + content[second + 47 :])
    with pytest.raises(UserError, match="its entries lie over each other"):
        require_sound(path)
