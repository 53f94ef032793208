"""Pictures of what a model makes of hidden patches, during a run and from a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spark_me import build_model
from spark_me.config.data import DataConfig, Statistics
from spark_me.config.tasks import ModelConfig
from spark_me.data.datasets import HeldOutDataset
from spark_me.data.loaders import held_out_dataset
from spark_me.data.reading import Item
from spark_me.data.transforms import Crop, display_of, to_displayable
from spark_me.data.unreadable import UnreadableImage
from spark_me.errors import UserError, printable, shown
from spark_me.files import check_output
from spark_me.masking import draw_visible_of_samples, upsample_visible
from spark_me.spark import SparK
from spark_me.train.checkpoint import config_of, load_model, read_checkpoint
from spark_me.train.plots import LONGEST_NAME, Row, plot_reconstruction

NOTES = (
    "Loss: squared error of normalised hidden pixels under the mask that is shown; predicting nothing scores 1.0.",
    "A hidden patch is predicted up to its mean and contrast, which are the original's.",
)


class Subject(NamedTuple):
    """An image to reconstruct."""

    item: Item
    place: int
    """In its data set, which decides its mask."""
    crop: Crop


def reconstruct_files(checkpoint: Path, images: Sequence[Path], out: Path, *, seed: int = 0) -> None:
    """Draw original, visible pixels and reconstruction of image files.

    Args:
        checkpoint: from the checkpoints/ folder of a run.
        images: files; their largest centred crop of the model's image shape is taken.
        out: PNG to write.
        seed: which masks are drawn.

    Raises:
        UserError: if the checkpoint does not load, an image is unreadable or the picture cannot be written.
    """
    check_output(out, checkpoint, *images)
    content = read_checkpoint(checkpoint)
    config = config_of(content, checkpoint)
    model = model_of(config.model)
    load_model(model, content, checkpoint)
    subjects = load_images(images, config.data, config.model, config.run.seed)
    encoder, step = config.model.encoder, content["step"]
    losses = draw_reconstruction(model, subjects, config.data, out, encoder=encoder, step=step, seed=seed)
    for subject, loss in zip(subjects, losses):
        print(f"{printable(str(subject.item))}  loss {loss:.4f}")
    print(f"wrote {printable(str(out))}")


def model_of(config: ModelConfig) -> SparK:
    """The model that a configuration describes, with random weights."""
    height, width = config.image_size
    return build_model(
        config.encoder,
        image_size=(height, width),
        in_channels=config.in_channels,
        mask_ratio=config.mask_ratio,
        decoder=config.decoder,
        decoder_width=config.decoder_width,
        drop_path=config.drop_path,
        backend=config.backend,
        init=config.init,
        zero_init_residual=config.zero_init_residual,
    )


def load_images(paths: Sequence[Path], data: DataConfig, model: ModelConfig, seed: int) -> list[Subject]:
    """Read files as the held-out images are.

    Raises:
        UserError: naming the first file that is unreadable.
    """
    dataset = held_out_dataset(list(paths), data, model, seed)
    subjects, unreadable = read_subjects(dataset, len(dataset))
    for name, reason in unreadable:
        raise UserError(f"{name}: unreadable ({reason}): give images that open in a viewer")
    return subjects


def read_subjects(dataset: HeldOutDataset, count: int) -> tuple[list[Subject], list[tuple[str, str]]]:
    """The first `count` images of a data set, and (name, reason) of those that cannot be used."""
    subjects, unreadable = [], []
    for index in range(count):
        item = dataset.items[index]
        try:
            subjects.append(Subject(item, index, dataset.crop(item, index)))
        except UnreadableImage as reason:
            unreadable.append((str(item), str(reason)))
    return subjects, unreadable


def draw_reconstruction(
    model: SparK, subjects: Sequence[Subject], data: Statistics, path: Path, *, encoder: str, step: int, seed: int
) -> list[float]:
    """Reconstruct images under reproducible masks and write the picture; the model's mode is kept.

    Args:
        model: on any device.
        subjects: one at least.
        data: with the statistics of the channels.
        path: PNG to write.
        encoder: its name.
        step: how far the model is trained.
        seed: which masks are drawn.

    Returns:
        The loss of each image under its mask.

    Raises:
        UserError: if the picture cannot be written.
    """
    images = torch.stack([subject.crop.image for subject in subjects])
    marked = [subject.crop.valid for subject in subjects if subject.crop.valid is not None]
    valid = torch.stack(marked) if marked else None
    places = [subject.place for subject in subjects]
    visible = draw_visible_of_samples(seed, 0, places, model.grid, model.mask_ratio, valid)
    device = next(model.parameters()).device
    training = model.training
    model.eval()  # as for the held-out loss
    result = model.reconstruct(images.to(device), visible, valid)
    model.train(training)
    losses: list[float] = result.losses.tolist()
    hidden = ~visible if valid is None else valid & ~visible
    rows = [
        Row(*fields)
        for fields in zip(
            [subject.item.name for subject in subjects],
            losses,
            to_displayable(images, data),
            to_displayable(result.prediction.float().cpu(), data),
            upsample_visible(visible, model.patch_size),
            upsample_visible(hidden, model.patch_size),
            [_without_data(subject.crop) for subject in subjects],
        )
    ]
    name, mean = shown(encoder, LONGEST_NAME), sum(losses) / len(losses)
    title = f"{name}, step {step}, mask ratio {model.mask_ratio:g}: mean loss {mean:.4f}"
    caption = display_of(data, images.shape[1]).caption
    plot_reconstruction(rows, title, [f"Shown: {caption}.", *NOTES] if caption else NOTES, path)
    return losses


def _without_data(crop: Crop) -> Tensor:
    """bool [H, W]."""
    if crop.without_data is None:
        return torch.zeros(crop.image.shape[1:], dtype=torch.bool)
    return crop.without_data
