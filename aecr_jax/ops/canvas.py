"""Images at the top left of a larger canvas, so that one compiled program serves images of many sizes.

The result does not depend on the canvas: it is that of the image without a canvas, up to rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


def next_side(size: int) -> int:
    """Return the side of the canvas for images with a side of `size`: a power of two from 128, or 1.5 times one from 192."""
    side = 128
    while side < size:
        side = side * 3 // 2 if side & (side - 1) == 0 else side * 4 // 3
    return side


def reflect(x: Array, axis: int, size: Array) -> Array:
    """Replace what follows the first `size` rows or columns by their reflection, as `jnp.pad` with `mode="reflect"` continues them."""
    period = 2 * size - 2
    position = jnp.arange(x.shape[axis]) % jnp.maximum(period, 1)
    return jnp.take(x, jnp.minimum(position, jnp.maximum(period - position, 0)), axis)


class Corner(NamedTuple):
    """The part of a canvas that is the image, for maps `[N, H, W, C]` of any resolution.

    If the input of a layer that pads with zeros is 0 outside the image, the image's part of the output is the same as without a canvas.
    """

    squares: tuple[int, int]
    """Into how many rows and columns of squares the canvas is divided. The image consists of whole squares."""
    used: tuple[Array, Array]
    """How many of these rows and columns are the image."""

    def clear(self, x: Array) -> Array:
        """Return `x` with zeros outside the image."""
        rows, columns = (jnp.arange(size) < part for size, part in zip(x.shape[1:3], self._sizes(x)))
        return x * (rows[:, None] & columns[None])[None, ..., None].astype(x.dtype)

    def extend(self, x: Array) -> Array:
        """Return `x` with the outermost values of the image repeated outside it."""
        for axis, part in zip((1, 2), self._sizes(x)):
            x = jnp.take(x, jnp.minimum(jnp.arange(x.shape[axis]), part - 1), axis)
        return x

    def mean(self, x: Array) -> Array:
        """Return the mean over the image of an `x` that is 0 outside it: `[N, H, W, C] -> [N, 1, 1, C]`."""
        rows, columns = self._sizes(x)
        return x.sum((1, 2), keepdims=True) / (rows * columns).astype(x.dtype)

    def _sizes(self, x: Array) -> list[Array]:
        return [size // count * used for size, count, used in zip(x.shape[1:3], self.squares, self.used)]
