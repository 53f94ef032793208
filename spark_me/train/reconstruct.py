"""Pictures of what a model makes of hidden patches, during a run and from a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from spark_me import build_model
from spark_me.config import Config
from spark_me.data.datasets import Batch, collate
from spark_me.data.files import Files
from spark_me.data.loaders import held_out_dataset
from spark_me.data.transforms import to_displayable
from spark_me.errors import UserError
from spark_me.masking import draw_visible_of_samples, upsample_visible
from spark_me.spark import SparK
from spark_me.train.checkpoint import config_of, load_model, read_checkpoint
from spark_me.train.plots import plot_reconstruction


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
    content = read_checkpoint(checkpoint)
    config = config_of(content, checkpoint)
    model = model_of(config)
    load_model(model, content, checkpoint)
    draw_reconstruction(model, load_images(images, config), config, out, seed=seed)
    print(f"wrote {out}")


def model_of(config: Config) -> SparK:
    """The model that a configuration describes, with random weights."""
    model = config.model
    return build_model(
        model.encoder,
        image_size=(model.image_size[0], model.image_size[1]),
        in_channels=model.in_channels,
        mask_ratio=model.mask_ratio,
        decoder_width=model.decoder_width,
        drop_path=model.drop_path,
        backend=model.backend,
        zero_init_residual=model.zero_init_residual,
    )


def load_images(paths: Sequence[Path], config: Config) -> Batch:
    """Read files as the held-out images are.

    Raises:
        UserError: naming the first file that is unreadable.
    """
    dataset = held_out_dataset(Files([], list(paths)), config)
    batch = collate([dataset[index] for index in range(len(dataset))])
    for path, reason in batch.unreadable:
        raise UserError(f"{path}: unreadable ({reason}): give images that open in a viewer")
    return batch


def draw_reconstruction(model: SparK, batch: Batch, config: Config, path: Path, *, seed: int) -> None:
    """Reconstruct images under reproducible masks and write the picture; the model's mode is kept."""
    images, valid = batch.images, batch.valid
    device = next(model.parameters()).device
    visible = draw_visible_of_samples(seed, 0, range(len(images)), model.grid, model.mask_ratio, valid)
    training = model.training
    model.eval()  # as for the held-out loss
    prediction = model.reconstruct(images.to(device), visible, valid).prediction
    model.train(training)
    plot_reconstruction(
        to_displayable(images, config.data),
        to_displayable(prediction.float().cpu(), config.data),
        upsample_visible(visible, model.patch_size),
        path,
    )
