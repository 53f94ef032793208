"""Whole fine-tuning runs of a ResNet on tiny images: what they leave behind, and what stops them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from child import together
from tiny_finetune import tiny_config, write_classes, write_config
from tiny_runs import RESNET, assert_equal

import spark_me
from spark_me import cli
from spark_me.config.loading import load_config
from spark_me.config.tasks import FinetuneConfig
from spark_me.downstream.evaluate import evaluate
from spark_me.downstream.finetune import finetune
from spark_me.errors import UserError
from spark_me.train.checkpoint import FINETUNE, list_checkpoints, read_checkpoint
from spark_me.train.logs import read_metrics
from spark_me.train.starting_weights import settle_images
from spark_me.weights.models import build_network

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Maps of a few pixels."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_classes(tmp_path / "images")


def newest(run: Path) -> dict:
    return read_checkpoint(list_checkpoints(run / "checkpoints")[-1], FINETUNE)


def message_of(config: FinetuneConfig) -> str:
    with pytest.raises(UserError) as caught:
        finetune(config)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_run_and_what_it_leaves(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, "train.ema=0.9", "train.epochs=3", "data.trivial_augment=true", "data.erasing=0.25")
    finetune(config)
    run = tmp_path / "run"
    assert load_config(run / "config.yaml", schema=FinetuneConfig) == config
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, 10))
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    measured = [line for line in lines if "held_out_top1" in line]
    assert [line["step"] for line in measured] == [3, 6, 9]
    best = read_checkpoint(run / "checkpoints" / "best.pt", FINETUNE)
    accuracies = {line["step"]: line["held_out_ema_top1"] for line in measured}
    assert best["best"] == accuracies[best["step"]] == max(accuracies.values())
    content = newest(run)
    assert content["classes"] == ["blue", "green", "red"]
    network = build_network(RESNET, 3)
    network.load_state_dict(content["model"], strict=True)
    network.load_state_dict(content["ema"], strict=True)
    assert (run / "loss.png").stat().st_size > 1000
    predicted = spark_me.inference_model(run / "checkpoints" / "best.pt", images / "val" / "red" / "0.png")
    assert predicted["pred_class"] in ("blue", "green", "red")
    assert "spark-me evaluate" in capsys.readouterr().out


def test_it_learns_in_a_number_of_steps(images: Path, tmp_path: Path) -> None:
    length = ["train.epochs=null", "train.steps=40", "optim.warmup_epochs=null", "optim.warmup_share=0.1"]
    finetune(tiny_config(tmp_path, *length, "train.mixup=0", "train.cutmix=0", "data.cache=true", "data.repeats=4"))
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["step"], last["held_out_top1"]) == (40, 1.0)


def test_average_is_that_of_the_weights_of_every_step(images: Path, tmp_path: Path) -> None:
    finetune(tiny_config(tmp_path, "train.ema=0.75", "run.checkpoint_every_steps=1", "run.keep_last=10"))
    states = [read_checkpoint(path, FINETUNE) for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert len(states) == 6
    expected = states[0]["model"]["fc.weight"].double()
    for state in states[1:]:
        expected = 0.75 * expected + 0.25 * state["model"]["fc.weight"].double()
    torch.testing.assert_close(states[-1]["ema"]["fc.weight"].double(), expected, rtol=0, atol=1e-6)


def test_a_resumed_run_ends_as_one_that_never_stopped(images: Path, tmp_path: Path) -> None:
    overrides = ["train.ema=0.9", "optim.name=lamb", "run.checkpoint_every_steps=1", "run.keep_last=10"]
    overrides += ["data.repeated_augmentation=3", "train.loss=bce"]
    finetune(tiny_config(tmp_path, *overrides))
    calm = tmp_path / "run"
    other = tmp_path / "other"
    at = calm / "checkpoints" / "step_00000004.pt"  # in the middle of the second epoch
    free = ["data.workers=1", "data.cache=true", f"run.dir={other}", f"run.resume={at}"]
    finetune(tiny_config(tmp_path, *overrides, *free))
    for part in ("model", "ema", "optimizer", "classes", "best"):
        assert_equal(newest(other)[part], newest(calm)[part], part)
    before = (calm / "metrics.jsonl").read_text()
    finetune(tiny_config(tmp_path, *overrides))
    assert (calm / "metrics.jsonl").read_text() == before


def test_accumulated_micro_batches_draw_the_same_images(images: Path, tmp_path: Path) -> None:
    # Without norms' statistics and draws in between, a step over micro-batches is the step over the batch.
    plain = [
        "train.mixup=0",
        "train.cutmix=0",
        "model.drop_path=0",
        "model.encoder=timm/test_convnext",
        "train.epochs=1",
    ]
    finetune(tiny_config(tmp_path, *plain))
    finetune(tiny_config(tmp_path, *plain, "train.accumulate=2", f"run.dir={tmp_path / 'other'}"))
    first, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "other"))
    assert first[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-4)
    assert first[0]["gradient_norm"] == pytest.approx(other[0]["gradient_norm"], rel=1e-4)


def test_it_starts_from_the_encoder_of_any_layout_with_a_new_classifier(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    published = build_network(RESNET, 1000)
    torch.save({"state_dict": published.state_dict()}, tmp_path / "published.pth")
    start = [f"weights={tmp_path / 'published.pth'}", "optim.base_lr=1e-12", "optim.weight_decay=0", "train.epochs=1"]
    finetune(tiny_config(tmp_path, *start))
    state = newest(tmp_path / "run")["model"]
    for name, tensor in published.state_dict().items():
        if name.endswith("conv1.weight") or name.endswith("conv2.weight"):
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)
    assert state["fc.weight"].shape == (3, 96)


def test_it_starts_from_a_pretraining_checkpoint(images: Path, tmp_path: Path) -> None:
    from spark_me.train.pretrain import pretrain

    path = tmp_path / "pretrain.yaml"
    path.write_text(
        f"""
