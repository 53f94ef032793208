"""Pixels without data: through crops and flips, in masks, in the loss, in a whole run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise
from tiny_runs import RESNET
from torch import Tensor

import spark_me
from spark_me.config.data import DataConfig
from spark_me.config.loading import load_config
from spark_me.data.datasets import Reader, TrainDataset
from spark_me.data.transforms import held_out_transform, train_transform
from spark_me.data.unreadable import UnreadableImage
from spark_me.masking import draw_visible, draw_visible_of_samples
from spark_me.train.checkpoint import list_checkpoints, read_checkpoint
from spark_me.train.pretrain import pretrain

SIZE, PATCH_SIZE = (64, 96), 32
DATA = DataConfig(nodata=float("nan"), mean=[0.3] * 4, std=[0.2] * 4, crop_scale=[0.2, 1.0])


def with_hole(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A picture [4, 90, 120] and the bool [90, 120] of its nodata, two small holes."""
    picture = torch.rand(4, 90, 120, generator=torch.Generator().manual_seed(seed))
    hole = torch.zeros(90, 120, dtype=torch.bool)
    hole[40:46, 100:103] = hole[0, 0] = True
    return picture, hole


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("make", [train_transform, held_out_transform])
def test_every_touched_pixel_is_marked(make, interpolation: str) -> None:
    """Whatever lies outside the marked pixels does not depend on what lay in the hole."""
    data = DataConfig(**{**vars(DATA), "interpolation": interpolation})
    transform = make(data, SIZE, 4)
    plain = make(DataConfig(**{**vars(data), "nodata": None}), SIZE, 4)
    picture, hole = with_hole()
    seen_invalid = 0
    for seed in range(20):

        def crop(transform, picture: Tensor, seed: int = seed):
            torch.manual_seed(seed)
            return transform(picture)

        image, valid, without_data, _ = crop(transform, picture.masked_fill(hole, torch.nan))
        assert image.isfinite().all()
        # The same crop without nodata, with two contents of the hole: what differs was touched.
        ones, twos = (crop(plain, picture.masked_fill(hole, value)).image for value in (100.0, -100.0))
        touched = (ones != twos).any(dim=0)
        blocks = touched.view(2, PATCH_SIZE, 3, PATCH_SIZE).permute(0, 2, 1, 3).flatten(2).any(dim=2)
        assert not (blocks & valid).any()
        assert without_data.shape == SIZE and without_data[touched].all()
        assert (image[:, without_data] == 0).all() and (image[:, ~without_data] != 0).all()
        everywhere_valid = valid.repeat_interleave(PATCH_SIZE, 0).repeat_interleave(PATCH_SIZE, 1)
        torch.testing.assert_close(image[:, everywhere_valid], ones[:, everywhere_valid], rtol=1e-4, atol=1e-4)
        seen_invalid += int((~valid).sum())
    assert seen_invalid > 0


def test_patches_far_from_the_hole_stay_valid() -> None:
    picture = torch.rand(4, 64, 96)
    picture[:, 10, 10] = torch.nan
    _, valid, without_data, _ = held_out_transform(DATA, SIZE, 4)(picture)
    assert without_data.nonzero().tolist() == [[10, 10]]
    assert valid.tolist() == [[False, True, True], [True, True, True]]


def test_flip_moves_the_hole() -> None:
    data = DataConfig(**{**vars(DATA), "flip": 1.0, "crop_scale": [1.0, 1.0]})
    picture = torch.rand(4, 64, 96)
    picture[:, 10, 10] = torch.nan
    moved = [train_transform(data, SIZE, 4)(picture).valid.tolist() for _ in range(8)]
    assert all(mask[0][2] is False and mask[0][0] is True for mask in moved)


def test_too_much_nodata_is_a_reason_after_trying_other_crops() -> None:
    picture = torch.full((4, 256, 256), torch.nan)
    picture[:, :, 128:] = 0.5
    small = DataConfig(**{**vars(DATA), "crop_scale": [0.05, 0.1]})
    transform = train_transform(small, (32, 64), 4)
    found = 0
    for seed in range(20):  # half of the single crops have no data
        torch.manual_seed(seed)
        found += transform(picture).valid.sum() == 2
    assert found == 20
    picture[:, :, 138:] = torch.nan
    with pytest.raises(UnreadableImage, match="nodata: . of 2 patches have data in the best of 10 crops, 2 are needed"):
        transform(picture)
    with pytest.raises(UnreadableImage, match="nodata: 0 of 2 patches have data in its centre crop"):
        held_out_transform(DATA, (32, 64), 4)(picture)


