"""Data sets of labelled images."""

from spark_me.config_finetune import FinetuneConfig
from spark_me.data.augment import LabelledTransform, centre_crop
from spark_me.data.class_folders import Labelled
from spark_me.data.datasets import HeldOutDataset, Reader, Sample, TrainDataset
from spark_me.data.reading import Item, Picture


class LabelledTrainDataset(TrainDataset):
    """Augmented crops; an unreadable image is replaced by the next one, with its label."""

    def __init__(self, images: Labelled, reader: Reader, *, repeats: int = 1, most_unreadable: int = 0) -> None:
        super().__init__(images.paths, reader, repeats=repeats, most_unreadable=most_unreadable)
        self.labels = images.labels

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        sample = super().__getitem__(key)
        place = (sample.sample_index + len(sample.unreadable)) % len(self.labels)
        return sample._replace(label=self.labels[place])


class LabelledTestDataset(HeldOutDataset):
    """Test crops, the same every time."""

    def __init__(self, images: Labelled, reader: Reader) -> None:
        super().__init__(images.paths, reader)
        self.labels = images.labels

    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index)._replace(label=self.labels[index])


class CachingReader(Reader):
    """Reads every image once, and keeps it decoded."""

    def __init__(self, transform: LabelledTransform, *, seed: int, channels: int) -> None:
        super().__init__(transform, seed=seed, channels=channels)
        self._pictures: dict[str, Picture] = {}

    def read(self, item: Item) -> Picture:
        name = str(item)
        if name not in self._pictures:
            self._pictures[name] = super().read(item)
        return self._pictures[name]


def held_out_labelled(images: Labelled, config: FinetuneConfig) -> LabelledTestDataset:
    """Labelled images under the test crop of a configuration."""
    return LabelledTestDataset(images, labelled_reader(centre_crop(config.data, config.model.in_channels), config))


def labelled_reader(transform: LabelledTransform, config: FinetuneConfig) -> Reader:
    """Reads as the configuration says, in memory or from the disk."""
    reader = CachingReader if config.data.cache else Reader
    return reader(transform, seed=config.run.seed, channels=config.model.in_channels)
