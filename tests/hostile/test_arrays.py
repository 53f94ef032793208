"""Damaged arrays: what a .npy or TIFF file claims is checked before memory is asked for it."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from child import MIB, run_limited
from mutations import mutate
from PIL import Image
from valid_images import valid_files

from spark_me.config.data import DataConfig
from spark_me.data import arrays
from spark_me.data.commands import examine
from spark_me.data.reading import Encoded, Item, read_image
from spark_me.data.unreadable import UnreadableImage, unreadable_if_it_fails


def reason(item: Item, channels: int) -> str:
    """Why an array is refused; it takes little memory to say so, from a file and from the content of one."""
    content = item.read_bytes() if isinstance(item, Path) else item.content
    for kind in [item, Encoded(str(item), content)]:
        why = run_limited(lambda kind=kind: examine(kind, channels, DataConfig()).reason, memory=64 * MIB)  # type: ignore[misc]
        assert why != "None" and len(why.splitlines()) == 1
    return why


def tiff(path: Path, shape: tuple[int, ...], **options: object) -> Path:
    bands = np.zeros(shape, dtype=np.uint16)
    tifffile.imwrite(path, bands, photometric="minisblack", **{"planarconfig": "contig", **options})  # type: ignore[arg-type]
    return path


def test_bands_are_counted_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 bands that take 300 MB, in a file of some hundred kB."""
    path = tmp_path / "a.tif"
    page = np.zeros((1000, 1000), dtype=np.uint16)
    pages = (page for _ in range(150))
    options = {"shape": (150, *page.shape), "dtype": page.dtype, "compression": "zlib", "rowsperstrip": 1000}
    tifffile.imwrite(path, pages, photometric="minisblack", **options)  # type: ignore[arg-type]
    assert path.stat().st_size < 1e6
    assert "has 150 channels (shape (1000, 1000, 150)), not 5" in reason(path, 5)
    monkeypatch.setattr(arrays, "LARGEST_ARRAY", 200 * MIB)
    assert "too large: 1000×1000×150 values of uint16 take 286 MiB, and the limit is 200 MiB" in reason(path, 150)


def test_files_that_hold_less_than_they_claim(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (8000, 8000, 4)})
    path = tmp_path / "a.npy"
    path.write_bytes(file.getvalue() + bytes(1000))
    assert "is cut off: 1000 of 1024000000 bytes" in reason(path, 4)
    assert "has 4 channels" in reason(path, 3)


def set_tag(path: Path, code: int, value: int) -> None:
    with tifffile.TiffFile(path, mode="r+") as file:
        tag = file.pages[0].tags[code]  # type: ignore[union-attr]
        width = {3: "H", 4: "I"}[int(tag.dtype)]
        file.filehandle.seek(tag.valueoffset)
        file.filehandle.write(struct.pack("<" + width, value))


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_tiles_larger_than_any_image(tmp_path: Path, compression: str | None) -> None:
    path = tiff(tmp_path / "a.tif", (16, 16, 5), tile=(16, 16), compression=compression)
    for code in (322, 323):
        set_tag(path, code, 65520)
    assert "too large: 65520×65520×5 values of uint16 take 40,940 MiB, and the limit is 64 MiB" in reason(path, 5)


def replace_segment(path: Path, content: bytes) -> None:
    set_tag(path, 273, path.stat().st_size)
    set_tag(path, 279, len(content))
    with path.open("ab") as file:
        file.write(content)


def test_a_strip_that_inflates_to_more_than_it_claims(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", (16, 16, 5), compression="zlib")
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(MIB)) for _ in range(500)) + packer.flush()
    replace_segment(path, bomb)
    run_limited(lambda: examine(path, 5, DataConfig()), memory=64 * MIB)


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (
            12_000,
            "DecompressionBombWarning: Image size (144000000 pixels) exceeds limit of 89478485 pixels, could be "
            "decompression bomb DOS attack.",
        ),
        (9000, "its tiles of 16×16 pixels hold images of 9000×9000"),
    ],
)
def test_an_image_within_a_tiff_that_is_larger_than_the_tiff(tmp_path: Path, side: int, expected: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((16, 16), dtype=np.uint8), photometric="minisblack", compression="jpeg")
    content = io.BytesIO()
    Image.new("L", (side, side)).save(content, "JPEG")
    replace_segment(path, content.getvalue())

    def read() -> str:
        with pytest.raises(UnreadableImage) as caught, unreadable_if_it_fails():
            arrays.read_tiff(path, 1)
        return str(caught.value)

    assert run_limited(read, memory=64 * MIB) == expected


