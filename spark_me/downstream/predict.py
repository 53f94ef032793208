"""`spark-me predict`: the classes of many images, as a table, JSON, a picture."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

from spark_me.data.transforms import to_displayable
from spark_me.devices import pick_device
from spark_me.downstream.classifier import Classifier, as_prediction, check_top_k, load_classifier
from spark_me.downstream.images import find_images, over_images, report
from spark_me.downstream.preprocessing import Preprocessing
from spark_me.errors import UserError, printable, shown
from spark_me.files import atomic_write, check_output, write_json
from spark_me.tables import text_table

MOST, COLUMNS = 64, 8
CAPTION_WIDTH, CAPTION_HEIGHT, MARGIN = 112, 18, 4
"""Pixels."""


def draw_sheet(paths: Sequence[Path], captions: Sequence[str], preprocessing: Preprocessing, out: Path) -> None:
    """Draw the first images as the network sees them.

    Args:
        paths: readable images; the first `MOST` are drawn.
        captions: one for each, cut to the width of its column.
        preprocessing: how they are shown.
        out: PNG to write.

    Raises:
        UserError: if it cannot be written.
    """
    cells = list(zip(paths, captions))[:MOST]
    height, width = preprocessing.size[0], max(preprocessing.size[1], CAPTION_WIDTH)
    columns = min(COLUMNS, len(cells))
    cell = (width + MARGIN, height + CAPTION_HEIGHT + MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, ceil(len(cells) / columns) * cell[1] + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, (path, caption) in enumerate(cells):
        left, top = MARGIN + place % columns * cell[0], MARGIN + place // columns * cell[1]
        crop = to_displayable(preprocessing.read(path)[None], preprocessing.data)[0]
        sheet.paste(to_pil_image(crop).convert("RGB"), (left, top))
        caption = shown(caption)  # Pillow cannot measure several lines
        while caption and draw.textlength(caption, font) > width:
            caption = caption[:-1]
        draw.text((left, top + height + 2), caption, "black", font)
    with atomic_write(out) as file:
        sheet.save(file, "PNG")


def predict_files(
    source: str,
    images: Sequence[Path],
    *,
    top_k: int | None = None,
    json_file: Path | None = None,
    picture: Path | None = None,
    raw: bool = False,
    device: str = "auto",
    batch_size: int = 32,
    workers: int | None = None,
) -> int:
    """Classify image files, print a table, and name the unreadable ones at the end.

    Args:
        source: what `load_classifier` takes.
        images: files, and folders of them at any depth.
        top_k: how many classes to list for each image; the likeliest alone when None.
        json_file: gets one list with, for each readable image, what `inference_model` returns but for `pred_scores`,
            and `image`, its path.
        picture: PNG that gets the first images with their classes.
        raw: see `load_classifier`.
        device: auto, cpu, cuda, …
        batch_size: images at once.
        workers: processes that read images; one a CPU but 4 at most when None.

    Returns:
        The exit code: 1 if any image is unreadable, else 0.

    Raises:
        UserError: if the model is no classifier, no image is readable, or a file cannot be written.
    """
    check_top_k(top_k)
    check_output(json_file, source, *images)
    if picture is not None and picture.suffix.lower() != ".png":
        raise UserError(f"{picture}: pictures are written as PNG: end the name in .png")
    paths = find_images(images)
    check_output(picture, source, *paths)
    classifier = load_classifier(source, raw=raw)
    classifier.network.to(pick_device(device))
    results = over_images(
        paths, classifier.preprocessing, classifier.scores, batch_size=batch_size, workers=workers, what="predicting"
    )
    readable = [paths[place] for place in results.places]
    predictions = [as_prediction(scores, classifier, top_k) for scores in results.rows]
    _write(classifier, readable, predictions, json_file, picture)
    print(table(readable, predictions))
    return report(results.unreadable)


def table(paths: Sequence[Path], predictions: Sequence[dict[str, Any]]) -> str:
    """A line for each image and class, in columns."""
    rows = [("image", "score", "label", "class")]
    for path, prediction in zip(paths, predictions):
        for rank, row in enumerate(prediction.get("top_k", [prediction])):
            score, label = f"{row['pred_score']:.4f}", str(row["pred_label"])
            rows.append((printable(str(path)) if rank == 0 else "", score, label, shown(row["pred_class"])))
    return text_table(rows, "<>><")


def _write(
    classifier: Classifier,
    paths: Sequence[Path],
    predictions: Sequence[dict[str, Any]],
    json_file: Path | None,
    picture: Path | None,
) -> None:
    if json_file is not None:
        entries = [{"image": str(path), **prediction} for path, prediction in zip(paths, predictions)]
        write_json(json_file, entries)
    if picture is not None:
        captions = [f"{prediction['pred_class']} {prediction['pred_score']:.2f}" for prediction in predictions]
        draw_sheet(paths, captions, classifier.preprocessing, picture)
