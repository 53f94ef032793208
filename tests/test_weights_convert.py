import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from checkpoints import assert_bitwise, random_like

import spark_me
from spark_me.cli import main
from spark_me.weights.files import card_of, read_content, read_state
from spark_me.weights.layouts import layout_names


@pytest.fixture
def source(tmp_path):
    state = random_like(torchvision.models.resnet18().state_dict())
    torch.save(state, tmp_path / "resnet18.pth")
    return tmp_path / "resnet18.pth"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", layout_names("resnet18"))
def test_command_line_to_every_layout_and_back(source, layout, suffix, capsys):
    there, back = source.with_name(f"there{suffix}"), source.with_name(f"back{suffix}")
    assert main(["convert", str(source), str(there), "--to", layout, "--encoder", "resnet18"]) == 0
    assert main(["convert", str(there), str(back), "--to", "torchvision"]) == 0
    assert f"resnet18 from torchvision to {layout} layout" in capsys.readouterr().out
    expected, actual = read_state(source), read_state(back)
    if layout in ("official", "detectron2"):
        del expected["fc.weight"], expected["fc.bias"]
    assert_bitwise({key: actual[key] for key in expected}, expected)
    assert actual.keys() == expected.keys()
    assert card_of(there, read_content(there)) == {
        "source": "resnet18.pth",
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "source_layout": "torchvision",
        "encoder": "resnet18",
        "layout": layout,
        "layout_version": "2" if layout == "spark_me" else "1",
    }


def test_what_is_left_out_is_said(source, capsys):
    assert main(["convert", str(source), str(source.with_name("x.pth")), "--to", "detectron2"]) == 0
    assert "note: classifier head left out: detectron2 has no place for it" in capsys.readouterr().out


def test_detectron2_reads_a_pickle_and_is_told_its_configuration(source, capsys):
    for name in ("x.pkl", "x.pth"):
        assert main(["convert", str(source), str(source.with_name(name)), "--to", "detectron2"]) == 0
        said = capsys.readouterr().out
        for needed in (
            "MODEL.RESNETS.STRIDE_IN_1X1: False",
            "INPUT.FORMAT: RGB",
            "MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53]",
            "MODEL.PIXEL_STD: [58.395, 57.12, 57.375]",
        ):
            assert needed in said
    # What detectron2 asks of a .pkl file: `model` and `__author__`, arrays of numpy.
    content = pickle.loads(source.with_name("x.pkl").read_bytes(), encoding="latin1")
    assert content["__author__"] and content["matching_heuristics"] is True
    saved = torch.load(source.with_name("x.pth"))["model"]
    assert content["model"].keys() == saved.keys()
    for key, array in content["model"].items():
        assert isinstance(array, np.ndarray) and np.array_equal(array, saved[key].numpy())
    state = source.with_name("x.pkl")
    for arguments, problem in (
        ([str(source), str(state), "--to", "timm"], "x.pkl: cannot tell the format to write"),
        ([str(state), str(source.with_name("y.pth")), "--to", "timm"], "x.pkl: refused, not plain tensors"),
    ):
        assert main(["convert", *arguments]) == 2
        assert problem in capsys.readouterr().err


def test_torchvision_loads_the_file_strictly(source):
    whole = source.with_name("spark.pth")
    model = spark_me.build_model("resnet18", decoder_width=32)
    torch.save({"model": model.state_dict(), "step": 3}, whole)
    spark_me.convert(whole, source.with_name("out.pth"), to="torchvision")
    network = torchvision.models.resnet18()
    result = network.load_state_dict(torch.load(source.with_name("out.pth"), weights_only=True), strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys
    spark_me.convert(source, source.with_name("full.pth"), to="torchvision")
    network.load_state_dict(torch.load(source.with_name("full.pth"), weights_only=True), strict=True)


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["nowhere.pth", "x.pth", "--to", "timm"], "nowhere.pth: no such file"),
        (["{source}", "x.txt", "--to", "timm"], "x.txt: cannot tell the format"),
        (["{source}", "x.pth", "--to", "keras"], "unknown layout 'keras': choose one of torchvision, timm, official"),
        (
            ["{source}", "x.pth", "--to", "timm", "--encoder", "resnet50"],
            "resnet18.pth: not the tensors of resnet50 in torchvision layout: it holds a resnet18",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(source, arguments, problem, capsys, monkeypatch):
    monkeypatch.chdir(source.parent)
    assert main(["convert", *(argument.format(source=source) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_the_source_is_not_replaced(source, capsys):
    before = source.read_bytes()
    source.with_name("link.pth").symlink_to(source)
    for target in (source, source.with_name("link.pth")):
        assert main(["convert", str(source), str(target), "--to", "timm"]) == 2
        error = capsys.readouterr().err
        assert f"{target}: would replace {source}, which is read" in error and error.count("\n") == 1
    assert source.read_bytes() == before


def test_needs_neither_the_engine_nor_timm_nor_the_trainer(source):
    """None in sys.modules makes an import fail."""
    program = """if True:
        import sys
        for name in ("MinkowskiEngine", "MinkowskiEngineBackend", "omegaconf", "timm"):
            sys.modules[name] = None
        import spark_me
        assert "torch" not in sys.modules
        spark_me.convert(sys.argv[1], sys.argv[2], to="spark_me")
        assert not [name for name in sys.modules if name.startswith(("spark_me.train", "spark_me.sparse"))]
    """
    target = source.with_name("ours.pth")
    subprocess.run([sys.executable, "-c", program, str(source), str(target)], check=True)
    model = spark_me.build_model("resnet18", decoder_width=32)
    spark_me.load_weights(model, target)
    exported = spark_me.export_weights(model)
    expected = read_state(source)
    assert_bitwise(exported, {key: expected[key] for key in exported})