@pytest.mark.parametrize("compression", ["lerc", "jpegxl"])
def test_compressions_that_hide_their_size_are_refused(tmp_path: Path, compression: str) -> None:
    path = tiff(tmp_path / "a.tif", (16, 16, 5), compression=compression)
    assert "does not tell how large it will be: store it with deflate, LZW or Zstandard" in reason(path, 5)


def test_a_tiff_reads_no_other_file(tmp_path: Path) -> None:
    """Two bands of an OME data set, the second of which lies elsewhere."""
    bands = np.ones((2, 16, 16), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "other.ome.tif", bands[1], metadata=None, photometric="minisblack")
    described = """<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">
<Image ID="Image:0"><Pixels DimensionOrder="XYCZT" ID="Pixels:0" SizeC="2" SizeT="1" SizeX="16" SizeY="16" SizeZ="1"
 Type="uint16"><Channel ID="Channel:0:0" SamplesPerPixel="1"/><Channel ID="Channel:0:1" SamplesPerPixel="1"/>
<TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="a.ome.tif">urn:uuid:1</UUID></TiffData>
<TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="other.ome.tif">urn:uuid:2</UUID></TiffData>
</Pixels></Image></OME>"""
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, bands[0], description=described, metadata=None, photometric="minisblack")
    with tifffile.TiffFile(path) as file:
        assert file.series[0].shape == (2, 16, 16) and file.series[0].asarray()[1].all()
    with pytest.raises(UnreadableImage, match="in another file|has 1 channels"):
        read_image(path, 2)


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("back_to", [0, 1])
def test_pages_in_a_circle_are_not_followed_for_ever(tmp_path: Path, bigtiff: bool, back_to: int) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((3, 16, 16), dtype=np.uint16), photometric="minisblack", bigtiff=bigtiff)
    assert examine(path, 3, DataConfig()).reason is None
    with tifffile.TiffFile(path, mode="r+") as file:
        offsets = [page.offset for page in file.pages]
        file.filehandle.seek(offsets[2])
        tags = int.from_bytes(file.filehandle.read(file.tiff.tagnosize), "little")
        file.filehandle.seek(tags * file.tiff.tagsize, 1)
        file.filehandle.write(offsets[back_to].to_bytes(file.tiff.offsetsize, "little"))
    assert reason(path, 3) == "its pages lead in a circle"


def check_mutations(seeds: range, kind: Callable[[str], bool]) -> None:
    readable = [
        (name, content, channels)
        for name, content in valid_files().items()
        for channels in (1, 3, 5)
        if kind(name) and examine(Encoded(name, content), channels, DataConfig()).reason is None
    ]
    assert len(readable) >= 10

    def read_all() -> int:
        read = 0
        for seed in seeds:
            name, content, channels = readable[seed % len(readable)]
            damaged = mutate(content, seed, readable[seed // 7 % len(readable)][1])
            why = examine(Encoded(name, damaged), channels, DataConfig()).reason
            assert why is None or (why and len(why.splitlines()) == 1 and len(why) < 400), (name, seed, why)
            read += why is None
        return read

    assert int(run_limited(read_all, memory=2560 * MIB, seconds=600)) > len(seeds) / 20


KINDS = {"npy": lambda name: name.endswith(".npy"), "tiff": lambda name: name.endswith((".tif", ".tiff"))}


@pytest.mark.parametrize("kind", KINDS)
def test_mutations(kind: str) -> None:
    check_mutations(range(400), KINDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutations(kind: str) -> None:
    check_mutations(range(1000, 11_000), KINDS[kind])
