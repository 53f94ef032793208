"""`--scope data`: images a second of pretraining's loader, JPEGs decoded wholly or reduced, with so many workers."""

import dataclasses
import gc
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import PIL
from PIL import Image, features

from spark_me.bench.timing import Advance, Record
from spark_me.config.data import DataConfig
from spark_me.config.tasks import ModelConfig
from spark_me.data.datasets import Batch
from spark_me.data.listing import Paths, is_there, list_images
from spark_me.data.loaders import train_loader, train_reader
from spark_me.data.sampler import Share
from spark_me.errors import UserError
from spark_me.machine import describe_machine

BATCHES = 8
"""For each worker, that are timed in a run."""
PHOTOS = 64
"""How many are made where none are given."""
QUALITY = 90
DECODING = {"whole": False, "reduced": True}
"""`data.draft`, by name."""


@dataclass(frozen=True)
class Loading:
    """What is measured: otherwise it is the default configuration of pretraining."""

    workers: Sequence[int] = (0, 1, 2)
    """How many load images, one measurement each; 0 loads in the process itself."""
    batch: int = 64
    image_size: tuple[int, int] = (224, 224)
    """(H, W) of the crops in pixels."""
    root: str | None = None
    """A folder of images; None makes photos."""
    photo_size: tuple[int, int] = (375, 500)
    """(H, W) of these: by default about ImageNet's."""

    def check(self) -> None:
        """Refuse now what would fail later.

        Raises:
            UserError: for anything that does not fit.
        """
        if self.batch < 1:
            raise UserError(f"--batch {self.batch}: give at least one image")
        if min(self.workers) < 0:
            raise UserError(f"--workers {min(self.workers)}: give 0 (none besides the process itself) or more")
        if not all(8 <= side <= 8192 for side in self.photo_size):
            raise UserError(f"--photo-size {' '.join(map(str, self.photo_size))}: give sides of 8 to 8192 pixels")
        if self.root is not None and not is_there(Path(self.root), folder=True):
            raise UserError(f"--root {self.root}: no such folder: give that of your images, or leave it out")
        train_reader(DataConfig(), self.model, 0)  # refuses a size that does not fit

    @property
    def model(self) -> ModelConfig:
        """Whose crops and masks are drawn."""
        return ModelConfig(image_size=[*self.image_size])


def measure_loading(case: Loading, *, runs: int, warmup: int, advance: Advance) -> Record:
    """Time every count of workers with both ways of decoding, a round of all after the other.

    The files come from the page cache after the first round: decoding and augmenting is what takes the time.

    Args:
        case: what is measured; checked.
        runs, warmup: rounds that count, and rounds before them that do not.
        advance: called once for each workers, way of decoding and round.

    Raises:
        UserError: if there are no images, or one is unreadable.
    """
    keys = [(workers, decoding) for workers in dict.fromkeys(case.workers) for decoding in DECODING]
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in keys}
    with _images(case) as images:
        for turn in range(warmup + runs):
            for workers, decoding in keys:
                advance(f"{'warm-up' if turn < warmup else 'timing'} {workers} workers, {decoding}")
                gc.collect()
                loader = loader_of(case, images, workers, draft=DECODING[decoding])
                seconds[workers, decoding].append(time_loader(loader, lead=max(1, workers)))
        machine = dataclasses.asdict(describe_machine("cpu"))
        number = len(images)
    machine["versions"] |= {"Pillow": PIL.__version__, "libjpeg-turbo": features.version("libjpeg_turbo") or "not used"}
    rows = compare_loading(case, {key: times[warmup:] for key, times in seconds.items()})
    result = {"scope": "data", "rows": rows, "left_out": {}}
    facts = {"case": {**dataclasses.asdict(case), "images": number}, "runs": runs, "warmup": warmup}
    return {"machine": machine, **facts, "scopes": [result]}


def loader_of(case: Loading, images: Paths, workers: int, *, draft: bool) -> Iterable[Batch]:
    """The batches of a run, first those before the clock starts: one for each worker, at least one."""
    data = DataConfig(workers=workers, draft=draft, repeats=math.ceil(case.batch / len(images)))
    share = Share(case.batch, (1 + BATCHES) * max(1, workers), seed=0)
    reader = train_reader(data, case.model, share.seed)
    return train_loader(images, reader, data, share, most_unreadable=0, pin_memory=False)


def time_loader(loader: Iterable[Batch], lead: int, clock: Callable[[], float] = perf_counter) -> float:
    """Seconds that all batches but the first `lead` take, with which workers start.

    Raises:
        UserError: if an image is unreadable: it would be loaded in no time.
    """
    batches = iter(loader)
    for batch in islice(batches, lead):
        _require_readable(batch)
    start = clock()
    for batch in batches:
        _require_readable(batch)
    return clock() - start


def compare_loading(case: Loading, seconds: dict[tuple[int, str], list[float]]) -> list[dict[str, Any]]:
    """A row for each (workers, decoding), from the seconds of its runs."""
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    return [
        {
            "workers": workers,
            "decoding": decoding,
            "seconds": times,
            "median": medians[workers, decoding],
            "fastest": min(times),
            "slowest": max(times),
            "images_per_second": BATCHES * max(1, workers) * case.batch / medians[workers, decoding],
            "speed_to_whole": medians[workers, "whole"] / medians[workers, decoding],
        }
        for (workers, decoding), times in seconds.items()
    ]


def _require_readable(batch: Batch) -> None:
    for name, reason in batch.unreadable:
        raise UserError(f"{name}: cannot be read ({reason}): repair it, or leave it out of --root")


@contextmanager
def _images(case: Loading) -> Iterator[Paths]:
    if case.root is not None:
        images = Paths(list_images(Path(case.root)))
        if not images:
            raise UserError(f"--root {case.root}: no images in there: check the path")
        yield images
        return
    with TemporaryDirectory(prefix="spark_me-bench-") as folder:
        paths = [Path(folder, f"{number:03}.jpg") for number in range(PHOTOS)]
        for number, path in enumerate(paths):
            make_photo(case.photo_size, number).save(path, quality=QUALITY)
        yield Paths(paths)


def make_photo(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth shapes of every width with some noise, which as JPEG take about as many bytes as a photo does."""
    height, width = size
    draws = np.random.default_rng(seed)
    pixels = draws.normal(127.5, 12, (height, width, 3))
    for cells in (4, 16, 64):
        coarse = draws.normal(0, 1, (cells, cells, 3)) * 120 / cells**0.5
        bands = [Image.fromarray(band).resize((width, height), Image.Resampling.BICUBIC)
                 for band in coarse.astype(np.float32).transpose(2, 0, 1)]  # fmt: skip
        pixels += np.stack([np.asarray(band) for band in bands], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
