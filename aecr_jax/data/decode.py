"""Decode image files into sRGB: Pillow reads images with 8 bits, libvips those with more. Sizes are checked before decoding."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from aecr_jax.data.exif import read_exif
from aecr_jax.errors import UserError

# Phones take pictures larger than Pillow's own limit of 89 million pixels. That limit applies to the whole process, so it is not changed.
MAX_PIXELS = 250_000_000
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Picture(NamedTuple):
    """A decoded image file. Pixels and alpha are uint8 if the file has 8 bits per value, otherwise float32 in [0, 1].

    pixels: upright, sRGB, `[H, W, 3]`.
    alpha: the opacity `[H, W]`, or None for an image that has none.
    exif: the EXIF data as they are in the file, with `exif.PREFIX`; b"" for a file without them.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None
    exif: bytes


def decode(file: BinaryIO, name: str) -> Picture:
    """Decode an image file. The embedded colour profile and the EXIF orientation are applied.

    Args:
      file: an open image file.
      name: the name of the file in error messages.

    Raises:
      UserError: the image is too large, or the range of its values is unknown.
      UnidentifiedImageError: the file is not an image.
      Exception: the file is damaged; decoders raise many exception types.
    """
    try:
        image = open_picture(file, name)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        # Pillow does not support floating-point colour in TIFF, and its own limit rejects a large WebP.
        if _vips_loader(file) not in ("tiffload_buffer", "webpload_buffer"):
            raise
        return _decode_with_vips(file, name)
    layout = str(image.tile[:1])  # how values are stored in the file; load() deletes this
    if _needs_vips(image, layout):
        return _decode_with_vips(file, name)
    format = image.format
    content = b""
    if format == "TIFF":
        file.seek(0)
        content = file.read()
    image.load()  # a PNG file may have EXIF data after its pixels
    exif = read_exif(image.info, content)
    upright = load(image)
    profile = upright.info.get("icc_profile")
    if upright.mode[0] not in "IF":
        if upright.mode in ("P", "PA") and upright.has_transparency_data:
            upright = upright.convert("RGBA")  # Pillow warns of any other conversion
        if upright.mode == "La":  # which Pillow converts to nothing else
            upright = upright.convert("LA")
        alpha = np.asarray(upright.convert("RGBA").getchannel("A")) if upright.has_transparency_data else None
        return Picture(_8_bit_as_srgb(upright, profile), alpha, exif)
    values = np.asarray(upright)[..., None]
    if "I;12" in layout:
        values = values / np.float32(4095)
    elif format == "PPM" and upright.mode != "F":  # Pillow scales the file's own range to 16 bits, stored in 32
        values = values.astype(np.uint16)
    return Picture(_as_srgb(values, profile, name), None, exif)


def open_picture(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    """Read the header of an image file like `Image.open`, but apply `MAX_PIXELS` instead of Pillow's limit and warning."""
    prefix = file.read(16)
    for load_plugins in (Image.preinit, Image.init):  # try the common formats first, as Image.open does
        load_plugins()
        for factory, accept in list(Image.OPEN.values()):
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # raised by plugins for other formats
                if accept is None or accept(prefix) is True:
                    file.seek(0)
                    image = factory(file, "")
                    _check_size(name, *image.size)
                    return image
    raise UnidentifiedImageError


def load(image: Image.Image) -> Image.Image:
    """Decode the pixels of an opened image and apply its EXIF orientation."""
    image.load()
    with contextlib.suppress(Exception):  # the pixels may be intact although the EXIF data are damaged
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _check_size(name: str, width: int, height: int, values: int = 1) -> None:
    if width * height * max(1, values / 4) > MAX_PIXELS:  # RGB with alpha has four values per pixel
        raise UserError(f"{name} is too large: {width} x {height} pixels; the limit is {MAX_PIXELS // 10**6} million pixels")


# ---- more than 8 bits per value


@functools.cache
def _import_pyvips() -> Any:
    import pyvips  # imported only when an image needs it

    logger = logging.getLogger("pyvips")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)  # it warns of defects that it tolerates, with several lines per file
    return pyvips


