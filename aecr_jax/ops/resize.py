"""Enlargement and reduction of images in forms that XLA compiles to fast code."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

# Where a part of an array is along an axis: its first index, and the size of the whole.
Place = tuple[ArrayLike, ArrayLike]


def upsample_bilinear(x: Array, rows: Place | None = None, columns: Place | None = None) -> Array:
    """Double height and width by bilinear interpolation with aligned corners: `[N, H, W, C] -> [N, 2H, 2W, C]`.

    Row p of the output is the input at row p (H - 1) / (2H - 1), so the first and last rows of both coincide; columns likewise. This is
    PyTorch's `interpolate(..., mode="bilinear", align_corners=True)`; `jax.image.resize` aligns the outer edges of the pixels instead.
    The sum is computed in at least float32.

    Args:
      x: the input.
      rows: if `x` is part of a larger array that is to be enlarged, its first row in that array, and the number of the array's rows. The
        border within the array is then extended by zeros.
      columns: likewise for columns.
    """
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return _double(_double(exact, 1, rows), 2, columns).astype(x.dtype)


def enlarge_bilinear(x: Array, factor: int) -> Array:
    """Multiply height and width by `factor` by bilinear interpolation: `[N, H, W, C] -> [N, factor H, factor W, C]`.

    The outer edges of the first and last pixels stay where they are, as in `jax.image.resize` and PyTorch's `align_corners=False`. The
    border is extended by its outermost values. The result has the type of `x`.
    """
    return _enlarge(_enlarge(x, factor, 1), factor, 2)


def _enlarge(x: Array, factor: int, axis: int) -> Array:
    # Output `factor i + j` is at the input's position i + (j + 0.5) / factor - 0.5, so each j is one weighted sum of two shifted copies.
    n = x.shape[axis]
    widened = jnp.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)], mode="edge")
    parts = []
    for j in range(factor):
        position = (j + 0.5) / factor - 0.5
        start, share = (0, position + 1) if position < 0 else (1, position)
        first, second = (lax.slice_in_dim(widened, begin, begin + n, axis=axis) for begin in (start, start + 1))
        parts.append((1 - share) * first + share * second)
    return jnp.stack(parts, axis + 1).reshape(*x.shape[:axis], factor * n, *x.shape[axis + 1 :])


def average_cells(x: Array, side: int) -> Array:
    """Return the means of square cells: `[N, H, W, C] -> [N, H / side, W / side, C]`; H and W must be multiples of `side`."""
    n, h, w, c = x.shape
    return x.reshape(n, h // side, side, w // side, side, c).mean((2, 4))


def upsample_nearest(x: Array) -> Array:
    """Double height and width by repeating each pixel: `[N, H, W, C] -> [N, 2H, 2W, C]`."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


def _double(x: Array, axis: int, place: Place | None) -> Array:
    # Output 2k is at the input's position k - k / (2n - 1), and output 2k + 1 at k + (n - 1 - k) / (2n - 1). Therefore two shifted copies
    # of the input suffice, and nothing is gathered, which would make the gradient slow.
    n = x.shape[axis]
    start, whole = place or (0, n)
    index = (start + jnp.arange(n, dtype=x.dtype)).reshape([n if i == axis else 1 for i in range(x.ndim)])
    before, after = index / (2 * whole - 1), (whole - 1 - index) / (2 * whole - 1)
    previous, following = (
        jnp.pad(lax.slice_in_dim(x, start, start + n - 1, axis=axis), [pads if i == axis else (0, 0) for i in range(x.ndim)])
        for start, pads in ((0, (1, 0)), (1, (0, 1)))  # zeros where the share is 0
    )
    even = (1 - before) * x + before * previous
    odd = (1 - after) * x + after * following
    return jnp.stack([even, odd], axis + 1).reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
