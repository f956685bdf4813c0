"""Dehazing of images in memory: NumPy arrays and PIL images."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from aecr_jax.inference.restore import OVERLAP, USUAL_TILE, Restorer, blend, check_strength, check_tile, restore_tiled
from aecr_jax.inference.weights import DEFAULT_MODEL, load_checkpoint
from aecr_jax.networks.arrays import get_arrays
from aecr_jax.networks.network import Network

AnyImage = TypeVar("AnyImage", np.ndarray, Image.Image)
# Floating-point values may lie slightly outside [0, 1], for instance after resizing. Values of 8-bit images lie far outside.
_LEAST, _GREATEST = -1.0, 2.0
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow converts RGB to grey
_KEPT_INFO = ("icc_profile", "exif", "dpi")
# The modes whose colour profile also describes the result.
_SAME_COLOURS = ("L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16B", "I;16L", "I;16N")


def dehaze(image: AnyImage, model: Network | str | Path | None = None, *, tile: int = USUAL_TILE, strength: float = 1.0) -> AnyImage:
    """Remove the haze from an image, or from a batch of images of the same size.

    Args:
      image: an array `[H, W, 3]` or `[N, H, W, 3]` of uint8, uint16, or floating point in [0, 1]; or a PIL image. The alpha channel of a
        PIL image is kept, as is a transparent colour, as an alpha channel; a grey image of 8 or 16 bits is restored as RGB and
        converted back to grey. Colours are taken as they are, and the EXIF
        orientation is not applied: the result's `info` has the image's profile, EXIF data and resolution.
      model: a network, or a name or path that `load_checkpoint` accepts; by default the default one of the shipped models. A model that
        is given by its name or path is loaded only once.
      tile: images of more than `tile * tile` pixels are restored in overlapping tiles, which needs less memory, unless the network
        restores large images as a whole (`Network.NEEDS_TILES`); 0 disables tiling.
      strength: how much of the change to apply, from 0 to 1: the result is `image + strength * (restored - image)`. At 0, images of
        integers are returned unchanged.

    Returns:
      An image of the same kind: an array of the same shape, type and range, or a PIL image of the mode L, LA, RGB, RGBA or
      I;16, with an alpha channel if the image has transparency and 8 bits per channel.

    Raises:
      ValueError: the image has an unsupported shape, type or range, or does not fit into memory, or `tile` or `strength` is out of range.
      FileNotFoundError: the model does not exist.
    """
    check_tile(tile)
    check_strength(strength)
    restorer = _restorer_of(model)
    if isinstance(image, Image.Image):
        return _dehaze_pil(image, restorer, tile, strength)
    return _dehaze_array(np.asarray(image), restorer, tile, strength)


def _dehaze_array(image: np.ndarray, restorer: Restorer, tile: int, strength: float) -> np.ndarray:
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape[-3:]:
        raise ValueError(f"image has shape {image.shape} and must be [H, W, 3] or [N, H, W, 3]")
    batch = _to_unit(image).reshape(-1, *image.shape[-3:])
    large = restorer.splits(batch.shape[1], batch.shape[2], tile)
    restored = [restore_tiled(restorer, hazy, tile, OVERLAP) if large else restorer(hazy) for hazy in batch]
    result = blend(batch, np.stack(restored), strength).reshape(image.shape) if restored else np.zeros(image.shape, np.float32)
    if np.issubdtype(image.dtype, np.floating):
        return result.astype(image.dtype)
    return np.round(result * np.iinfo(image.dtype).max).astype(image.dtype)


def _dehaze_pil(image: Image.Image, restorer: Restorer, tile: int, strength: float) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16)  # in the byte order of the machine
        restored = _dehaze_array(np.repeat(grey[..., None], 3, -1), restorer, tile, strength)
        result = Image.fromarray(np.round(restored @ _LUMA).astype(np.uint16))
    elif image.mode in ("I", "F"):
        raise ValueError(f"image has mode {image.mode}, whose range is unknown: pass an array of uint8, uint16 or floating point in [0, 1]")
    else:
        if image.mode == "La":  # Pillow converts it only to LA
            image = image.convert("LA")
        colours = image.convert("RGBA") if image.has_transparency_data else image
        result = Image.fromarray(_dehaze_array(np.asarray(colours.convert("RGB")), restorer, tile, strength))
        if image.has_transparency_data:
            result.putalpha(colours.getchannel("A"))
        if image.mode in ("L", "LA"):
            result = result.convert("LA" if image.has_transparency_data else "L")
    result.info = {key: image.info[key] for key in _KEPT_INFO if key in image.info}
    if image.mode not in _SAME_COLOURS:
        result.info.pop("icc_profile", None)  # it describes other colours than RGB
    return result


def _to_unit(image: np.ndarray) -> np.ndarray:
    """Convert the values of an array to float32 in [0, 1]."""
    if image.dtype.newbyteorder("=") in (np.uint8, np.uint16):
        return image.astype(np.float32) / np.iinfo(image.dtype).max
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"image has type {image.dtype} and must be uint8, uint16 or floating point in [0, 1]")
    if image.size and not (image.min() >= _LEAST and image.max() <= _GREATEST):
        raise ValueError(f"image has values from {image.min():g} to {image.max():g} and must be in [0, 1]: divide 8-bit values by 255")
    return np.clip(image, 0, 1).astype(np.float32)


def _restorer_of(model: Any) -> Restorer:
    if isinstance(model, Network):
        restorer = _restorer_of_network(model)
        restorer.set_arrays(get_arrays(model))  # the network may have been trained since the last call
        return restorer
    return _restorer_of_path(str(DEFAULT_MODEL if model is None else model))


# A restorer holds its compiled programs, so keeping it avoids compiling again.
@functools.lru_cache(4)
def _restorer_of_network(model: Network) -> Restorer:
    return Restorer(model)


@functools.lru_cache(4)
def _restorer_of_path(path: str) -> Restorer:
    return Restorer(load_checkpoint(path))
