"""Convert image files to arrays and back. Arrays are float32 `[H, W, 3]`, RGB in [0, 1]."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from aecr_jax.data.decode import Picture, decode, load, open_picture, srgb_profile
from aecr_jax.data.haze import depth_problem
from aecr_jax.errors import UserError, first_line
from aecr_jax.files import replacing
from aecr_jax.storage import as_path

# Pillow's names of the formats in which results are written, by file name extension.
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "tif": "TIFF", "tiff": "TIFF"}
_WRITTEN = FORMATS | {"bmp": "BMP"}

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
_MISSING = "it does not exist"


def list_images(folder: str | Path, skipped: list[tuple[Path, str]] | None = None) -> list[Path]:
    """List the image files directly in `folder`, sorted by name; hidden files are left out.

    Entries that have an image's extension but cannot be read as a file are left out: directories, FIFOs, links without a target, and
    files without read permission. They are added to `skipped`, each with the reason, such as "it is a directory".

    Raises:
      UserError: there is no such folder, or it cannot be listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    try:
        entries = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror}") from error
    images = []
    for path in entries:
        reason = _why_unreadable(path)
        if not reason:
            images.append(path)
        elif skipped is not None:
            skipped.append((path, reason))
    return images


def _why_unreadable(path: Path) -> str:
    """Return the reason why `path` cannot be read as a file, or "". Nothing is opened, because opening a FIFO waits for a writer."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "it is a link to a file that does not exist" if path.is_symlink() else _MISSING
    except OSError as error:
        return "it is a symbolic link that leads back to itself" if error.errno == errno.ELOOP else (error.strerror or str(error))
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "named pipe (FIFO)", stat.S_IFSOCK: "socket"}
        return f"it is a {kinds.get(stat.S_IFMT(mode), 'device')}"
    return "" if os.access(path, os.R_OK) else "no permission to read it"


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as a viewer shows it: float32 `[H, W, 3]` in [0, 1].

    The EXIF orientation is applied, colours are converted from the embedded profile to sRGB, grey becomes RGB, and alpha is
    dropped. PNG and TIFF files are read at their full bit depth.

    Raises:
      UserError: the file is missing, not an image, truncated, or larger than 250 million pixels, or the range of its values is unknown.
    """
    return to_float(read_pixels(path))


def read_pixels(file: str | Path | bytes, name: str = "") -> np.ndarray:
    """Read an image as `read_image` does, but return 8-bit images as uint8 `[H, W, 3]`, which `to_float` converts.

    Args:
      file: a path, or the bytes of an image file.
      name: the name of the image in error messages; the path by default.

    Raises:
      UserError: as for `read_image`.
    """
    name = name or _called(file)
    with _opened(file, name) as stream:
        return decode(stream, name).pixels


def read_picture(path: str | Path) -> Picture:
    """Read an image as `read_pixels` does, with its alpha channel and its EXIF data.

    Raises:
      UserError: as for `read_image`.
    """
    with _opened(path, str(path)) as stream:
        return decode(stream, str(path))


def to_float(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels that are uint8, or floating-point in [0, 1] already, to float32 in [0, 1]."""
    return pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels.astype(np.float32, copy=False)


def read_depth(file: str | Path | bytes, name: str = "") -> np.ndarray:
    """Read a depth map of any scale as `[H, W]`: `min((value + 0.5) / largest value, 1)`, as RESIDE does with NYU's.

    RESIDE's haze is defined by depth relative to the largest depth of the whole frame, whatever the file's unit.

    Raises:
      UserError: as for `read_image`, or the values are not depths: negative, the same everywhere, or not finite.
    """
    image = _open(file, name)
    values = np.asarray(image if image.mode == "F" or image.mode.startswith("I") else image.convert("L"), np.float32)
    if problem := depth_problem(values):
        raise UserError(f"{name or _called(file)} is not a valid depth map: {problem}")
    half = 0.0 if image.mode == "F" else 0.5  # the middle of the interval that was rounded down to an integer
    return np.minimum((values + half) / values.max(), 1)


def _called(file: str | Path | bytes) -> str:
    return f"an image of {len(file)} bytes" if isinstance(file, bytes) else str(file)


@contextlib.contextmanager
def _opened(file: str | Path | bytes, name: str) -> Iterator[BinaryIO]:
    """Open a file for decoding, and convert exceptions of the decoders into a `UserError` that refers to the file as `name`."""
    if not isinstance(file, bytes) and (reason := _why_unreadable(Path(file))):
        raise UserError(f"there is no file {name}" if reason == _MISSING else f"{name} cannot be read: {reason}")
    try:
        with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as stream:
            yield stream
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image file") from error
    except Exception as error:  # decoders raise many exception types for damaged files
        raise UserError(f"{name} cannot be read: {first_line(error)}") from error


def _open(file: str | Path | bytes, name: str = "") -> Image.Image:
    name = name or _called(file)
    with _opened(file, name) as stream:
        return load(open_picture(stream, name))


def unique_names(stems: Iterable[str]) -> list[str]:
    """Make file names without extension unique: a second `a` (from a.jpg and a.png, or from two folders) becomes `a_2`."""
    names: dict[str, str] = {}
    for stem in stems:
        name, number = stem, 1
        while name.lower() in names:
            number += 1
            name = f"{stem}_{number}"
        names[name.lower()] = name
    return list(names.values())


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write an image `[H, W, 3]`, clipped to [0, 1], rounded to 8 bits and marked as sRGB. It is written completely or not at all.

    Raises:
      UserError: the image has NaN or infinite values, or is too large for the format; the extension is unknown; or the file cannot be
        written.
    """
    path, image = as_path(path), np.asarray(image, np.float32)
    if not np.isfinite(image).all():
        raise UserError(f"{path} was not written: the image contains NaN or infinite values")
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    format = _format(path)
    with replacing(path) as partial, open(partial, "wb") as file:
        try:
            Image.fromarray(pixels).save(file, format=format, icc_profile=srgb_profile())
        except ValueError as error:  # WebP has at most 16,383 pixels per side
            raise UserError(f"{path} was not written: {first_line(error)}") from error


def check_picture_name(path: str | Path) -> None:
    """Raise UserError unless a file name has the extension of a format that `write_image` writes."""
    _format(Path(path))


def _format(path: Path) -> str:
    if (format := _WRITTEN.get(path.suffix.lower().removeprefix("."))) is None:
        raise UserError(f"{path} must end in one of {', '.join(f'.{extension}' for extension in _WRITTEN)}")
    return format


def panel(rows: Sequence[Sequence[np.ndarray]], gap: int = 4) -> np.ndarray:
    """Combine rows of images `[H, W, 3]`, all of the same size, into one image with white gaps between them."""
    lines = []
    for row in rows:
        height = row[0].shape[0]
        cells = [np.clip(row[0], 0, 1)]
        for image in row[1:]:
            cells += [np.ones((height, gap, 3), np.float32), np.clip(image, 0, 1)]
        lines += [np.concatenate(cells, 1)]
    spaced = [lines[0]]
    for line in lines[1:]:
        spaced += [np.ones((gap, line.shape[1], 3), np.float32), line]
    return np.concatenate(spaced, 0)
