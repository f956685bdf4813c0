"""Applies a model to single images of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from aecr_jax.compilation import bounded_jit
from aecr_jax.errors import UserError
from aecr_jax.model import AECRNet, get_arrays, replace_arrays
from aecr_jax.validation import check_weight


class Restorer:
    """A compiled model: hazy image `[H, W, 3]` in [0, 1] -> restored image, the same shape, clipped to [0, 1].

    Each new size compiles; the programs of the last few sizes are kept (see `bounded_jit`).

    Args:
      model: the network; it is used in evaluation mode.

    Raises:
      UserError: the model's arrays, or at a call the image or its result, are not finite.
      NotEnoughMemory: at a call, the image is too large.
    """

    def __init__(self, model: AECRNet):
        model.eval()
        graph, self._state = nnx.split(model)
        self.set_arrays(get_arrays(model))

        def apply(state: nnx.State, hazy: Array) -> Array:
            return nnx.merge(graph, state)(hazy[None])[0].clip(0, 1)

        self._apply = bounded_jit(apply)

    def set_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Take other parameters and statistics of the same model (as `get_arrays` names them); this compiles nothing anew.

        Raises:
          UserError: they are not finite.
        """
        for name, array in arrays.items():
            try:
                check_weight(array, name)
            except ValueError as error:
                raise UserError(f"the model cannot be used: {error}") from error
        local = {name: jnp.asarray(np.asarray(array)) for name, array in arrays.items()}  # off the mesh, onto one device
        self._state = replace_arrays(self._state, local)

    def __call__(self, hazy: np.ndarray) -> np.ndarray:
        restored = self._apply(self._state, hazy)
        if not np.isfinite(restored).all():
            whose = "restored image" if np.isfinite(hazy).all() else "hazy image"
            raise UserError(f"the {whose} has values that are not finite")
        return restored


def restore_tiled(restorer: Restorer, hazy: np.ndarray, tile: int, overlap: int) -> np.ndarray:
    """Restores a large image in square tiles of one size that overlap, blended linearly where they do.

    Memory grows with the tile and not with the image. The network's channel attention then averages over a tile instead of the
    whole image, so the result differs a little from that of the whole.

    Args:
      restorer: the model.
      hazy: `[H, W, 3]` in [0, 1].
      tile: side of a tile, more than twice `overlap`; a shorter image gets shorter tiles.
      overlap: pixels that neighbours share at least.

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
    """Weights that fall towards both ends over `overlap` pixels, never to 0."""
    distance = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 1
    return np.minimum(distance / overlap, 1)
