"""Application of a model to single images of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aecr_jax.compilation import bounded_jit
from aecr_jax.errors import UserError
from aecr_jax.networks.arrays import get_arrays, replace_arrays
from aecr_jax.networks.network import Network
from aecr_jax.validation import check_weight

# Neighbouring tiles overlap by this many pixels and are blended there.
OVERLAP = 128
LEAST_TILE, USUAL_TILE = 2 * OVERLAP, 1536


def check_tile(tile: int) -> None:
    """Raise UserError unless `tile` is 0 (no tiles) or large enough to overlap."""
    if tile < 0 or 0 < tile < LEAST_TILE:
        raise UserError(f"tile (={tile}) must be 0 or at least {LEAST_TILE}")


def check_strength(strength: float) -> None:
    """Raise UserError unless `strength` is a number from 0 to 1."""
    if not 0 <= strength <= 1:
        raise UserError(f"strength (={strength}) must be from 0 to 1")


def blend(hazy: np.ndarray, restored: np.ndarray, strength: float) -> np.ndarray:
    """Return `hazy + strength * (restored - hazy)`, where a strength of 0 gives exactly `hazy` and 1 exactly `restored`."""
    return restored if strength == 1 else hazy + strength * (restored - hazy)  # the formula gives `restored` only up to rounding


class Restorer:
    """A compiled model that maps a hazy image `[H, W, 3]` in [0, 1] to the restored image of the same shape, clipped to [0, 1].

    The model is compiled for each new image size, or for each new size of a canvas if the network has one (`Network.canvas_size`). The
    programs of the last few sizes are kept (see `bounded_jit`).

    Args:
      model: the network; it is used in evaluation mode.

    Raises:
      UserError: the model's arrays are not finite or, when the restorer is called, the image or its result is not finite.
      NotEnoughMemory: when the restorer is called, the image is too large.
    """

    def __init__(self, model: Network):
        arrays = get_arrays(model)
        self.needs_tiles = model.NEEDS_TILES
        model = nnx.clone(model)  # leave the mode of the caller's network unchanged
        model.eval()
        self._graph, self._state = nnx.split(model)
        self.set_arrays(arrays)

        def apply(state: nnx.State, hazy: Array) -> Array:
            return nnx.merge(self._graph, state)(hazy[None])[0].clip(0, 1)

        def apply_on_canvas(state: nnx.State, canvas: Array, height: Array, width: Array) -> Array:
            return nnx.merge(self._graph, state).restore_on_canvas(canvas[None], height, width)[0].clip(0, 1)

        self._apply, self._apply_on_canvas = bounded_jit(apply), bounded_jit(apply_on_canvas)
        self._canvas_size = model.canvas_size

    def set_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Replace the parameters and statistics by others of the same model, named as by `get_arrays`, without compiling again.

        Raises:
          UserError: the new values are not finite.
        """
        for name, array in arrays.items():
            try:
                check_weight(array, name)
            except ValueError as error:
                raise UserError(f"the model cannot be used: {error}") from error
        local = {name: jnp.asarray(np.asarray(array)) for name, array in arrays.items()}  # move them from the mesh to one device
        self._state = replace_arrays(self._state, local)

    def splits(self, height: int, width: int, tile: int) -> bool:
        """Return whether an image of this size is to be restored in tiles of side `tile`; 0 means no tiles."""
        return self.needs_tiles and tile > 0 and height * width > tile * tile

    def __call__(self, hazy: np.ndarray) -> np.ndarray:
        height, width = hazy.shape[:2]
        if size := self._canvas_size(height, width):
            canvas = np.zeros((*size, 3), hazy.dtype)
            canvas[:height, :width] = hazy
            restored = self._apply_on_canvas(self._state, canvas, np.int32(height), np.int32(width))[:height, :width]
        else:
            restored = self._apply(self._state, hazy)
        self._check(hazy, restored)
        return restored

    def _check(self, hazy: np.ndarray, restored: np.ndarray) -> None:
        if not np.isfinite(restored).all():
            whose = "restored image" if np.isfinite(hazy).all() else "hazy image"
            raise UserError(f"the {whose} has values that are not finite")


def restore_tiled(restorer: Restorer, hazy: np.ndarray, tile: int, overlap: int) -> np.ndarray:
    """Restore a large image in overlapping square tiles of one size, which are blended linearly where they overlap.

    The memory needed grows with the tile and not with the image. The network's channel attention averages over a tile instead of the
    whole image, so the result differs slightly from that of restoring the whole image at once.

    Args:
      restorer: the model.
      hazy: `[H, W, 3]` in [0, 1].
      tile: side length of a tile, more than twice `overlap`; if a side of the image is shorter, so is that side of the tiles.
      overlap: minimum number of pixels by which neighbouring tiles overlap.

    Returns:
      The restored image, `[H, W, 3]`.
    """
    h, w = hazy.shape[:2]
    rows, columns = min(tile, h), min(tile, w)
    weight = np.outer(_ramp(rows, overlap), _ramp(columns, overlap))[..., None].astype(np.float32)
    total, weights = np.zeros(hazy.shape, np.float32), np.zeros((h, w, 1), np.float32)
    for top in _starts(h, rows, overlap):
        for left in _starts(w, columns, overlap):
            here = np.s_[top : top + rows, left : left + columns]
            total[here] += weight * restorer(hazy[here])
            weights[here] += weight
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    count = 1 if size <= tile else -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / max(1, count - 1)) for i in range(count)]


def _ramp(tile: int, overlap: int) -> np.ndarray:
    """Return weights that decrease over `overlap` pixels towards both ends without reaching 0."""
    distance = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 1
    return np.minimum(distance / overlap, 1)
