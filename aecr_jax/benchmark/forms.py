"""Other forms of the deformable convolution, 3x3 with stride 1 and padding 1, to measure which is fastest on a device.

On CPUs the form of `aecr_jax.deform_conv2d` is the fastest. Accelerators may prefer fewer and larger operations, which take more memory.
JAX derives the gradients of the forms here, whereas those of `deform_conv2d`, `loop` and `pallas`, compute the samples again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from aecr_jax.ops.deform_conv import deform_conv2d, neighbour_steps

Form = Callable[[Array, Array, Array, Array], Array]


def loop(x: Array, offset: Array, mask: Array, kernel: Array) -> Array:
    """Compute the taps one after another, as the network does.

    Args:
      x: input `[N, H, W, C]`.
      offset: (dy, dx) per tap in pixels, `[N, H, W, 18]`, float32.
      mask: modulation `[N, H, W, 9]`, float32.
      kernel: `[3, 3, C, O]`.

    Returns:
      `[N, H, W, O]` in the type of `x`.
    """
    return deform_conv2d(x, offset, kernel, mask=mask, padding=1)


def at_once(x: Array, offset: Array, mask: Array, kernel: Array) -> Array:
    """Gather the samples of all taps, then compute one matrix product (im2col). Arguments as for `loop`."""
    image, corner, shares = _sample(x, offset, mask)
    row = x.shape[2] + 4
    neighbours = [jnp.take_along_axis(image, (corner + step)[..., None], 1, mode="promise_in_bounds") for step in neighbour_steps(row)]
    return _product(neighbours, shares, x, kernel)


def packed(x: Array, offset: Array, mask: Array, kernel: Array) -> Array:
    """Store the four neighbours of every position side by side, so that one gather of 4C channels reads them. Arguments as for `loop`."""
    image, corner, shares = _sample(x, offset, mask)
    row = x.shape[2] + 4
    four = jnp.concatenate([jnp.roll(image, -step, 1) for step in neighbour_steps(row)], -1)
    neighbours = jnp.take_along_axis(four, corner[..., None], 1, mode="promise_in_bounds")
    return _product(jnp.split(neighbours, 4, -1), shares, x, kernel)


def _sample(x: Array, offset: Array, mask: Array) -> tuple[Array, Array, tuple[Array, ...]]:
    """Return the padded image `[N, pixels, C]`, the upper left neighbour's index `[N, 9 P]`, and the four shares, each `[N, 9 P]`."""
    n, h, w, c = x.shape
    image = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0))).reshape(n, (h + 4) * (w + 4), c)
    rows, columns, taps = jnp.arange(h)[:, None, None], jnp.arange(w)[None, :, None], jnp.arange(9)[None, None]
    base = jnp.stack(jnp.broadcast_arrays(rows + taps // 3 - 1, columns + taps % 3 - 1), -1)[None]
    position = jnp.clip(base + offset.reshape(n, h, w, 9, 2), -2, jnp.array([h, w])[None, None, None, None])
    nearest = jnp.floor(position)
    fy, fx = jnp.moveaxis(position - nearest, -1, 0)
    top, left = jnp.moveaxis(nearest.astype(jnp.int32) + 2, -1, 0)
    shares = ((1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx)
    return image, (top * (w + 4) + left).reshape(n, -1), tuple((mask * share).reshape(n, -1) for share in shares)


def _product(neighbours: Sequence[Array], shares: Sequence[Array], x: Array, kernel: Array) -> Array:
    n, h, w, c = x.shape
    terms = [values * share[..., None] for values, share in zip(neighbours, shares)]
    columns = (terms[0] + terms[1] + terms[2] + terms[3]).astype(x.dtype).reshape(n, h, w, 9 * c)
    accumulator = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(columns, kernel.reshape(9 * c, -1), preferred_element_type=accumulator).astype(x.dtype)


def kernels(x: Array, offset: Array, mask: Array, kernel: Array) -> Array:
    """Use the Pallas kernels for GPUs or TPUs; on a CPU this is `loop`. Arguments as for `loop`."""
    return deform_conv2d(x, offset, kernel, mask=mask, padding=1, implementation="pallas")


FORMS: dict[str, Form] = {
    "loop": loop,
    "at_once": at_once,
    "at_once_checkpoint": jax.checkpoint(at_once),
    "packed": packed,
    "pallas": kernels,
}
