"""Whole runs of tiny networks on tiny images: what they leave behind, and everything that stops them."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import RESNET, SMALL, assert_equal, newest

from spark_me import cli
from spark_me.config.loading import load_config
from spark_me.config.tasks import PretrainConfig
from spark_me.errors import UserError
from spark_me.spark import SparK
from spark_me.train import pretrain as pretraining
from spark_me.train.checkpoint import list_checkpoints, read_checkpoint
from spark_me.train.logs import read_metrics
from spark_me.train.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(9):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((100, 80), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def make_config(tmp_path: Path, images: Path) -> MakeConfig:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
model: {{encoder: {SMALL}, backend: native, image_size: [64, 64], decoder_width: 32}}
data: {{root: {images}, held_out: 1, workers: 0}}
optim: {{name: adamw, base_lr: 0.1, warmup_epochs: 0}}
train: {{epochs: 2, batch_size: 4}}
run: {{dir: {tmp_path / "run"}, log_every_steps: 1, device: cpu}}
"""
    )
    return lambda *overrides: load_config(path, overrides)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(list_checkpoints(run / "checkpoints")[-1])["model"]


def message_of(config: PretrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        pretrain(config)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_run_directory_holds_everything(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    pretrain(config)
    run = tmp_path / "run"
    assert load_config(run / "config.yaml") == config
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000002.pt", "step_00000004.pt"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processes"] == 1 and environment["device"] == "cpu"
    assert environment["versions"]["torch"] == torch.__version__
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    board = EventAccumulator(str(run / "tensorboard")).Reload().Tags()
    named = {"loss", "lr", "weight_decay", "gradient_norm", "images_per_second", "data_wait", "memory_gib"}
    assert set(board["scalars"]) == named | {"held_out_loss"}
    assert board["images"] == ["reconstruction"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in steps if "held_out_loss" in entry] == [2, 4]
    assert all(math.isfinite(entry.get("loss", 0)) for entry in steps)
    assert all(entry["data_wait"] >= 0 for entry in steps if "loss" in entry)
    for name in ("loss.png", "reconstruction.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 100
    assert not (run / "unreadable.txt").exists()
    assert not list(run.rglob(".*"))
    out = capsys.readouterr().out
    assert str(run / "reconstruction.png") in out
    assert "spark-me reconstruct" in out


def test_height_and_width_may_differ_in_bf16_without_held_out_images(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spark_me.train.distributed.cpu_multiplies_bfloat16", lambda: True)
    pretrain(make_config("model.image_size=[32,96]", "train.precision=bf16", "data.held_out=0", "optim.name=lamb"))
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 4
    assert not (tmp_path / "run" / "reconstruction.png").exists()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("encoder", ["timm/test_convnext", "convnextv2_atto"])
def test_convnexts_are_trained_from_the_command_line(encoder: str, make_config: MakeConfig, tmp_path: Path) -> None:
    make_config()
    overrides = [f"model.encoder={encoder}", "train.epochs=1", "optim.name=lamb"]
    assert cli.main(["pretrain", str(tmp_path / "tiny.yaml"), *overrides]) == 0
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


def test_one_seed_gives_one_result_and_another_another(make_config: MakeConfig, tmp_path: Path) -> None:
    # The second run differs in everything that may not matter.
    free = ["data.workers=2", "run.log_every_steps=3", "run.evaluate_every_epochs=2", "run.checkpoint_every_steps=1"]
    free += ["train.activation_checkpointing=true", "run.picture_every_epochs=2"]
    pretrain(make_config("model.drop_path=0.3", f"run.dir={tmp_path / 'a'}"))
    pretrain(make_config("model.drop_path=0.3", f"run.dir={tmp_path / 'b'}", *free))
    pretrain(make_config("model.drop_path=0.3", f"run.dir={tmp_path / 'c'}", "run.seed=1"))
    first, second, third = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_a_complete_run_is_not_repeated(make_config: MakeConfig, tmp_path: Path) -> None:
    pretrain(make_config())
    run = tmp_path / "run"
    before = (run / "metrics.jsonl").read_text()
    (run / "loss.png").unlink()
    pretrain(make_config())
    assert (run / "metrics.jsonl").read_text() == before
    assert (run / "loss.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_held_out_loss_is_the_mean_over_fixed_masks_in_evaluation_mode(make_config: MakeConfig, tmp_path: Path) -> None:
    from spark_me import build_model
    from spark_me.masking import draw_visible_of_samples
    from spark_me.train.reconstruct import load_images

    config = make_config(f"model.encoder={RESNET}", "data.held_out=3", "train.batch_size=2", "train.epochs=1")
    pretrain(config)
    run = tmp_path / "run"
    model = build_model(RESNET, image_size=(64, 64), decoder_width=32)
    model.load_state_dict(weights(run))
    model.eval()
    photos = [tmp_path / "images" / f"{number}.png" for number in (1, 4, 7)]
    subjects = load_images(photos, config.data, config.model, config.run.seed)
    losses = []
    for mask in range(4):
        visible = draw_visible_of_samples(config.run.seed, mask, range(3), (2, 2), 0.6)
        losses += [model(one.crop.image[None], shown[None]).item() for one, shown in zip(subjects, visible)]
    assert read_metrics(run / "metrics.jsonl")[-1]["held_out_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


# What stops a run.


@pytest.mark.usefixtures("undrawn")
def test_directory_of_another_configuration(make_config: MakeConfig, tmp_path: Path) -> None:
    pretrain(make_config("train.epochs=1"))
    before = weights(tmp_path / "run")
    message = message_of(make_config("train.epochs=1", "optim.base_lr=0.2", "run.seed=3"))
    assert str(tmp_path / "run") in message
    assert "optim.base_lr: 0.1 → 0.2; run.seed: 0 → 3" in message
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run").items())


@pytest.mark.usefixtures("undrawn")
def test_resume_never_overwrites_nothing(make_config: MakeConfig) -> None:
    pretrain(make_config("train.epochs=1"))
    assert "run.resume=never" in message_of(make_config("train.epochs=1", "run.resume=never"))


@pytest.mark.usefixtures("undrawn")
def test_resume_from_a_named_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    pretrain(make_config())
    first = tmp_path / "run" / "checkpoints" / "step_00000002.pt"
    pretrain(make_config(f"run.dir={tmp_path / 'other'}", f"run.resume={first}"))
    expected, other = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert all(torch.equal(value, other[name]) for name, value in expected.items())
    assert "holds newer ones" in message_of(make_config(f"run.resume={first}"))
    foreign = make_config(f"run.dir={tmp_path / 'third'}", f"run.resume={first}", "model.encoder=resnet34")
    assert "model.encoder: small → resnet34" in message_of(foreign)
    assert not (tmp_path / "third").exists()


@pytest.mark.usefixtures("undrawn")
def test_block_decoder_from_the_command_line_to_a_picture(
    make_config: MakeConfig, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with any width, one that goes on from its middle to the same weights, and a reconstruction by it."""
    make_config()  # writes the file
    command = ["pretrain", str(tmp_path / "tiny.yaml"), "model.decoder=block", "model.decoder_width=12"]
    assert cli.main(command) == 0
    first = tmp_path / "run" / "checkpoints" / "step_00000002.pt"
    assert cli.main([*command, f"run.dir={tmp_path / 'other'}", f"run.resume={first}"]) == 0
    one, other = newest(tmp_path / "run"), newest(tmp_path / "other")
    assert one["step"] == other["step"] == 4
    for part in ("model", "optimizer"):
        assert_equal(other[part], one[part], part)
    assert not any(name.startswith("densify.0.") for name in weights(tmp_path / "run"))
    photo, picture = next(images.glob("*.png")), tmp_path / "picture.png"
    assert cli.main(["reconstruct", str(first), str(photo), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and "loss" in capsys.readouterr().out
    foreign = make_config(f"run.dir={tmp_path / 'third'}", f"run.resume={first}")
    assert "model.decoder: block → unet; model.decoder_width: 12 → 32" in message_of(foreign)


def test_a_named_checkpoint_goes_on_with_another_learning_rate(make_config: MakeConfig, tmp_path: Path) -> None:
    pretrain(make_config())
    last = tmp_path / "run" / "checkpoints" / "step_00000004.pt"
    overrides = [f"run.dir={tmp_path / 'other'}", f"run.resume={last}", "optim.base_lr=0.05", "train.epochs=3"]
    pretrain(make_config(*overrides))
    lines = read_metrics(tmp_path / "other" / "metrics.jsonl")
    assert [line["step"] for line in lines if "lr" in line] == [5, 6]
    assert all(0 < line["lr"] < 0.05 * 4 / 256 for line in lines if "lr" in line)
    other_order = make_config(*overrides, "run.seed=1")
    assert "run.seed: 0 → 1" in message_of(other_order)


@pytest.mark.usefixtures("undrawn")
def test_damaged_newest_checkpoint_falls_back_aloud(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(make_config())
    expected = weights(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000004.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    capsys.readouterr()
    pretrain(make_config())
    assert "step_00000004.pt: damaged or no checkpoint" in capsys.readouterr().out
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "run").items())
    for path in newest.parent.iterdir():
        path.write_bytes(b"")
    assert "none of 3 checkpoints loads" in message_of(make_config())


@pytest.mark.usefixtures("undrawn")
def test_changed_images(make_config: MakeConfig, images: Path) -> None:
    pretrain(make_config("train.epochs=1"))
    (images / "3.png").unlink()
    assert "the training data changed" in message_of(make_config("train.epochs=1"))


@pytest.mark.usefixtures("undrawn")
def test_unreadable_images_are_skipped_and_listed(make_config: MakeConfig, images: Path, tmp_path: Path) -> None:
    (images / "2.png").write_bytes(b"no image")
    (images / "5.png").write_bytes((images / "5.png").read_bytes()[:500])
    pretrain(make_config("data.max_unreadable=0.3", "data.workers=1"))
    lines = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(images / "2.png"), str(images / "5.png")]
    assert all(line.split("\t")[1] for line in lines)


def test_too_many_unreadable_images(make_config: MakeConfig, images: Path, tmp_path: Path) -> None:
    for number in (2, 5):
        (images / f"{number}.png").write_bytes(b"no image")
    message = message_of(make_config("data.max_unreadable=0.2"))
    assert "2 of 9 images are unreadable" in message
    assert "data.max_unreadable=0.2" in message
    assert len((tmp_path / "run" / "unreadable.txt").read_text().splitlines()) == 2


def test_no_readable_held_out_image(make_config: MakeConfig, images: Path) -> None:
    (images / "4.png").write_bytes(b"no image")
    assert "none of the held-out images is readable" in message_of(make_config("data.max_unreadable=0.5"))


def test_batch_larger_than_an_epoch(make_config: MakeConfig) -> None:
    assert "train.batch_size=9 is more than the 8 images" in message_of(make_config("train.batch_size=9"))


def test_mask_that_leaves_or_hides_nothing(make_config: MakeConfig) -> None:
    assert "hides no patch" in message_of(make_config("model.image_size=[8,8]", "model.mask_ratio=0.1"))
    assert "leaves no patch visible" in message_of(make_config("model.image_size=[8,8]", "model.mask_ratio=0.9"))


def test_device_that_is_not_there(make_config: MakeConfig) -> None:
    assert "run.device=abacus" in message_of(make_config("run.device=abacus"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_stops_before_the_step(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    class Diverging(SparK):
        """Fails at the third step, in its loss or in its gradient alone."""

        calls = 0

        def forward(
            self,
            images: torch.Tensor,
            visible: torch.Tensor | None = None,
            valid: torch.Tensor | None = None,
        ) -> torch.Tensor:
            loss = super().forward(images, visible, valid)
            self.calls += self.training
            if self.calls != 3:
                return loss
            # √x at 0 is finite with an infinite slope.
            return loss * math.nan if what == "loss" else loss + (loss - loss.detach()).sqrt()

    build = pretraining.model_of

    def build_diverging(config: PretrainConfig) -> SparK:
        model = build(config)
        model.__class__ = Diverging
        return model

    monkeypatch.setattr(pretraining, "model_of", build_diverging)
    message = message_of(make_config())
    assert message.startswith(f"the {what} is ")
    assert "at step 3 (images: " in message
    named = message.partition("(images: ")[2].partition(")")[0].split(", ")
    assert len(named) == 4 and all(Path(name).is_file() for name in named)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step_00000002.pt"]
    assert all(value.isfinite().all() for value in read_checkpoint(saved[0])["model"].values())


def test_command_line_prints_one_line_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {{root: {tmp_path / 'nowhere'}}}")
    assert cli.main(["pretrain", str(tmp_path / "c.yaml"), f"run.dir={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no such folder" in line
    assert not (tmp_path / "run").exists()
