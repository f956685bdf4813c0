"""One sheet of pictures that compares models: hazy | each model's result | clear, with scores below, as in the figures of papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from aecr_jax.data.folders import clear_names
from aecr_jax.data.images import check_picture_name, list_images, read_image, write_image
from aecr_jax.errors import UserError
from aecr_jax.files import refuse_existing, replaces
from aecr_jax.inference.photographs import restore_any_size
from aecr_jax.inference.restore import USUAL_TILE, Restorer, check_tile
from aecr_jax.inference.scores import Measure
from aecr_jax.inference.weights import load_checkpoint
from aecr_jax.processes import no_bar

_GAP, _FONT_SIZE, _LINE = 8, 16, 26


@dataclass(frozen=True)
class Cell:
    """One picture of the sheet."""

    picture: Image.Image
    """The picture, reduced to the width of its column."""
    score: tuple[float, float] | None
    """PSNR in dB and SSIM of the picture in full size, if the clear image is known."""


def compare(
    images: Sequence[str | Path],
    models: Sequence[str | Path],
    output: str | Path,
    *,
    clear: str | Path | None = None,
    width: int = 320,
    tile: int = USUAL_TILE,
    overwrite: bool = False,
) -> str:
    """Restore each image by each model, and write one sheet with a row for each image and a column for each model.

    Args:
      images: image files.
      models: names and paths that `load_checkpoint` accepts; a column is headed by the model's name.
      output: the picture to write, in the format of its extension.
      clear: a folder of clear images, matched by the naming schemes of public data sets, or the clear image if there is one image; the
        sheet then has a last column with it, and PSNR and SSIM below each picture.
      width: width of a column in pixels; larger pictures are reduced to it.
      tile: as for `dehaze_files`.
      overwrite: replace an existing `output`.

    Returns:
      A table of the scores, or an empty string without clear images.

    Raises:
      UserError: a file is missing or unreadable, an image has no clear one or one of another size, a result is not finite, or the output
        exists or cannot be written.
    """
    check_tile(tile)
    if not 16 <= width <= 4096:
        raise UserError(f"--width (={width}) must be from 16 to 4096")
    check_picture_name(output)
    refuse_existing(output, overwrite=overwrite)
    pairs = [(Path(image), find_clear(Path(image), clear, single=len(images) == 1)) for image in images]
    if any(replaces(output, source) for pair in pairs for source in pair if source is not None):
        raise UserError(f"{output} is an input and would be replaced: choose another --output")
    networks = [load_checkpoint(model) for model in models]
    restorers = [Restorer(network) for network in networks]
    # Each image is read twice: once to check its size before any time is spent, and again to restore it. So only one is in memory.
    hazy_cells, clear_cells = [], []
    for pair in pairs:
        hazy, target = _read_pair(*pair)
        hazy_cells.append(make_cell(hazy, target, width))
        if target is not None:
            clear_cells.append(make_cell(target, None, width))
    rows: list[list[Cell]] = []
    with tqdm(total=len(networks) * len(images), desc="restoring", unit="image", leave=False, disable=no_bar()) as bar:
        for pair in pairs:
            hazy, target = _read_pair(*pair)
            rows.append([])
            for network, restorer in zip(networks, restorers):
                rows[-1].append(make_cell(restore_any_size(restorer, hazy, tile, f"{network.name}, {pair[0]}"), target, width))
                bar.update()
    columns = [hazy_cells, *map(list, zip(*rows))]
    titles = ["hazy", *(network.name for network in networks)]
    table = _table([image.name for image, _ in pairs], titles, columns) if clear is not None else ""
    if clear is not None:
        titles.append("clear")
        columns.append(clear_cells)
    write_image(output, draw_sheet(titles, columns))
    return table


def find_clear(image: Path, clear: str | Path | None, *, single: bool) -> Path | None:
    """Return the clear image of a hazy one: `clear` itself if it is a file and there is a `single` image, or one in that folder.

    Raises:
      UserError: there is none.
    """
    if clear is None:
        return None
    clear = Path(clear)
    if clear.is_dir():
        by_name = {path.stem.lower(): path for path in list_images(clear)}
        names = clear_names(image.stem)
        if not (found := [by_name[name] for name in names if name in by_name]):
            raise UserError(f"{image} has no clear image in {clear}: looked for {' or '.join(names)} with any image extension")
        return found[0]
    if not single:
        raise UserError(f"--clear (={clear}) must be a folder, because there are several images")
    return clear


def _read_pair(image: Path, clear: Path | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read an image and its clear image, if it has one.

    Raises:
      UserError: one of them cannot be read, or their sizes differ.
    """
    hazy, target = read_image(image), None if clear is None else read_image(clear)
    if target is not None and hazy.shape != target.shape:
        sizes = [f"{x.shape[1]}x{x.shape[0]}" for x in (hazy, target)]
        raise UserError(f"{image} is {sizes[0]} and its clear image {sizes[1]}: they must have one size")
    return hazy, target


def draw_sheet(titles: Sequence[str], columns: Sequence[Sequence[Cell]]) -> np.ndarray:
    """Arrange columns of cells under their titles on white, `[H, W, 3]` in [0, 1]."""
    font = ImageFont.load_default(_FONT_SIZE)
    widths = [max(cell.picture.width for cell in column) for column in columns]
    rows = list(zip(*columns))
    has_scores = any(cell.score for row in rows for cell in row)
    heights = [max(cell.picture.height for cell in row) + (_LINE if has_scores else 0) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + _GAP * (len(widths) + 1), _LINE + sum(heights) + _GAP * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(text: str, left: int, top: int, room: int) -> None:
        while draw.textlength(text, font) > room and len(text) > 1:
            text = text[:-2] + "\u2026"
        draw.text((left + (room - draw.textlength(text, font)) / 2, top), text, "black", font)

    left = _GAP
    for title, column, column_width in zip(titles, columns, widths):
        write(title, left, 4, column_width)
        top = _LINE + _GAP
        for cell, height in zip(column, heights):
            sheet.paste(cell.picture, (left + (column_width - cell.picture.width) // 2, top))
            if cell.score:
                write(f"{cell.score[0]:.2f} dB / {cell.score[1]:.4f}", left, top + cell.picture.height + 4, column_width)
            top += height + _GAP
        left += column_width + _GAP
    return np.asarray(sheet, np.float32) / 255


def make_cell(image: np.ndarray, target: np.ndarray | None, width: int) -> Cell:
    """Return a picture `[H, W, 3]` in [0, 1], reduced to `width`, with its scores against the clear image `target`, if that is known."""
    score = None
    if target is not None:
        measured = Measure()(image, target)
        score = measured["psnr"], measured["ssim"]
    picture = Image.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8))
    picture.thumbnail((width, 100 * width), Image.Resampling.LANCZOS)
    return Cell(picture, score)


def _table(images: Sequence[str], titles: Sequence[str], columns: Sequence[Sequence[Cell]]) -> str:
    first = max(map(len, images))
    widths = [max(len(title), 15) for title in titles]
    lines = [" " * first + "".join(f"  {title:>{width}}" for title, width in zip(titles, widths))]
    for i, image in enumerate(images):
        scores = [column[i].score or (0.0, 0.0) for column in columns]
        lines.append(f"{image:{first}}" + "".join(f"  {f'{p:.2f} / {s:.4f}':>{width}}" for (p, s), width in zip(scores, widths)))
    return "\n".join(lines)
