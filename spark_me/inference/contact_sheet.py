"""A picture of images with a line of text below each."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

from spark_me.data.transforms import to_displayable
from spark_me.errors import shown
from spark_me.files import atomic_write
from spark_me.inference.view import View

MOST, COLUMNS = 64, 8
CAPTION_WIDTH, CAPTION_HEIGHT, MARGIN = 112, 18, 4
"""Pixels."""


def draw_sheet(paths: Sequence[Path], captions: Sequence[str], view: View, out: Path) -> None:
    """Draw the first images as the network sees them.

    Args:
        paths: readable images; the first `MOST` are drawn.
        captions: one for each, cut to the width of its column.
        view: how they are shown.
        out: PNG to write.

    Raises:
        UserError: if it cannot be written.
    """
    cells = list(zip(paths, captions))[:MOST]
    height, width = view.size[0], max(view.size[1], CAPTION_WIDTH)
    columns = min(COLUMNS, len(cells))
    cell = (width + MARGIN, height + CAPTION_HEIGHT + MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, ceil(len(cells) / columns) * cell[1] + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, (path, caption) in enumerate(cells):
        left, top = MARGIN + place % columns * cell[0], MARGIN + place // columns * cell[1]
        crop = to_displayable(view.read(path)[None], view.data)[0]
        sheet.paste(to_pil_image(crop).convert("RGB"), (left, top))
        caption = shown(caption)  # Pillow cannot measure several lines
        while caption and draw.textlength(caption, font) > width:
            caption = caption[:-1]
        draw.text((left, top + height + 2), caption, "black", font)
    with atomic_write(out) as file:
        sheet.save(file, "PNG")
