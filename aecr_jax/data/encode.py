"""Encode images as PNG, JPEG, WebP or TIFF files in sRGB, with 8 or 16 bits, alpha and EXIF data."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from aecr_jax.data import exif as exif_data
from aecr_jax.data.decode import Picture, srgb_profile
from aecr_jax.data.images import FORMATS, to_float
from aecr_jax.errors import UserError
from aecr_jax.files import replacing

_LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # of libjpeg and of the WebP format
_LONGEST_EXIF = 65533  # bytes of EXIF data in a JPEG file, whose segments have 16 bits for their length
_QUALITY = 95
_STRIP = 2**20  # bytes of a TIFF strip before compression


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How restored images are written.

    Args:
      extension: the extension of the files, a key of `FORMATS`, which selects the format.
      quality: from 1 to 100, for JPEG and WebP; 95 by default. JPEG files keep the full resolution of colour from 90 on.
      bits: 8 or 16 bits per value. By default, PNG and TIFF files have 16 bits if the input has more than 8. JPEG and WebP have 8.

    Raises:
      UserError: a value is not one of these, or the format does not have it.
    """

    extension: str = "png"
    quality: int | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.extension not in FORMATS:
            raise UserError(f"format (={self.extension}) must be one of {', '.join(FORMATS)}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"quality (={self.quality}) must be from 1 to 100")
        if self.quality is not None and not self._lossy:
            raise UserError(f"quality (={self.quality}) applies to the formats jpg and webp only, and the format is {self.extension}")
        if self.bits not in (None, 8, 16):
            raise UserError(f"bits (={self.bits}) must be 8 or 16")
        if self.bits == 16 and self._lossy:
            raise UserError(f"bits (=16) needs the format png or tif: {self.extension} files have 8 bits")

    @property
    def _format(self) -> str:
        return FORMATS[self.extension]

    @property
    def _lossy(self) -> bool:
        return self._format in ("JPEG", "WEBP")

    def check(self, picture: Picture, name: str) -> None:
        """Raise UserError, with `name` as the image's name, if the format cannot hold the size, the alpha channel or the EXIF data."""
        height, width = picture.pixels.shape[:2]
        longest = _LONGEST_SIDE.get(self._format, max(height, width))
        if max(height, width) > longest:
            raise UserError(
                f"{name} has {width} x {height} pixels, and a side of a {self.extension} file has at most {longest}:"
                " choose the format png or tif"
            )
        if self._format != "JPEG":
            return
        if picture.alpha is not None and picture.alpha.min() < (255 if picture.alpha.dtype == np.uint8 else 1):
            raise UserError(f"{name} has transparent parts, which a {self.extension} file cannot hold: choose the format png, webp or tif")
        if len(picture.exif) > _LONGEST_EXIF:
            raise UserError(
                f"{name} has {len(picture.exif)} bytes of EXIF data, and a {self.extension} file holds at most {_LONGEST_EXIF}:"
                " choose the format png, webp or tif"
            )

    def write(self, path: Path, image: np.ndarray, picture: Picture) -> None:
        """Write an image with the alpha channel and the EXIF data of the picture that it was made from, completely or not at all.

        Args:
          path: the file.
          image: `[H, W, 3]` in sRGB, finite; values are clipped to [0, 1].
          picture: the source, which has passed `check`.

        Raises:
          UserError: the file cannot be written.
        """
        deep = self.bits == 16 or (self.bits is None and not self._lossy and picture.pixels.dtype != np.uint8)
        values = _quantized(np.asarray(image), deep)
        if picture.alpha is not None and self._format != "JPEG":
            values = np.concatenate([values, _quantized(to_float(picture.alpha), deep)[..., None]], -1)
        height, width = image.shape[:2]
        exif = exif_data.correct(picture.exif, width, height)
        with replacing(path) as partial, open(partial, "wb") as file:
            if self._format == "TIFF":
                _write_tiff(file, values, exif)
            elif deep:
                _write_deep_png(file, values, exif)
            else:
                Image.fromarray(values).save(file, self._format, icc_profile=srgb_profile(), exif=exif, **self._options())

    def _options(self) -> dict[str, int | bool]:
        quality = self.quality or _QUALITY
        if self._format == "JPEG":
            return {"quality": quality, "subsampling": 0 if quality >= 90 else 2}
        return {"quality": quality, "exact": True} if self._format == "WEBP" else {}  # exact: colours under transparent parts are kept


def _quantized(values: np.ndarray, deep: bool) -> np.ndarray:
    return np.round(np.clip(values, 0, 1) * (65535 if deep else 255)).astype(np.uint16 if deep else np.uint8)


def _write_deep_png(file: BinaryIO, values: np.ndarray, exif: bytes) -> None:
    """Write uint16 values `[H, W, 3 or 4]`, which Pillow cannot, as a PNG file (ISO/IEC 15948)."""
    height, width, channels = values.shape
    lines = values.astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, 1 + lines.shape[1]), np.uint8)
    filtered[:, 0] = 2  # each line is stored as the difference from the line above it
    filtered[:1, 1:] = lines[:1]
    np.subtract(lines[1:], lines[:-1], out=filtered[1:, 1:])
    chunks = [
        (b"IHDR", struct.pack(">2I5B", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)),
        (b"iCCP", b"ICC Profile\0\0" + zlib.compress(srgb_profile())),
        *([(b"eXIf", exif.removeprefix(exif_data.PREFIX))] if exif else []),
        (b"IDAT", zlib.compress(filtered.tobytes())),
        (b"IEND", b""),
    ]
    file.write(b"\x89PNG\r\n\x1a\n")
    for name, data in chunks:
        file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))


def _write_tiff(file: BinaryIO, values: np.ndarray, exif: bytes) -> None:
    """Write values `[H, W, 3 or 4]` of uint8 or uint16 as a TIFF file (TIFF 6.0) with lossless compression.

    Pillow writes no colour of 16 bits, and libvips no EXIF data.
    """
    height, width, channels = values.shape
    order, directory = exif_data.parse(exif) if exif else ("<", {})
    size = values.dtype.itemsize
    rows = max(1, _STRIP // (width * channels * size))
    strips = []
    for top in range(0, height, rows):
        part = values[top : top + rows].copy()
        part[:, 1:] -= values[top : top + rows, :-1]  # the predictor: differences from the pixel at the left
        strips.append(zlib.compress(part.astype(f"{order}u{size}").tobytes()))
    lengths = [len(strip) for strip in strips]
    starts = [8 + sum(lengths[:i]) for i in range(len(lengths))]

    def field(kind: int, *numbers: int) -> exif_data.Field:
        return exif_data.Field(kind, struct.pack(f"{order}{len(numbers)}{ {3: 'H', 4: 'I'}[kind] }", *numbers))

    directory |= {
        256: field(4, width),
        257: field(4, height),
        258: field(3, *[8 * size] * channels),
        259: field(3, 8),  # compression: Deflate
        262: field(3, 2),  # RGB
        273: field(4, *starts),
        274: field(3, 1),  # orientation: upright
        277: field(3, channels),
        278: field(4, rows),
        279: field(4, *lengths),
        284: field(3, 1),  # the values of a pixel are together
        317: field(3, 2),  # horizontal differences
        34675: exif_data.Field(7, srgb_profile()),
    }
    if channels == 4:
        directory[338] = field(3, 2)  # alpha that is not multiplied into the colours
    end = 8 + sum(lengths)
    padding = end % 2  # a directory begins at an even position
    file.write({"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", end + padding))
    file.writelines(strips)
    file.write(bytes(padding) + exif_data.pack(directory, order, end + padding))
