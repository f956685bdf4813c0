"""Minimum, maximum and mean over square windows that are cut at the image's border.

Every function computes the rows and then the columns, and builds a window of any size from windows of 1, 2, 4, ... pixels, so that its
cost grows with the logarithm of the radius. Differences of cumulative sums would be about as fast, but they lose digits on large images.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from aecr_jax.ops.gradients import with_cpu_gradient


def window_min(x: Array, radius: int) -> Array:
    """Return the minimum over the window of `2 radius + 1` rows and columns around each pixel of `x`, `[N, H, W, ...]`."""
    return _extreme(x, radius, jnp.minimum, jnp.inf)


def window_max(x: Array, radius: int) -> Array:
    """Return the maximum over the window of `2 radius + 1` rows and columns around each pixel of `x`, `[N, H, W, ...]`."""
    return _extreme(x, radius, jnp.maximum, -jnp.inf)


def max_pool(x: Array) -> Array:
    """Return the maximum of each 2x2 pixels, `[N, H, W, C] -> [N, H // 2, W // 2, C]`.

    Of several equal maxima, only the first in row-major order receives the gradient. XLA's own gradient for CPUs stores an index for each
    pixel; this one does not.
    """
    none, pair = (0, 0), (1, 2, 2, 1)

    def pool(x: Array) -> Array:
        return lax.reduce_window(x, -jnp.inf, lax.max, pair, pair, "VALID")

    def gradient(x: Array, cotangent: Array) -> Array:
        n, h, w, c = cotangent.shape
        cells = x[:, : 2 * h, : 2 * w].reshape(n, h, 2, w, 2, c)
        first, second, third, fourth = (cells[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
        greatest = jnp.maximum(jnp.maximum(first, second), jnp.maximum(third, fourth))
        index = jnp.where(first == greatest, 0, jnp.where(second == greatest, 1, jnp.where(third == greatest, 2, 3))).astype(jnp.int8)
        position = jnp.arange(4, dtype=jnp.int8).reshape(1, 1, 2, 1, 2, 1)
        spread = jnp.where(index[:, :, None, :, None] == position, cotangent[:, :, None, :, None], 0).reshape(n, 2 * h, 2 * w, c)
        return jnp.pad(spread, (none, (0, x.shape[1] - 2 * h), (0, x.shape[2] - 2 * w), none))

    return with_cpu_gradient(pool, gradient, x)


def box_mean(x: Array, radius: int) -> Array:
    """Return the mean over the window of `2 radius + 1` rows and columns around each pixel of `x`, `[N, H, W, ...]`.

    At the border, it is the mean over the part of the window that lies inside the image.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        reach = min(radius, size - 1)
        i = jnp.arange(size)  # not NumPy's, because an exported program has symbols for sizes
        counts = jnp.minimum(i + reach, size - 1) - jnp.maximum(i - reach, 0) + 1
        counts = counts.reshape([size if other == axis else 1 for other in range(x.ndim)])
        x = _sums(_pad(x, reach, axis, 0), 2 * reach + 1, axis) / counts.astype(x.dtype)
    return x


def _extreme(x: Array, radius: int, combine: Callable[[Array, Array], Array], fill: float) -> Array:
    for axis in (1, 2):
        reach = min(radius, x.shape[axis] - 1)
        x = _pad(x, reach, axis, fill)
        length, size = 1, 2 * reach + 1
        while length < size:  # `x` has the extremes of all windows of `length` pixels
            step = min(length, size - length)
            x = combine(_cut(x, 0, x.shape[axis] - step, axis), _cut(x, step, x.shape[axis] - step, axis))
            length += step
    return x


def _sums(x: Array, size: int, axis: int) -> Array:
    """Return the sums over all windows of `size` pixels that lie within `x`."""
    count = x.shape[axis] - size + 1
    parts, start, length = [], 0, 1
    while True:  # `x` has the sums over all windows of `length` pixels
        if size & length:
            parts.append(_cut(x, start, count, axis))
            start += length
        if 2 * length > size:
            return sum(parts[1:], parts[0])
        x = _cut(x, 0, x.shape[axis] - length, axis) + _cut(x, length, x.shape[axis] - length, axis)
        length *= 2


def _pad(x: Array, reach: int, axis: int, fill: float) -> Array:
    return jnp.pad(x, [(reach, reach) if other == axis else (0, 0) for other in range(x.ndim)], constant_values=fill)


def _cut(x: Array, start: int, count: int, axis: int) -> Array:
    return lax.slice_in_dim(x, start, start + count, axis=axis)