def test_skipped_image_is_recorded(tmp_path: Path) -> None:
    empty = np.full((40, 40, 4), np.nan, dtype=np.float32)
    for name, array in (("0.npy", empty), ("1.npy", np.random.rand(40, 40, 4).astype(np.float32))):
        np.save(tmp_path / name, array)
    reader = Reader(train_transform(DATA, SIZE, 4), seed=0, channels=4, nodata=DATA.nodata)
    sample = TrainDataset([tmp_path / "0.npy", tmp_path / "1.npy"], reader, most_unreadable=1)[(0, 0)]
    assert [path for path, _ in sample.unreadable] == [str(tmp_path / "0.npy")]
    assert sample.image is not None and sample.valid is not None and sample.valid.all()


def test_patches_are_as_large_as_the_encoders() -> None:
    picture, _ = with_hole()
    valid = held_out_transform(DATA, SIZE, 4, patch_size=16)(picture).valid
    assert valid.shape == (4, 6)


# Masks.


def test_masks_are_drawn_from_valid_patches() -> None:
    valid = torch.rand(200, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    valid[0], valid[1] = True, False
    valid[1, 3, 3] = valid[1, 0, 0] = True
    visible = draw_visible(200, (7, 7), 0.6, valid=valid, generator=torch.Generator().manual_seed(1))
    assert not (visible & ~valid).any()
    for mask, allowed in zip(visible, valid):
        patches = int(allowed.sum())
        assert mask.sum() == min(max(round(patches * 0.4), 1), patches - 1)


def test_image_without_nodata_keeps_its_mask() -> None:
    valid = torch.ones(3, 7, 7, dtype=torch.bool)
    valid[1, 0] = False
    masks = draw_visible_of_samples(0, 2, [4, 5, 6], (7, 7), 0.6, valid)
    plain = draw_visible_of_samples(0, 2, [4, 5, 6], (7, 7), 0.6)
    assert torch.equal(masks[0], plain[0]) and torch.equal(masks[2], plain[2])
    assert not masks[1, 0].any()


def test_a_single_valid_patch_is_refused() -> None:
    valid = torch.zeros(1, 7, 7, dtype=torch.bool)
    valid[0, 0, 0] = True
    with pytest.raises(ValueError, match="needs 2 valid patches"):
        draw_visible(1, (7, 7), 0.6, valid=valid)


# The loss.


def masked_case() -> tuple[spark_me.spark.SparK, Tensor, Tensor, Tensor]:
    model = randomise(spark_me.build_model(RESNET, image_size=SIZE, in_channels=4, decoder_width=32)).double()
    images = torch.randn(2, 4, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[1, 1, 1], [0, 0, 0]]], dtype=torch.bool)
    visible = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [0, 0, 0]]], dtype=torch.bool)
    return model, images, visible, valid


def test_loss_counts_valid_hidden_patches_alone() -> None:
    model, images, visible, valid = masked_case()
    loss = model(images, visible, valid)
    with torch.no_grad():
        prediction = model.predict(images, visible)
    errors = []
    for image, row, column in [(0, 0, 2), (0, 1, 0), (1, 0, 0), (1, 0, 2)]:  # by hand: valid, not visible
        place = (image, slice(None), slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32))
        target = images[place]
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append(((prediction[place] - target) ** 2).mean())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-12)
    assert loss.item() != pytest.approx(model(images, visible).item(), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e30, float("inf"), float("nan")])
def test_values_of_nodata_reach_neither_loss_nor_gradient(value: float) -> None:
    model, images, visible, valid = masked_case()

    def gradients(images: Tensor) -> list[Tensor]:
        model.zero_grad()
        loss = model(images, visible, valid)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = gradients(images)
    model.load_state_dict(state)
    has_data = valid.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    actual = gradients(torch.where(has_data, images, value))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected))
    assert torch.isfinite(expected[0])
    out = model.reconstruct(torch.where(has_data, images, value), visible, valid)
    assert out.prediction.isfinite().all() and out.loss.isfinite()


