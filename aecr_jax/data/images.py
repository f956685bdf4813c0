"""Image files to arrays and back. Arrays are float32 `[H, W, 3]`, RGB in [0, 1]."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from aecr_jax.errors import UserError
from aecr_jax.files import replacing

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})

# Pillow refuses at twice this and warns from it on. Its own limit, 89 million, is below what telephones take.
Image.MAX_IMAGE_PIXELS = 250_000_000


def list_images(folder: str | Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name; hidden ones are left out.

    Raises:
      UserError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))


def read_image(path: str | Path) -> np.ndarray:
    """Reads any picture as a viewer shows it: turned as its EXIF says, grey as RGB, alpha dropped, 16 bit scaled to [0, 1].

    Raises:
      UserError: the file is missing, no image, or truncated.
    """
    return to_float(read_pixels(path))


def read_pixels(file: str | Path | bytes, name: str = "") -> np.ndarray:
    """As `read_image`, but 8-bit pictures stay uint8 `[H, W, 3]`; what they become in float is `to_float`'s.

    Args:
      file: a path, or the bytes of an image file.
      name: what to call it in an error; the path by default.

    Raises:
      UserError: as `read_image`.
    """
    image = _open(file, name)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion to RGB would clip at 255
        grey = np.asarray(image, np.float32) / 65535
        return np.repeat(np.clip(grey, 0, 1)[..., None], 3, -1)
    if image.mode == "F":
        return np.repeat(np.clip(np.asarray(image, np.float32), 0, 1)[..., None], 3, -1)
    return np.asarray(image.convert("RGB"))


def to_float(pixels: np.ndarray) -> np.ndarray:
    """Pixels of 8 bit, or of float already, to float32 in [0, 1]."""
    return pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels.astype(np.float32, copy=False)


def read_depth(file: str | Path | bytes, name: str = "") -> np.ndarray:
    """Reads a depth map of any scale, `[H, W]`: `min((value + 0.5) / largest value, 1)`, as RESIDE takes NYU's.

    RESIDE's haze is defined by depth relative to the largest of the whole frame, whatever the file's unit.

    Raises:
      UserError: as `read_image`, or the depth is zero everywhere or not finite.
    """
    image = _open(file, name)
    values = np.asarray(image if image.mode == "F" or image.mode.startswith("I") else image.convert("L"), np.float32)
    if not (np.isfinite(values).all() and values.max() > 0):
        raise UserError(f"{name or _called(file)} is no depth map: its values must be finite and not all zero")
    half = 0.0 if image.mode == "F" else 0.5  # the middle of what was rounded down to an integer
    return np.minimum((values + half) / values.max(), 1)


def _called(file: str | Path | bytes) -> str:
    return f"an image of {len(file)} bytes" if isinstance(file, bytes) else str(file)


def _open(file: str | Path | bytes, name: str = "") -> Image.Image:
    name = name or _called(file)
    if not isinstance(file, bytes) and not Path(file).is_file():
        raise UserError(f"there is no file {name}")
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image file") from error
    except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged files
        raise UserError(f"{name} cannot be read: {error}") from error
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the pixels
        return image


def unique_names(stems: Iterable[str]) -> list[str]:
    """File names without extension, the second `a` as `a_2`: a.jpg and a.png, or one name from two folders."""
    names: dict[str, str] = {}
    for stem in stems:
        name, number = stem, 1
        while name.lower() in names:
            number += 1
            name = f"{stem}_{number}"
        names[name.lower()] = name
    return list(names.values())


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Writes `[H, W, 3]`, clipped to [0, 1] and rounded to 8 bit; the file appears whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    path = Path(path)
    pixels = np.round(np.clip(np.asarray(image, np.float32), 0, 1) * 255).astype(np.uint8)
    with replacing(path) as partial, open(partial, "wb") as file:
        Image.fromarray(pixels).save(file, format=Image.registered_extensions().get(path.suffix.lower(), "PNG"))


def panel(rows: Sequence[Sequence[np.ndarray]], gap: int = 4) -> np.ndarray:
    """One picture of rows of images `[H, W, 3]`, all of one size, with white gaps between them."""
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
