"""`model.init_from`: a run starts from weights of any layout, says which, and reads them only once."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from tiny_runs import RESNET, assert_same_end, newest, write_config, write_images
from torch import Tensor

from spark_me import convert, get_model
from spark_me.config.loading import load_config
from spark_me.errors import UserError
from spark_me.train.checkpoint import list_checkpoints
from spark_me.train.pretrain import pretrain
from spark_me.weights import models

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
# Steps so small that weights stay where they began, to float32.
STILL = ["optim.base_lr=1e-12", "train.epochs=1"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return write_config(folder / "tiny.yaml", write_images(folder / "images"), encoder=RESNET)


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """A checkpoint of another run, with another seed."""
    run = config.parent / "trained"
    pretrain(load_config(config, [f"run.dir={run}", "train.epochs=1", "run.seed=5", "model.drop_path=0.0"]))
    return list_checkpoints(run / "checkpoints")[-1]


def start(config: Path, run: Path, *overrides: str) -> dict[str, Tensor]:
    """The parameters after a run's steps; without running statistics, which do move."""
    pretrain(load_config(config, [f"run.dir={run}", *overrides]))
    return {name: tensor for name, tensor in newest(run)["model"].items() if "running" not in name}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> None:
    names = [name for name in actual if name.startswith(prefix) and "num_batches" not in name]
    assert names
    for name in names:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-7)


def test_a_whole_model(config: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    weights = start(config, run, *STILL, f"model.init_from={trained}")
    assert_same(weights, newest(config.parent / "trained")["model"], "")
    assert f"weights from {trained}: {RESNET}, spark_me layout" in capsys.readouterr().out
    record = json.loads((run / "initial_weights.json").read_text())
    assert (record["source"], record["encoder"], record["notes"]) == (str(trained), RESNET, [])
    assert load_config(run / "config.yaml").model.init_from == str(trained)


def test_an_encoder_alone_of_another_layout(config: Path, trained: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder.pth"
    convert(trained, encoder, "timm")
    weights = start(config, tmp_path / "run", *STILL, f"model.init_from={encoder}")
    assert_same(weights, newest(config.parent / "trained")["model"], "encoder.")
    assert_same(weights, start(config, tmp_path / "random", *STILL), "decoder.")
    record = json.loads((tmp_path / "run" / "initial_weights.json").read_text())
    assert record["layout"] == "timm" and "decoder" in record["notes"][0]


def test_a_published_name(config: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.PUBLISHED, "mine", models.Published(RESNET, None, str(trained)))
    weights = start(config, tmp_path / "run", *STILL, "model.init_from=mine")
    assert_same(weights, newest(config.parent / "trained")["model"], "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.init_from={folder}/resnet18.pth", "model.encoder=resnet34"],
            "file holds a resnet18, the model is a resnet34",
        ),
        (["model.init_from=spark_resnet50"], "neither a file nor a published name.*spark_sparse-resnet50_800e_in1k"),
    ],
)
def test_weights_that_do_not_fit(config: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    run = tmp_path / "run"
    torch.save(get_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=message) as caught:
        start(config, run, *(override.format(folder=tmp_path) for override in overrides))
    assert not run.exists()
    # Processes that train together send each other their errors.
    received = pickle.loads(pickle.dumps(caught.value))
    assert (str(received), vars(received)) == (str(caught.value), vars(caught.value))


def test_a_run_that_goes_on_does_not_read_them_again(config: Path, trained: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(trained.read_bytes())
    overrides = ["train.epochs=1", f"model.init_from={weights}"]
    start(config, tmp_path / "undisturbed", *overrides)
    start(config, tmp_path / "interrupted", *overrides)
    # Back to where it was after 2 of its 4 steps; a start from the beginning would fail.
    list_checkpoints(tmp_path / "interrupted" / "checkpoints")[-1].unlink()
    weights.unlink()
    start(config, tmp_path / "interrupted", *overrides)
    assert_same_end(tmp_path / "interrupted", tmp_path / "undisturbed")