@pytest.mark.parametrize("nodata", [True, False])
def test_loss_of_each_image_is_its_own(nodata: bool) -> None:
    """Against a loop over the patches of each image, predicted without the other."""
    model, images, visible, valid = masked_case()
    model.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    valid = valid if nodata else torch.ones_like(valid)
    losses = model.reconstruct(images, visible, valid if nodata else None).losses
    assert losses.shape == (2,) and losses.dtype == torch.float64
    for number, image in enumerate(images):
        with torch.no_grad():
            prediction = model.predict(images[number : number + 1], visible[number : number + 1])[0].numpy()
        errors = []
        for row, column in (valid & ~visible)[number].nonzero().tolist():
            place = (slice(None), slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32))
            target = image.numpy()[place]
            target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(np.square(prediction[place] - target).mean())
        assert losses[number].item() == pytest.approx(np.mean(errors), rel=1e-9)
    assert abs(losses[0] - losses[1]) > 1e-3
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_visible_nodata_is_refused() -> None:
    model, images, visible, valid = masked_case()
    with pytest.raises(ValueError, match="cannot be visible"):
        model(images, ~valid, valid)


def test_all_valid_changes_nothing() -> None:
    model, images, visible, valid = masked_case()
    assert torch.equal(model(images, visible, torch.ones_like(valid)), model(images, visible))


def test_run_on_thirteen_channels_with_nodata(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(7):
        array = generator.random((70, 80, 13)).astype(np.float32)
        array[:20, :9] = np.nan if number != 3 else 0.5
        array = np.full_like(array, np.nan) if number == 5 else array
        np.save(tmp_path / "images" / f"{number}.npy", array)
    (tmp_path / "c.yaml").write_text(
        f"""
model: {{encoder: {RESNET}, image_size: [64, 64], decoder_width: 32, in_channels: 13}}
data: {{root: {tmp_path / "images"}, nodata: nan, held_out: 1, workers: 0, max_unreadable: 0.2}}
optim: {{name: adamw, warmup_epochs: 0}}
train: {{epochs: 2, batch_size: 3}}
run: {{dir: {tmp_path / "run"}, device: cpu}}
"""
    )
    values = f"[{','.join(['0.5'] * 13)}]"
    config = load_config(tmp_path / "c.yaml", [f"data.mean={values}", f"data.std={values}"])
    pretrain(config)
    run = tmp_path / "run"
    assert (run / "unreadable.txt").read_text().splitlines()[0].startswith(f"{tmp_path / 'images' / '5.npy'}\tnodata: ")
    saved = read_checkpoint(list_checkpoints(run / "checkpoints")[-1])["model"]
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert (run / "reconstruction.png").is_file()
    pretrain(config)  # nan is the same nodata when the run goes on


def test_run_goes_on_where_a_micro_batch_has_one_visible_patch(tmp_path: Path, backend: str, one_thread: None) -> None:
    """Half of an image of 2×2 patches has no data: one patch of it is visible, all that the deepest norms see."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        array = np.random.default_rng(number).random((64, 64, 4)).astype(np.float32)
        array[:, : 32 if number < 2 else 1] = np.nan
        np.save(tmp_path / "images" / f"{number}.npy", array)
    (tmp_path / "c.yaml").write_text(
        f"""
model: {{encoder: {RESNET}, image_size: [64, 64], decoder_width: 32, in_channels: 4, backend: {backend}}}
data: {{root: {tmp_path / "images"}, nodata: nan, workers: 0, crop_scale: [1, 1], mean: [0.5, 0.5, 0.5, 0.5],
  std: [0.3, 0.3, 0.3, 0.3]}}
optim: {{name: adamw, warmup_epochs: 0}}
train: {{epochs: 1, batch_size: 2, accumulate: 2}}
run: {{device: cpu, checkpoint_every_steps: 1, keep_last: 9}}
"""
    )
    calm = load_config(tmp_path / "c.yaml", [f"run.dir={tmp_path / 'calm'}"])
    pretrain(calm)
    paths = list_checkpoints(tmp_path / "calm" / "checkpoints")
    assert len(paths) == 2
    pretrain(load_config(tmp_path / "c.yaml", [f"run.dir={tmp_path / 'other'}", f"run.resume={paths[0]}"]))
    expected, actual = (
        read_checkpoint(list_checkpoints(tmp_path / run / "checkpoints")[-1])["model"] for run in ("calm", "other")
    )
    assert all(torch.equal(actual[name], expected[name]) and expected[name].isfinite().all() for name in expected)
