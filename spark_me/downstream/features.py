"""Frozen features: the maps of an encoder, averaged over the image."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spark_me.devices import pick_device
from spark_me.downstream.classifier import read_model
from spark_me.downstream.images import Results, find_images, over_images, report
from spark_me.downstream.preprocessing import Preprocessing
from spark_me.errors import UserError, printable
from spark_me.files import atomic_write, check_output


@dataclass(frozen=True)
class Encoder:
    """What extracting features needs.

    Attributes:
        name: of the encoder.
        network: a dense network with `feature_maps`, in evaluation mode.
        preprocessing: how an image is shown to the network.
        stage: whose maps are taken, from 1, the shallowest: of most networks, those at stride 4.
    """

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    stage: int

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Maps of the stage, averaged over height and width.

        Args:
            images: [B, C, H, W] as `preprocessing` makes them, on any device.

        Returns:
            float32 [B, channels of the stage], on the network's device.
        """
        device = next(self.network.parameters()).device
        network: Any = self.network
        maps: Tensor = network.feature_maps(images.to(device))[self.stage - 1]
        return maps.float().mean(dim=(2, 3))


def load_encoder(source: str | os.PathLike[str], stage: int | None = None, *, raw: bool = False) -> Encoder:
    """The encoder in a file, ready to extract features. A decoder or classifier in it is left out.

    Its images are those that a checkpoint of ours was tested on (pretraining: the largest centred crop, resized), else
    those of `load_classifier`.

    Args:
        source: a published name (downloaded once), or path or URL of weights of any known layout, of a pretraining or
            of a fine-tuning checkpoint.
        stage: whose maps are taken, from 1, the shallowest; the deepest when None.
        raw: of a fine-tuning checkpoint, the weights themselves and not their moving average (EMA).

    Raises:
        UserError: if the source cannot be read, or there is no such stage.
        WeightsError: if its tensors are not those of a model.
    """
    file = read_model(source, raw=raw)
    network: Any = file.network(classifier=False)
    scales = len(network.traced.scales)
    if stage is not None and not 1 <= stage <= scales:
        raise UserError(f"stage={stage}: {file.weights.encoder} has stages 1 to {scales}")
    return Encoder(file.weights.encoder, network, file.preprocessing, stage or scales)


def extract_features(
    encoder: Encoder,
    images: Sequence[Path],
    *,
    device: str = "auto",
    batch_size: int = 32,
    workers: int | None = None,
    what: str = "features",
) -> Results:
    """Pooled features of image files: `rows` is float32 [n, C], of the readable ones in their order.

    Args:
        encoder: of `load_encoder`; moved to the device.
        images: files.
        device: auto, cpu, cuda, …
        batch_size: images at once.
        workers: processes that read images; one a CPU but 4 at most when None.
        what: for the progress bar.

    Raises:
        UserError: if none of the images is readable.
    """
    encoder.network.to(pick_device(device))
    return over_images(
        images, encoder.preprocessing, encoder.features, batch_size=batch_size, workers=workers, what=what
    )


def features_of_files(
    source: str, images: Sequence[Path], out: Path, *, stage: int | None = None, raw: bool = False, **options: Any
) -> int:
    """Write features of image files and of folders of them, and name the unreadable ones at the end.

    Args:
        source, stage, raw: see `load_encoder`.
        images: files, and folders of them at any depth.
        out: .npz file with `features` (float32 [n, C]), `paths` (n texts), `encoder` and `stage`.
        options: of `extract_features`.

    Returns:
        The exit code: 1 if any image is unreadable, else 0.

    Raises:
        UserError: if the source cannot be read, no image is readable, or the file cannot be written.
    """
    check_output(out, source)
    if out.suffix != ".npz":
        raise UserError(f"{out}: features are written as .npz: end the name so")
    paths = find_images(images)
    encoder = load_encoder(source, stage, raw=raw)
    results = extract_features(encoder, paths, **options)
    names = np.array([str(paths[place]) for place in results.places])
    with atomic_write(out) as file:
        np.savez(file, features=results.rows.numpy(), paths=names, encoder=encoder.name, stage=encoder.stage)
    what = f"{results.rows.shape[1]} features of {encoder.name}, stage {encoder.stage}"
    print(f"{printable(str(out))}: {len(names)} images, {what}")
    return report(results.unreadable)