model: {{encoder: {RESNET}, image_size: [64, 64], decoder_width: 32, mask_ratio: 0.5}}
data: {{root: {images}, workers: 0}}
optim: {{name: adamw, warmup_epochs: 0}}
train: {{epochs: 1, batch_size: 4}}
run: {{dir: {tmp_path / "pretrained"}, device: cpu}}
"""
    )
    pretrain(load_config(path))
    weights = list_checkpoints(tmp_path / "pretrained" / "checkpoints")[-1]
    tiny = ["optim.base_lr=1e-12", "optim.weight_decay=0", "train.epochs=1"]
    finetune(tiny_config(tmp_path, f"weights={weights}", *tiny))
    expected = read_checkpoint(weights)["model"]["encoder.layer1.0.conv1.weight"]
    weight = newest(tmp_path / "run")["model"]["layer1.0.conv1.weight"]
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)


def test_it_runs_where_minkowski_engine_cannot_be_imported(images: Path, tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules["MinkowskiEngine"] = None
from spark_me.cli import main
code = main(["finetune", {str(write_config(tmp_path))!r}, "train.epochs=1", "train.ema=0.9"])
code = code or main(["evaluate", {str(tmp_path / "tiny.yaml")!r},
                     "--weights", {str(tmp_path / "run" / "checkpoints" / "best.pt")!r}])
assert not any(name.startswith("spark_me.sparse") for name in sys.modules)
sys.exit(code)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "top-5 100.00%" in done.stdout


def test_a_network_of_many_channels(tmp_path: Path) -> None:
    import numpy as np

    for split in ("train", "val"):
        for label, name in enumerate(("land", "water")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                np.save(folder / f"{index}.npy", np.random.default_rng(index).random((40, 40, 5)) + label)
    channels = ["model.in_channels=5", "data.mean=[0,0,0,0,0]", "data.std=[1,1,1,1,1]", "data.erasing=0.5"]
    finetune(tiny_config(tmp_path, *channels, "train.epochs=1"))
    assert newest(tmp_path / "run")["model"]["conv1.0.weight"].shape[1] == 5


def test_two_processes_take_the_steps_of_one(images: Path, tmp_path: Path) -> None:
    # Norms are synchronised, and nothing is drawn in a step, so that a batch's parts make the whole.
    plain = ["train.mixup=0", "train.cutmix=0", "model.drop_path=0", "train.epochs=1", "train.ema=0.9"]
    finetune(tiny_config(tmp_path, *plain))
    other = tmp_path / "other"
    for child in together(lambda: cli.main(["finetune", str(tmp_path / "tiny.yaml"), *plain, f"run.dir={other}"])):
        assert child.returncode == 0, child.output
    one, two = (read_metrics(path / "metrics.jsonl") for path in (tmp_path / "run", other))
    # Rounding is amplified by AdamW's first steps, in which every gradient counts alike.
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    assert two[0]["gradient_norm"] == pytest.approx(one[0]["gradient_norm"], rel=1e-4)
    assert two[-1]["held_out_loss"] == pytest.approx(one[-1]["held_out_loss"], rel=0.05)
    statistics = [newest(path)["model"]["bn1.running_mean"] for path in (tmp_path / "run", other)]
    torch.testing.assert_close(statistics[1], statistics[0], rtol=1e-2, atol=1e-3)


# What stops a run.


def test_weights_have_to_be_named(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["finetune", str(write_config(tmp_path)), "weights="]) == 2
    assert "weights=none to start from scratch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [("resnet34", "the file holds a resnet34, the model is a resnet18"), (None, "other.pth: no such file")],
)
def test_weights_of_another_encoder_or_none(images: Path, tmp_path: Path, name: str | None, expected: str) -> None:
    if name is not None:
        torch.save(spark_me.get_model(name).state_dict(), tmp_path / "other.pth")
    assert expected in message_of(tiny_config(tmp_path, "model.encoder=resnet18", f"weights={tmp_path / 'other.pth'}"))
    assert not (tmp_path / "run").exists()


def test_other_classes_than_the_checkpoint(images: Path, tmp_path: Path) -> None:
    finetune(tiny_config(tmp_path, "train.epochs=1"))
    (images / "train" / "red").rename(images / "train" / "crimson")
    (images / "val" / "red").rename(images / "val" / "crimson")
    assert "the training data changed" in message_of(tiny_config(tmp_path, "train.epochs=1"))


def test_too_few_images_at_a_fraction(images: Path, tmp_path: Path) -> None:
    message = message_of(tiny_config(tmp_path, "data.fraction=0.01"))
    assert "train.batch_size=4 is more than the 3 images of an epoch (3 files" in message


def test_unreadable_images_are_skipped_up_to_a_share(images: Path, tmp_path: Path) -> None:
    (images / "train" / "red" / "2.png").write_bytes(b"no image")
    assert "1 of 18 images are unreadable" in message_of(tiny_config(tmp_path))
    finetune(tiny_config(tmp_path, "data.max_unreadable=0.1", f"run.dir={tmp_path / 'other'}"))
    assert "2.png" in (tmp_path / "other" / "unreadable.txt").read_text()


def test_directory_of_a_pretraining_run(images: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {mask_ratio: 0.6}")
    assert "holds a run of another command" in message_of(tiny_config(tmp_path))


# The images that the weights were made for.


def pretrained(tmp_path: Path, *overrides: str) -> Path:
    """A checkpoint of one step of pretraining."""
    images = tiny_runs.write_images(tmp_path / "plain")
    config = tiny_runs.write_config(tmp_path / "pretrain.yaml", images, encoder=RESNET)
    own = ["model.image_size=[32,128]", "data.mean=[0.1,0.2,0.3]", "data.std=[0.4,0.5,0.6]", *overrides]
    length = ["train.steps=1", "train.batch_size=8", "optim.warmup_share=0", f"run.dir={tmp_path / 'pretrained'}"]
    assert cli.main(["pretrain", str(config), *own, *length]) == 0
    return tmp_path / "pretrained" / "checkpoints" / "best.pt"


def seen(config: FinetuneConfig) -> tuple:
    data = config.data
    return data.train_crop, data.test_resize, data.test_crop, data.mean, data.std


def test_images_are_those_of_the_pretraining_unless_told_otherwise(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = pretrained(tmp_path)
    free = ["data.train_crop=null", "data.test_resize=null", "data.test_crop=null", "train.epochs=1"]
    capsys.readouterr()
    finetune(tiny_config(tmp_path, f"weights={weights}", *free, "data.std=[0.7,0.7,0.7]"))
    # As many pixels as 32 × 128 in a square, and 64 / 0.95 for the short edge of test images.
    recorded = seen(load_config(tmp_path / "run" / "config.yaml", schema=FinetuneConfig))
    assert recorded == (64, 67, 64, [0.1, 0.2, 0.3], [0.7, 0.7, 0.7])
    assert f"images of 64 pixels, tested on 64, as {weights} was trained on unless told" in capsys.readouterr().out
    # The run goes on by itself, also where its weights are gone.
    weights.unlink()
    finetune(tiny_config(tmp_path, f"weights={weights}", *free, "data.std=[0.7,0.7,0.7]"))
    assert "this run is complete" in capsys.readouterr().out
    # evaluate takes those of the fine-tuning.
    own = tmp_path / "run" / "checkpoints" / "best.pt"
    config = tiny_config(tmp_path, *free)
    evaluate(config, str(own))
    assert seen(config) == recorded


def test_images_of_other_weights_are_imagenets(images: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "data.train_crop=null", "data.test_resize=null", "data.test_crop=null")
    settle_images(config, "none", "weights=")
    assert seen(config) == (224, 236, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    config = tiny_config(tmp_path, "model.in_channels=2")
    with pytest.raises(UserError, match="data.mean=null: weights=none has none: give model.in_channels=2 values"):
        settle_images(config, "none", "weights=")


def test_other_channels_than_the_pretraining(images: Path, tmp_path: Path) -> None:
    weights = pretrained(tmp_path, "model.in_channels=1", "data.mean=[0.5]", "data.std=[0.5]")
    message = message_of(tiny_config(tmp_path, f"weights={weights}"))
    assert message.endswith("was trained on images of 1 channels, not 3: set model.in_channels=1")