def _needs_vips(image: Image.Image, layout: str) -> bool:
    # Pillow reduces 16-bit colour to 8 bits, and does not distinguish wider integers from 16-bit values.
    deep = image.mode[0] in "IF" or ";16" in layout
    if image.format == "PNG":
        return deep
    # Pillow checks a TIFF against its own limit again while decoding. libvips cannot read 12-bit values.
    too_large = image.width * image.height > (Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    return image.format == "TIFF" and (deep or too_large) and "I;12" not in layout


def _vips_loader(file: BinaryIO) -> str:
    file.seek(0)
    prefix = file.read(12)
    if prefix.startswith(_TIFF):
        return "tiffload_buffer"
    if prefix.startswith(b"\x89PNG"):
        return "pngload_buffer"
    return "webpload_buffer" if prefix[:4] == b"RIFF" and prefix[8:] == b"WEBP" else ""


def _decode_with_vips(file: BinaryIO, name: str) -> Picture:
    pyvips = _import_pyvips()
    loader = getattr(pyvips.Image, _vips_loader(file))
    file.seek(0)
    content = file.read()
    try:
        # A specific loader is called, so that no other decoder of libvips is given the file. It reads only the header at first.
        image = loader(content, access="sequential", fail_on="error")
        _check_size(name, image.width, image.height, image.bands)
        fields = image.get_fields()
        profile = image.get("icc-profile-data") if "icc-profile-data" in fields else None
        orientation = image.get("orientation") if "orientation" in fields else 1
        channels = {"b-w": 1, "grey16": 1, "rgb": 3, "srgb": 3, "rgb16": 3, "scrgb": 3, "cmyk": 4}.get(image.interpretation)
        if channels is None or channels > image.bands:
            raise UserError(
                f"{name} has {image.bands} values per pixel in the colour space {image.interpretation}: save it as grey, RGB or CMYK"
            )
        exif = read_exif({"exif": image.get("exif-data")} if "exif-data" in fields else {}, content)
        image = image[: channels + 1]
        values = np.asarray(image).reshape(image.height, image.width, image.bands)
    except pyvips.Error as error:
        raise OSError((error.detail or error.message).strip().splitlines()[-1]) from error
    # EXIF has eight orientations: 5 to 8 exchange rows and columns; then each axis may be reversed.
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    alpha = _alpha(values[..., channels]) if channels < values.shape[-1] else None
    return Picture(_as_srgb(values[..., :channels], profile, name), alpha, exif)


def _alpha(values: np.ndarray) -> np.ndarray | None:
    """Return the opacity as in a `Picture`, or None if its range is unknown."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == np.uint16:
        return values.astype(np.float32) / 65535
    return np.clip(np.nan_to_num(values), 0, 1).astype(np.float32) if values.dtype.kind == "f" else None


def _to_unit(values: np.ndarray, name: str) -> np.ndarray:
    """Scale values of any type to float32 in [0, 1]."""
    if values.dtype == np.uint16:
        return values.astype(np.float32) / 65535
    if values.dtype.kind not in "iuf":
        raise UserError(f"{name} holds {values.dtype} values: save it with 8 or 16 bits")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"{name} contains NaN or infinite values: replace them by values in [0, 1]")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        # Interpolation and highlights may exceed [0, 1] slightly. Files with another range, such as 0 to 255, exceed it by far.
        if low < -1 or high > 2:
            raise UserError(
                f"{name} holds floating-point values from {low:g} to {high:g}, which must be in [0, 1]: divide them by the value of"
                " white, such as 255"
            )
        return np.clip(values, 0, 1).astype(np.float32)
    # The value of white in wide integers is unknown, unless the values need all of 16 bits. Zero is black in every range.
    if low < 0 or not (high == 0 or 2**15 <= high < 2**16):
        raise UserError(
            f"{name} holds {values.dtype} values from {low} to {high}, and the value of white is unknown: save it with 8 or 16 bits"
        )
    return values.astype(np.float32) / 65535


# ---- colour

# The conversion that viewers use between screens: equal colours stay equal, and black stays black.
_RENDERING: dict[str, Any] = {"renderingIntent": ImageCms.Intent.RELATIVE_COLORIMETRIC, "flags": ImageCms.Flags.BLACKPOINTCOMPENSATION}


@functools.cache
def srgb_profile() -> bytes:
    """Return a small sRGB profile to embed. Its date is fixed, so that equal images give equal files."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + profile[36:]


def _as_srgb(values: np.ndarray, profile: bytes | None, name: str) -> np.ndarray:
    """Convert values `[H, W, C]` of any type, C = 1 (grey), 3 (RGB) or 4 (CMYK), to the pixels of a `Picture`."""
    height, width, channels = values.shape
    if values.dtype == np.uint8:
        mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
        return _8_bit_as_srgb(Image.frombytes(mode, (width, height), values.tobytes()), profile)
    values = _to_unit(values, name)
    if profile and (conversion := _conversion(profile, channels)):
        pyvips = _import_pyvips()
        pixels = np.round(values * 65535).astype(np.uint16)
        if conversion.mode == "RGB" and channels == 1:
            pixels = np.repeat(pixels, 3, -1)
        image = pyvips.Image.new_from_array(pixels, interpretation={"L": "grey16", "RGB": "rgb16", "CMYK": "cmyk"}[conversion.mode])
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
        # Convert through CIELAB in float: icc_transform() interpolates in a table whose error is up to 0.07 near saturated colours.
        options = {"intent": "relative", "black_point_compensation": True, "pcs": "lab"}
        image = image.icc_import(embedded=True, **options).copy()
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", srgb_profile())
        return np.asarray(image.icc_export(depth=16, **options)).astype(np.float32) / 65535
    if channels == 4:
        return (1 - values[..., :3]) * (1 - values[..., 3:])  # as Pillow does for CMYK without a profile
    return np.repeat(values, 3, -1) if channels == 1 else np.ascontiguousarray(values)


def _8_bit_as_srgb(image: Image.Image, profile: bytes | None) -> np.ndarray:
    channels = 1 if image.mode in ("1", "L", "LA") else 4 if image.mode == "CMYK" else 3
    if profile and (conversion := _conversion(profile, channels)):
        image = conversion.transform.apply(image.convert(conversion.mode))
    return np.asarray(image.convert("RGB"))


class _Conversion(NamedTuple):
    """A conversion from pixels of `mode` to sRGB."""

    mode: str
    transform: ImageCms.ImageCmsTransform


@functools.lru_cache(maxsize=16)  # the images of a folder have one profile or a few
def _conversion(profile: bytes, channels: int) -> _Conversion | None:
    """Return the conversion of pixels with 1 (grey), 3 (RGB) or 4 (CMYK) values; None for a profile that is sRGB, damaged or unsuitable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # Grey pixels may have an RGB profile, which then describes them as three equal values.
        mode = {("GRAY", 1): "L", ("RGB", 1): "RGB", ("RGB", 3): "RGB", ("CMYK", 4): "CMYK"}[source.profile.xcolor_space.strip(), channels]
        target = ImageCms.ImageCmsProfile(io.BytesIO(srgb_profile()))
        transform = ImageCms.buildTransform(source, target, mode, "RGB", **_RENDERING)
    except Exception:
        return None
    # A profile's name does not tell what it does, so colours from black to white are converted to find out.
    ramp = np.arange(0, 256, 15, dtype=np.uint8)
    grid = Image.fromarray(np.stack(np.meshgrid(ramp, ramp, ramp, indexing="ij"), -1).reshape(1, -1, 3))
    probe = {"L": Image.linear_gradient("L"), "RGB": grid, "CMYK": Image.new("CMYK", (1, 1))}[mode]
    result = np.asarray(transform.apply(probe), np.int16)
    if result[-1, -1].min() < 200:  # only a damaged profile makes white dark
        return None
    if mode != "CMYK" and np.abs(result - np.asarray(probe.convert("RGB"), np.int16)).max() <= 1:
        return None  # the profile is one of the many variants of sRGB
    return _Conversion(mode, transform)
