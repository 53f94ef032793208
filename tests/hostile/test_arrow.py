"""Damaged data sets on the disk, as `datasets` saves them: images, listed images, or one line.

A damaged offset may end a process that reads it, so each bundle of damages has a process of its own.
"""

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

SEEDS, MANY = 100, 10_000
FILES = ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
ATTACK = """
import sys
from pathlib import Path
from memory import memory_below
from mutations import mutate
from spark_me.config.data import DataConfig
from spark_me.data import files
from spark_me.data.reading import read_image
from spark_me.data.unreadable import UnreadableImage
from spark_me.errors import UserError

folder, names = Path(sys.argv[1]), sys.argv[3:]
contents, read = [(folder / name).read_bytes() for name in names], 0
with memory_below(500):
    for seed in range(int(sys.argv[2])):
        for name, content in zip(names, contents):
            (folder / name).write_bytes(content)
        (folder / names[seed % len(names)]).write_bytes(mutate(contents[seed % len(names)], seed))
        print(seed, file=sys.stderr, flush=True)
        try:
            images = files.load(DataConfig(kind="huggingface", root=str(folder)), "train")
            for number in range(min(len(images), 20)):
                try:
                    read_image(images[number], 3)
                    read += 1
                except UnreadableImage as reason:
                    assert "\\n" not in str(reason)
        except UserError as error:
            assert "\\n" not in str(error)
print(read)
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    photos = [Image.fromarray(np.full((9, 8, 3), 20 * number, np.uint8)) for number in range(6)]
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    rows = datasets.Dataset.from_dict({"label": list(range(6)), "picture": photos}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def attack(saved: Path, seeds: int, *names: str) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    program = f"import sys\nsys.path[:0] = {paths}\n{ATTACK}"
    arguments = [sys.executable, "-c", program, str(saved), str(seeds), *names]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60 + seeds)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0


def test_damaged_data_sets_are_images_or_one_line(saved: Path) -> None:
    attack(saved, SEEDS, *FILES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_damaged_data_sets_are_images_or_one_line(saved: Path, name: str) -> None:
    attack(saved, MANY, name)
